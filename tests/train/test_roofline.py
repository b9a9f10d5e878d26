"""The roofline of a compiled program: what is touched is counted, as often as it runs, at the chip's speeds."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from train.plan.chips import CHIPS, gpu_target
from train.plan.hlo import read_program
from train.plan.roofline import LAUNCH_SECONDS, WAIT_SECONDS, Item, KernelCost, Roofline, Work, link_speed

H200, V5P = CHIPS["H200"], CHIPS["v5p"]
LAYERS = """
%sliced (p.0: bf16[28,64,64], p.1: s32[]) -> bf16[64,64] {
  %p.0 = bf16[28,64,64]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = bf16[1,64,64]{2,1,0} dynamic-slice(%p.0, %p.1, %zero, %zero), dynamic_slice_sizes={1,64,64}
  ROOT %view = bf16[64,64]{1,0} bitcast(%one)
}

%updated (q.0: f32[512,16], q.1: f32[1,16], q.2: s32[]) -> f32[512,16] {
  %q.0 = f32[512,16]{1,0} parameter(0)
  %q.1 = f32[1,16]{1,0} parameter(1)
  %q.2 = s32[] parameter(2)
  ROOT %put = f32[512,16]{1,0} dynamic-update-slice(%q.0, %q.1, %q.2, %q.2)
}

