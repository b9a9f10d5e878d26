"""`python -m train {sft,reward,policy} --config FILE [--key value ...]`, and `python -m train export`."""

import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

from train.config import ExportConfig, PlanConfig, PolicyConfig, RewardModelConfig, SftConfig, parse

USAGE = """usage: python -m train {sft,reward,policy} --config FILE [--key value ...] [--show [N]]
       python -m train plan --config FILE [--mesh data=1,fsdp=64,tensor=4] [--devices N] [--chip v5p] [--suggest true]
       python -m train export --checkpoint RUN[@STEP] --out DIR

  sft      supervised fine-tuning of a policy
  reward   a reward model from comparisons (Bradley-Terry, Plackett-Luce)
  policy   GOPO, GRPO and their relatives against one or more rewards
  plan     what a policy's run needs of its devices: memory, arithmetic, communication; needs none of them
  export   a Hugging Face directory of a policy or a reward model, or of the adapters alone (PEFT)

  --print_config shows every setting; --help explains them. Started again, a run goes on where it was.
  --show prints the first N (3) prompts with the token ids that the models see, and trains nothing."""


def main(arguments: list[str]) -> int:
    kinds: dict[str, type[Any]] = {"sft": SftConfig, "reward": RewardModelConfig, "policy": PolicyConfig}
    kinds |= {"plan": PlanConfig, "export": ExportConfig}
    if not arguments or arguments[0] not in kinds:
        print(USAGE, file=sys.stderr)
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    command, *rest = arguments
    try:
        count = 0
        if command in ("sft", "reward", "policy"):
            rest, count = take_show(rest)
        if command == "plan":
            rest = spread_mesh(rest)
        config = parse(kinds[command], rest, f"python -m train {command}")
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from models.compile_cache import enable_compile_cache
    from train import processes
    from train.metrics import SetupError, console

    try:
        if command != "plan":  # which makes its own devices
            enable_compile_cache()
            processes.start()
            console.quiet = not processes.is_first()
        if count:
            from train.show import show

            show(config, count)
        else:
            program(command)(config)
    except (SetupError, processes.JoinError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except (Exception, KeyboardInterrupt):
        if not processes.are_several():
            raise
        traceback.print_exc()
        code = 1
    else:
        return 0
    if processes.are_several():
        processes.leave(code)
    return code


def spread_mesh(arguments: list[str]) -> list[str]:
    """`--mesh data=1,fsdp=64` as `--mesh.data=1 --mesh.fsdp=64`."""
    spread, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        key, equals, value = argument.partition("=")
        if key != "--mesh":
            spread.append(argument)
            continue
        for size in (value if equals else rest.pop(0) if rest else "").split(","):
            if not re.fullmatch(r"(data|fsdp|tensor)=-?\d+", size):
                raise ValueError(f"--mesh: expected sizes such as data=1,fsdp=64,tensor=4, got {size!r}")
            spread.append(f"--mesh.{size}")
    return spread


def take_show(arguments: list[str]) -> tuple[list[str], int]:
    """The other arguments, and N of `--show [N]` or `--show=N`; 0 without it.

    Raises:
      ValueError: N is not a number of at least 1.
    """
    others, count, rest = [], 0, list(arguments)
    while rest:
        argument = rest.pop(0)
        key, equals, value = argument.partition("=")
        if key != "--show":
            others.append(argument)
            continue
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "3"
        if not value.isdigit() or int(value) < 1:
            raise ValueError(f"--show: expected how many prompts, at least 1, got {value!r}")
        count = int(value)
    return others, count


def program(command: str) -> Callable[[Any], None]:
    """The function behind a command, imported when it is needed."""
    if command == "sft":
        from train.sft import train_sft

        return train_sft
    if command == "reward":
        from train.reward_model import train_reward_model

        return train_reward_model
    if command == "plan":
        from train.plan import plan

        return plan
    if command == "export":
        from train.export import export

        return export
    from train.loop import train_policy

    return train_policy


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
