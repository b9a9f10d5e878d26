"""`python -m eval generate`: samples n completions per prompt and temperature from a policy, to JSONL.

A row is {prompt_id, prompt, completion, length, temperature, sample, stop_reason, seed, checkpoint} and the data's
other columns: `prompt_id` is the row's number in the data, `length` counts tokens with the end token, `stop_reason` is
"stop" (the policy ended, or wrote one of the texts in `stop`: `stop_string` then says which) or "length" (cut),
`sample` numbers a prompt's completions at a temperature from 0. Rows are in the order of temperatures, then prompts,
then samples.

A completion depends only on the policy, the sampling settings, the seed and (prompt_id, temperature, sample): not on
`n`, `batch_prompts`, `limit` or the devices, except for rounding. The same seed gives every checkpoint and every
temperature the same random numbers, so that differences between them are not due to the draw.

A restarted program resumes its file (see `eval.texts.resumable`). Each process samples its share on its own devices;
process 0 writes.
"""

import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from eval.texts.resumable import GrowingFile, as_line
from models.checkpoint import check_loadable, is_run, load_model, read_about, resolve_step
from models.generate import Completions, Generator
from models.hf_weights import split
from models.pins import weights_hash
from models.qwen3 import Qwen3
from models.sharding import Layout
from models.stop_strings import check_stop_strings
from models.tokenizer import Tokenizer, tokenizer_path
from train.build import make_layout_for
from train.config import ChatConfig, MeshConfig, check_sampling, check_seed
from train.console import console, progress_bar
from train.data.chats import normalize_prompts
from train.data.prompts import fitting_indices
from train.data.rows import Row, load_rows
from train.parse import parse
from train.run.files import check_out
from train.running import setup_errors
from train.state import EVALUATION, stream_key

MAX_SAMPLES = 1024  # completions of a prompt at a temperature: row * MAX_SAMPLES + sample numbers a random stream
STREAMS = 2**32
ROW_KEYS = ("completion", "length", "temperature", "sample", "stop_reason", "seed", "checkpoint", "prompt_id", "prompt")
STOP_STRING = "stop_string"  # a row's key too, if there are stop strings
# Settings that change no row, or that the hashes and the checkpoint's exact name cover.
_IRRELEVANT = ("out", "overwrite", "batch_prompts", "mesh", "checkpoint", "data", "split", "columns", "limit", "chat")
# Settings that files of older versions do not have, with the values that they were made with.
_LATER: list[tuple[str, Any]] = [("min_p", 0.0), ("repetition_penalty", 1.0), ("stop", [])]


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Completions of a policy, over temperatures; resumed where it was killed."""

    checkpoint: str  # a run, RUN@STEP, a Hugging Face directory or Hub name
    data: str  # a file (JSON Lines, a JSON array, CSV, Arrow, parquet), glob:PATTERN, or a data set's name on the Hub
    out: str  # the JSONL file to write
    split: str = "validation"  # of a Hub data set
    prompt_column: str = "prompt"  # text, or a list of chat messages
    columns: dict[str, str] = field(default_factory=dict)  # our name: theirs, e.g. {reference: completion}
    limit: int | None = None  # the first so many rows
    temperatures: list[float] = field(default_factory=lambda: [1.0])  # each once, e.g. 0.1,0.5,0.9; 0: greedy
    n: int = 1  # completions per prompt and temperature
    top_p: float = 1.0  # sample from the likeliest tokens that have this probability together; 1: off
    top_k: int = 0  # sample from so many likeliest tokens; 0: off
    min_p: float = 0.0  # sample from tokens of at least this share of the likeliest one's probability; 0: off
    # logits of tokens in the prompt or the completion so far are divided by this, or multiplied where below 0; 1: off
    repetition_penalty: float = 1.0
    # texts that end a completion, with the token in which the first of them ends, e.g. '["</answer>", "\n\n"]'
    stop: list[str] = field(default_factory=list)
    max_prompt_length: int = 1024  # tokens; longer prompts are left out, counted and printed
    max_completion_length: int = 2048  # tokens; longer completions are cut
    batch_prompts: int = 64  # prompts at a time; changes no token
    seed: int = 0  # of sampling
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation
    chat: ChatConfig | None = None  # how prompts become tokens; default: the run's own; for a model directory, as below
    mesh: MeshConfig = field(default_factory=MeshConfig)  # how arrays are split over devices, e.g. data=8,fsdp=1
    overwrite: bool = False  # start anew, whatever is in the file already

    def __post_init__(self) -> None:
        least = {"n": 1, "max_prompt_length": 1, "max_completion_length": 1, "batch_prompts": 1}
        check_seed(self.seed)
        for name, low in (least | {"top_k": 0}).items():
            if not getattr(self, name) >= low:
                raise ValueError(f"{name}: expected at least {low}, got {getattr(self, name)}")
        given, drawn = self.temperatures, np.array(self.temperatures, np.float32).tolist()  # as the sampler reads them
        if not given or not all(0 <= t < math.inf for t in drawn) or len(set(drawn)) < len(drawn):
            raise ValueError(f"temperatures: expected numbers from 0, each once, such as 0.1,0.5,0.9, got {given}")
        if 0 in drawn and self.n > 1:
            raise ValueError(
                f"temperatures: at 0 the {self.n} completions of a prompt would be one and the same; expected n = 1, "
                f"or temperatures above 0"
            )
        if self.n > MAX_SAMPLES:
            raise ValueError(f"n: expected at most {MAX_SAMPLES}, got {self.n}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1], got {self.top_p}")
        check_sampling(self)
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit: expected at least 1, got {self.limit}")


def parse_generate(arguments: list[str]) -> GenerateConfig:
    return parse(GenerateConfig, arguments, "python -m eval generate")


def generate(config: GenerateConfig) -> list[Row]:
    """Writes the completions to `config.out`, and returns its rows on process 0 ([] elsewhere).

    Raises:
      SetupError: invalid settings or data, before anything is sampled.
    """
    with setup_errors():
        check_out(config.out, config.data, several=True, rows=True)
        check_loadable(config.checkpoint)  # first: a wrong name would otherwise be reported as a missing tokenizer
        layout = make_layout_for(config.mesh, config.batch_prompts)
        chat = config.chat or trained_chat(config.checkpoint)
        tokenizer = Tokenizer(tokenizer_path(config.checkpoint), chat.enable_thinking, chat.continue_final_message)
        check_stop_strings(config.stop, tokenizer)
        rows = load_fitting_prompts(config, tokenizer, chat)
        file = GrowingFile(config.out, settings_of(config, chat, rows), overwrite=config.overwrite)
    with file:
        with setup_errors():
            if file.complete:
                console.print(f"{config.out}: is complete, made with the same settings", markup=False)
                return file.finish()
            generator, params = load_policy(config, tokenizer, layout)
        sample_all(config, file, generator, params, rows)
        return file.finish()


class PolicySettings(Protocol):
    """The settings that `load_policy` reads from GenerateConfig or eval.texts.chat's TalkConfig."""

    @property
    def checkpoint(self) -> str: ...
    @property
    def dtype(self) -> Literal["float32", "bfloat16"]: ...
    @property
    def max_prompt_length(self) -> int: ...
    @property
    def max_completion_length(self) -> int: ...
    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...
    @property
    def min_p(self) -> float: ...
    @property
    def repetition_penalty(self) -> float: ...
    @property
    def stop(self) -> list[str]: ...


