"""`python -m eval judge`: a judge compares the completions of two policies pair by pair.

1. The k-th completion of A is paired with the k-th of B, for each prompt and temperature.
2. A back end in eval/judges/ shows the judge every pair in both orders. A reply without a verdict
   (eval/judges/verdict.py) leaves the pair without an outcome; such pairs are counted.
3. A pair's outcome for A is the mean of both orders (a win 1, a tie 1/2, a loss 0), so that contradicting orders
   give 1/2: one order alone would measure the judge's position bias. With likelihoods the outcome is a win if the mean
   over both orders of A's probability is above 1/2, so one order may outweigh the other. Equal texts tie without being
   asked about.
4. Outcomes are averaged for each prompt first; intervals are over prompts (eval/stats.py).

Writes OUT/judgements.jsonl, a row per pair, and OUT/judge.json. Exchanging A and B asks the same questions and mirrors
every result.
"""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from eval.judges.pairs import CompletionPair, Judgement, read_pairs
from eval.judges.results import JUDGEMENTS, NO_OUTCOME, gold_of, read_judgements, results, row_of, step_of
from eval.judges.task import JudgeTask, load_task
from eval.stats import NotConvergedError, without_nan
from train.config import MeshConfig
from train.console import console
from train.parse import parse
from train.run.files import check_out, check_out_directory, write_jsonl, write_whole
from train.running import SetupError, setup_errors

JUDGE_JSON = "judge.json"


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Two policies' completions of the same prompts, compared by a judge."""

    a: str  # JSONL with prompt_id, prompt, completion, as `python -m eval generate` writes it
    b: str  # JSONL of the same prompts, answered by another policy
    out: str  # the directory to write
    backend: Literal["server", "likelihood", "reward_model"]  # what asks the judge
    model: str  # server: the model's name there; else a run, RUN@STEP, a Hugging Face directory or Hub name
    base_url: str | None = None  # of the server, e.g. http://localhost:8000/v1; default: OPENAI_BASE_URL, else OpenAI's
    task: str = "chat"  # what is asked: chat, summary, llmbar_*, or a YAML file like those in eval/judges/tasks
    concurrency: int = 16  # requests to the server at a time
    timeout: float = 60.0  # seconds until a request has failed
    max_retries: int = 5  # of a request that has failed, with growing pauses
    temperature: float | None = 0.0  # of the judge on a server; null: the server's own
    price_prompt: float | None = None  # of a million tokens that the server reads; the cost is in judge.json
    price_completion: float | None = None  # of a million tokens that the server writes
    cache: str | None = None  # SQLite file of all replies; default: OUT/cache.sqlite
    seed: int = 0  # of the bootstrap
    agree_with: list[str] = field(default_factory=list)  # directories of earlier judgements to compare with
    gold: str | None = None  # a column of A with "a" or "b", whichever is really better: judges the judge
    limit: int | None = None  # only the first so many prompts
    common: bool = False  # leave out prompts that one side does not have
    name_a: str | None = None  # in tables and pictures; default: the file's name
    name_b: str | None = None  # in tables and pictures; default: the file's name
    max_length: int = 4096  # tokens of a question to a local model; longer questions are counted, not judged
    batch_prompts: int = 8  # questions to a local model at a time; changes no result
    dtype: Literal["float32", "bfloat16"] = "float32"  # of a local model's computation
    mesh: MeshConfig = field(default_factory=MeshConfig)  # of a local model, e.g. data=1,fsdp=4

    def __post_init__(self) -> None:
        for name, least in (
            ("concurrency", 1),
            ("max_retries", 0),
            ("max_length", 1),
            ("batch_prompts", 1),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"timeout: expected seconds, more than 0, got {self.timeout}")
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature: expected a number from 0 on, or null, got {self.temperature}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit: expected at least 1, got {self.limit}")
        if (self.price_prompt is None) != (self.price_completion is None):
            raise ValueError("expected both --price_prompt and --price_completion, or neither")
        if self.backend != "server" and (self.base_url is not None or self.price_prompt is not None):
            raise ValueError(f"--base_url and prices are for --backend server, not for {self.backend}")


def parse_judge(arguments: list[str]) -> JudgeConfig:
    return parse(JudgeConfig, arguments, "python -m eval judge", positional=("a", "b"))


