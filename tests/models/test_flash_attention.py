"""Attention by kernels is XLA's attention: output and gradients, whatever is masked, packed or padded."""

import functools
import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from models import flash_gpu
from models.attention import KeyValues, group_attention, heads_first, prefix_key_values
from models.config import REWARD_MODEL, Qwen3Config
from models.flash_attention import KERNELS, choose_attention, flash_attention
from models.flash_gpu import flash_work
from models.hf_weights import split
from models.qwen3 import Qwen3
from models.reward_model import Qwen3RewardModel
from models.sharding import MESH_AXES, RULES, Layout, make_layout

# P, G, T, H, K, E, S, completions packed into a row (0: one a row), window
SHAPES = {
    "heads 1:1, no prompt": (2, 1, 150, 2, 2, 16, 0, 0, None),
    "heads 8:1, sixteen rows, short prompt": (1, 16, 20, 8, 1, 16, 37, 0, None),
    "lengths that divide": (1, 2, 128, 4, 2, 32, 128, 0, None),
    "packed": (2, 2, 170, 4, 2, 16, 70, 4, None),
    "packed rows without a prompt": (2, 1, 300, 2, 1, 16, 0, 5, None),
    "five queries a head, window inside the completion": (1, 2, 140, 5, 1, 16, 50, 0, 9),
    "window into the prompt, packed": (2, 2, 140, 2, 2, 16, 200, 3, 77),
    "window of one": (1, 2, 40, 2, 1, 16, 20, 0, 1),
}


