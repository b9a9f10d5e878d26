"""The config of `train plan`."""

import math
from dataclasses import dataclass

from train.config.checks import check_at_least
from train.config.policy import PolicyConfig

CHIP_NAMES = ("v4", "v5e", "v5p", "v6e", "A100", "H100", "H200", "B200")  # train.plan.chips has their figures


@dataclass(frozen=True, kw_only=True)
class PlanConfig(PolicyConfig):
    """`train plan`: what a policy's run needs of its devices. A policy's settings, and the devices to plan for."""

    # how many to plan for: 8, or of each chip H200=8,v5p=64; default: the product of the mesh's sizes
    devices: int | str | None = None
    # the devices' kind (v4, v5e, v5p, v6e, A100, H100, H200, B200), or several with commas; default: memory of all
    chip: str | None = None
    suggest: bool = False  # try meshes, the likeliest first, with smaller micro-batches where needed; show the best
    tries: int = 4  # with suggest: how many meshes of each kind of chip to compile for
    compare: bool = False  # one table of all meshes and chips that were tried; always so for several chips
    price_per_chip_hour: float | str | None = None  # in any currency: 3.5 for all chips, or H200=3.5,v5p=4.2
    top: int = 0  # list so many of the most expensive kernels of each program, with the named scope of each
    out: str | None = None  # a JSON file to write with all figures; of several plans those of the best
    hlo: str | None = None  # a directory to write each program's compiled text to, as NAME.hlo

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "tries")
        check_at_least(self, 0, "top")
        for chip in self.chips:
            if chip not in CHIP_NAMES:
                raise ValueError(f"chip: expected one or more of {', '.join(CHIP_NAMES)}, got {chip!r}")
        _ = self.prices, self.counts

    @property
    def chips(self) -> tuple[str, ...]:
        """The kinds of devices to plan for, each once; none: all, by memory alone."""
        return tuple(dict.fromkeys(name.strip() for name in self.chip.split(","))) if self.chip is not None else ()

    @property
    def prices(self) -> dict[str, float]:
        """The price of an hour of each chip that has one."""
        prices = _by_chip(self.price_per_chip_hour)
        if prices is None or not all(0 <= price < math.inf for price in prices.values()):
            raise ValueError(
                "price_per_chip_hour: expected a price such as 3.5, or H200=3.5,v5p=4.2, "
                f"got {self.price_per_chip_hour!r}"
            )
        return prices

    @property
    def counts(self) -> dict[str, int]:
        """The number of devices of each chip that has one."""
        counts = _by_chip(self.devices)
        if counts is None or not all(count >= 1 and count == int(count) for count in counts.values()):
            raise ValueError(f"devices: expected a number such as 8, or H200=8,v5p=64, got {self.devices!r}")
        return {chip: int(count) for chip, count in counts.items()}


def _by_chip(given: float | str | None) -> dict[str, float] | None:
    """Reads one number for all chips, or NUMBER of each as CHIP=NUMBER,...; None if it is neither."""
    values: dict[str, float] = {}
    for part in [] if given is None else str(given).split(","):
        chip, equals, number = part.strip().rpartition("=")
        if bool(equals) != (chip in CHIP_NAMES) or (values and not equals):
            return None
        try:
            values |= dict.fromkeys([chip] if equals else CHIP_NAMES, float(number))
        except ValueError:
            return None
    return values if all(math.isfinite(value) for value in values.values()) else None
