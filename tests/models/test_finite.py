"""Weights that are not finite are refused by everything that reads or writes them, with the parameter's name."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.checkpoint import Checkpoints, load_adapters, load_model
from models.config import Qwen3Config
from models.finite import first_nonfinite
from models.hf_weights import save_pretrained, split
from models.lora import Lora
from models.peft import save_adapters
from models.qwen3 import Backbone
from models.tokenizer import Tokenizer
from train.__main__ import main

BAD = [np.nan, np.inf, -np.inf]


def spoilt(tree: Any, name: str, value: float) -> Any:
    """The tree with one number of one leaf replaced."""

    def leaf(path: Any, array: jax.Array) -> jax.Array:
        here = ".".join(key.key for key in path)
        return array.at[(-1,) * array.ndim].set(value) if here == name else array

    return jax.tree_util.tree_map_with_path(leaf, tree)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_number_is_found(dtype: str, value: float) -> None:
    params = {"a": jnp.ones((3, 4), dtype), "layers": {"b": jnp.full(5, jnp.finfo(dtype).max, dtype)}}
    assert first_nonfinite(params) is None
    assert first_nonfinite(spoilt(params, "layers.b", value)) == "layers.b"
    assert first_nonfinite(spoilt(params, "a", value)) == "a"


@pytest.fixture(scope="module")
def save_run(
    make_model: Callable[..., Backbone],
    tiny_config: Qwen3Config,
    tiny_tokenizer_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:
    """save_run(name, value): a run whose step 2 has the value in a parameter; step 1 is whole."""

    def save(name: str, value: float) -> Path:
        run = tmp_path_factory.mktemp("saved") / "run"
        params = split(make_model(tiny_config))[1]
        checkpoints, about = Checkpoints(run), {"model": tiny_config.to_hf(), "run": {}}
        checkpoints.save(1, params, {"step": jnp.zeros(())}, about)
        checkpoints.save(2, spoilt(params, name, value), {"step": jnp.zeros(())}, about)
        checkpoints.close()
        Tokenizer(tiny_tokenizer_dir).save(run / "tokenizer")
        return run

    return save


@pytest.mark.parametrize("name", ["embed_VD", "layers.down_LFD"])
def test_a_step_that_is_not_finite_is_refused_wherever_it_is_read(
    save_run: Callable[..., Path], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_run(name, np.nan)
    words = f"step 2: {name} has NaN or infinite values; expected finite weights"
    with pytest.raises(ValueError, match=re.escape(f"{run}: {words}")):
        load_model(run)
    checkpoints = Checkpoints(run)
    params = split(load_model(f"{run}@1"))[1]
    with pytest.raises(ValueError, match=re.escape(words)):
        checkpoints.restore(2, params, {"step": jnp.zeros(())})
    checkpoints.close()
    assert main(["export", "--checkpoint", str(run), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [np.nan, 3e38], ids=["NaN", "too large for float16"])
def test_what_is_not_finite_is_not_written(
    make_model: Callable[..., Backbone], tiny_config: Qwen3Config, tmp_path: Path, value: float
) -> None:
    model = make_model(tiny_config)
    model.norm_D[...] = jnp.asarray(model.norm_D[...]).at[0].set(value)
    with pytest.raises(ValueError, match="norm_D has (NaN or infinite values in|values beyond 65504)"):
        save_pretrained(model, tmp_path, dtype="float16")
    assert not list(tmp_path.glob("*.safetensors"))


def test_adapters_that_are_not_finite_are_neither_loaded_nor_written(tiny_config: Qwen3Config, tmp_path: Path) -> None:
    lora = Lora(rank=2, targets=("q_proj",))
    params = {"layers": {"query_lora_a_LDA": jnp.ones((2, 32, 2)), "query_lora_b_LAHE": jnp.ones((2, 2, 4, 16))}}
    bad = spoilt(params, "layers.query_lora_b_LAHE", np.inf)
    about = {"model": tiny_config.to_hf(), "run": {}, "lora": {"rank": 2, "targets": ["q_proj"]}}
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save(1, bad, {"step": jnp.zeros(())}, about)
    checkpoints.close()
    with pytest.raises(ValueError, match="step 1: layers.query_lora_b_LAHE has NaN or infinite values"):
        load_adapters(tmp_path / "run")
    with pytest.raises(ValueError, match="lora_B.weight has NaN or infinite values in float32"):
        save_adapters(bad, lora, tiny_config, tmp_path / "peft", base=None)
