"""Where the programs print; `quiet` in all processes but the first."""

from rich.console import Console

console = Console(soft_wrap=True)
