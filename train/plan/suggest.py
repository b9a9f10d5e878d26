"""Meshes worth a plan, the likeliest to be fast first, by a rough estimate that compiles nothing."""

import dataclasses
from collections.abc import Sequence

import jax

from models.config import Qwen3Config
from models.flops import layer_weights
from models.sharding import Layout
from train.build import policy_layout
from train.config import MeshConfig, PlanConfig
from train.plan.chips import CHIPS, HOST_GPUS, USABLE_SHARE, Chip
from train.plan.plans import Plan, least_flops
from train.plan.programs import axis_sizes, parameter_count, resident_bytes, step_parts

EXPECTED_MFU = 0.4  # of products, in the rough estimate


def candidate_meshes(
    config: PlanConfig,
    chip: str,
    devices: Sequence[jax.Device],
    network: Qwen3Config,
    rewards: Sequence[Qwen3Config],
) -> list[MeshConfig]:
    """Returns the meshes whose arrays fit the chip, by rough seconds; of equals that with less communication first."""
    powers = [2**n for n in range(len(devices).bit_length())]
    found: list[tuple[float, MeshConfig]] = []
    for tensor in (n for n in powers if network.num_key_value_heads % n == 0):
        for fsdp in (n for n in powers if len(devices) % (n * tensor) == 0):
            mesh = dataclasses.replace(config.mesh, data=len(devices) // (fsdp * tensor), fsdp=fsdp, tensor=tensor)
            candidate = dataclasses.replace(config, mesh=mesh)
            try:
                layout = policy_layout(candidate, devices)
                arrays, _ = step_parts(candidate, layout, network, rewards)
            except ValueError:
                continue  # the mesh does not divide a batch, a group or the weights
            if resident_bytes(arrays, ["gradient"]) < USABLE_SHARE * CHIPS[chip].memory:
                found.append((rough_seconds(candidate, CHIPS[chip], layout, network, rewards), mesh))
    return [mesh for _, mesh in sorted(found, key=lambda pair: pair[0])]


def with_smaller_microbatch(config: PlanConfig, made: Plan) -> PlanConfig | None:
    """Returns the config with the micro-batches that a plan that does not fit suggests; None if there are none.

    The temporaries of the gradient grow with the micro-batch: it is halved until they should fit.
    """
    memory = USABLE_SHARE * CHIPS[str(made.chip)].memory
    gradient = [
        made.memory(program, cost)
        for program, cost in zip(made.programs, made.costs, strict=True)
        if program.name.startswith(("gradient", "logprobs"))
    ]
    others = [made.memory(program, cost) for program, cost in zip(made.programs, made.costs, strict=True)]
    if max(gradient, default=0.0) <= memory or max(set(others) - set(gradient), default=0.0) > memory:
        return None
    size, peak = config.microbatch_prompts, max(gradient)
    resident = resident_bytes(made.arrays, ["gradient"])
    while peak > memory:
        size, peak = size // 2, resident + (peak - resident) / 2
        if size < 1 or size % (made.mesh["data"] * made.mesh["fsdp"]):
            return None
    return dataclasses.replace(config, microbatch_prompts=size)


def rough_seconds(
    config: PlanConfig, chip: Chip, layout: Layout, network: Qwen3Config, rewards: Sequence[Qwen3Config]
) -> float:
    """Returns the seconds of a step by arithmetic, weights read for every token, and bytes over links.

    tokens * weights / tensor / bandwidth + FLOPs / (peak * EXPECTED_MFU) + (3 gathers of the parameters over fsdp for
    each micro-batch, a gradient over data for each, activations over tensor in every layer) / links
    """
    P, G, S, T = axis_sizes(config)
    mesh = layout.mesh.shape
    weights = 2.0 * parameter_count(network)  # bytes in bfloat16
    positions = P * (S + G * T) / (mesh["data"] * mesh["fsdp"])
    inner = mesh["fsdp"] * mesh["tensor"]
    outer = chip.link if chip.gpu is None or inner <= HOST_GPUS else min(chip.link, HOST_GPUS * chip.network)
    across = chip.link if chip.gpu is None or layout.mesh.size <= HOST_GPUS else chip.network
    parts = P // config.microbatch_prompts
    gathered = 3 * parts * weights * (1 - 1 / mesh["fsdp"]) / mesh["tensor"]
    reduced = parts * 2 * weights / inner * (1 - 1 / mesh["data"])
    hidden = 2.0 * positions * network.hidden_size
    activations = 12.0 * network.num_hidden_layers * hidden * (1 - 1 / mesh["tensor"])
    flops = sum(least_flops(config, network, rewards, layout.mesh.size).values())
    reading = T * (2.0 * layer_weights(network) + 2.0 * network.hidden_size * network.vocab_size) / mesh["tensor"]
    links = gathered / outer + reduced / across + activations / chip.link
    return reading / chip.bandwidth + flops / (chip.flops * EXPECTED_MFU) + links
