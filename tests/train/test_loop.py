"""The training loop's laws: how a batch is cut changes nothing, interrupted equals uninterrupted."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow.parquet as pq
import pytest
import yaml

import train.loop
import train.update
from gopo_jax import ADVANTAGES
from models.checkpoint import load_model
from models.config import Qwen3Config
from models.flops import PEAK_FLOPS, forward_flops
from models.hf_weights import split
from models.sampler import Rollout
from models.sharding import make_layout
from train.batch import Batch, Groups, make_batch
from train.config import (
    CheckpointConfig,
    LogConfig,
    LossConfig,
    ModelConfig,
    PolicyConfig,
    RewardSpec,
    ValidationConfig,
)
from train.loop import train_policy
from train.objective import completion_logprobs, make_advantages, policy_objective
from train.packing import MicroBatch, microbatches
from train.run.directory import read_metrics
from train.run.metrics import UpdateMetrics, fetch_metrics, require_finite, throughput
from train.state import copy_tree, make_state
from train.update import Update
from train.validation import check_best

ROOT = Path(__file__).parents[2]
MakeConfig = Callable[..., PolicyConfig]
numbers = partial(read_metrics, clock=False)


@pytest.fixture
def some_batch(make_groups: Callable[..., Groups]) -> Callable[[PolicyConfig], Batch]:
    """some_batch(config): unequal lengths, an unscorable completion and a group of equal rewards, ranked."""

    def make(config: PolicyConfig) -> Batch:
        groups = make_groups(config)
        return make_batch(groups, config)._replace(
            advantages_PG=np.asarray(ADVANTAGES["gopo"](groups.rewards_PGR[..., 0]))
        )

    return make


@pytest.mark.parametrize(
    "aggregate",
    ["token", pytest.param("sequence", marks=pytest.mark.slow), pytest.param("constant", marks=pytest.mark.slow)],
)
def test_the_cut_into_micro_batches_changes_nothing(
    aggregate: Any, policy_config: MakeConfig, tmp_path: Path, some_batch: Callable[[PolicyConfig], Batch]
) -> None:
    base = policy_config(tmp_path, loss=LossConfig(aggregate=aggregate, logprob_chunk=24))
    layout = make_layout(data=1)
    graphdef, params = split(load_model(str(base.model.path), mesh=layout))
    ref_params = jax.tree.map(lambda p: p * 1.01, params)
    batch = some_batch(base)
    sgd = optax.sgd(1.0)  # the step is the gradient
    after = {}
    for microbatch_prompts in (4, 1):
        config = replace(base, microbatch_prompts=microbatch_prompts)
        state = make_state(copy_tree(params), sgd, layout)
        state, updates = Update(graphdef, sgd, config, layout, state)(state, ref_params, batch, 0)
        after[microbatch_prompts] = (state.params, fetch_metrics(updates))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), after[4][0], after[1][0])
    for name, value in after[4][1].items():
        np.testing.assert_allclose(after[1][1][name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), after[4][0], params)
    assert max(jax.tree.leaves(moved)) > 1e-3  # there was a gradient to compare


@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_so_many_tokens_have_logits_at_a_time(
    tokens: int, policy_config: MakeConfig, tmp_path: Path, some_batch: Callable[[PolicyConfig], Batch]
) -> None:
    """`logprob_chunk` bounds the arrays of the update that have a vocabulary axis, however many rows there are."""
    config = policy_config(tmp_path, loss=LossConfig(logprob_chunk=tokens))
    layout = make_layout(data=1)
    graphdef, params = split(load_model(str(config.model.path), mesh=layout))
    V = params["embed_VD"].shape[0]
    ((_, micro),) = microbatches(some_batch(config), config.prompts_per_step, layout)
    rows = math.prod(micro.tokens_PBT.shape[:2])
    gradient = jax.grad(partial(policy_objective, graphdef=graphdef, config=config), has_aux=True)
    program = str(jax.make_jaxpr(gradient)(params, params, {}, micro, jnp.float32(1)))
    shapes = {tuple(map(int, shape.split(","))) for shape in re.findall(rf"f32\[([\d,]+,{V})\]", program)}
    held = max(math.prod(shape[:-1]) for shape in shapes)
    assert held == max(tokens // rows, 1) * rows < math.prod(micro.tokens_PBT.shape)


def test_interrupted_equals_uninterrupted(
    policy_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: Callable[..., Any]
) -> None:
    whole = policy_config(tmp_path / "whole", max_steps=4, checkpoint=CheckpointConfig(every=2))
    train_policy(whole)
    cut = replace(whole, output_dir=str(tmp_path / "cut"))

    class Killed(Exception):
        pass

    calls = []

    def killed_at_the_fourth(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:  # step 3 is written, the checkpoint is of step 2
            raise Killed
        return make_batch(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train.loop, "make_batch", killed_at_the_fourth)
        with dies(Killed):
            train_policy(cut)
    before = numbers(tmp_path / "cut")
    assert [row["step"] for row in before] == [0, 1, 2, 3]
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "rew')  # what a kill leaves behind
    train_policy(cut)

    assert [row["step"] for row in numbers(tmp_path / "cut")] == [0, 1, 2, 3, 4]
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole" / "run")
    ends = [split(load_model(f"{run}@4"))[1] for run in (tmp_path / "cut", tmp_path / "whole" / "run")]
    jax.tree.map(np.testing.assert_array_equal, *ends)
    completions = [
        (run / "completions" / "validation_000004.jsonl").read_text()
        for run in (tmp_path / "cut", tmp_path / "whole" / "run")
    ]
    assert completions[0] == completions[1]


SCORED: list[int] = []  # completions of each call


def letters(completions: list[str], wanted: list[str], **_: Any) -> list[float]:
    SCORED.append(len(completions))
    return [text.count(w) + len(text) / 64 for text, w in zip(completions, wanted, strict=True)]


def policy_that_ends(config: PolicyConfig, folder: Path) -> ModelConfig:
    """The config's policy, with a fifth of all tokens ending a completion."""
    size = json.loads((Path(str(config.model.path)) / "config.json").read_text())["vocab_size"]
    shutil.copytree(str(config.model.path), folder)
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": list(range(0, size, 5))}))
    return ModelConfig(path=str(folder), remat="none")


