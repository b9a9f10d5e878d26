"""Reads the text of a compiled program (HLO): instructions, shapes, arithmetic, traffic between devices.

What a program costs is `train.plan.roofline`; here is what one instruction says.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

BITS = {
    **{"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64, "u64": 64},
    **{"f8e4m3fn": 8, "f8e5m2": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128},
}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)")
_FAST_MEMORY = "S(1)"  # in a layout: on a TPU the array lies in its vector memory, not in its HBM

Route = tuple[str, tuple[int, ...]]  # a kind of collective and a group of devices

# (number of enclosing loops of unknown length, index of the loop among those beside it) -> number of its iterations
Trips = Callable[[int, int], float]


class Instruction(NamedTuple):
    """One instruction of HLO text: NAME = SHAPE OPCODE(OPERANDS), ATTRIBUTES.

    What is started here and ends at a later instruction (OPCODE-start, OPCODE-done) stands here as if it ended here.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool = False

    @property
    def scope(self) -> str:
        """The named scopes and the JAX primitive that the instruction comes from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def called(self) -> str | None:
        """The computation of a fusion or a call."""
        found = _CALLED.search(self.attributes)
        return found[1] if found else None

    @property
    def branches(self) -> list[str]:
        """The computations of a conditional; of a predicate the one for false comes first."""
        if listed := re.search(r"branch_computations=\{([^}]*)\}", self.attributes):
            return re.findall(r"%?([\w.\-]+)", listed[1])
        found = dict(re.findall(r"(true|false)_computation=%?([\w.\-]+)", self.attributes))
        return [found["false"], found["true"]] if len(found) == 2 else []


Computation = Mapping[str, Instruction]  # name -> instruction, in the order of the text


class Program(NamedTuple):
    """A compiled program: its computations, and the one that runs."""

    computations: Mapping[str, Computation]
    entry: str

    def iterations(self, loop: Instruction) -> float | None:
        """Returns how often a loop's body runs; None where only the run shows it.

        A compiler for TPUs does not write the count down: it is the constant that the loop's condition compares with.
        """
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return float(known[1])
        condition = list(self._within(re.search(r"condition=%?([\w.\-]+)", loop.attributes)))
        bounds = [item.attributes.split(")")[0] for item in condition if _is_index(item)]
        compared = [item.attributes for item in condition if item.opcode == "compare"]
        is_count = not any(item.opcode in ("and", "or", "not") for item in condition)
        if is_count and len(bounds) == len(compared) == 1 and "direction=LT" in compared[0]:
            return float(bounds[0])
        return None

    def _within(self, found: re.Match[str] | None) -> Iterator[Instruction]:
        """Yields the instructions of a computation and of the fusions in it."""
        for item in self.computations.get(found[1], {}).values() if found else ():
            yield item
            if item.opcode == "fusion":
                yield from self._within(_CALLED.search(item.attributes))

    def body(self, loop: Instruction) -> str:
        found = re.search(r"body=%?([\w.\-]+)", loop.attributes)
        assert found is not None
        return found[1]


def read_program(text: str) -> Program:
    """Parses `compiled.as_text()`."""
    if partitions := re.match(r"HloModule .*\bnum_partitions=(\d+)", text):  # no group listed: all devices are in one
        everyone = ",".join(map(str, range(int(partitions[1]))))
        text = text.replace("replica_groups={}", f"replica_groups={{{{{everyone}}}}}")
    computations, entry = {}, ""
    for name, is_entry, instructions in _computations(text):
        computations[name] = {item.name: item for item in instructions}
        entry = name if is_entry else entry
    return Program(computations, entry)


def _computations(text: str) -> Iterator[tuple[str, bool, list[Instruction]]]:
    """Yields (name, whether it is the entry, instructions) of every computation."""
    name, is_entry = "", False
    instructions: list[Instruction] = []
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name, is_entry, instructions = header["name"], bool(header["entry"]), []
        elif line.startswith("}") and name:
            yield name, is_entry, instructions
            name = ""
        elif name and (match := _INSTRUCTION.match(line)):
            instructions.append(_instruction(match["name"], match["rest"], bool(match["root"])))


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
    """Parses "SHAPE OPCODE(OPERANDS), ATTRIBUTES"; a shape may be a tuple, and layouts contain brackets too."""
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    close = _closing(rest, start)
    inside = rest[start + 1 : close]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    opcode = rest[:start]
    attributes = f"{inside}){rest[close + 1 :]}" if opcode in ("constant", "parameter") else rest[close + 1 :]
    return Instruction(name, *_started(shape, opcode, attributes), operands, attributes, is_root)


def _started(shape: str, opcode: str, attributes: str) -> tuple[str, str]:
    """Returns shape and opcode of what an instruction does, whether or not it is only started there.

    The shape of a start is (operands, results, ...), of a copy (result, operand, ...). The vendor's products return
    (result, workspace): the workspace is memory, but nothing passes through it as a whole.
    """
    what = opcode.removesuffix("-start")
    if what != opcode and what != "all-reduce" and len(parts := _elements(shape)) > 1:
        shape = parts[0 if what == "copy" else 1]
    elif what == "custom-call" and '"__cublas' in attributes and len(parts := _elements(shape)) > 1:
        shape = parts[0]
    return shape, "call" if what == "async" else what


def _elements(shape: str) -> list[str]:
    """Returns the elements of a tuple's shape; none of an array's."""
    if not shape.startswith("("):
        return []
    depth, parts = 0, [""]
    for character in shape[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _closing(text: str, start: int) -> int:
    """Returns the position of the bracket that closes the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == "(") - (text[position] == ")")
        if depth == 0:
            return position
    raise ValueError(f"unbalanced brackets: {text[:80]}")


