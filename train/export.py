"""`python -m train export`: writes a checkpoint as a Hugging Face directory that transformers, vLLM and SGLang load.

Adapters are merged into their base or, with `--adapters true`, written alone, as PEFT loads them.
"""

import dataclasses
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.filesize import decimal

from models.checkpoint import check_loadable, is_run, load_adapters, load_model, read_about, resolve_step
from models.config import stored_dtype
from models.hf_weights import save_pretrained, split
from models.peft import save_adapters
from models.qwen3 import Backbone
from models.tokenizer import Tokenizer, tokenizer_path
from train.config import ExportConfig
from train.console import console
from train.run.files import check_out_directory, check_room, disk_errors
from train.running import WriteError, setup_errors

# what an export writes: a directory of other files is not one
EXPORTED = r".*\.(json|safetensors|jinja|model)|merges\.txt|vocab\.txt|README\.md|config\.json\.tmp"


def export(config: ExportConfig) -> None:
    """Writes config.json, safetensors, tokenizer and generation_config.json to `config.out`, or nothing at all.

    Raises:
      SetupError: no such checkpoint, a tokenizer of another model, or an output directory that is not empty.
    """
    out = Path(config.out).absolute()
    with setup_errors():
        check_out_directory(config.out)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"--out {out}: there is something already; expected a new or empty directory")
        partial = out.with_name(f"{out.name}.partial")
        check_out_directory(str(partial), "config.json")
        refuse_foreign(partial)
        check_loadable(config.checkpoint)
        tokenizer = Tokenizer(tokenizer_path(config.checkpoint))
        shutil.rmtree(partial, ignore_errors=True)  # left by an export that was killed
        write = write_adapters if config.adapters else write_model
        try:
            with disk_errors(f"--out {out}"):
                weights, dtype = write(config, tokenizer, partial)
                tokenizer.save(partial)
                if out.is_dir():
                    out.rmdir()
                partial.rename(out)
        except WriteError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    files = [file.stat().st_size for file in out.glob("*.safetensors")]
    console.print(
        f"{out}: {weights} of {resolve_step(config.checkpoint)}, {dtype}, "
        f"{decimal(sum(files))} in {len(files)} {'file' if len(files) == 1 else 'files'}",
        soft_wrap=True,
    )


def refuse_foreign(partial: Path) -> None:
    """Refuses a directory of the name that an unfinished export has, with files that no export writes."""
    for file in partial.iterdir() if partial.is_dir() else []:
        if file.is_dir() or not re.fullmatch(EXPORTED, file.name):
            raise ValueError(
                f"--out: its files are first written to {partial}, which is there already and is no unfinished export "
                f"(it holds {file.name}); move that directory, or name another --out"
            )


def write_model(config: ExportConfig, tokenizer: Tokenizer, out: Path) -> tuple[str, str]:
    """Writes the whole network; returns its architecture and its dtype."""
    model = load_model(config.checkpoint, dtype=config.dtype)
    tokenizer.check_vocab_size(model.config.vocab_size, config.checkpoint)
    if model.config.pad_token_id is None:  # without it transformers scores a reward model's texts one at a time only
        model.config = dataclasses.replace(model.config, pad_token_id=tokenizer.pad_id)
    check_room(out.parent, parameter_bytes(model), f"the model of {config.checkpoint}")
    save_pretrained(model, out, max_shard_bytes=config.max_shard_bytes)
    return model.config.architecture, str(stored_dtype(out))


def parameter_bytes(model: Backbone) -> int:
    """Returns the size of a network's parameters in its dtype."""
    return sum(leaf.size for leaf in jax.tree.leaves(split(model)[1])) * jnp.dtype(model.dtype).itemsize


def write_adapters(config: ExportConfig, tokenizer: Tokenizer, out: Path) -> tuple[str, str]:
    """Writes the adapters alone; returns a description of them, and their dtype."""
    params, lora, network = load_adapters(config.checkpoint)
    tokenizer.check_vocab_size(network.vocab_size, config.checkpoint)
    about = read_about(config.checkpoint)
    base = about["run"]["model"]["path"]
    if base is not None and is_run(base) and "model.path" in about.get("pins", {}):
        base = about["pins"]["model.path"]["exact"]  # its newest step may be another by now
    if base is not None and is_run(base):  # PEFT cannot read a run
        console.print(f"PEFT must be told where its base is: python -m train export --checkpoint {base} --out BASE")
        base = None
    dtype = "float32" if config.dtype == "auto" else config.dtype
    save_adapters(params, lora, network, out, base=base, dtype=dtype)
    return f"adapters of rank {lora.rank} for {network.architecture}", dtype
