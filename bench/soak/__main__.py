"""`python -m bench.soak {kills,starts,fuzz,damage,disk,leaks,all} [--short] ...`: what a run survives, by force."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module, util

PARTS = ("kills", "starts", "fuzz", "damage", "disk")  # of `all`
SHORT = ("kills", "fuzz")  # those that --short, --seed are for, and that --short is made of
OTHERS = ("leaks",)  # takes long, and prints figures


def main(arguments: Sequence[str]) -> int:
    """Runs one part, or all of them; returns the highest exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("part", choices=(*PARTS, *OTHERS, "all"))
    chosen = parser.parse_args(arguments[:1]).part
    if chosen != "all":
        return int(import_module(f"bench.soak.{chosen}").main(arguments[1:]) or 0)
    parts = SHORT if "--short" in arguments else [name for name in PARTS if util.find_spec(f"bench.soak.{name}")]
    codes = [import_module(f"bench.soak.{name}").main(arguments[1:] if name in SHORT else []) for name in parts]
    return max(int(code or 0) for code in codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