%nested (n.0: bf16[28,64,64], n.1: s32[], n.2: bf16[8,64]) -> bf16[8,64] {
  %n.2 = bf16[8,64]{1,0} parameter(2)
  %n.0 = bf16[28,64,64]{2,1,0} parameter(0)
  %n.1 = s32[] parameter(1)
  %layer = bf16[64,64]{1,0} fusion(%n.0, %n.1), kind=kLoop, calls=%sliced
  ROOT %product = bf16[8,64]{1,0} dot(%n.2, %layer), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%added (s.0: f32[1000,16], s.1: s32[4,1], s.2: f32[4,16]) -> f32[1000,16] {
  %s.0 = f32[1000,16]{1,0} parameter(0)
  %s.1 = s32[4,1]{1,0} parameter(1)
  %s.2 = f32[4,16]{1,0} parameter(2)
  ROOT %sum = f32[1000,16]{1,0} scatter(%s.0, %s.1, %s.2), update_window_dims={1}, to_apply=%plus
}

"""


def work_of(*lines: str, chip: str | None = "H200", others: str = LAYERS, **options: Any) -> Work:
    """The work of a program of these lines, beside other computations."""
    inside = "\n".join(f"  {line}" for line in lines)
    program = read_program(f"{others}ENTRY %main () -> f32[] {{\n{inside}\n}}\n")
    return Roofline(program, CHIPS[chip] if chip else None, **options).work()


STACK, INDEX, ROW = (
    "%a = bf16[28,64,64]{2,1,0} parameter(0)",
    "%i = s32[] parameter(1)",
    "%x = bf16[8,64]{1,0} parameter(2)",
)
MATRIX = 2 * 64 * 64  # bytes of one layer's weight


def test_of_a_sliced_operand_what_is_taken_counts() -> None:
    assert work_of(STACK, INDEX, "%b = bf16[64,64]{1,0} fusion(%a, %i), calls=%sliced").bytes == 2 * MATRIX + 4
    alone = work_of(STACK, INDEX, "%b = bf16[1,64,64]{2,1,0} dynamic-slice(%a, %i, %i, %i)")
    assert alone.bytes == 2 * MATRIX


def test_a_slice_within_a_nested_fusion_counts_as_taken() -> None:
    work = work_of(STACK, INDEX, ROW, "%b = bf16[8,64]{1,0} fusion(%a, %i, %x), calls=%nested")
    assert work.bytes == MATRIX + 4 + 2 * (2 * 8 * 64)
    assert work.flops == 2 * 8 * 64 * 64


def test_of_an_update_in_place_what_is_written_counts() -> None:
    cache, row = "%c = f32[512,16]{1,0} parameter(0)", "%r = f32[1,16]{1,0} parameter(1)"
    fused = work_of(cache, row, INDEX, "%b = f32[512,16]{1,0} fusion(%c, %r, %i), calls=%updated")
    assert fused.bytes == 2 * 4 * 16 + 4  # the row is read and written
    alone = work_of(cache, row, INDEX, "%b = f32[512,16]{1,0} dynamic-update-slice(%c, %r, %i, %i)")
    assert alone.bytes == 2 * 4 * 16
    table, ids, rows = (
        "%t = f32[1000,16]{1,0} parameter(0)",
        "%d = s32[4,1]{1,0} parameter(1)",
        "%u = f32[4,16]{1,0} parameter(2)",
    )
    scattered = work_of(table, ids, rows, "%b = f32[1000,16]{1,0} fusion(%t, %d, %u), calls=%added")
    assert scattered.bytes == 4 * 16 * 4 + 4 * 4 + 2 * 4 * 16 * 4


def test_arrays_in_a_tpus_vector_memory_are_not_in_its_main_memory() -> None:
    slow, fast = "%s = f32[1024]{0:T(1024)} parameter(0)", "%f = f32[1024]{0:T(1024)S(1)} copy(%s)"
    assert work_of(slow, fast, chip="v5p").bytes == 4 * 1024


def test_a_kernel_takes_the_longer_of_arithmetic_and_memory_and_a_launch() -> None:
    product = "%b = bf16[{0},{0}]{{1,0}} dot(%l, %l), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}"
    for n, bound in ((8192, 2 * 8192**3 / H200.flops), (64, 3 * 2 * 64**2 / H200.bandwidth)):
        work = work_of(f"%l = bf16[{n},{n}]{{1,0}} parameter(0)", product.format(n))
        assert work.seconds == pytest.approx(bound + LAUNCH_SECONDS) and work.kernels == 1


LOOPS = """
%turn (t: (s32[], f32[64])) -> (s32[], f32[64]) {
  %t = (s32[], f32[64]{0}) parameter(0)
  %v = f32[64]{0} get-tuple-element(%t), index=1
  %n = s32[] get-tuple-element(%t), index=0
  %w = f32[64]{0} add(%v, %v), metadata={op_name="jit(f)/while/body/mlp/add"}
  ROOT %o = (s32[], f32[64]{0}) tuple(%n, %w)
}

%counts (k: (s32[], f32[64])) -> pred[] {
  %k = (s32[], f32[64]{0}) parameter(0)
  %at = s32[] get-tuple-element(%k), index=0
  %end = s32[] constant(36)
  ROOT %less = pred[] compare(%at, %end), direction=LT
}

%searches (k: (s32[], f32[64])) -> pred[] {
  %k = (s32[], f32[64]{0}) parameter(0)
  %at = s32[] get-tuple-element(%k), index=0
  %end = s32[] constant(36)
  %less = pred[] compare(%at, %end), direction=LT
  %open = pred[] compare(%at, %at), direction=NE
  ROOT %both = pred[] and(%less, %open)
}

"""
LOOP = "%l = (s32[], f32[64]{{0}}) while(%s), condition=%{}, body=%turn{}"
START = "%s = (s32[], f32[64]{0}) parameter(0)"


def test_a_loop_counts_as_often_as_it_runs_and_the_host_waits_only_where_its_end_shows_late() -> None:
    known = LOOP.format("searches", ', backend_config={"known_trip_count":{"n":"28"}}')
    turn = 3 * 4 * 64 / H200.bandwidth + LAUNCH_SECONDS
    for line, times, waits in ((known, 28, 0), (LOOP.format("counts", ""), 36, 0), (LOOP.format("searches", ""), 7, 7)):
        work = work_of(START, line, others=LOOPS, trips=lambda depth, index: 7)
        assert (work.kernels, work.bytes, work.host_waits) == (times, times * 3 * 4 * 64, waits)
        assert work.seconds == pytest.approx(times * turn + waits * WAIT_SECONDS)
        assert set(work.items) == {Item(f"{times}", "add", "jit(f)/while/body/mlp/add")}
        assert work.items[Item(f"{times}", "add", "jit(f)/while/body/mlp/add")].seconds == pytest.approx(times * turn)
    assert work_of(START, LOOP.format("searches", ""), others=LOOPS, trips=lambda depth, index: 0).kernels == 0


def test_a_tpus_instruction_takes_its_compilers_cycles() -> None:
    cycles = 'backend_config={{"window_config":{{"estimated_cycles":"{}"}}}}'
    lines = ("%x = f32[64]{0} parameter(0)", "%y = f32[64]{{0}} add(%x, %x), " + cycles)
    work = work_of(lines[0], lines[1].format(3500), chip="v5p")
    assert work.seconds == 3500 / 1.75e9 and work.host_waits == 0
    assert work_of(lines[0], lines[1].format(2**63 - 1), chip="v5p").seconds == 3 * 256 / V5P.bandwidth  # it has none


STARTED = {
    "fusion": (
        "((bf16[28,64,64], s32[]), bf16[64,64]{1,0}, u32[]) fusion-start(%a, %i), kind=kLoop, calls=%sliced",
        "bf16[64,64]{1,0} fusion(%a, %i), kind=kLoop, calls=%sliced",
    ),
    "call": (
        "((bf16[28,64,64], s32[]), bf16[64,64]{1,0}, u32[]) call-start(%a, %i), to_apply=%sliced",
        "bf16[64,64]{1,0} call(%a, %i), to_apply=%sliced",
    ),
    "async": (
        "((bf16[28,64,64], s32[]), bf16[64,64]{1,0}, u32[]) async-start(%a, %i), calls=%sliced",
        "bf16[64,64]{1,0} call(%a, %i), to_apply=%sliced",
    ),
    "copy": (
        "(bf16[28,64,64]{2,1,0:T(8,128)S(1)}, bf16[28,64,64]{2,1,0}, u32[]{:S(2)}) copy-start(%a)",
        "bf16[28,64,64]{2,1,0:T(8,128)S(1)} copy(%a)",
    ),
    "gather": (
        "(bf16[8,64]{1,0}, bf16[16,64]{1,0}) all-gather-start(%x), replica_groups={{0,1}}, dimensions={0}",
        "bf16[16,64]{1,0} all-gather(%x), replica_groups={{0,1}}, dimensions={0}",
    ),
    "gather of two": (
        "((bf16[8,64], bf16[8,64]), (bf16[16,64], bf16[16,64])) all-gather-start(%x, %x), replica_groups={{0,1}}",
        "(bf16[16,64], bf16[16,64]) all-gather(%x, %x), replica_groups={{0,1}}",
    ),
    "reduce": (
        "(bf16[8,64], bf16[8,64]) all-reduce-start(%x, %x), replica_groups={{0,1}}, to_apply=%plus",
        "(bf16[8,64], bf16[8,64]) all-reduce(%x, %x), replica_groups={{0,1}}, to_apply=%plus",
    ),
}


@pytest.mark.parametrize(("started", "whole"), STARTED.values(), ids=STARTED)
def test_what_is_only_started_counts_as_what_it_does(started: str, whole: str) -> None:
    """A compiler that lets instructions run beside others writes OPCODE-start and OPCODE-done."""
    works = [work_of(STACK, INDEX, ROW, f"%b = {line}", links=lambda group: 450e9) for line in (started, whole)]
    assert works[0] == works[1] and works[0].kernels == 1 and 0 < works[0].bytes <= 2 * 28 * MATRIX


def test_the_workspace_of_a_product_is_not_moved() -> None:
    call = '(bf16[8,64]{1,0}, s8[33554432]{0}) custom-call(%x, %x), custom_call_target="__cublas$lt$matmul"'
    assert work_of(ROW, f"%b = {call}").bytes == 3 * 2 * 8 * 64


def test_a_fused_all_reduce_that_is_sliced_is_a_reduce_scatter() -> None:
    """As a TPU's compiler writes it; outside of a fusion every device has the whole sum."""
    lines = [
        "HloModule m, num_partitions=4",
        "%fused (x: f32[8]) -> f32[2] {",
        "  %x = f32[8]{0} parameter(0)",
        "  %sum = f32[8]{0} all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%plus",
        "  %n = s32[] constant(0)",
        "  ROOT %part = f32[2]{0} dynamic-slice(%sum, %n), dynamic_slice_sizes={2}",
        "}",
        "ENTRY %main (x: f32[8]) -> f32[2] {",
        "  %x = f32[8]{0} parameter(0)",
        "  ROOT %scattered = f32[2]{0} fusion(%x), kind=kCustom, calls=%fused",
        "}",
    ]
    work = Roofline(read_program("\n".join(lines))).work()
    assert work.sent == {("reduce-scatter", (0, 1, 2, 3)): 32 * 3 / 4}
    alone = [*lines[:1], lines[7], *lines[2:7]]
    assert Roofline(read_program("\n".join(alone))).work().sent == {("all-reduce", (0, 1, 2, 3)): 2 * 32 * 3 / 4}


def test_a_collective_that_lists_no_group_is_one_of_all_devices() -> None:
    lines = ["HloModule jit_f, is_scheduled=true, num_partitions=4", "", "ENTRY %main (x: f32[6]) -> f32[6] {"]
    lines += [
        "  %x = f32[6]{0} parameter(0)",
        "  ROOT %b = f32[6]{0} all-reduce(%x), replica_groups={}, to_apply=%plus",
    ]
    assert Roofline(read_program("\n".join([*lines, "}"]))).work().sent == {("all-reduce", (0, 1, 2, 3)): 36}


@pytest.mark.parametrize(
    ("instruction", "left", "right", "flops"),
    [  # as a compiler for TPUs writes products of 8 batches, and of heads: padding multiplies nothing
        (
            "f32[8,32,16]{2,1,0} convolution(%l, %r), window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0oi->0bf",
            *("bf16[8,32,64]", "bf16[8,16,64]", 2 * 8 * 32 * 16 * 64),
        ),
        (
            "bf16[32,4,16]{2,1,0} convolution(%l, %r), window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=bf0_0oi->b0f",
            *("bf16[32,64,1]", "bf16[4,16,64]", 2 * 32 * 64 * 4 * 16),
        ),
        (
            'bf16[5,32,16]{2,1,0} custom-call(%l, %r), custom_call_target="__cublas$lt$matmul", backend_config='
            '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"]}}}',
            *("bf16[5,32,64]", "bf16[5,64,16]", 2 * 5 * 32 * 16 * 64),
        ),
    ],
    ids=["batches", "heads", "library"],
)
def test_products_by_another_name_count_as_products(instruction: str, left: str, right: str, flops: int) -> None:
    lines = (f"%l = {left} parameter(0)", f"%r = {right} parameter(1)", f"%b = {instruction}")
    assert work_of(*lines, chip=None).flops == flops


def test_convolutions_count_the_products_that_meet_no_padding() -> None:
    """Against a convolution with ones, which counts them."""
    size, kernel, options = (
        9,
        3,
        {"window_strides": (2,), "padding": ((2, 1),), "lhs_dilation": (2,), "rhs_dilation": (2,)},
    )

    def convolved(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, w, dimension_numbers=("NWC", "WIO", "NWC"), **options)

    x, w = jnp.ones((2, size, 3)), jnp.ones((kernel, 3, 4))
    text = jax.jit(convolved).lower(x, w).as_text("hlo")
    line = next(line for line in text.splitlines() if " convolution(" in line)
    text = re.sub(r"\b(\w[\w.]*) = ", r"%\1 = ", text)  # as compiled text is written
    shape, window = re.search(r"= (\S+) convolution\(.*?\), (window=.*?->\w+)", line).groups()  # type: ignore[union-attr]
    lines = ("%l = f32[2,9,3]{2,1,0} parameter(0)", "%r = f32[3,3,4]{2,1,0} parameter(1)")
    work = work_of(*lines, f"%b = {shape} convolution(%l, %r), {window}", chip=None)
    assert work.flops == 2 * float(convolved(x, w).sum())


def test_a_kernel_of_ones_own_costs_what_its_formula_says() -> None:
    call = (
        '%b = f32[64]{0} custom-call(%x), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(f)/decode"}'
    )
    work = work_of("%x = f32[64]{0} parameter(0)", call, kernels={"decode": KernelCost(3e12, 5e9)})
    assert (work.flops, work.bytes) == (3e12, 5e9)
    assert work.seconds == pytest.approx(3e12 / H200.flops + LAUNCH_SECONDS)
    estimate = '"cost_estimate":{"flops":"12","transcendentals":"0","bytes_accessed":"5530000000"}'
    mosaic = f'%b = f32[64]{{0}} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={{{estimate}}}'
    work = work_of("%x = f32[64]{0} parameter(0)", mosaic, chip="v5p")
    assert (work.flops, work.bytes, work.seconds) == (12, 5.53e9, pytest.approx(5.53e9 / V5P.bandwidth))


def test_what_runs_nothing_costs_nothing() -> None:
    buffer = '%b = f32[64]{0} custom-call(), custom_call_target="AllocateBuffer"'
    done = "%d = f32[64]{0} all-gather-done(%x)"
    assert work_of("%x = f32[64]{0} parameter(0)", buffer, done, "%v = f32[8,8]{1,0} bitcast(%x)").kernels == 0


def test_a_collective_takes_the_slowest_link_on_its_ring() -> None:
    hosts = [(index // 8, ()) for index in range(16)]
    speed = link_speed(H200, hosts)
    assert speed((0, 1, 2, 3)) == H200.link == 450e9
    assert speed((0, 8)) == H200.network  # one network card each
    assert speed(tuple(range(16))) == min(H200.link, 8 * H200.network)
    torus = [(0, (x, y, 0)) for y in range(2) for x in range(4)]
    assert link_speed(V5P, torus)((0, 1, 2, 3)) == V5P.link
    assert link_speed(V5P, torus)(tuple(range(8))) == 2 * V5P.link
    slices = [(index // 4, (index % 2, index // 2 % 2, 0)) for index in range(8)]
    assert link_speed(V5P, slices)((0, 4)) == V5P.network

    gather = "%b = f32[1048576]{0} all-gather(%x), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}"
    lines = ("%x = f32[131072]{0} parameter(0)", gather)
    work = work_of(*lines, links=speed)
    assert work.link_seconds == pytest.approx(7 / 8 * 4 * 1048576 / 450e9)
    assert work.seconds == pytest.approx(work.link_seconds + LAUNCH_SECONDS)


def test_a_gpus_target_has_its_facts() -> None:
    assert "memory_bandwidth: 4800000000000\n" in gpu_target(H200) and "major: 9 }" in gpu_target(H200)
    assert 'device_description_str: "NVIDIA B200"' in gpu_target(CHIPS["B200"])
    assert all(f"device_memory_size: {chip.memory}\n" in gpu_target(chip) for chip in CHIPS.values() if chip.gpu)


def test_a_tpus_clock_makes_its_peak() -> None:
    """peak = 2 * multipliers * clock, multipliers in units of 128 x 128."""
    for name, units in (("v4", 8), ("v5e", 4), ("v5p", 8), ("v6e", 16)):
        chip = CHIPS[name]
        assert 2 * units * 128**2 * chip.clock == pytest.approx(chip.flops, rel=0.01)
