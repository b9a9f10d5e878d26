"""The workloads of `eval speed`: a network with random weights, and prompts of given lengths to train it on."""

import json
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from models.config import Qwen3Config
from models.tokenizer import Tokenizer, train_bpe

SMALL_NETWORK = Qwen3Config(4096, 256, 768, 4, 8, 4, 32, tie_word_embeddings=True)
END_SHARE = 100  # w3: every END_SHARE-th token id ends a completion, so lengths are geometric with this mean


@dataclass(frozen=True)
class Workload:
    """P prompts of at most `prompt` tokens (the first of every step has exactly `prompt`), G completions of each."""

    prompt: int
    completion: int
    network: Qwen3Config = SMALL_NETWORK
    prompts_per_step: int = 8
    num_generations: int = 8
    microbatch_prompts: int = 8
    dtype: str = "float32"
    ends: bool = False  # completions may end early
    rollout_prompts: int | None = None  # prompts that are sampled at a time; None: all


def _qwen3(width: int, mlp: int, layers: int, heads: int, tied: bool, microbatch_prompts: int) -> Workload:
    network = Qwen3Config(151_936, width, mlp, layers, heads, 8, 128, tie_word_embeddings=tied)
    return Workload(512, 512, network, 16, 8, microbatch_prompts, dtype="bfloat16")


WORKLOADS = {
    "w1": Workload(64, 64, microbatch_prompts=4),
    "w2": Workload(512, 64, microbatch_prompts=2),  # the shape of TL;DR
    "w3": Workload(128, 512, microbatch_prompts=1, ends=True),  # of chat: most completions short, a few at the limit
    "w4": Workload(128, 512, prompts_per_step=32, microbatch_prompts=1, ends=True),  # w3 with more prompts a step
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, tied=True, microbatch_prompts=4),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, tied=True, microbatch_prompts=2),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, tied=True, microbatch_prompts=1),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, tied=False, microbatch_prompts=1),
}


def even_share(prompts: list[str], completions: list[str]) -> list[float]:
    """Reward of the workloads: share of a completion's characters with an even code point."""
    return [sum(ord(c) % 2 == 0 for c in text) / max(len(text), 1) for text in completions]


def prepare(workload: Workload, work: Path, steps: int) -> None:
    """Writes tokenizer, prompts and config of a workload, made from the source files of Python's standard library."""
    texts = [
        file.read_text(encoding="utf-8", errors="ignore")
        for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:80]
    ]
    tokenizer_size = min(SMALL_NETWORK.vocab_size, workload.network.vocab_size)
    train_bpe(texts, work / "tokenizer", tokenizer_size)
    tokenizer = Tokenizer(work / "tokenizer")
    if workload.ends:
        ends = list(range(END_SHARE, tokenizer_size, END_SHARE))
        (work / "tokenizer" / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    rows: list[dict[str, str]] = []
    count, shortest = workload.prompts_per_step * 8, workload.prompt // 2
    span = max(2000, 8 * workload.prompt)
    for piece in (text[start : start + span] for text in texts for start in range(0, len(text) - span, span)):
        length = workload.prompt if len(rows) % workload.prompts_per_step == 0 else None
        length = length or shortest + 7 * len(rows) % (workload.prompt - shortest + 1)
        prompt = tokenizer.hf.decode(tokenizer.encode([piece])[0][:length])
        if len(tokenizer.encode([prompt])[0]) == length:
            rows.append({"prompt": prompt})
        if len(rows) == count:
            break
    if len(rows) < count:
        raise ValueError(
            f"expected {count} prompts of {workload.prompt} tokens in Python's own library, got {len(rows)}"
        )
    (work / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    network = {name: value for name, value in asdict(workload.network).items() if value is not None}
    settings = {
        "output_dir": str(work / "run"),
        "data": {"train": str(work / "prompts.jsonl")},
        "model": {
            "tokenizer": str(work / "tokenizer"),
            "architecture": network,
            "dtype": workload.dtype,
            "param_dtype": workload.dtype,
        },
        "rewards": [{"function": "eval.speed.workloads.even_share"}],
        "max_steps": steps,
        "prompts_per_step": workload.prompts_per_step,
        "num_generations": workload.num_generations,
        "microbatch_prompts": workload.microbatch_prompts,
        "rollout_prompts": workload.rollout_prompts,
        "max_prompt_length": workload.prompt,
        "max_completion_length": workload.completion,
        "optimizer": {"learning_rate": 1e-5, "warmup_steps": 0},
        "validation": {"prompts": 0},
        "checkpoint": {"every": 10**6},
        "log": {"tensorboard": False, "progress": False},
    }
    (work / "config.yaml").write_text(yaml.safe_dump(settings))
