"""Completions of a policy, to JSONL: one row {prompt_id, prompt, completion, length, finished, seed, checkpoint} each.

`prompt_id` is the row's number in the data. What is drawn depends on the policy, the data, the seed and the sampling
settings alone: not on `batch_prompts`, and the same seed gives every checkpoint the same random numbers.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from models.checkpoint import about, exact_name, is_run, load_model
from models.generate import Generator
from models.hf_weights import split
from models.qwen3 import Qwen3
from models.tokenizer import Tokenizer, tokenizer_path
from train import state as training
from train.config import ChatConfig, MeshConfig
from train.metrics import console, setup_errors, write_jsonl
from train.parse import parse
from train.prompts import Row, conversations, fitting, load_rows


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    checkpoint: str  # a run, RUN@STEP, a Hugging Face directory or Hub name
    data: str  # JSONL (.gz too), parquet, or a data set's name on the Hub
    out: str  # the JSONL file to write
    split: str = "validation"  # of a Hub data set
    prompt_column: str = "prompt"  # text, or a list of chat messages
    limit: int | None = None  # the first so many rows
    num_generations: int = 1  # completions per prompt
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    max_prompt_length: int = 1024  # tokens; longer prompts are left out, counted and printed
    max_completion_length: int = 2048
    batch_prompts: int = 64  # prompts at a time; changes no token
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    chat: ChatConfig | None = None  # default: the run's own; for a model directory, ChatConfig's
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        least = {"num_generations": 1, "max_prompt_length": 1, "max_completion_length": 1, "batch_prompts": 1}
        for name, low in (least | {"temperature": 0, "top_k": 0, "seed": 0}).items():
            if not getattr(self, name) >= low:
                raise ValueError(f"{name}: expected at least {low}, got {getattr(self, name)}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1], got {self.top_p}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit: expected at least 1, got {self.limit}")


def parse_generate(arguments: list[str]) -> GenerateConfig:
    return parse(GenerateConfig, arguments, "python -m eval generate")


def generate(config: GenerateConfig) -> list[Row]:
    """Write the completions to `config.out`; returns its rows.

    Raises:
      SetupError: a mistake in the settings or the data, before anything is drawn.
    """
    with setup_errors():
        layout = training.make_layout_for(config.mesh, config.batch_prompts)
        chat = config.chat or trained_chat(config.checkpoint)
        tokenizer = Tokenizer(tokenizer_path(config.checkpoint), chat.enable_thinking)
        prompts = load_prompts(config, tokenizer, chat)
        model = load_model(config.checkpoint, mesh=layout, dtype=config.dtype)
        if not isinstance(model, Qwen3):
            raise ValueError(f"{config.checkpoint}: expected a policy, got a reward model")
        tokenizer.check_fits(model.config.vocab_size, config.checkpoint)
    graphdef, params = split(model)
    generator = Generator(
        graphdef,
        tokenizer,
        layout,
        max_prompt_length=config.max_prompt_length,
        max_completion_length=config.max_completion_length,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
    )
    key = training.stream_key(config.seed, training.EVALUATION, 0)
    drawn = generator.complete(params, list(prompts.values()), key, config.num_generations, config.batch_prompts)
    origin: dict[str, Any] = {"seed": config.seed, "checkpoint": exact_name(config.checkpoint)}
    rows = [
        {
            "prompt_id": prompt_id,
            "prompt": prompt,
            "completion": drawn.texts_PG[p][g],
            "length": int(drawn.lengths_PG[p, g]),
            "finished": bool(drawn.finished_PG[p, g]),
            **origin,
        }
        for p, (prompt_id, prompt) in enumerate(prompts.items())
        for g in range(config.num_generations)
    ]
    write_jsonl(Path(config.out), rows)
    console.print(
        f"{config.out}: {len(rows)} completions of {len(prompts)} prompts by {origin['checkpoint']}, mean length "
        f"{drawn.lengths_PG.mean():.1f} tokens, {1 - drawn.finished_PG.mean():.1%} cut off"
    )
    return rows


def trained_chat(checkpoint: str) -> ChatConfig:
    """How the prompts of a run were rendered."""
    if not is_run(checkpoint):
        return ChatConfig()
    return ChatConfig(**about(checkpoint)["run"].get("chat", {}))


def load_prompts(config: GenerateConfig, tokenizer: Tokenizer, chat: ChatConfig) -> dict[int, Any]:
    """The prompts that fit, by their row's number in the data."""
    rows = conversations(load_rows(config.data, config.split)[: config.limit], config.data, config.prompt_column, chat)
    fit = fitting(rows, config.data, config.prompt_column, tokenizer, config.max_prompt_length)
    kept = {i: rows[i][config.prompt_column] for i in fit}
    if len(kept) < len(rows):
        longer = f"longer than {config.max_prompt_length} tokens"
        console.print(f"{config.data}: {len(rows) - len(kept)} of {len(rows)} prompts left out, {longer}")
    return kept
