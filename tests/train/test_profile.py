"""Laws of profiles: the trace of the steps that were asked for is written, names what it shows, and is always ended."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from models.config import REWARD_MODEL, Qwen3Config
from models.lora import Lora
from train.build import policy_layout
from train.config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    PlanConfig,
    PolicyConfig,
    ProfileConfig,
    RewardSpec,
)
from train.loop import train_policy
from train.parse import parse
from train.plan.programs import StepProgram, step_parts
from train.run.lock import owns_its_run
from train.run.profile import Profile, finish_trace

LAYERS = {"layers", "norm", "rotary", "attention", "output", "gate", "up", "down"}
PROJECTIONS = {"query", "key", "value"}
SCOPES = {  # what each program's operations are found under
    "copy": {"copy"},
    "sample": LAYERS | {"prefill", "token", "embed", "head", "draw"},
    "score tiny": LAYERS | PROJECTIONS | {"score", "embed", "head"},
    "logprobs": LAYERS | PROJECTIONS | {"predict", "embed", "head", "unpack"},
    "gradient": LAYERS | PROJECTIONS | {"predict", "embed", "head", "unpack", "loss", "accumulate"},
    "optimizer": {"optimizer"},
}


def programs_of(tiny_config: Qwen3Config, **overrides: Any) -> list[StepProgram]:
    config = PlanConfig(
        output_dir="unused",
        model=ModelConfig(architecture=tiny_config, tokenizer="unused", dtype="bfloat16"),
        data=DataConfig(train="unused"),
        rewards=[RewardSpec(model="unused", name="tiny")],
        max_steps=1,
        **{"prompts_per_step": 4, "microbatch_prompts": 2, "max_prompt_length": 16, "max_completion_length": 16},
        **overrides,
    )
    network = dataclasses.replace(tiny_config, architecture=REWARD_MODEL)
    return step_parts(config, policy_layout(config, jax.devices()[:1]), tiny_config, [network])[1]


@pytest.mark.parametrize("decoding", ["scanned", "unrolled"])
@pytest.mark.parametrize("rank", [0, 2], ids=["all weights", "adapters"])
def test_every_product_has_a_name(tiny_config: Qwen3Config, decoding: Any, rank: int) -> None:
    overrides = {"mesh": MeshConfig(decoding=decoding), "lora": Lora(rank=rank), "num_iterations": 1 + (rank > 0)}
    seen = set()
    for program in programs_of(tiny_config, **overrides):
        lowered = program.jitted.lower(*program.arguments, **program.options)
        text = lowered.as_text(debug_info=True)
        names = {
            key: set(re.split(r"[/()]", name)) for key, name in re.findall(r'^(#loc\d+) = loc\("([^"]+)"', text, re.M)
        }
        scopes, words = SCOPES[program.name], set().union(*names.values())
        if program.name == "sample" and decoding == "scanned":
            scopes = scopes | PROJECTIONS | {"cache"}
        assert scopes <= words, (program.name, scopes - words)
        for key in re.findall(r"stablehlo\.dot_general .* loc\((#loc\d+)\)", text):
            named = names[key] & (LAYERS | PROJECTIONS | {"head", "qkv"}) or program.name == "copy"  # which is one name
            assert named, (program.name, names[key])
        seen.add(program.name)
    assert seen == set(SCOPES) - ({"logprobs"} if rank == 0 else set())


@pytest.fixture
def compiled_anew() -> Iterator[None]:
    """No compiled program comes from the cache: names are no part of its key, so they may be those of another day."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


def test_a_run_writes_a_trace_of_the_steps_that_were_asked_for(
    policy_config: Callable[..., PolicyConfig],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    compiled_anew: None,
) -> None:
    log = LogConfig(tensorboard=False, progress=False, profile=ProfileConfig(start=2, steps=1))
    train_policy(policy_config(tmp_path, log=log, checkpoint=CheckpointConfig(every=9)))
    (trace,) = (tmp_path / "run" / "profile" / "process_0").rglob("*.xplane.pb")
    content = trace.read_bytes()
    for scope in (SCOPES["sample"] | SCOPES["gradient"] | SCOPES["score tiny"] | SCOPES["optimizer"]) - {"copy"}:
        assert re.search(rb"[/(]" + scope.encode() + rb"[/)]", content), scope
    for phase in (b"generate", b"reward", b"update", b"step"):
        assert phase in content
    assert capsys.readouterr().out.count("profile written") == 1
    assert list(trace.parent.glob("*.trace.json.gz"))  # what Perfetto opens


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is called of JAX's profiler, which does nothing."""
    calls: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **_: calls.append(f"start {folder.name}"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


def test_the_trace_ends_when_its_last_step_is_logged(traced: list[str], tmp_path: Path) -> None:
    profile, calls = Profile(ProfileConfig(start=2, steps=2), tmp_path, 0), []
    for step in range(1, 6):
        with profile.step(step):
            calls.append(len(traced))
            profile.logged(step - 1)  # a step is logged while the next one runs
    assert traced == ["start process_0", "stop"] and calls == [0, 1, 1, 1, 2]


def test_a_run_that_ends_inside_its_trace_finishes_it(
    traced: list[str], policy_config: Callable[..., PolicyConfig], tmp_path: Path
) -> None:
    @owns_its_run
    def program(config: PolicyConfig) -> None:
        with Profile(ProfileConfig(start=1, steps=2), Path(config.output_dir), 0).step(1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        program(policy_config(tmp_path))
    assert traced == ["start process_0", "stop"]
    finish_trace()  # there is none any more
    assert len(traced) == 2


def test_a_run_that_goes_on_behind_the_start_says_so_once(
    traced: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = Profile(ProfileConfig(start=3, steps=4), tmp_path, 3)
    for step in (4, 5):
        with profile.step(step):
            pass
    assert not traced
    said = "no profile: step 3, where it starts, is done already; set log.profile.start above 3"
    assert capsys.readouterr().out.replace("\n", " ").count(said) == 1


def test_settings(policy_config: Callable[..., PolicyConfig], tmp_path: Path) -> None:
    for name in ("start", "steps"):
        with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
            ProfileConfig(**{name: 0})
    with pytest.raises(ValueError, match="log.profile: expected steps up to max_steps = 3, got 3 to 4"):
        policy_config(tmp_path, log=LogConfig(profile=ProfileConfig(start=3, steps=2)))
    required = ["--output_dir=x", "--model.path=x", "--data.train=x", "--rewards=[{model: x}]", "--max_steps=9"]
    for arguments in (["--log.profile={start: 4, steps: 1}"], ["--log.profile.start=4", "--log.profile.steps=1"]):
        config = parse(PolicyConfig, [*required, *arguments], "python -m train policy")
        assert config.log.profile == ProfileConfig(start=4, steps=1)
