"""Seconds of a compiled program on its chip, from its text: a roofline of its kernels, or the compiler's own cycles.

A kernel of a GPU takes max(FLOPs / peak, bytes / bandwidth) and a launch. An instruction of a TPU takes the cycles that
its compiler estimates; where it estimates none (kernels of one's own), a roofline as on a GPU. A collective takes at
least the bytes that it sends over the slowest link on its ring. A loop counts as often as it runs. What is counted and
what is not: docs/plan.md.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from train.plan.chips import Chip
from train.plan.hlo import Computation, Instruction, Program, Route, Trips, product_flops, sent_bytes, shape_bytes

LAUNCH_SECONDS = 2.5e-6  # of a kernel on a GPU
WAIT_SECONDS = 12e-6  # of the host for a predicate that a GPU has computed, and for the launch of what follows
# Instructions that run nothing of their own.
FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("opt-barrier", "add-dependency"),
)
_ALLOCATIONS = ("AllocateBuffer", "AssumeGatherIndicesInBound", "PrepareAsyncCallStart", "PrepareAsyncCallDone")
_SLICES = ("dynamic-slice", "gather", "slice")
_UPDATES = ("dynamic-update-slice", "scatter")
_VIEWS = ("bitcast", "reshape", "transpose", "copy")
_CYCLES = re.compile(r'"estimated_cycles":"(\d{1,18})"')  # 2^63 - 1 (19 digits) means that there is no estimate
_COST_ESTIMATE = re.compile(r'"cost_estimate":\{"flops":"(\d+)".*?"bytes_accessed":"(\d+)"')

Links = Callable[[tuple[int, ...]], float]  # a group of devices -> bytes per second that each sends to the others


class KernelCost(NamedTuple):
    """What one call of a kernel of one's own does, where its text does not say it."""

    flops: float
    bytes: float


class Item(NamedTuple):
    """Instructions of a program that do the same at the same place."""

    loops: str  # the loops around it and how often they run, e.g. "512 x 28"
    opcode: str
    scope: str


@dataclass
class Work:
    """What one device does in one call of a program."""

    flops: float = 0.0  # of matrix products; a multiply-add is two
    bytes: float = 0.0  # of main memory, read and written
    kernels: float = 0.0  # launches; on a TPU instructions
    host_waits: float = 0.0
    seconds: float = 0.0
    sent: dict[Route, float] = field(default_factory=lambda: defaultdict(float))  # bytes
    link_seconds: float = 0.0  # of `seconds`: those of collectives
    items: dict[Item, "Work"] = field(default_factory=dict)  # the same, by place

    def add(self, other: "Work", times: float = 1.0) -> None:
        """Adds other work, done `times` times; not its `items`."""
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        self.kernels += times * other.kernels
        self.host_waits += times * other.host_waits
        self.seconds += times * other.seconds
        self.link_seconds += times * other.link_seconds
        for key, count in other.sent.items():
            self.sent[key] += times * count

    def by_axis(self, sizes: Mapping[str, int]) -> dict[tuple[str, str], float]:
        """Returns the bytes sent, by kind of collective and by the mesh axes that it spans ("fsdp", "data+fsdp")."""
        by_axis: dict[tuple[str, str], float] = {}
        for (kind, group), count in self.sent.items():
            places = np.stack(np.unravel_index(np.array(group), tuple(sizes.values())))
            axes = "+".join(name for name, place in zip(sizes, places, strict=True) if len(set(place)) > 1)
            by_axis[kind, axes] = by_axis.get((kind, axes), 0.0) + count
        return by_axis


