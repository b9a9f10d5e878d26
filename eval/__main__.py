"""`python -m eval COMMAND ...`: what measures, judges and explains what was trained."""

import sys
from importlib import import_module

from train.console import in_one_line
from train.parse import no_command

EVAL_USAGE = """usage: python -m eval COMMAND ...

  generate  --checkpoint RUN[@STEP]|DIR --data FILE --out R.jsonl             completions of a policy
  reward    --responses R.jsonl --reward_model PATH --out SCORED.jsonl        a reward model's scores of them
  judge     A.jsonl B.jsonl --backend server --model NAME --out DIR           which of two policies answers better
  ifeval    --responses R.jsonl --out OUT.json                                how well instructions are followed
  summaries --responses R.jsonl --out OUT.json                                ROUGE, length, novelty of summaries
  chat      --checkpoint RUN[@STEP]|DIR                                       talk to a policy
  compare   RUN_A RUN_B --judge PATH --out DIR                                win rate and gains of two policies
  report    RUN [RUN ...] --reward_models PATH ... --compare DIR --out DIR    report.html and report.md
  reliability  RM [RM ...]                                                    how sure reward models are, and how right
  theory    --out DIR                                                         tabular policies beside their fixed points
  lab       --out DIR [--part PART]                                           does ranking help: a controlled study
  speed     --workload w1 --json OUT.json                                     seconds of a step and of its parts
  device    --out OUT.md                                                      an accelerator beside its plan and torch

  --help after a command explains its settings."""

COMMANDS = {  # the module, imported when it is needed, with the parser of its command line and its program
    "generate": ("eval.texts.generate", "parse_generate", "generate"),
    "reward": ("eval.texts.score", "parse_reward", "reward"),
    "judge": ("eval.judges.command", "parse_judge", "judge_policies"),
    "ifeval": ("eval.texts.ifeval", "parse_ifeval", "measure_ifeval"),
    "summaries": ("eval.texts.summaries", "parse_summaries", "measure_summaries"),
    "chat": ("eval.texts.chat", "parse_chat", "chat"),
    "compare": ("eval.report.compare", "parse_compare", "compare"),
    "report": ("eval.report.report", "parse_report", "report"),
    "reliability": ("eval.report.reliability", "parse_reliability", "draw_reliability"),
    "theory": ("eval.theory.command", "parse_theory", "theory"),
    "lab": ("eval.lab.command", "parse_lab", "lab"),
    "speed": ("eval.speed.speed", "parse_speed", "speed"),
    "device": ("eval.speed.device", "parse_device", "measure_device"),
}
SEVERAL = ("generate", "reward")  # those that may be one of several processes


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in COMMANDS:
        return no_command(arguments, COMMANDS, EVAL_USAGE)
    module, *names = COMMANDS[arguments[0]]
    parse, program = (getattr(import_module(module), name) for name in names)
    try:
        config = parse(arguments[1:])
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {in_one_line(str(error))}", file=sys.stderr)
        return 2
    from train.running import exit_code

    return exit_code(lambda: program(config), several=arguments[0] in SEVERAL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
