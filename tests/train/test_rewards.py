"""Laws of the rewards: what is shared within a group changes no score; what is missing is left out, never 0."""

import json
import math
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from models.checkpoint import load_model
from models.hf_weights import split
from models.sampler import Rollout
from models.sharding import make_layout
from models.slots import Part
from models.tokenizer import Tokenizer
from train.config import PolicyConfig, RewardSpec
from train.loop import train_policy
from train.rewards import Rewards
from train.rewards.functions import BUILT_IN, completion_ids, function_scorer, load_function
from train.rewards.model import RewardModelScorer, common_prefix_length
from train.rewards.parts import PartScores
from train.run.metrics import UpdateMetrics

G, LONGEST = 3, 8  # every text has at most as many tokens, one bucket: one compilation for each number of prompts
GROUPS: dict[str, tuple[str, Sequence[str]]] = {
    "a prompt in common": ("Good", [" fo", " bar", " f"]),
    "all equal": ("Bad ", ["one", "one", "one"]),
    "two equal": ("Bad ", ["a", "b", "a"]),
    "one token each": ("", ["a", "b", "a"]),
    "nothing in common": ("", ["Good", "Bad", "x y z"]),
    "one is the beginning of the others": ("Wow", ["", "!", "!!"]),
    "one prompt alone": ("a", ["", "", ""]),
}
PROMPTS = [prompt for prompt, _ in GROUPS.values()]
COMPLETIONS = [list(completions) for _, completions in GROUPS.values()]


# Reward models


@pytest.fixture(scope="module")
def alone(tiny_reward_dir: Path) -> Callable[[Sequence[str]], np.ndarray]:
    """The score of each text by itself: the whole text through the plain call."""
    tokenizer, (graphdef, params) = Tokenizer(tiny_reward_dir), split(load_model(tiny_reward_dir))
    call = jax.jit(lambda params, tokens, lengths: nnx.merge(graphdef, params)(tokens, lengths))

    def score(texts: Sequence[str]) -> np.ndarray:
        rows = tokenizer.encode(texts)
        assert max(map(len, rows)) <= LONGEST
        tokens = np.array([row + [0] * (LONGEST - len(row)) for row in rows], np.int32)
        scores = [call(params, tokens[i : i + 1], np.array([len(row)])) for i, row in enumerate(rows)]
        return np.concatenate(scores).reshape(-1, G)

    return score


@pytest.fixture(scope="module")
def scorer(tiny_reward_dir: Path) -> RewardModelScorer:
    return RewardModelScorer(str(tiny_reward_dir), max_length=LONGEST, batch_prompts=len(GROUPS) + 1)


def test_a_group_is_scored_as_each_text_alone(scorer: RewardModelScorer, alone: Callable[..., np.ndarray]) -> None:
    rewards_PG = scorer(PROMPTS, COMPLETIONS)
    texts = [prompt + text for prompt, texts in GROUPS.values() for text in texts]
    assert rewards_PG.dtype == np.float32
    np.testing.assert_allclose(rewards_PG, alone(texts), atol=1e-5)
    assert np.ptp(rewards_PG) > 0.1, "scores of different texts differ"
    order = [2, 0, 1]
    moved_PG = scorer(PROMPTS[::-1], [[texts[g] for g in order] for texts in COMPLETIONS[::-1]])
    np.testing.assert_allclose(moved_PG[::-1], rewards_PG[:, order], atol=1e-5)


def test_batches_and_the_mesh_change_no_score(tiny_reward_dir: Path, scorer: RewardModelScorer) -> None:
    other = RewardModelScorer(str(tiny_reward_dir), layout=make_layout(), max_length=LONGEST, batch_prompts=3)
    np.testing.assert_allclose(other(PROMPTS, COMPLETIONS), scorer(PROMPTS, COMPLETIONS), atol=1e-5)


