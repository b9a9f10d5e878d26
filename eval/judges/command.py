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
from eval.runs import Arguments
from eval.stats import without_nan
from train.config import MeshConfig
from train.console import console
from train.run.files import write_jsonl, write_whole
from train.running import setup_errors

JUDGE_JSON = "judge.json"


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    a: str
    b: str
    out: str
    backend: Literal["server", "likelihood", "reward_model"]
    model: str
    base_url: str | None = None
    task: str = "chat"
    concurrency: int = 16
    timeout: float = 60.0
    max_retries: int = 5
    temperature: float | None = 0.0
    price_prompt: float | None = None
    price_completion: float | None = None
    cache: str | None = None
    seed: int = 0
    agree_with: list[str] = field(default_factory=list)
    gold: str | None = None
    limit: int | None = None
    common: bool = False
    name_a: str | None = None
    name_b: str | None = None
    max_length: int = 4096
    batch_prompts: int = 8
    dtype: Literal["float32", "bfloat16"] = "float32"
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        for name, least in (("concurrency", 1), ("max_retries", 0), ("max_length", 1), ("batch_prompts", 1)):
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
    parser = Arguments("judge", "Two policies' completions of the same prompts, compared by a judge.")
    add = parser.add_argument
    add(
        "a", metavar="A.jsonl", help="rows with prompt_id, prompt, completion, as `python -m eval generate` writes them"
    )
    add("b", metavar="B.jsonl", help="the same prompts, answered by another policy")
    add("--out", required=True, help="the directory to write")
    add("--backend", required=True, choices=("server", "likelihood", "reward_model"))
    add("--model", required=True, help="its name on the server; a run, RUN@STEP or Hugging Face directory otherwise")
    add("--base_url", help="e.g. http://localhost:8000/v1; default: OPENAI_BASE_URL, else OpenAI's own")
    add("--task", default="chat", help="what is asked: chat, summary, llmbar_*, or a YAML file like those")
    add("--concurrency", type=int, default=16, help="requests at a time")
    add("--timeout", type=float, default=60.0, help="seconds until a request has failed")
    add("--max_retries", type=int, default=5, help="of a request that has failed, with growing pauses")
    add("--temperature", type=_number_or_null, default=0.0, help="of the judge; null: the server's own")
    add("--price_prompt", type=float, help="of a million tokens")
    add("--price_completion", type=float)
    add("--cache", help="sqlite file of all replies; default: OUT/cache.sqlite")
    add("--seed", type=int, default=0, help="of the bootstrap")
    add("--agree_with", nargs="+", default=[], metavar="DIR", help="earlier judgements to compare with")
    add("--gold", help='a column of A.jsonl, "a" or "b": which is really better; judges the judge')
    add("--limit", type=int, help="the first so many prompts")
    add("--common", type=_true_or_false, default=False, help="true: leave out prompts that one side does not have")
    add("--name_a", help="in tables and pictures; default: the file's name")
    add("--name_b")
    add("--max_length", type=int, default=4096, help="of a question to a local model, in its tokens; longer: counted")
    add("--batch_prompts", type=int, default=8, help="questions to a local model at a time; changes no result")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of a local model")
    add("--mesh", type=_mesh, default=MeshConfig(), help="of a local model, e.g. data=1,fsdp=4")
    return JudgeConfig(**vars(parser.parse_args(arguments)))


def judge_policies(config: JudgeConfig) -> dict[str, Any]:
    """Writes the judgements to `config.out`; returns the content of judge.json.

    Raises:
      SetupError: a mistake in settings or data, or a judge that cannot be asked.
      SystemExit: 1 if some questions failed, after everything is written; 130 after Ctrl-C.
    """
    with setup_errors():
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
    result = without_nan(provenance(config, pairs) | results(rows, config.seed, gold, earlier) | usage)
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


# The command line's values


def _number_or_null(text: str) -> float | None:
    return None if text == "null" else float(text)


def _true_or_false(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(text)
    return text == "true"


def _mesh(text: str) -> MeshConfig:
    sizes = {name: int(size) for name, _, size in (part.partition("=") for part in text.split(","))}
    if not sizes.keys() <= {"data", "fsdp", "tensor"}:
        raise ValueError(text)
    return MeshConfig(**sizes)  # type: ignore[arg-type]
