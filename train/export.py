"""`python -m train export`: a checkpoint as a Hugging Face directory that transformers, vLLM and SGLang load."""

import dataclasses
import shutil
from pathlib import Path

from rich.filesize import decimal

from models.checkpoint import check, exact_name, load_model
from models.config import stored_dtype
from models.hf_weights import save_pretrained
from models.tokenizer import Tokenizer, tokenizer_path
from train.config import ExportConfig
from train.metrics import console, setup_errors


def export(config: ExportConfig) -> None:
    """Write config.json, safetensors, tokenizer and generation_config.json to `config.out`, or nothing at all.

    Raises:
      SetupError: no such checkpoint, a tokenizer of another model, or a directory with something in it.
    """
    out = Path(config.out).absolute()
    with setup_errors():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"--out {out}: there is something already; expected a new or empty directory")
        check(config.checkpoint)
        tokenizer = Tokenizer(tokenizer_path(config.checkpoint))
        model = load_model(config.checkpoint, dtype=config.dtype)
        tokenizer.check_fits(model.config.vocab_size, config.checkpoint)
        if model.config.pad_token_id is None:  # transformers would score a reward model's texts one by one only
            model.config = dataclasses.replace(model.config, pad_token_id=tokenizer.pad_id)
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    save_pretrained(model, partial, max_shard_bytes=config.max_shard_bytes)
    tokenizer.save(partial)
    if out.is_dir():
        out.rmdir()
    partial.rename(out)
    files = [file.stat().st_size for file in out.glob("*.safetensors")]
    console.print(
        f"{out}: {model.config.architecture} of {exact_name(config.checkpoint)}, {stored_dtype(out)}, "
        f"{decimal(sum(files))} in {len(files)} {'file' if len(files) == 1 else 'files'}",
        soft_wrap=True,
    )