def judge_policies(config: JudgeConfig) -> dict[str, Any]:
    """Writes the judgements to `config.out`; returns the content of judge.json.

    Raises:
      SetupError: a mistake in settings or data, or a judge that cannot be asked.
      SystemExit: 1 if some questions failed, after everything is written; 130 after Ctrl-C.
    """
    with setup_errors():
        check_out_directory(config.out, JUDGEMENTS, JUDGE_JSON, others=(config.a, config.b))
        if config.cache is not None:
            check_out(config.cache, config.a, config.b)
        task = load_task(config.task)
        pairs = read_pairs(config.a, config.b, common=config.common, limit=config.limit)
        gold = gold_of(pairs, config.gold, config.a) if config.gold else None
        earlier = {name: read_judgements(name) for name in config.agree_with}
        differing = [pair for pair in pairs if pair.a != pair.b]
        try:
            judged, usage = ask_judge(config, task, differing)
        except KeyboardInterrupt:
            console.print("stopped; what has come is kept, and the same command goes on from there")
            raise SystemExit(130) from None
    of_pair = dict(zip((pair.key for pair in differing), judged, strict=True))
    rows = [row_of(pair, of_pair.get(pair.key)) for pair in pairs]
    out = Path(config.out)
    write_jsonl(out / JUDGEMENTS, [without_nan(row) for row in rows])
    try:
        numbers = results(rows, config.seed, gold, earlier)
    except NotConvergedError as error:
        raise SetupError(str(error)) from error
    result = without_nan(provenance(config, pairs) | numbers | usage)
    write_whole(out / JUDGE_JSON, json.dumps(result, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
    print_judgements(result)
    console.print(f"{out / JUDGE_JSON}")
    if result["failed"]:
        console.print(f"{result['failed']} pairs have failed; the same command asks for them again, and for no other")
        raise SystemExit(1)
    return result


def provenance(config: JudgeConfig, pairs: Sequence[CompletionPair]) -> dict[str, Any]:
    """The fields of judge.json that say what was judged, and by which judge."""
    return {
        "a": config.a,
        "b": config.b,
        "name_a": config.name_a or Path(config.a).stem,
        "name_b": config.name_b or Path(config.b).stem,
        "backend": config.backend,
        "model": config.model,
        "task": None if config.backend == "reward_model" else config.task,  # a reward model is asked no question
        "seed": config.seed,
        "step": step_of(config.a, config.b, pairs),
    }


# Back ends


def ask_judge(
    config: JudgeConfig, task: JudgeTask, pairs: Sequence[CompletionPair]
) -> tuple[list[Judgement], dict[str, Any]]:
    """Returns a judgement per pair, and the requests, tokens and cost of asking."""
    no_usage = {"requests": 0, "cached": 0, "tokens": {"prompt": 0, "completion": 0}, "cost": None}
    if config.backend != "server":
        return local_judge(config, task).judge(pairs) if pairs else [], no_usage
    from eval.judges.cache import Cache
    from eval.judges.questions import ServerJudge
    from eval.judges.server import Server

    file = Path(config.cache) if config.cache else Path(config.out) / "cache.sqlite"
    with closing(Cache(file)) as cache:
        options = {"concurrency": config.concurrency, "timeout": config.timeout, "max_retries": config.max_retries}
        server = Server(config.model, cache, config.base_url, temperature=config.temperature, **options)  # type: ignore[arg-type]
        with closing(server):
            asked = ServerJudge(server, task)
            judged = asked.judge(pairs)
    prompt = sum(reply.prompt_tokens for reply in asked.replies.values())
    completion = sum(reply.completion_tokens for reply in asked.replies.values())
    cost = None
    if config.price_prompt is not None and config.price_completion is not None:
        cost = (prompt * config.price_prompt + completion * config.price_completion) / 1e6
    tokens = {"prompt": prompt, "completion": completion}
    return judged, {"requests": server.requests, "cached": server.cached, "tokens": tokens, "cost": cost}


def local_judge(config: JudgeConfig, task: JudgeTask) -> Any:
    from eval.judges.likelihood import LikelihoodJudge
    from eval.judges.reward_model import RewardModelJudge
    from train.build import make_layout_for

    options: dict[str, Any] = {
        "layout": make_layout_for(config.mesh, config.batch_prompts),
        "dtype": config.dtype,
        "max_length": config.max_length,
        "batch_prompts": config.batch_prompts,
    }
    if config.backend == "reward_model":
        return RewardModelJudge(config.model, **options)
    return LikelihoodJudge(config.model, task, **options)


# On the terminal


def print_judgements(result: Mapping[str, Any]) -> None:
    """Prints the result as a table."""
    from rich.table import Table

    table = Table("", "", title=f"{result['name_a']} against {result['name_b']}, judged by {result['model']}")
    for name, value in judgement_lines(result):
        table.add_row(name, value)
    console.print(table)


def judgement_lines(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    text_rows = [("win rate", mean_text(result["win_rate"]))]
    text_rows += [(f"  at temperature {key}", mean_text(value)) for key, value in result["temperatures"].items()]
    if result["length_controlled"]:
        text_rows.append(("  at equal length", mean_text(result["length_controlled"])))
    text_rows += [
        (f"  {key}", mean_text(value)) for key, value in result["aspects"].items() if len(result["aspects"]) > 1
    ]
    text_rows.append(("wins, ties, losses", f"{result['wins']}, {result['ties']}, {result['losses']}"))
    if result["position_bias"]:
        text_rows.append(("wins of the answer shown first", mean_text(result["position_bias"])))
        text_rows.append(("both orders agree", f"{result['consistent']:.1%}"))
    without = [f"{result[kind]} {kind.replace('_', ' ')}" for kind in ("identical", *NO_OUTCOME) if result[kind]]
    text_rows.append(("pairs", ", ".join([f"{result['judged']} of {result['pairs']} judged", *without])))
    if result["backend"] == "server":
        tokens = result["tokens"]
        cost = "" if result["cost"] is None else f", cost {result['cost']:.4g}"
        if result["cut_off"]:
            text_rows.append(("replies cut off, filtered or refused", str(result["cut_off"])))
        text_rows.append(("requests", f"{result['requests']}, and {result['cached']} from the cache"))
        text_rows.append(("tokens", f"{tokens['prompt']} in, {tokens['completion']} out{cost}"))
    for other in result["agreement"]:
        kappa = "-" if other["kappa"] is None else f"{other['kappa']:.3f}"
        text_rows.append((f"kappa with {other['with']}", f"{kappa} over {other['pairs']} pairs"))
    if result["accuracy"]:
        accuracy = result["accuracy"]
        text_rows.append(("accuracy", f"{accuracy['mean']:.1%}; right in both orders {accuracy['both']:.1%}"))
    return text_rows


def mean_text(estimate: Mapping[str, Any]) -> str:
    mean = estimate.get("mean", estimate.get("share"))
    return "-" if mean is None else f"{mean:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"
