"""Counts the arithmetic and communication of a compiled program, read from its text.

XLA's own cost analysis counts the body of a loop once, and layers are a loop. This count multiplies a body by its
loop's `known_trip_count`; where XLA does not know it, because the end depends on the data, the caller gives the number.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

BITS = {
    **{"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64, "u64": 64},
    **{"f8e4m3fn": 8, "f8e5m2": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128},
}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)")

Route = tuple[str, tuple[int, ...]]  # a kind of collective and a group of devices

# (number of enclosing loops of unknown length, index of the loop among those beside it) -> number of its iterations
Trips = Callable[[int, int], float]


class Instruction(NamedTuple):
    """One instruction of HLO text: NAME = SHAPE OPCODE(OPERANDS), ATTRIBUTES."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str


@dataclass
class Work:
    """What one device does: FLOPs of matrix products (a multiply-add is two), and bytes that it sends."""

    flops: float = 0.0
    sent: dict[Route, float] = field(default_factory=lambda: defaultdict(float))  # bytes

    def add(self, other: "Work", times: float = 1.0) -> None:
        """Adds other work, done `times` times."""
        self.flops += times * other.flops
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


def program_work(text: str, trips: Trips = lambda depth, index: 1.0) -> Work:
    """Returns the work of one device in one run of a compiled program.

    A collective counts the bytes that a device sends around a ring of n devices: (n - 1) / n of the full array for
    all-gather, reduce-scatter and all-to-all, twice that for all-reduce; the whole operand for a permutation.

    Args:
      text: `compiled.as_text()`.
      trips: number of iterations of the loops that XLA does not know.
    """
    computations = dict(_computations(text))
    entry = next(name for name, (is_entry, _) in computations.items() if is_entry)
    memo: dict[tuple[str, int], Work] = {}

    def computation_work(name: str, depth: int) -> Work:
        if (name, depth) not in memo:
            memo[name, depth] = total = Work()
            _, instructions = computations[name]
            shapes = {item.name: item.shape for item in instructions}
            unknown = 0
            for item in instructions:
                total.flops += _flops(item, shapes)
                if sent := _sent(item, shapes):
                    total.sent[sent[0]] += sent[1]
                if item.opcode == "while":
                    body = re.search(r"body=%?([\w.\-]+)", item.attributes)
                    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', item.attributes)
                    assert body is not None
                    times = float(known[1]) if known else trips(depth, unknown)
                    unknown += not known
                    total.add(computation_work(body[1], depth + (not known)), times)
                elif item.opcode == "conditional":
                    names = [name for name in _branches(item.attributes) if name in computations]
                    branches = [computation_work(name, depth) for name in names]
                    total.add(max(branches, key=lambda branch: branch.flops, default=Work()))
                elif item.opcode in ("fusion", "call", "async-start", "custom-call"):
                    called = _CALLED.search(item.attributes)
                    if called and called[1] in computations:
                        total.add(computation_work(called[1], depth))
        return memo[name, depth]

    return computation_work(entry, 0)


def _computations(text: str) -> Iterator[tuple[str, tuple[bool, list[Instruction]]]]:
    """Yields (name, (whether it is the entry, instructions)) of every computation."""
    name, is_entry = "", False
    instructions: list[Instruction] = []
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name, is_entry, instructions = header["name"], bool(header["entry"]), []
        elif line.startswith("}") and name:
            yield name, (is_entry, instructions)
            name = ""
        elif name and (match := _INSTRUCTION.match(line)):
            instructions.append(_instruction(match["name"], match["rest"]))


def _instruction(name: str, rest: str) -> Instruction:
    """Parses "SHAPE OPCODE(OPERANDS), ATTRIBUTES"; a shape may be a tuple, and layouts contain brackets too."""
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    close = _closing(rest, start)
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[start:close]))
    return Instruction(name, shape, rest[:start], operands, rest[close + 1 :])


def _closing(text: str, start: int) -> int:
    """Returns the position of the bracket that closes the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == "(") - (text[position] == ")")
        if depth == 0:
            return position
    raise ValueError(f"unbalanced brackets: {text[:80]}")


def _dims(shape: str) -> list[int]:
    match = _SHAPE.search(shape)
    return [int(n) for n in match[2].split(",") if n] if match else []


def _bytes(shape: str) -> float:
    return sum(
        BITS.get(dtype, 32) / 8 * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in _SHAPE.findall(shape)
    )


def _branches(attributes: str) -> Sequence[str]:
    if listed := re.search(r"branch_computations=\{([^}]*)\}", attributes):
        return re.findall(r"%?([\w.\-]+)", listed[1])
    return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", attributes)


def _flops(item: Instruction, shapes: Mapping[str, str]) -> float:
    if item.opcode != "dot":
        return 0.0
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", item.attributes)
    left = _dims(shapes[item.operands[0]])
    axes = [int(n) for n in contracted[1].split(",") if n] if contracted else []
    return 2.0 * math.prod(_dims(item.shape)) * math.prod(left[axis] for axis in axes)


def _sent(item: Instruction, shapes: Mapping[str, str]) -> tuple[Route, float] | None:
    """Returns ((kind, a group of devices), bytes sent) of a collective; None for other instructions."""
    kind = item.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    operands = sum(_bytes(shapes[name]) for name in item.operands)
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", item.attributes)
        return ((kind, (int(pairs[1]), int(pairs[2]))), operands) if pairs else None
    group = _group(item.attributes)
    n = len(group)
    if n < 2:
        return None
    whole = operands * n if kind == "all-gather" else operands
    return (kind, group), whole * (n - 1) / n * (2 if kind == "all-reduce" else 1)


def _group(attributes: str) -> tuple[int, ...]:
    """Returns the first group of devices, from any of XLA's three notations.

    {{0,1},{2,3}} lists the groups; [groups, size]<=[dims]T(order) reshapes and transposes the devices' numbers;
    mesh['a'=4,'b'=2] {'a'} names mesh axes, and 'a':(1)2 the part of size 2 of axis 'a' after a part of size 1.
    """
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return tuple(int(n) for n in listed[1].split(","))
    order = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if mesh := re.search(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({order}\))? \{{([^}}]*)\}}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        numbers = _numbers(mesh[2] or str(math.prod(sizes.values())), mesh[3])
        return _mesh_group(sizes, numbers.reshape(list(sizes.values())), mesh[4])
    iota = re.search(rf"replica_groups=\[([\d,]+)\]<={order}", attributes)
    if not iota:
        return ()
    groups = _numbers(iota[2], iota[3]).reshape([int(n) for n in iota[1].split(",")])
    return tuple(int(n) for n in groups[0])


def _numbers(dims: str, order: str | None) -> np.ndarray:
    """Returns the devices' numbers in the shape "4,16", with its axes in the order "1,0"."""
    shape = [int(n) for n in dims.split(",")]
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return numbers.transpose([int(n) for n in order.split(",")]) if order else numbers


def _mesh_group(sizes: Mapping[str, int], numbers: np.ndarray, over: str) -> tuple[int, ...]:
    """Returns the device numbers of the first group over mesh axes such as "'a','b':(1)2"."""
    index: list[np.ndarray] = [np.zeros(1, int) for _ in sizes]
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", over):
        stride = sizes[name] // (int(before) * int(size)) if size else 1
        part = stride * np.arange(int(size) if size else sizes[name])
        at = list(sizes).index(name)
        index[at] = (index[at][:, None] + part).reshape(-1)
    return tuple(int(n) for n in numbers[np.ix_(*index)].reshape(-1))