class Roofline:
    """The work of a program on a chip.

    Args:
      chip: the device; None: counts alone, seconds stay 0.
      trips: number of iterations of the loops that the compiler does not know.
      taken: scope of a conditional -> which of its branches runs (0: of a predicate the one for false). Of others the
        one that takes least counts.
      kernels: part of the scope or name of a kernel of one's own -> its cost.
      links: bandwidth between the devices of a group.
    """

    def __init__(
        self,
        program: Program,
        chip: Chip | None = None,
        trips: Trips = lambda depth, index: 1.0,
        *,
        taken: Mapping[str, int] | None = None,
        kernels: Mapping[str, KernelCost] | None = None,
        links: Links = lambda group: math.inf,
    ) -> None:
        self._program, self._chip, self._trips, self._links = program, chip, trips, links
        self._taken, self._kernels, self._fused = taken or {}, kernels or {}, _FusedBytes(program)

    def work(self) -> Work:
        """Returns the work of one call."""
        return self._computation(self._program.entry, 0, "")

    def _computation(self, name: str, depth: int, loops: str) -> Work:
        total, unknown = Work(), 0
        computation = self._program.computations[name]
        for item in computation.values():
            if item.opcode == "while":
                times = self._program.iterations(item)
                inside = depth + (times is None)
                turns = self._trips(depth, unknown) if times is None else times
                unknown += times is None
                if not turns:
                    continue
                around = f"{loops} x {turns:g}" if loops else f"{turns:g}"
                body = self._computation(self._program.body(item), inside, around)
                if times is None and self._on_gpu:
                    body.host_waits += 1
                    body.seconds += WAIT_SECONDS
                self._add(total, body, turns)
            elif item.opcode == "conditional":
                self._add(total, self._branch(item, depth, loops))
            elif item.opcode == "call" and item.called in self._program.computations:
                self._add(total, self._computation(str(item.called), depth, loops))
            elif item.opcode not in FREE and not item.opcode.endswith(("-done", "-update")):
                one = self._instruction(item, computation)
                if one is not None:
                    one.items = {Item(loops, item.opcode, item.scope or item.name): one}
                    self._add(total, one)
        return total

    def _add(self, total: Work, part: Work, times: float = 1.0) -> None:
        total.add(part, times)
        for key, work in part.items.items():
            total.items.setdefault(key, Work()).add(work, times)

    def _branch(self, item: Instruction, depth: int, loops: str) -> Work:
        branches = [name for name in item.branches if name in self._program.computations]
        chosen = next((branch for scope, branch in self._taken.items() if f"/{scope}/" in item.scope), None)
        if chosen is not None and chosen < len(branches):
            branches = [branches[chosen]]
        works = [self._computation(name, depth, loops) for name in branches]
        work = min(works, key=lambda work: (work.seconds, work.flops), default=Work())
        if self._on_gpu:
            work.host_waits += 1
            work.seconds += WAIT_SECONDS
        return work

    @property
    def _on_gpu(self) -> bool:
        return self._chip is not None and self._chip.gpu is not None

    def _instruction(self, item: Instruction, computation: Computation) -> Work | None:
        """Returns the work of one instruction; None if it runs nothing."""
        own = next((cost for part, cost in self._kernels.items() if part in item.scope or part in item.name), None)
        if item.opcode == "custom-call":
            if any(f'"{target}"' in item.attributes for target in _ALLOCATIONS):
                return None
            if own is None and (estimate := _COST_ESTIMATE.search(item.attributes)):
                own = KernelCost(float(estimate[1]), float(estimate[2]))
        work = Work(kernels=1.0)
        if own is not None and item.opcode == "custom-call":
            work.flops, work.bytes = own
        else:
            work.flops = self._flops(item, computation)
            work.bytes = self._bytes(item, computation)
        sent = self._sent(item, computation)
        for route, count in sent:
            work.sent[route] += count
        if self._chip is None:
            return work
        roof = max(work.flops / self._chip.flops, work.bytes / self._chip.bandwidth)
        if sent:
            work.link_seconds = sum(count / self._links(route[1]) for route, count in sent)
            work.seconds = max(work.link_seconds, work.bytes / self._chip.bandwidth)
        elif self._chip.gpu is not None:
            work.seconds = roof
        elif cycles := _CYCLES.search(item.attributes):
            work.seconds = float(cycles[1]) / self._chip.clock
        elif own is not None or "estimated_cycles" in item.attributes:
            work.seconds = roof
        if self._on_gpu:
            work.seconds += LAUNCH_SECONDS
        return work

    def _flops(self, item: Instruction, computation: Computation) -> float:
        """Counts the products of an instruction and of what it calls."""
        called = self._program.computations.get(item.called or "", {})
        if item.opcode in ("fusion", "custom-call") and called:
            return sum(self._flops(part, called) for part in called.values())
        return product_flops(item, computation)

    def _sent(
        self, item: Instruction, computation: Computation, in_fusion: bool = False
    ) -> Sequence[tuple[Route, float]]:
        """Returns what an instruction and what it calls send.

        A TPU's reduce-scatter is written as one fusion: an all-reduce, of which each device takes its slice.
        """
        if sent := sent_bytes(item, computation):
            (kind, group), count = sent
            users = [user.opcode for user in computation.values() if item.name in user.operands]
            if in_fusion and kind == "all-reduce" and set(users) == {"dynamic-slice"}:
                return [(("reduce-scatter", group), count / 2)]
            return [sent]
        called = self._program.computations.get(item.called or "", {})
        if item.opcode != "fusion" or not called:
            return []
        return [sent for part in called.values() for sent in self._sent(part, called, in_fusion=True)]

    def _bytes(self, item: Instruction, computation: Computation) -> float:
        """Returns the bytes of main memory that an instruction reads and writes."""

        def size(name: str) -> float:
            return shape_bytes(computation[name].shape) if name in computation else 0.0

        if item.opcode == "fusion" and item.called in self._program.computations:
            return self._fused.count(item, computation)
        if item.opcode in _SLICES:
            return 2 * shape_bytes(item.shape)
        if item.opcode in _UPDATES:
            return 2 * size(item.operands[-1 if item.opcode == "scatter" else 1])
        return shape_bytes(item.shape) + sum(size(name) for name in item.operands)