def _is_index(item: Instruction) -> bool:
    return item.opcode == "constant" and bool(re.match(r"[su]32\[\]", item.shape))


def dims(shape: str) -> list[int]:
    """Returns the dimensions of an array, or of the first array of a tuple."""
    match = _SHAPE.search(shape)
    return [int(n) for n in match[2].split(",") if n] if match else []


def shape_bytes(shape: str) -> float:
    """Returns the bytes of an array or tuple in the device's main memory."""
    return sum(
        BITS.get(dtype, 32) / 8 * math.prod(int(n) for n in sizes.split(",") if n)
        for dtype, sizes, layout in _SHAPE.findall(shape)
        if _FAST_MEMORY not in layout
    )


# Arithmetic


def product_flops(item: Instruction, computation: Computation) -> float:
    """Returns the FLOPs of a matrix product or a convolution (a multiply-add is two); 0 for other instructions."""
    if item.opcode not in ("dot", "convolution", "custom-call"):
        return 0.0
    shapes = [computation[name].shape for name in item.operands if name in computation]
    if len(shapes) < 2:
        return 0.0
    if item.opcode == "convolution":
        return _convolution_flops(item, *map(dims, shapes[:2]))
    contracted = re.search(r"lhs_contracting_dim(?:ension)?s\"?[=:][\{\[]([\d,\"]*)[\}\]]", item.attributes)
    if contracted is None:
        return 0.0  # a custom call that is no product of the vendor's library
    left = dims(shapes[0])
    axes = [int(n) for n in contracted[1].replace('"', "").split(",") if n]
    return 2.0 * math.prod(dims(item.shape)) * math.prod(left[axis] for axis in axes)


def _convolution_flops(item: Instruction, left: Sequence[int], right: Sequence[int]) -> float:
    """Counts the products that are not with padding: a TPU's batched products are convolutions that skip most."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", item.attributes)
    if labels is None:
        return 0.0
    lhs, rhs, out = labels[1], labels[2], labels[3]
    result = dims(item.shape)
    flops = 2.0 * result[out.index("b")] * result[out.index("f")] * right[rhs.index("i")]
    spatial = [axis for axis in rhs if axis.isdigit()]
    window = _window(item.attributes, len(spatial))
    for axis in spatial:
        options = {name: values[int(axis)] for name, values in window.items()}
        flops *= _products(left[lhs.index(axis)], right[rhs.index(axis)], result[out.index(axis)], options)
    return flops


def _window(attributes: str, rank: int) -> dict[str, list[tuple[int, ...]]]:
    """Returns stride, padding and dilations of each spatial dimension."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    given = dict(part.split("=", 1) for part in found[1].split() if "=" in part) if found else {}
    defaults = {"stride": "1", "pad": "0_0", "lhs_dilate": "1", "rhs_dilate": "1"}
    values = {name: given.get(name, "x".join([default] * rank)).split("x") for name, default in defaults.items()}
    return {name: [tuple(int(n) for n in part.split("_")) for part in parts if part] for name, parts in values.items()}


def _products(size: int, kernel: int, result: int, window: Mapping[str, tuple[int, ...]]) -> int:
    """Returns how many (output, kernel) positions of one dimension meet an element of the input."""
    (stride,), (low, _), (left_dilation,), (right_dilation,) = (
        window[name] for name in ("stride", "pad", "lhs_dilate", "rhs_dilate")
    )
    at = np.arange(result)[:, None] * stride + np.arange(kernel) * right_dilation - low
    return int(((at >= 0) & (at < (size - 1) * left_dilation + 1) & (at % left_dilation == 0)).sum())


# Traffic between devices


def sent_bytes(item: Instruction, computation: Computation) -> tuple[Route, float] | None:
    """Returns ((kind, a group of devices), bytes sent by one device) of a collective; None for other instructions.

    Sent around a ring of n devices: (n - 1) / n of the full array for all-gather, reduce-scatter and all-to-all,
    twice that for all-reduce; the whole operand for a permutation.
    """
    kind = item.opcode
    if kind not in COLLECTIVES:
        return None
    operands = sum(shape_bytes(computation[name].shape.replace(_FAST_MEMORY, "")) for name in item.operands)
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
