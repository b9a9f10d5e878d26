"""`python -m train {sft,reward,policy} --config FILE [--key value ...]`; also inspect, plan and export."""

import sys
from importlib import import_module
from typing import Any

from train.config import ExportConfig, PlanConfig, PolicyConfig, RewardModelConfig, SftConfig
from train.console import in_one_line
from train.heaps import limit_heaps
from train.parse import no_command, parse, take

USAGE = """usage: python -m train {sft,reward,policy} --config FILE [--variant NAME] [--key value ...] [--show [N]]
       python -m train {sft,reward,policy} --config FILE --resume previous
       python -m train {sft,reward,policy} --config FILE --dry_run [--devices N] [--chip H200]
       python -m train inspect {sft,reward,policy} --config FILE [--rows N]
       python -m train plan --config FILE [--mesh data=1,fsdp=64,tensor=4] [--chip v5p,H200] [--suggest true]
       python -m train export --checkpoint RUN[@STEP] --out DIR

  sft      supervised fine-tuning of a policy
  reward   a reward model from comparisons (Bradley-Terry, Plackett-Luce)
  policy   GOPO, GRPO and their relatives against one or more rewards
  inspect  the data of a run: rows, lengths in tokens, duplicates, and N (3) rows as the models see them
  plan     memory, seconds and price of a policy's run, by its devices' own compilers; needs none of the devices
  export   a Hugging Face directory of a policy or a reward model, or of the adapters alone (PEFT)

  --variant dapo (or another name in configs/variants) makes a policy's run that algorithm's, whatever FILE says.
  --help after a program explains its settings; --print_config shows their values. Started again, a run goes on where
  it was.
  --dry_run prints data, networks, memory and schedule; --show the first N (3) prompts with the token ids that the
  models see. Neither trains anything.
  --resume previous goes on from the checkpoint before the newest one, which may be damaged; that one is kept as
  STEP.aside. Give it once: each start with it goes one checkpoint back."""
LEARNING: dict[str, type[Any]] = {"sft": SftConfig, "reward": RewardModelConfig, "policy": PolicyConfig}
KINDS: dict[str, type[Any]] = LEARNING | {"plan": PlanConfig, "export": ExportConfig}
PROGRAMS = {  # the module, imported when it is needed, and its function of the config and the options
    "sft": ("train.supervised.sft", "train_sft"),
    "reward": ("train.supervised.reward_model", "train_reward_model"),
    "policy": ("train.loop", "train_policy"),
    "plan": ("train.plan.command", "plan"),
    "export": ("train.export", "export"),
    "inspect": ("train.plan.inspect", "inspect"),
    "show": ("train.plan.show", "show_rows"),
    "dry_run": ("train.plan.dry_run", "dry_run"),
}
# Options that are no settings of a run: what is printed instead of training.
PREVIEWS = {
    "dry_run": "print data, networks, memory and schedule; train nothing",
    "devices": "with --dry_run: how many to plan for (default: those of the mesh)",
    "chip": "with --dry_run: their kind, e.g. H200 or v5p (default: all kinds)",
    "show": "print the first so many prompts (3) with the token ids that the models see; train nothing",
}
RESUME = {"resume": "previous: go on from the checkpoint before the newest one, which is set aside"}
INSPECT = {"rows": "how many rows to print as the models see them (default: 3)"}


def main(arguments: list[str]) -> int:
    words, commands = arguments, [*KINDS, "inspect"]
    if words[:1] == ["inspect"]:
        words, commands = words[1:], [*LEARNING]
    if not words or words[0] not in commands:
        return no_command(words, commands, USAGE)
    try:
        command, rest, task, options = what_to_do(arguments)
        program_name = f"python -m train {'inspect ' if task == 'inspect' else ''}{command}"
        extra = INSPECT if task == "inspect" else PREVIEWS | RESUME if command in LEARNING else None
        config = parse(KINDS[command], rest, program_name, options=extra)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {in_one_line(str(error))}", file=sys.stderr)
        return 2
    from train.running import exit_code

    module, name = PROGRAMS[task]
    program = getattr(import_module(module), name)
    return exit_code(lambda: program(config, **options), own_devices=task in ("plan", "dry_run"))


def what_to_do(arguments: list[str]) -> tuple[str, list[str], str, dict[str, Any]]:
    """Splits a command line into the command whose config is read, its settings, a key of `PROGRAMS`, and options.

    Raises:
      ValueError: an option that is not a setting has no value, or a wrong one.
    """
    command, *rest = arguments
    if command == "inspect":
        command, *rest = rest
        rest, rows = take(rest, "--rows", alone="3")
        return command, rest, "inspect", {"count": positive("--rows", rows or "3")}
    if command in LEARNING:
        rest, shown = take(rest, "--show", alone="3")
        rest, dry = take(rest, "--dry_run", alone="true")
        rest, devices = take(rest, "--devices")
        rest, chip = take(rest, "--chip")
        if dry not in (None, "true", "false"):
            raise ValueError(f"--dry_run: expected nothing, true or false behind it, got {dry!r}")
        if dry == "true":
            return command, rest, "dry_run", {"devices": positive("--devices", devices), "chip": chip}
        if devices is not None or chip is not None:
            raise ValueError("--devices, --chip: are for --dry_run, which plans a run without training it")
        if shown is not None:
            return command, rest, "show", {"count": positive("--show", shown)}
        rest, resume = take(rest, "--resume")
        if resume not in (None, "previous"):
            raise ValueError(
                f"--resume: expected previous behind it, got {resume!r}; a run that is started again goes on from its "
                f"newest checkpoint without the option"
            )
        return command, rest, command, {"previous": True} if resume else {}
    return command, rest, command, {}


def positive(name: str, value: str | None) -> int | None:
    """The whole number behind an option; None without the option."""
    if value is not None and (not value.isdigit() or int(value) < 1):
        raise ValueError(f"{name}: expected a number of at least 1, got {value!r}")
    return None if value is None else int(value)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in LEARNING:
        limit_heaps()
    sys.exit(main(sys.argv[1:]))