class _FusedBytes:
    """Bytes of main memory of a fused kernel: operands and results; what is sliced or updated in place as that much."""

    def __init__(self, program: Program) -> None:
        self._computations = program.computations
        self._users: dict[str, dict[str, list[Instruction]]] = {}  # computation -> instruction -> those that read it

    def count(self, item: Instruction, computation: Computation) -> float:
        name = str(item.called)
        called = self._computations[name]
        total = 0.0
        for part in called.values():
            if part.opcode == "parameter":
                number = _parameter_number(part)
                outer = item.operands[number] if number < len(item.operands) else ""
                whole = shape_bytes(computation[outer].shape if outer in computation else part.shape)
                touched = self._touched(part.name, name)
                total += whole if touched is None else min(whole, touched)
            if part.is_root:
                total += min(self._written(part, called), shape_bytes(item.shape))
        return total

    def _touched(self, name: str, computation: str) -> float | None:
        """Returns the bytes that are taken out of an array by slicing alone; None if it is read whole."""
        total = 0.0
        for user in self._readers(computation).get(name, ()):
            if user.opcode in _SLICES and user.operands[0] == name:
                total += shape_bytes(user.shape)
                continue
            if user.opcode in _UPDATES and user.operands[0] == name:
                continue  # updated in place: `_written` counts it
            if user.opcode in _VIEWS:
                inside = [self._touched(user.name, computation)]
            elif user.opcode == "fusion" and user.called in self._computations:
                inside = [
                    self._touched(part.name, str(user.called))
                    for part in self._computations[str(user.called)].values()
                    if part.opcode == "parameter" and user.operands[_parameter_number(part)] == name
                ]
            else:
                return None
            for count in inside:
                if count is None:
                    return None
                total += count
        return total

    def _readers(self, computation: str) -> Mapping[str, Sequence[Instruction]]:
        if computation not in self._users:
            users: dict[str, list[Instruction]] = defaultdict(list)
            for part in self._computations[computation].values():
                for name in set(part.operands):
                    users[name].append(part)
            self._users[computation] = users
        return self._users[computation]

    def _written(self, root: Instruction, called: Computation) -> float:
        """Returns the bytes that a root writes; of an update in place those of the update."""
        inside = [called[name] for name in root.operands if name in called]
        if root.opcode == "dynamic-update-slice" and len(inside) > 1:
            return shape_bytes(inside[1].shape)
        if root.opcode == "scatter" and inside:
            return 2 * shape_bytes(inside[-1].shape)  # read, added to, written
        if root.opcode == "tuple":
            return sum(self._written(part, called) for part in inside)
        if root.opcode in ("bitcast", "convert", "copy") and inside and inside[0].opcode == "dynamic-update-slice":
            return self._written(inside[0], called)
        if root.opcode == "fusion" and root.called in self._computations:
            fused = self._computations[str(root.called)]
            return sum(self._written(part, fused) for part in fused.values() if part.is_root)
        return shape_bytes(root.shape)


def _parameter_number(part: Instruction) -> int:
    return int(part.attributes.split(")")[0])


def link_speed(chip: Chip, places: Sequence[tuple[int, tuple[int, ...]]]) -> Links:
    """Returns the bandwidth of groups of devices.

    A ring within a GPU's host or along axes of a TPU's torus goes at `Chip.link`, on a torus times the number of axes
    that the group spans. A ring over hosts or slices leaves each of them once for every member that it has there.

    Args:
      places: of each device, in the order of the mesh: (host or slice, coordinates on the torus).
    """

    def speed(group: tuple[int, ...]) -> float:
        members = [places[index] for index in group]
        outer = {place for place, _ in members}
        axes = sum(len(set(axis)) > 1 for axis in zip(*(at for _, at in members), strict=True))
        within = chip.link * max(axes, 1)
        return within if len(outer) == 1 else min(within, chip.network * len(members) / len(outer))

    return speed
