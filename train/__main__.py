"""`python -m train {sft,reward,policy} --config FILE [--key value ...]`."""

import sys
from collections.abc import Callable
from typing import Any

from train.config import PolicyConfig, RewardModelConfig, SupervisedConfig, parse

USAGE = """usage: python -m train {sft,reward,policy} --config FILE [--key value ...]

  sft      supervised fine-tuning of a policy
  reward   a reward model from comparisons (Bradley-Terry)
  policy   GOPO, GRPO and their relatives against one or more rewards

  --print_config shows every setting; --help explains them. Started again, a run goes on where it was."""


def main(arguments: list[str]) -> int:
    kinds: dict[str, type[Any]] = {"sft": SupervisedConfig, "reward": RewardModelConfig, "policy": PolicyConfig}
    if not arguments or arguments[0] not in kinds:
        print(USAGE, file=sys.stderr)
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    command, *rest = arguments
    try:
        config = parse(kinds[command], rest, f"python -m train {command}")
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from models.compile_cache import enable_compile_cache
    from train.metrics import SetupError

    enable_compile_cache()
    try:
        program(command)(config)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def program(command: str) -> Callable[[Any], None]:
    """The function behind a command, imported when it is needed."""
    if command == "sft":
        from train.sft import train_sft

        return train_sft
    if command == "reward":
        from train.reward_model import train_reward_model

        return train_reward_model
    from train.loop import train_policy

    return train_policy


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