class NoUpdate:
    """In place of Update: the policy stays as it is."""

    def old_and_ref_logprobs(self, state: Any, ref_params: Any, batch: Any) -> tuple[Any, float]:
        return batch, 0.0

    def __call__(self, state: Any, *_: Any) -> tuple[Any, list[UpdateMetrics]]:
        return state, [UpdateMetrics({"grad_norm": (0.0, 1.0)}, [{"loss": (0.0, 1.0)}])]


@pytest.mark.parametrize("update", [NoUpdate, pytest.param(Update, marks=pytest.mark.slow)])
def test_prompts_sampled_at_a_time_change_nothing(
    update: Any, policy_config: MakeConfig, with_function: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at once; and a run that is begun with 3 of 4 and goes on with 1: the same order, texts, rewards, metrics."""
    SCORED.clear()
    monkeypatch.setattr(train.loop, "Update", update if update is Update else lambda *_: NoUpdate())
    base = with_function(tmp_path, "letters")
    settings: dict[str, Any] = {
        "model": policy_that_ends(base, tmp_path / "policy"),
        "rewards": [base.rewards[0], replace(policy_config(tmp_path).rewards[0], batch_prompts=3)],
        "validation": ValidationConfig(prompts=0),
        "log": LogConfig(tensorboard=False, progress=False, completions_every=1),
        "repetition_penalty": 1.2,
        "min_p": 0.01,
        "stop": ["e", "th"],
    }
    whole = replace(base, **settings, max_steps=2, output_dir=str(tmp_path / "whole"))
    parts = replace(whole, output_dir=str(tmp_path / "parts"))
    train_policy(whole)
    P, G = whole.prompts_per_step, whole.num_generations
    assert SCORED == [P * G, P * G]
    SCORED.clear()
    train_policy(replace(parts, max_steps=1, rollout_prompts=3))
    train_policy(replace(parts, rollout_prompts=1))
    assert sum(SCORED) == 2 * P * G and SCORED[-P:] == [G] * P, "each prompt as soon as it has ended"
    rows, expected = numbers(parts.output_dir), numbers(whole.output_dir)
    assert [row["step"] for row in rows] == [1, 2]
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            assert math.isclose(value, other[name], rel_tol=1e-4, abs_tol=1e-5), (row["step"], name)
        assert row["completions/min_length"] < row["completions/max_length"]
    for step in (1, 2):
        file = f"completions/train_{step:06d}.parquet"
        found, wanted = (pq.read_table(Path(run.output_dir) / file).to_pydict() for run in (parts, whole))
        for name in ("prompt", "completion", "length", "stop_reason", "stop_string", "rewards/r"):
            assert found[name] == wanted[name]
        ends = zip(found["completion"], found["stop_reason"], found["stop_string"], strict=True)
        assert {"e", None} <= {*found["stop_string"]}
        assert all(reason == "stop" and string in text for text, reason, string in ends if string)


def sometimes_unscorable(completions: list[str], wanted: list[str], **_: Any) -> list[float | None]:
    return [None if len(text) % 3 == 0 else float(text.count(w)) for text, w in zip(completions, wanted, strict=True)]


@pytest.fixture
def with_function(policy_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> MakeConfig:
    """policy_config with a reward function of this file."""
    monkeypatch.setitem(sys.modules, "rewards_of_this_test", sys.modules[__name__])

    def make(tmp_path: Path, name: str, **overrides: Any) -> PolicyConfig:
        spec = RewardSpec(function=f"rewards_of_this_test.{name}", name="r")
        return policy_config(tmp_path, rewards=[spec], **overrides)

    return make


@pytest.mark.slow
def test_unscorable_completions_leave_no_trace(with_function: MakeConfig, tmp_path: Path) -> None:
    train_policy(with_function(tmp_path, "sometimes_unscorable", advantage="grpo"))
    rows = numbers(tmp_path / "run")
    assert any(row.get("frac_reward_unscorable", 0) > 0 for row in rows)
    params = split(load_model(tmp_path / "run"))[1]
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params))


def test_a_run_directory_is_whole(policy_config: MakeConfig, tmp_path: Path) -> None:
    config = policy_config(tmp_path, log=LogConfig(progress=False, completions_every=2))
    train_policy(config)
    run = tmp_path / "run"
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved == json.loads(json.dumps(asdict(config)))
    rows = numbers(run)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    trained = {"loss", "kl", "entropy", "grad_norm", "learning_rate", "reward", "reward_std", "frac_reward_zero_std"}
    trained |= {"completions/mean_length", "completions/clipped_ratio", "clip_ratio/region_mean", "rank/tie_frac"}
    trained |= {"rewards/tiny/mean", "rm/truncated_frac", "sampling/attempts", "clip_ratio/low_min"}
    trained |= {"sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"}
    assert all(trained <= row.keys() for row in rows[1:])
    assert {row["step"] for row in rows if "validation/reward" in row} == {0, 2, 3}
    for name in rows[0].keys() & {f"validation/{metric}" for metric in rows[1]}:  # each may be what is best
        check_best(replace(config, checkpoint=CheckpointConfig(best=name)))
    assert rows[1]["kl"] == 0  # the first update starts at the reference
    assert rows[1]["clip_ratio/region_mean"] == 0  # one update per batch: the ratio is 1
    assert all(row["sampling/sampling_logp_difference/mean"] < 1e-4 for row in rows[1:])
    (table,) = (pq.read_table(file).to_pydict() for file in (run / "completions").glob("train_*.parquet"))
    assert table["step"] == [2] * 16 and table["completion"][0] and len(set(table["prompt"])) == 4
    assert np.mean(table["rewards/tiny"]) == pytest.approx(rows[2]["reward"], rel=1e-5)
    assert sum(table["advantage"][:4]) == pytest.approx(0, abs=1e-5)
    assert np.mean(table["length"]) == rows[2]["completions/mean_length"]
    assert not list(run.rglob("lock.json"))
    train_policy(config)  # done is done: nothing is written twice
    assert numbers(run) == rows


def test_mfu_is_the_least_arithmetic_over_what_the_devices_could_do(
    policy_config: MakeConfig, tmp_path: Path, tiny_config: Qwen3Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = policy_config(tmp_path, num_iterations=2)
    rollout = Rollout(*[np.zeros(0)] * 2, np.array([[1, 2], [3, 4]]), np.ones((2, 2), bool))  # type: ignore[arg-type]
    drawn = [Groups([], np.zeros((2, 4)), np.array([3, 4]), rollout, np.zeros((2, 2, 1)))] * 2
    assert throughput(config, tiny_config, drawn, 0.5) == {"perf/tokens_per_s": 40}  # of a CPU no peak is known
    monkeypatch.setitem(PEAK_FLOPS, jax.devices()[0].device_kind, 1e9)
    forward = forward_flops(tiny_config, [3, 4], [[1, 2], [3, 4]])
    expected = (2 * forward + (3 * 2 + 1) * forward) / (0.5 * 1e9 * jax.device_count())
    assert throughput(config, tiny_config, drawn, 0.5)["perf/mfu"] == pytest.approx(expected)


@pytest.mark.slow
def test_the_penalty_in_the_reward_and_the_mean_of_micro_batches(
    policy_config: MakeConfig, tmp_path: Path, some_batch: Callable[[PolicyConfig], Batch]
) -> None:
    in_reward = LossConfig(kl_in="reward", kl="k1", beta=0.3, logprob_chunk=24)
    base = policy_config(tmp_path, loss=in_reward, advantage="rloo")
    layout = make_layout(data=1)
    graphdef, params = split(load_model(str(base.model.path), mesh=layout))
    ref_params = jax.tree.map(lambda p: p * 1.1, params)
    batch = some_batch(base)
    sgd = optax.sgd(1.0)

    def update(config: PolicyConfig) -> Any:
        state = make_state(copy_tree(params), sgd, layout)
        return Update(graphdef, sgd, config, layout, state), state

    # the penalty is the sum over the tokens that count of log p - log p_ref, and is taken off the reward
    one, state = update(base)
    filled, penalty_PG = one.old_and_ref_logprobs(state, ref_params, batch)
    ((indices, micro),) = microbatches(batch, 4, layout)
    now, ref = (completion_logprobs(graphdef, base, p, micro) for p in (params, ref_params))
    expected = np.where(batch.mask_PGT[indices], now - ref, 0).sum(-1)
    np.testing.assert_allclose(penalty_PG[indices], 0.3 * expected, atol=1e-4)
    assert np.abs(expected).max() > 0.1 and filled.old_PGT is not None and filled.ref_PGT is not None
    rewards_PGR = np.random.default_rng(1).normal(size=(4, 4, 1)).astype(np.float32)
    advantages_PG = make_advantages(base)(rewards_PGR, penalty_PG)
    np.testing.assert_allclose(advantages_PG, ADVANTAGES["rloo"](rewards_PGR[..., 0] - penalty_PG), atol=1e-5)

    # micro-batches keep the order of the prompts, for each counts the same whatever its tokens
    by_part = replace(base, loss=LossConfig(aggregate="token_per_microbatch", logprob_chunk=24), microbatch_prompts=2)
    T = base.max_completion_length
    batch = batch._replace(
        advantages_PG=np.random.default_rng(2).normal(size=(4, 4)).astype(np.float32),
        mask_PGT=np.broadcast_to(np.arange(T) < np.array([1, T, 1, T])[:, None, None], batch.mask_PGT.shape),
    )

    def loss_of(config: PolicyConfig, prompts: list[int]) -> float:
        one, state = update(config)
        return fetch_metrics(one(state, ref_params, batch.take(np.array(prompts)), 0)[1])["loss"]

    half = replace(by_part, prompts_per_step=2)
    whole = loss_of(by_part, [0, 1, 2, 3])
    assert whole == pytest.approx((loss_of(half, [0, 1]) + loss_of(half, [2, 3])) / 2, rel=1e-5)
    assert abs(whole - (loss_of(half, [0, 2]) + loss_of(half, [1, 3])) / 2) > 1e-3  # short ones together: another mean


def test_a_run_that_diverges_ends() -> None:
    require_finite(3, {"loss": -1.0, "grad_norm": 2.0})
    for name in ("loss", "grad_norm"):
        with pytest.raises(FloatingPointError, match=f"step 3: {name} is nan: the run has diverged"):
            require_finite(3, {"loss": 1.0, "grad_norm": 1.0} | {name: math.nan})


def test_the_loop_fits_on_a_few_pages() -> None:
    assert len((ROOT / "train" / "loop.py").read_text().splitlines()) < 300


@pytest.mark.slow
def test_killed_and_started_again(policy_config: MakeConfig, tmp_path: Path) -> None:
    """The same with a real process and SIGKILL, at a moment nobody chose."""
    runs = {}
    for name in ("whole", "killed"):
        config = policy_config(tmp_path / name, max_steps=12, checkpoint=CheckpointConfig(every=2))
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(asdict(config)))
        runs[name] = (tmp_path / name / "run", [sys.executable, "-m", "train", "policy", "--config", str(file)])
    run, command = runs["whole"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    run, command = runs["killed"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while len(read_metrics(run)) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 6 <= len(read_metrics(run)) < 13
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert numbers(run) == numbers(runs["whole"][0])


@pytest.mark.slow
def test_nothing_compiles_but_for_shapes_that_are_new(
    policy_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every backend compilation is counted, over 20 steps of completions of varying lengths."""
    config = policy_config(
        tmp_path,
        model=policy_that_ends(policy_config(tmp_path), tmp_path / "policy"),
        rewards=[RewardSpec(function="eval.speed.workloads.even_share")],
        max_steps=20,
        max_completion_length=24,
        validation=ValidationConfig(prompts=0),
        checkpoint=CheckpointConfig(every=100),
    )
    compilations: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compilations.append(event) if event.endswith("backend_compile_duration") else None
    )
    seen: dict[str, set[Any]] = {"sample": set(), "update": set()}
    new, counts, lengths = [], [], []
    rollout = train.loop.Generator.rollout

    def note(kind: str, shape: Any) -> None:
        new.append(shape not in seen[kind])
        seen[kind].add(shape)

    def counted_rollout(self: Any, params: Any, prompt_PS: Any, *rest: Any) -> Rollout:
        note("sample", prompt_PS.shape)
        out = rollout(self, params, prompt_PS, *rest)
        lengths.append(np.asarray(out.lengths_PG).max())
        return out

    def counted_parts(*arguments: Any, **options: Any) -> Iterator[tuple[np.ndarray, MicroBatch]]:
        for indices, micro in microbatches(*arguments, **options):
            note("update", (micro.prompt_PS.shape, micro.tokens_PBT.shape))
            yield indices, micro

    def end_of_step(self: Any, step: int, metrics: Any) -> None:
        counts.append((len(compilations), sum(new)))
        compilations.clear()
        new.clear()

    monkeypatch.setattr(train.loop.Generator, "rollout", counted_rollout)
    monkeypatch.setattr(train.update, "microbatches", counted_parts)
    monkeypatch.setattr(train.loop.Run, "write", end_of_step)
    try:
        train_policy(config)
    finally:
        jax.monitoring.clear_event_listeners()
    assert len(counts) == 20 and len(set(map(int, lengths))) > 5  # lengths do vary
    assert counts[0][0] >= counts[0][1] >= 2
    assert all(compiled == shapes for compiled, shapes in counts[1:]), counts
    assert len(seen["update"]) <= 3 * len(seen["sample"]) <= 6  # rows of tokens: 1, 2, 4