def arguments(shape: tuple[Any, ...], dtype: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Differentiable arrays (query, row, prompt), and the rest."""
    P, G, T, H, K, E, S, packed, window = shape
    rng = np.random.default_rng(sum(n or 0 for n in shape))

    def normal(*sizes: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=sizes), dtype)

    prompt = KeyValues(normal(P, S, K, E), normal(P, S, K, E)) if S else None
    options: dict[str, Any] = {"window": window}
    if S:
        options["prompt_lengths_P"] = jnp.asarray(rng.integers(1, S + 1, P), jnp.int32)
    if packed:
        offset_PGT = np.zeros((P, G, T), np.int32)
        for row in offset_PGT.reshape(-1, T):  # as train.packing leaves them: free slots at the end have offset 0
            cuts = [0, *sorted(rng.choice(np.arange(1, T - 5), packed - 1, replace=False)), T - 5]
            for start, end in itertools.pairwise(cuts):
                row[start:end] = np.arange(end - start)
        options["offset_PGT"] = jnp.asarray(offset_PGT)
    return (normal(P, G, T, H, E), KeyValues(normal(P, G, T, K, E), normal(P, G, T, K, E)), prompt), options


def by_xla(
    query: jax.Array, row: KeyValues, prompt: KeyValues | None, *, prompt_lengths_P: Any = None, **options: Any
) -> jax.Array:
    P, G, T, _, E = query.shape
    if prompt is not None:
        options |= {"prefix": prefix_key_values(prompt), "prefix_lengths_P": prompt_lengths_P}
    query_PGTKQE = query.reshape(P, G, T, row.keys.shape[3], -1, E)
    return group_attention(query_PGTKQE, heads_first(row), **options).reshape(query.shape)


@functools.lru_cache(maxsize=2)  # one kernel after the other is compared with XLA's
def output_and_gradients(name: str, dtype: str, kernels: str | None = None) -> Any:
    """Of a random weighted sum of the output, by kernels or by XLA."""
    given, options = arguments(SHAPES[name], dtype)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=given[0].shape), jnp.float32)

    def loss(query: jax.Array, row: KeyValues, prompt: KeyValues | None) -> tuple[jax.Array, jax.Array]:
        if kernels:
            out = flash_attention(query, row, prompt=prompt, kernels=kernels, **options)
        else:
            out = by_xla(query, row, prompt, **options)
        return (out.astype(jnp.float32) * weight).sum(), out.astype(jnp.float32)

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*given)
    return out, gradients


CASES = [(name, "float32", 2e-5) for name in SHAPES] + [
    (name, "bfloat16", 2e-2) for name in ("heads 8:1, sixteen rows, short prompt", "window into the prompt, packed")
]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("name", "dtype", "tolerance"), CASES, ids=[f"{dtype}, {name}" for name, dtype, _ in CASES])
def test_kernels_are_xlas_attention(name: str, dtype: str, tolerance: float, kernels: str) -> None:
    """Output and gradients of queries, keys and values, each to the tolerance times its largest number."""
    found, expected = output_and_gradients(name, dtype, f"interpreted {kernels}"), output_and_gradients(name, dtype)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        assert np.abs(one - other).max() <= tolerance * max(np.abs(other).max(), 1)


SIZES = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=16)
SIZES |= dict(num_attention_heads=4, num_key_value_heads=2)


def network(kind: Any, attention: str, **config: Any) -> tuple[Any, Any]:
    layout = replace(make_layout(devices=jax.devices()[:1]), attention=attention)
    return split(kind(Qwen3Config(**SIZES, **config), nnx.Rngs(0), layout=layout))


@pytest.mark.parametrize("windows", [False, True], ids=["whole", "windows"])
def test_a_policy_has_the_same_hidden_states_and_gradient(windows: bool) -> None:
    config = {"sliding_window": 6, "layer_types": ("sliding_attention", "full_attention")} if windows else {}
    rng = np.random.default_rng(0)
    prompt_PS, tokens_PGT = rng.integers(0, 61, (2, 9)), rng.integers(0, 61, (2, 3, 12))
    offset_PGT = jnp.asarray(np.tile(np.r_[np.arange(7), np.arange(5)], (2, 3, 1)))
    found = []
    for attention in ("xla", "interpreted gpu"):
        graphdef, params = network(Qwen3, attention, **config)

        def loss(params: Any, graphdef: Any = graphdef) -> jax.Array:
            hidden = nnx.merge(graphdef, params).predict(prompt_PS, jnp.array([9, 4]), tokens_PGT, offset_PGT)
            return jnp.square(hidden).mean()

        found.append(jax.jit(jax.value_and_grad(loss))(params))
    for one, other in zip(jax.tree.leaves(found[1]), jax.tree.leaves(found[0]), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * max(1, float(jnp.abs(other).max())))


def test_the_last_token_is_computed_on_accelerators_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    prompt_PS, tokens_PGT = rng.integers(0, 61, (2, 9)), rng.integers(0, 61, (2, 3, 12))
    offset_PGT = jnp.asarray(np.tile(np.r_[np.arange(7), np.arange(5)], (2, 3, 1)))
    graphdef, params = network(Qwen3, "xla")
    model, sizes, hidden = nnx.merge(graphdef, params), [], []
    computed = model.prefill_and_extend

    def count(*arguments: Any) -> Any:
        sizes.append(arguments[2].shape[-1])
        return computed(*arguments)

    monkeypatch.setattr(model, "prefill_and_extend", count)
    for platform in ("cpu", "gpu"):
        monkeypatch.setattr("models.qwen3.platform_of", lambda layout, platform=platform: platform)
        hidden += [model.predict(prompt_PS, jnp.array([9, 4]), tokens_PGT, offset) for offset in (None, offset_PGT)]
    assert sizes == [11, 11, 12, 12]
    for on_cpu, elsewhere in zip(hidden[:2], hidden[2:], strict=True):
        np.testing.assert_allclose(on_cpu, elsewhere, atol=1e-5)


def test_a_reward_model_has_the_same_scores() -> None:
    rng = np.random.default_rng(0)
    prefix_PS, suffix_PGT = rng.integers(0, 61, (2, 9)), rng.integers(0, 61, (2, 3, 12))
    lengths = jnp.array([9, 4]), jnp.asarray(rng.integers(1, 13, (2, 3)))
    scores = []
    for attention in ("xla", "interpreted gpu"):
        graphdef, params = network(Qwen3RewardModel, attention, architecture=REWARD_MODEL)
        model = nnx.merge(graphdef, params)
        scores.append(
            jax.jit(lambda p, g=graphdef: nnx.merge(g, p).score_group(prefix_PS, lengths[0], suffix_PGT, lengths[1]))(
                params
            )
        )
        scores.append(model(suffix_PGT[:, 0], lengths[1][:, 0]))
    np.testing.assert_allclose(scores[2], scores[0], atol=2e-5)
    np.testing.assert_allclose(scores[3], scores[1], atol=2e-5)


def layout_of(platform: str, attention: str = "auto", **rules: tuple[str, ...]) -> Layout:
    device = SimpleNamespace(platform=platform)
    shape = dict.fromkeys(MESH_AXES, 2)
    mesh: Any = SimpleNamespace(devices=np.array([device]), shape=shape)
    return Layout(mesh, tuple((RULES | rules).items()), attention)


def test_devices_choose() -> None:
    """Kernels where they can; XLA for CPUs, heads of another width, and rules that part what a kernel joins."""
    heads = {width: Qwen3Config(**SIZES | {"head_dim": width}) for width in (16, 24, 128, 256)}
    assert choose_attention(None, heads[128]) == "xla"
    assert {p: choose_attention(layout_of(p), heads[128]) for p in ("cpu", "gpu", "cuda", "tpu")} == {
        "cpu": "xla",
        "gpu": "gpu",
        "cuda": "gpu",
        "tpu": "tpu",
    }
    assert {n: choose_attention(layout_of("gpu"), config) for n, config in heads.items()} == {
        16: "gpu",
        24: "xla",
        128: "gpu",
        256: "xla",
    }
    assert choose_attention(layout_of("tpu"), heads[256]) == "tpu"
    assert choose_attention(layout_of("gpu", kv_heads=()), heads[128]) == "xla"
    assert choose_attention(layout_of("gpu", sequence=("data",)), heads[128]) == "xla"
    assert choose_attention(layout_of("gpu", "xla"), heads[128]) == "xla"
    abstract = Layout(AbstractMesh((1, 1, 1), MESH_AXES), tuple(RULES.items()))  # type: ignore[arg-type]
    assert choose_attention(abstract, heads[128]) == "xla"


@pytest.mark.parametrize(
    "layout",
    [layout_of("cpu", "kernels"), layout_of("gpu", "kernels", kv_heads=())],
    ids=["cpu", "rules"],
)
def test_kernels_that_cannot_run_are_refused(layout: Layout) -> None:
    with pytest.raises(ValueError, match=r"mesh.attention: kernels are for GPUs and TPUs, .* expected auto or xla"):
        choose_attention(layout, Qwen3Config(**SIZES))


def test_what_kernels_do_is_a_formula() -> None:
    """By hand, for one prompt of 128 tokens with two rows of 128: pairs = 2 rows x 128 queries x keys x 4 heads."""
    rows, E = 2 * 128 * 4, 16
    work = flash_work(1, 2, 128, 4, 2, E, 128, 2)
    assert work["flash_forward"].flops == 4 * E * rows * (128 + (128 + flash_gpu.QUERIES) / 2)
    assert work["flash_prompt"].flops == 8 * E * rows * 128
    assert work["flash_forward"].bytes == 2 * rows * E * 2 + 4 * rows + 2 * 2 * 128 * 2 * E * 2 + 2 * 128 * 2 * E * 2
    alone = flash_work(1, 1, 100, 4, 2, E, 0, 2)
    assert set(alone) == {"flash_forward_alone", "flash_queries_alone", "flash_keys_alone"}
    assert alone == flash_work(1, 1, 128, 4, 2, E, 0, 2)  # rows are filled up to whole blocks
