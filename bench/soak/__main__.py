"""`python -m bench.soak {kills,fuzz,damage,disk,leaks,all} [--short] ...`: what a run survives, tried by force."""

import sys
from collections.abc import Sequence
from importlib import import_module, util

PARTS = ("kills", "fuzz", "damage", "disk")  # of `all`
OTHERS = ("leaks",)  # takes long, and prints figures


def main(arguments: Sequence[str]) -> int:
    """Runs one part, or all of them; returns the highest exit code."""
    name, *rest = arguments or ("",)
    if name == "all":
        parts = [part for part in PARTS if util.find_spec(f"bench.soak.{part}") is not None]
        return max([import_module(f"bench.soak.{part}").main(rest) for part in parts])
    if name not in (*PARTS, *OTHERS):
        print(f"usage: python -m bench.soak {{{','.join((*PARTS, *OTHERS, 'all'))}}} [--short] ...", file=sys.stderr)
        return 0 if name in ("-h", "--help") else 2
    return int(import_module(f"bench.soak.{name}").main(rest))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