def test_texts_that_do_not_fit_are_nan_and_leave_the_others_alone(
    scorer: RewardModelScorer, alone: Callable[..., np.ndarray]
) -> None:
    groups = [["Good", "Good, far longer than eight tokens", "Bad"], ["", "a", "b"]]
    rewards_PG = scorer(["", ""], groups)
    expected_PG = alone(["Good", "x", "Bad", "x", "a", "b"])
    expected_PG[0, 1] = expected_PG[1, 0] = np.nan
    np.testing.assert_allclose(rewards_PG, expected_PG, atol=1e-5)


def test_scores_that_are_not_finite_are_unscorable_and_the_reason_is_known(
    scorer: RewardModelScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, factors = scorer._score, np.array([1.0, np.nan, np.inf], np.float32)
    monkeypatch.setattr(scorer, "_score", lambda *arrays: program(*arrays) * factors)
    np.testing.assert_array_equal(np.isnan(scorer(["", ""], [["a", "b", "c"]] * 2)), [[False, True, True]] * 2)
    assert scorer.why_unscorable == "its scores are NaN or infinite"


def test_a_template_may_strip_what_a_completion_begins_with(
    tiny_reward_dir: Path, alone: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch, scorer: RewardModelScorer
) -> None:
    template = "{% for m in messages %}{{ m.content | trim }}{{ '' if loop.last else ':' }}{% endfor %}"
    monkeypatch.setattr(scorer.tokenizer.hf, "chat_template", template)
    prompt = [{"role": "user", "content": "Hm"}]
    rewards_PG = scorer([prompt], [["\n\nbad", "bad", " so"]])
    np.testing.assert_allclose(rewards_PG, alone(["Hm:bad", "Hm:bad", "Hm:so"]), atol=1e-5)


def test_common_prefix() -> None:
    rng = np.random.default_rng(0)
    found = set()
    for _ in range(300):
        shared = rng.integers(0, 3, rng.integers(0, 4)).tolist()
        rows = [shared + rng.integers(0, 3, rng.integers(0, 4)).tolist() + [0] for _ in range(rng.integers(1, 4))]
        n, shortest = common_prefix_length(rows), min(map(len, rows))
        found.add(n)
        assert n < shortest, "every row keeps a token of its own"
        assert all(row[:n] == rows[0][:n] for row in rows)
        assert n == shortest - 1 or len({row[n] for row in rows}) > 1, "and no more than it must"
        assert common_prefix_length(rows[::-1]) == n
    assert found >= {0, 1, 2, 3}


# Functions


@pytest.fixture
def define(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """define(name=function) makes them importable from a module; returns the module's name."""
    module = types.ModuleType("some_rewards")
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def put(**functions: Any) -> str:
        vars(module).update(functions)
        return module.__name__

    return put


def constant(values_PG: np.ndarray, missing: Any = None) -> Callable[..., list[float | None]]:
    flat = [missing if math.isnan(value) else float(value) for value in values_PG.reshape(-1)]
    return lambda prompts, completions: flat


def scored(
    specs: Sequence[RewardSpec], prompts: Any, completions_PG: Any, ids_PG: Any = None, **options: Any
) -> tuple[np.ndarray, dict[str, float]]:
    rewards = Rewards(specs, None, "float32", **options)
    rewards_PGR = rewards.score(prompts, completions_PG, {}, ids_PG)
    return rewards.combine(rewards_PGR), rewards.metrics(rewards_PGR)


def random_rewards(count: int) -> np.ndarray:
    rng = np.random.default_rng(count)
    values_RPG = rng.normal(size=(count, 6, G)).astype(np.float32)
    values_RPG[rng.random(values_RPG.shape) < 0.4] = np.nan
    values_RPG[:, 0, 0] = np.nan
    values_RPG[:, 0, 1] = 1
    return values_RPG


@pytest.mark.parametrize("weights", [[1.0], [-2.0], [1.0, 1.0], [0.5, -1.5, 3.0]])
@pytest.mark.parametrize("missing", [None, math.nan])
def test_rewards_are_weighed_and_a_missing_one_leaves_only_its_own_part(
    define: Callable[..., str], weights: list[float], missing: float | None
) -> None:
    values_RPG = random_rewards(len(weights))
    module = define(**{f"f{r}": constant(values_PG, missing) for r, values_PG in enumerate(values_RPG)})
    specs = [RewardSpec(function=f"{module}.f{r}", weight=weight) for r, weight in enumerate(weights)]
    rewards_PG, metrics = scored(specs, ["p"] * 6, [["c"] * G] * 6)

    expected_PG = np.full((6, G), np.nan)
    for p, g in np.ndindex(6, G):
        present = [w * v for w, v in zip(weights, values_RPG[:, p, g], strict=True) if not math.isnan(v)]
        if present:
            expected_PG[p, g] = sum(present)
    assert np.isnan(expected_PG[0, 0]) and not np.isnan(expected_PG[0, 1])
    assert rewards_PG.dtype == np.float32
    np.testing.assert_allclose(rewards_PG, expected_PG, rtol=1e-5)
    for r, values_PG in enumerate(values_RPG):
        seen = values_PG[~np.isnan(values_PG)]
        assert metrics[f"rewards/f{r}/mean"] == pytest.approx(seen.mean(), rel=1e-5)
        assert metrics[f"rewards/f{r}/std"] == pytest.approx(seen.std(ddof=1), rel=1e-5)


def test_a_reward_that_scores_nothing_has_no_metrics(define: Callable[..., str]) -> None:
    module = define(none=constant(np.full((2, G), np.nan)))
    rewards_PG, metrics = scored([RewardSpec(function=f"{module}.none")], ["p"] * 2, [["c"] * G] * 2)
    assert np.isnan(rewards_PG).all() and metrics.pop("rewards/none/unscorable") == 2 * G
    assert metrics and all(math.isnan(value) for value in metrics.values())


def test_a_reward_model_and_a_function_add_up(
    define: Callable[..., str], tiny_reward_dir: Path, scorer: RewardModelScorer
) -> None:
    module = define(letters=lambda prompts, completions: [float(len(text)) for text in completions])
    specs = [
        RewardSpec(model=str(tiny_reward_dir), max_length=LONGEST, batch_prompts=len(GROUPS) + 1, name="model"),
        RewardSpec(function=f"{module}.letters", weight=0.1),
    ]
    rewards_PG, metrics = scored(specs, PROMPTS, COMPLETIONS)
    kinds = ("mean", "std", "unscorable")
    letters_PG = np.array([[len(text) for text in texts] for texts in COMPLETIONS])
    np.testing.assert_allclose(rewards_PG, scorer(PROMPTS, COMPLETIONS) + 0.1 * letters_PG, atol=1e-5)
    names = {f"rewards/{name}/{what}" for name in ("model", "letters") for what in kinds}
    assert metrics.keys() == names | {"rm/truncated_frac"}
    assert metrics["rm/truncated_frac"] == metrics["rewards/model/unscorable"] == 0


def test_texts_too_long_for_a_reward_model_are_counted(define: Callable[..., str], tiny_reward_dir: Path) -> None:
    module = define(none=constant(np.full((2, G), np.nan)))
    specs = [
        RewardSpec(model=str(tiny_reward_dir), max_length=LONGEST, batch_prompts=len(GROUPS) + 1, name="model"),
        RewardSpec(function=f"{module}.none"),
    ]
    texts_PG = [["Good", "Good, far longer than eight tokens", "Bad"], ["so", "a", "b"]]
    _, metrics = scored(specs, ["x", "y"], texts_PG)
    assert metrics["rewards/model/unscorable"] == 1
    assert metrics["rm/truncated_frac"] == pytest.approx(1 / (2 * G)), "a function's None is not counted"


@pytest.mark.parametrize(("combination", "combine"), [("sum", sum), ("minimum", min), ("mean", np.mean)])
@pytest.mark.parametrize("weights", [[1.0], [-2.0, 1.0], [0.5, -1.5, 3.0]])
def test_combinations_are_of_the_weighted_rewards_that_are_there(
    define: Callable[..., str], combination: str, combine: Callable[..., float], weights: list[float]
) -> None:
    values_RPG = random_rewards(len(weights))
    module = define(**{f"f{r}": constant(values_PG) for r, values_PG in enumerate(values_RPG)})
    specs = [RewardSpec(function=f"{module}.f{r}", weight=weight) for r, weight in enumerate(weights)]
    rewards_PG, _ = scored(specs, ["p"] * 6, [["c"] * G] * 6, combination=combination)
    for p, g in np.ndindex(6, G):
        present = [w * v for w, v in zip(weights, values_RPG[:, p, g], strict=True) if not math.isnan(v)]
        assert rewards_PG[p, g] == pytest.approx(combine(present) if present else math.nan, rel=1e-5, nan_ok=True)


def test_an_infinite_reward_is_refused(define: Callable[..., str]) -> None:
    module = define(wild=lambda prompts, completions: [1.0, float("inf")])
    with pytest.raises(ValueError, match="wild: expected finite rewards, or None .*, got an infinite one"):
        function_scorer(f"{module}.wild")(["p"], [["a", "b"]], {})


def test_a_function_gets_prompts_completions_and_the_columns_it_names(define: Callable[..., str]) -> None:
    calls: list[dict[str, Any]] = []

    def named(prompts: list[str], completions: list[str], answer: list[int]) -> list[float]:
        calls.append({"prompts": prompts, "completions": completions, "answer": answer})
        return [float(a) for a in answer]

    def everything(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
        calls.append({"prompts": prompts, "completions": completions} | columns)
        return [0.0] * len(prompts)

    module = define(named=named, everything=everything)
    columns = {"answer": [1, 2], "source": ["x", "y"]}
    completions_PG = [["a", "b", "c"], ["d", "e", "f"]]
    rewards_PG = function_scorer(f"{module}.named")(["p", "q"], completions_PG, columns)
    np.testing.assert_array_equal(rewards_PG, [[1, 1, 1], [2, 2, 2]])
    function_scorer(f"{module}.everything")(["p", "q"], completions_PG, columns)

    flat = {"prompts": ["p"] * G + ["q"] * G, "completions": list("abcdef"), "answer": [1] * G + [2] * G}
    assert calls == [flat, flat | {"source": ["x"] * G + ["y"] * G}]


def test_a_function_gets_the_tokens_it_asks_for(define: Callable[..., str]) -> None:
    def tokens(prompts: list[str], completions: list[str], completion_ids: list[list[int]]) -> list[float]:
        return [float(sum(ids)) for ids in completion_ids]

    module = define(tokens=tokens, plain=lambda prompts, completions: [0.0] * len(prompts))
    tokens_PGT = np.arange(24).reshape(2, G, 4)
    lengths_PG = np.array([[1, 2, 3], [4, 0, 2]])
    ids_PG = completion_ids(tokens_PGT, lengths_PG)
    assert ids_PG[1] == [[12, 13, 14, 15], [], [20, 21]] and type(ids_PG[0][0][0]) is int
    specs = [RewardSpec(function=f"{module}.{name}") for name in ("tokens", "plain")]
    rewards_PG, _ = scored(specs, ["p", "q"], [["c"] * G] * 2, ids_PG, columns=[])
    kept_PGT = np.arange(4) < lengths_PG[..., None]
    np.testing.assert_array_equal(rewards_PG, (tokens_PGT * kept_PGT).sum(-1))


def test_options_reach_the_function_and_columns_do_not_replace_them(define: Callable[..., str]) -> None:
    def scaled(completions: list[str], *, scale: float = 2.0, **columns: list[Any]) -> list[float]:
        assert columns.keys() == {"prompts", "other"}
        return [scale * len(text) for text in completions]

    module = define(scaled=scaled)
    columns = {"scale": ["x"], "other": ["y"]}
    for options, scale in (({}, 2), ({"scale": 5}, 5)):
        rewards_PG = function_scorer(f"{module}.scaled", options, columns)(["p"], [["a", "bb", ""]], columns)
        np.testing.assert_array_equal(rewards_PG, [[scale, 2 * scale, 0]])


def test_an_option_may_stand_where_a_column_would(define: Callable[..., str]) -> None:
    module = define(answered=lambda completions, *, answer: [float(text == answer) for text in completions])
    rewards_PG = function_scorer(f"{module}.answered", {"answer": "a"}, [])(["p"], [["a", "b", "a"]], {})
    np.testing.assert_array_equal(rewards_PG, [[1, 0, 1]])


def test_a_column_that_rows_of_a_batch_lack_is_none(define: Callable[..., str]) -> None:
    module = define(known=lambda completions, answer: [None if a is None else 1.0 for a in answer])
    assert np.isnan(function_scorer(f"{module}.known", {}, ["answer"])(["p"], [["c"] * G], {})).all()


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
        ("some_rewards.own", {"scal": 1}, "some_rewards.own has no 'scal'; expected one of scale, shift"),
        ("some_rewards.none", {"answer": 1}, "some_rewards.none has no 'answer'; it has no options"),
        ("some_rewards.none", {}, "some_rewards.none needs 'answer', which is neither a column of the data .a, b. nor"),
        ("length", {"taget": 1}, "length has no 'taget'; expected one of target, unit, ceiling"),
        ("length", {"target": 0}, "length: target: expected at least 1, got 0"),
        ("length", {"target": math.inf}, "length: target: expected a finite number, got inf"),
        ("soft_overlong_punishment", {"cache": 1}, "soft_overlong_punishment needs 'max_completion_length'"),
        ("rouge", {}, "no column 'completion'; the columns are a, b; name"),
        (
            "soft_overlong_punishment",
            {"cache": 1, "max_completion_length": math.inf},
            "length: expected a finite number",
        ),
        ("judge", {}, "judge needs 'model'"),
        ("judge", {"model": "m", "concurrency": 0}, "judge: concurrency: expected a whole number of at least 1, got 0"),
        (
            "judge",
            {"model": "m", "max_retries": 0.5},
            "judge: max_retries: expected a whole number of at least 0, got 0",
        ),
        ("judge", {"model": "m", "timeout": math.nan}, "judge: timeout: expected seconds, more than 0, got nan"),
        ("ifeval", {}, "ifeval needs 'instruction_id_list', which is neither a column of the data"),
        ("lenght", {}, "lenght: cannot be imported; expected a dotted path, or one of length, format_match"),
    ],
)
def test_what_a_function_lacks_is_said_before_any_weight_is_read(
    define: Callable[..., str], function: str, options: dict[str, Any], words: str
) -> None:
    define(own=lambda completions, *, scale=1, shift=0: [], none=lambda completions, answer: [])
    specs = [RewardSpec(model="no/such/model"), RewardSpec(function=function, options=options)]
    with pytest.raises(ValueError, match=words):
        Rewards(specs, None, "float32", columns=["a", "b"])


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_rewards_are_named_by_one_word(name: str) -> None:
    assert load_function(name) is load_function(BUILT_IN[name])
    assert RewardSpec(function=name).label == name


def test_a_reward_model_has_no_options() -> None:
    with pytest.raises(ValueError, match="a reward model has none"):
        RewardSpec(model="somewhere", options={"target": 1})


@pytest.mark.slow
def test_training_and_validation_hand_over_the_tokens_of_the_texts(
    define: Callable[..., str],
    policy_config: Callable[..., PolicyConfig],
    tmp_path: Path,
    tiny_tokenizer_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[list[str], list[list[int]]]] = []

    def seen(completions: list[str], completion_ids: list[list[int]], wanted: list[str]) -> list[float]:
        calls.append((completions, completion_ids))
        return [float(len(ids)) for ids in completion_ids]

    class NoUpdate:
        def old_and_ref_logprobs(self, state: Any, ref_params: Any, batch: Any) -> tuple[Any, float]:
            return batch, 0.0

        def __call__(self, state: Any, *_: Any) -> tuple[Any, list[UpdateMetrics]]:
            return state, [UpdateMetrics({"grad_norm": (0.0, 1.0)}, [{"loss": (0.0, 1.0)}])]

    monkeypatch.setattr("train.loop.Update", lambda *_: NoUpdate())
    train_policy(policy_config(tmp_path, rewards=[RewardSpec(function=f"{define(seen=seen)}.seen")], max_steps=1))
    tokenizer = Tokenizer(tiny_tokenizer_dir)
    assert [len(texts) for texts, _ in calls] == [16, 16, 16], "validation, a step, validation"
    for texts, ids in calls:
        rows = [row + [tokenizer.pad_id] * (8 - len(row)) for row in ids]
        assert tokenizer.decode(np.array([rows]), np.array([[len(row) for row in ids]])) == [texts]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for key in ("", "validation/"):
        assert rows[1][f"{key}reward"] == rows[1][f"{key}completions/mean_length"] > 0


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_parts_are_scored_by_shares(
    processes: int, define: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tiny_tokenizer_dir: Path
) -> None:
    """Each process scores its share, however the prompts are spread; a part may have fewer than there are processes."""
    calls: list[int] = []

    def tokens(completions: list[str], completion_ids: list[list[int]], wanted: list[str], prompts: list[str]) -> Any:
        calls.append(len(completions))
        assert [wanted, prompts] == [[f"{kind}{ids[0]}" for ids in completion_ids] for kind in "wp"]
        return [ids[0] + ids[1] / 10 for ids in completion_ids]

    rewards = Rewards([RewardSpec(function=f"{define(tokens=tokens)}.tokens")], None, "float32")
    P, numbers = 7, np.arange(7)
    tokens_PGT = np.stack([np.repeat(numbers[:, None], G, 1), np.tile(np.arange(G), (P, 1)), np.ones((P, G), int)], -1)
    rollout = Rollout(tokens_PGT, np.zeros((P, G, 3)), np.full((P, G), 2), np.ones((P, G), bool))
    own = []
    for index in range(processes):
        monkeypatch.setattr(jax, "process_count", lambda: processes)
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        monkeypatch.setattr("train.rewards.gather", lambda rows: rows)  # below the shares are put together
        prompts, columns = [f"p{p}" for p in numbers], {"wanted": [f"w{p}" for p in numbers]}
        scores = PartScores(rewards, Tokenizer(tiny_tokenizer_dir), prompts, columns)
        for part in ([5], [6, 0, 2], [4, 1, 3]):
            scores.add(Part(np.array(part), jax.tree.map(lambda array, part=part: array[part], rollout)))
        own.append(scores.of_all())
    expected = tokens_PGT[..., 0] + tokens_PGT[..., 1] / 10
    np.testing.assert_array_equal(np.concatenate(own)[..., 0], expected)
    assert sum(calls) == P * G and 0 not in calls


@pytest.mark.parametrize("count", [0, 1, 5, 7])
def test_a_wrong_number_of_rewards_is_refused(define: Callable[..., str], count: int) -> None:
    module = define(wrong=lambda prompts, completions: [1.0] * count)
    with pytest.raises(ValueError, match=f"{module}.wrong: expected 6 rewards, one per completion, got {count}"):
        function_scorer(f"{module}.wrong")(["p", "q"], [["c"] * G] * 2, {})


@pytest.mark.parametrize(
    ("dotted", "why"),
    [
        ("some_rewards.missing", "cannot be imported .*no attribute 'missing'"),
        ("no_such_module.f", "cannot be imported .*No module named 'no_such_module'"),
        ("f", "cannot be imported"),
        ("some_rewards.number", "expected a function, got int"),
    ],
)
def test_dotted_paths(define: Callable[..., str], dotted: str, why: str) -> None:
    define(number=1)
    with pytest.raises(ValueError, match=f"rewards.function: {dotted}: {why}"):
        function_scorer(dotted)
