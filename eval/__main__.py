"""`python -m eval {generate,reward,compare,report,reliability,speed} ...`."""

import sys
from collections.abc import Callable
from typing import Any

USAGE = """usage: python -m eval {generate,reward,compare,report,reliability,speed} ...

  generate  --checkpoint RUN[@STEP]|DIR --data FILE --out R.jsonl             completions of a policy
  reward    --responses R.jsonl --reward_model PATH --out SCORED.jsonl        a reward model's scores of them
  compare   RUN_A RUN_B --judge PATH --out DIR                                win rate and gains of two policies
  report    RUN [RUN ...] --reward_models PATH ... --compare DIR --out DIR    report.html and report.md
  reliability  RM [RM ...]                                                    how sure reward models are, and how right
  speed     --workload w1 --json OUT.json                                     seconds of a step and of its parts

  --help after a command explains its settings."""


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in ("generate", "reward", "compare", "report", "reliability", "speed"):
        print(USAGE, file=sys.stderr)
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    from models.compile_cache import enable_compile_cache
    from train.metrics import SetupError

    parse, program = command(arguments[0])
    try:
        config = parse(arguments[1:])
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    enable_compile_cache()
    try:
        program(config)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def command(name: str) -> tuple[Callable[[list[str]], Any], Callable[[Any], Any]]:
    """The parser and the program behind a command, imported when they are needed."""
    if name == "generate":
        from eval.generate import generate, parse_generate

        return parse_generate, generate
    if name == "reward":
        from eval.reward import parse_reward, reward

        return parse_reward, reward
    if name == "compare":
        from eval.compare import compare, parse_compare

        return parse_compare, compare
    if name == "reliability":
        from eval.reliability import draw_reliability, parse_reliability

        return parse_reliability, draw_reliability
    if name == "speed":
        from eval.speed import parse_speed, speed

        return parse_speed, speed
    from eval.report import parse_report, report

    return parse_report, report


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