def load_policy(config: PolicySettings, tokenizer: Tokenizer, layout: Layout) -> tuple[Generator, Any]:
    """Loads a policy; returns its sampler and the weights to sample from.

    Raises:
      ValueError: a reward model, or a policy with too few embeddings for the tokenizer.
    """
    model = load_model(config.checkpoint, mesh=layout, dtype=config.dtype)
    if not isinstance(model, Qwen3):
        raise ValueError(f"{config.checkpoint}: expected a policy, got a reward model")
    tokenizer.check_vocab_size(model.config.vocab_size, config.checkpoint)
    graphdef, params = split(model)
    generator = Generator(
        graphdef,
        tokenizer,
        layout,
        max_prompt_length=config.max_prompt_length,
        max_completion_length=config.max_completion_length,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        stop=config.stop,
    )
    return generator, generator.sampling_weights(params)


def sample_all(
    config: GenerateConfig, file: GrowingFile, generator: Generator, params: Any, rows: Sequence[tuple[int, Row]]
) -> None:
    """Samples the completions that the file lacks, batch by batch."""
    key = stream_key(config.seed, EVALUATION, 0)
    origin = {"seed": config.seed, "checkpoint": resolve_step(config.checkpoint)}
    total = len(rows) * len(config.temperatures) * config.n
    done = whole_batches(config, file.rows, len(rows))
    file.keep(sum(size for _, _, size in islice(batches(config, len(rows)), done)))
    if file.rows:
        console.print(f"{config.out}: goes on behind {file.rows} of {total} completions", markup=False)
    ways = generator.layout.shard_count("prompt")
    size = min(config.batch_prompts, -(-len(rows) // ways) * ways)  # no padding beyond the prompts
    began, tokens, cut, first = time.perf_counter(), 0, 0, file.rows
    with progress_bar() as bar:
        task = bar.add_task(Path(config.out).name, total=total, completed=file.rows)
        for temperature, start, _ in islice(batches(config, len(rows)), done, None):
            batch = rows[start : start + config.batch_prompts]
            streams_PG = np.array([[i * MAX_SAMPLES + g for g in range(config.n)] for i, _ in batch], np.uint32)
            generator.sampling = generator.sampling._replace(temperature=temperature)
            prompts = [row["prompt"] for _, row in batch]
            rollouts = generator.complete(params, prompts, key, config.n, size, streams_PG)
            file.append(list(completion_rows(batch, rollouts, temperature, origin, generator.endings(rollouts))))
            tokens, cut = tokens + int(rollouts.lengths_PG.sum()), cut + int((~rollouts.finished_PG).sum())
            bar.update(task, completed=file.rows)
    new, seconds = file.rows - first, time.perf_counter() - began
    console.print(
        f"{config.out}: {total} completions of {len(rows)} prompts by {origin['checkpoint']}; {new} of them now, mean "
        f"length {tokens / max(new, 1):.1f} tokens, {cut / max(new, 1):.1%} cut off, {tokens / seconds:.0f} tokens/s",
        markup=False,
    )


def batches(config: GenerateConfig, count: int) -> Iterator[tuple[float, int, int]]:
    """Yields temperature, first prompt and number of rows of each batch, in the file's order."""
    for temperature in config.temperatures:
        for start in range(0, count, config.batch_prompts):
            yield temperature, start, min(config.batch_prompts, count - start) * config.n


def whole_batches(config: GenerateConfig, rows: int, count: int) -> int:
    """Number of complete batches in the first `rows` rows."""
    complete = 0
    for _, _, size in batches(config, count):
        rows -= size
        if rows < 0:
            break
        complete += 1
    return complete


def completion_rows(
    batch: Sequence[tuple[int, Row]],
    rollouts: Completions,
    temperature: float,
    origin: Mapping[str, Any],
    endings_PG: Sequence[Sequence[str | None]] | None = None,
) -> Iterator[Row]:
    own = (*ROW_KEYS, STOP_STRING) if endings_PG else ROW_KEYS
    for p, (prompt_id, row) in enumerate(batch):
        columns = {name: value for name, value in row.items() if name not in own}
        for g, text in enumerate(rollouts.texts_PG[p]):
            yield {
                "prompt_id": prompt_id,
                "prompt": row["prompt"],
                "completion": text,
                "length": int(rollouts.lengths_PG[p, g]),
                "temperature": temperature,
                "sample": g,
                "stop_reason": "stop" if rollouts.finished_PG[p, g] else "length",
                **({STOP_STRING: endings_PG[p][g]} if endings_PG else {}),
                **origin,
                **columns,
            }


def trained_chat(checkpoint: str) -> ChatConfig:
    """The chat settings that a run was trained with; the defaults for a model directory."""
    if not is_run(checkpoint):
        return ChatConfig()
    return ChatConfig(**read_about(checkpoint)["run"].get("chat", {}))


def load_fitting_prompts(config: GenerateConfig, tokenizer: Tokenizer, chat: ChatConfig) -> list[tuple[int, Row]]:
    """Loads (prompt_id, row) of the prompts that fit; column "prompt" holds the prompt as it is asked."""
    column = config.prompt_column
    loaded = load_rows(config.data, config.split, config.columns, "columns")[: config.limit]
    rows = normalize_prompts(loaded, config.data, column, chat, "--prompt_column")
    fit = fitting_indices(rows, config.data, column, tokenizer, config.max_prompt_length)
    if len(fit) < len(rows):
        longer = f"longer than {config.max_prompt_length} tokens"
        console.print(f"{config.data}: {len(rows) - len(fit)} of {len(rows)} prompts left out, {longer}", markup=False)
    if fit[-1] >= STREAMS // MAX_SAMPLES:
        raise ValueError(
            f"{config.data}: expected at most {STREAMS // MAX_SAMPLES} rows, got {len(rows)}; --limit them"
        )
    own = {*ROW_KEYS, *([STOP_STRING] if config.stop else [])}
    clashing = sorted({name for row in rows for name in row} & own - {"prompt_id", column})
    if clashing:
        console.print(
            f"{config.data}: its columns {', '.join(clashing)} are not carried along: the completions' own have these "
            f"names; --columns '{{NEW: {clashing[0]}}}' renames one",
            markup=False,
        )
    renamed = [(i, {name: value for name, value in rows[i].items() if name != column}) for i in fit]
    return [(i, row | {"prompt": rows[i][column]}) for i, row in renamed]


def settings_of(config: GenerateConfig, chat: ChatConfig, rows: Sequence[tuple[int, Row]]) -> dict[str, Any]:
    """Every setting that the file's rows depend on."""
    digest = hashlib.sha256()
    for i, row in rows:
        digest.update(as_line({"prompt_id": i} | row).encode())
    values = asdict(config)
    return {
        "checkpoint": resolve_step(config.checkpoint),
        "weights": weights_hash(config.checkpoint),
        "data": digest.hexdigest(),
        "chat": asdict(chat),
        **{name: value for name, value in values.items() if name not in _IRRELEVANT and (name, value) not in _LATER},
    }
