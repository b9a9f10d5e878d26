"""The arrays and programs of a policy's step, from shapes alone, and what they cost by the compiler's analysis.

Names and sizes of arrays are bytes on each device; a program's arguments are ShapeDtypeStructs with shardings.
"""

import functools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.attention import CACHE_CHUNK
from models.checkpoint import is_run, read_about
from models.config import Qwen3Config, read_config
from models.decode_gpu import kernel_work
from models.decoding import DecodeWeights
from models.flash_attention import choose_attention
from models.flash_gpu import flash_work
from models.generate import SamplingCopy, known_drawing, optional_settings, sampling_program
from models.hf_weights import abstract_model, abstract_params, split
from models.lora import split_trainable
from models.published import PUBLISHED
from models.sampler import SamplingParams
from models.sharding import Layout, with_sharding
from models.slots import finish_arguments, has_finish, refill_size, slot_axes, slot_programs
from models.stop_strings import StopTable
from models.weight_files import could_be_on_hub, find_directory
from train.build import make_optimizer
from train.config import PlanConfig
from train.objective import Denominators
from train.packing import abstract_microbatch
from train.plan.chips import Chip
from train.plan.compilers import Compiler
from train.plan.hlo import Trips, read_program
from train.plan.roofline import KernelCost, Links, Roofline, Work, link_speed
from train.rewards.model import SCORED_AXES, scoring_program
from train.running import naming
from train.state import TrainState, abstract_opt_state
from train.update import Update

SLOTS = "cache of keys and values"  # with rollout_prompts, all that is kept of the prompts that are sampled at a time
RESIDENT = ("parameters", "base of adapters", "reference", "optimizer", "reward models")


class StepProgram(NamedTuple):
    """One compiled part of a step."""

    name: str
    calls: int  # per step
    jitted: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    beside: tuple[str, ...] = ()  # arrays beside the RESIDENT ones that are in memory while it runs
    trips: Trips | None = None  # of loops whose length XLA does not know; None: there should be none
    taken: Mapping[str, int] = {}  # named scope of a conditional -> the branch that the run's settings take
    kernels: Mapping[str, KernelCost] = {}  # part of a name or scope -> cost of a kernel of one's own


class Cost(NamedTuple):
    """Cost of one call of a program, on each device."""

    temporaries: float  # bytes of temporaries, and of outputs that do not reuse an input's buffer
    work: Work
    sent: dict[tuple[str, str], float]  # (kind of collective, mesh axes) -> bytes
    compile_seconds: float
    predicted: bool = False  # whether `work` has seconds, bytes and kernels: only the chip's own compiler knows them
    fits: bool = True  # False: the chip's compiler refused it, and there is its text neither
    note: str = ""
    text: str = ""  # HLO


def resident_bytes(arrays: Mapping[str, float], beside: Sequence[str]) -> float:
    """Returns the bytes of the RESIDENT arrays and those in `beside`."""
    return sum(arrays.get(name, 0.0) for name in {*RESIDENT, *beside})


def network_config(path: str, setting: str | None = None) -> Qwen3Config:
    """Returns the config of a model, given as a run, a directory, a published name (offline), or a name on the Hub.

    Args:
      setting: the user's name for it, for an error.
    """
    with naming(setting):
        if is_run(path):
            return Qwen3Config.from_hf(read_about(path)["model"], source=path)
        return PUBLISHED[path] if path in PUBLISHED and could_be_on_hub(path) else read_config(find_directory(path))


StepParts = tuple[dict[str, float], list[StepProgram]]  # name -> bytes on each device, and programs


def step_parts(config: PlanConfig, layout: Layout, network: Qwen3Config, rewards: Sequence[Qwen3Config]) -> StepParts:
    """Returns the arrays and the programs of a run's step."""
    dtypes = {"dtype": config.model.dtype, "param_dtype": config.model.param_dtype}
    model = abstract_model(network, lora=config.lora, remat=config.model.remat, layout=layout, **dtypes)
    (graphdef, _), params = split(model), abstract_params(model, layout)
    arrays, programs = updating_parts(config, layout, network, graphdef, params)
    for more_arrays, more_programs in (
        scoring_parts(config, layout, rewards),
        sampling_parts(config, layout, network, graphdef, params),
    ):
        arrays, programs = more_arrays | arrays, more_programs + programs
    if SLOTS not in arrays:
        P, G, S, T = axis_sizes(config)
        arrays[SLOTS] = cache_bytes(network, P, G, S, T, layout, jnp.dtype(config.model.dtype).itemsize)
    return arrays, programs


def axis_sizes(config: PlanConfig) -> tuple[int, int, int, int]:
    """Returns the sizes P, G, S, T."""
    lengths = (config.max_prompt_length, config.max_completion_length)
    return config.prompts_per_step, config.num_generations, *lengths


def sampling_parts(config: PlanConfig, layout: Layout, network: Qwen3Config, graphdef: Any, params: Any) -> StepParts:
    """Returns the sampling copy, and the programs that make it and sample from it."""
    P, G, S, T = axis_sizes(config)
    programs: list[StepProgram] = []
    arrays: dict[str, float] = {}
    during: tuple[str, ...] = ()
    copy = SamplingCopy(graphdef, params, layout, config.mesh.decoding) if config.mesh.sampling_copy else None
    if copy is not None and any(copy.is_copied):
        programs.append(StepProgram("copy", 1, copy.program, (copy.argument(params),), {}))
        arrays, during = {"sampling copy": bytes_per_device(copy.new_leaves)}, ("sampling copy",)
        params = copy.targets
    prompts = [
        abstract_array(layout, (P, S), jnp.int32, ("prompt", None)),
        *[abstract_array(layout, (P,), jnp.int32, ("prompt",))] * 2,
    ]
    settings = sampling_settings(config, network)
    arguments = (params, *prompts, jax.eval_shape(lambda: jax.random.key(0)), settings)
    if config.samples_in_parts:
        more_arrays, more_programs = slot_parts(config, layout, network, graphdef, params, settings, during)
        return arrays | more_arrays, programs + more_programs
    jitted, taken = sampling_program(graphdef, T, 0), sampling_taken(config)
    options = {"num_generations": G, "drawing": known_drawing(params, settings)}
    trips, kernels = sampling_trips(T), sampling_kernels(config, layout, network, params)
    programs.append(StepProgram("sample", 1, jitted, arguments, options, during, trips, taken, kernels))
    return arrays, programs


def sampling_settings(config: PlanConfig, network: Qwen3Config) -> SamplingParams:
    """Returns the settings that the sampler is compiled for; ids stand for none of a tokenizer's."""
    stop = None
    if config.stop:  # of about as many states and classes as the strings will have
        states = 1 + sum(len(string.encode()) for string in config.stop)
        stop = StopTable(np.zeros(network.vocab_size, np.int32), np.zeros((states, 4 * states), np.int32))
    options = optional_settings(config.min_p, config.repetition_penalty, stop)
    eos_ids = np.zeros(2, np.int32)
    return SamplingParams(config.temperature, config.top_k, config.top_p, config.min_tokens, eos_ids, **options)


def slot_parts(
    config: PlanConfig,
    layout: Layout,
    network: Qwen3Config,
    graphdef: Any,
    params: Any,
    settings: SamplingParams,
    during: tuple[str, ...],
) -> StepParts:
    """Returns the slots of `rollout_prompts`, and the programs that fill them and sample in them.

    As no completion ends early, slots end together: they are decoded to the end as often as prompts fill them.
    """
    (P, G, S, T), R = axis_sizes(config), sampled_at_once(config)
    programs, C = slot_programs(graphdef, T, 0, layout, settings.tracked), refill_size(R, layout)
    shapes = jax.eval_shape(functools.partial(programs.empty, P=R, S=S, G=G), params)
    slots = jax.tree.map(lambda a, axes: abstract_array(layout, a.shape, a.dtype, axes), shapes, slot_axes(shapes))
    options: dict[str, Any] = {"drawing": known_drawing(params, settings)}
    kernels = sampling_kernels(config, layout, network, params, prefilled=C)
    number = functools.partial(abstract_array, layout, dtype=jnp.int32)
    new, source = number((C,), axes=("prompt",)), number((R,), axes=("prompt",))
    prompts = (number((C, S), axes=("prompt", None)), new, new, jax.eval_shape(lambda: jax.random.key(0)), source)
    beside, turns = (*during, SLOTS), -(-P // R)
    enough, finishes = number((), axes=()), int(has_finish(params, graphdef, R, G, T))

    def decoding(name: str, calls: int, program: Any, *arguments: Any) -> StepProgram:
        trips, taken = sampling_trips(T), sampling_taken(config)
        return StepProgram(name, calls, program, (params, *arguments), options, beside, trips, taken, kernels)

    given = (params, slots, *prompts)
    refill = StepProgram("sample refill", -(-P // C), programs.refill, given, {}, beside, kernels=kernels)
    parts = [
        refill,
        decoding("sample decode", turns - finishes, programs.decode, *slots, settings, enough),
    ]
    if finishes:
        parts.append(decoding("sample finish", 1, programs.finish, *finish_arguments(slots, settings)))
    return {SLOTS: bytes_per_device(slots)}, parts


def sampled_at_once(config: PlanConfig) -> int:
    """Returns the number of prompts that are sampled at a time."""
    return config.rollout_prompts if config.rollout_prompts is not None else config.prompts_per_step


def sampling_taken(config: PlanConfig) -> dict[str, int]:
    """Returns which branches of the sampler the settings take."""
    return {"truncate": int(config.top_k > 0 or config.top_p < 1), "draw": int(config.temperature > 0)}


def sampling_kernels(
    config: PlanConfig, layout: Layout, network: Qwen3Config, params: Any, prefilled: int | None = None
) -> Mapping[str, KernelCost]:
    """Returns the costs of the sampler's own kernels; those of decoding in the middle of the longest completion.

    Args:
      prefilled: prompts that are prefilled at a time; None: all.
    """
    (_, G, S, T), P = axis_sizes(config), sampled_at_once(config)
    costs = attention_kernels(layout, network, config.model.dtype, prefilled or P, 1, S)
    if not isinstance(params, DecodeWeights) or params.kernels != "gpu":  # a TPU's stand in the compiled text
        return costs
    sizes = [n // layout.shard_count(axis) for n, axis in ((P, "prompt"), (G, "group"))]
    heads = network.num_key_value_heads // layout.shard_count("kv_heads")
    queries = network.num_attention_heads // network.num_key_value_heads
    size = jnp.dtype(params.embed_VD.dtype).itemsize
    works = kernel_work(sizes[0], sizes[1], heads, queries, network.head_dim, S, (T - 1) / 2, size)
    return {**costs, **{name: KernelCost(*work) for name, work in works.items()}}


def attention_kernels(
    layout: Layout, network: Qwen3Config, dtype: str, P: int, G: int, T: int, S: int = 0
) -> Mapping[str, KernelCost]:
    """Returns the costs of attention's kernels for prompts of S tokens with G rows of T, and for the prompts alone."""
    if choose_attention(layout, network) != "gpu":  # a TPU's stand in the compiled text
        return {}
    H, K = network.num_attention_heads, network.num_key_value_heads
    shards = {axis: layout.shard_count(axis) for axis in ("prompt", "group", "heads", "kv_heads")}
    heads = (H // shards["heads"], K // shards["kv_heads"], network.head_dim)
    group, size = (G // shards["group"] if G > 1 else 1), jnp.dtype(dtype).itemsize
    costs = flash_work(P // shards["prompt"], group, T, *heads, S, size)
    if S:
        costs = flash_work(P // shards["prompt"], 1, S, *heads, 0, size) | costs  # names that are longer come first
    return {name: KernelCost(*cost) for name, cost in costs.items()}


def scoring_parts(config: PlanConfig, layout: Layout, rewards: Sequence[Qwen3Config]) -> StepParts:
    """Returns the reward models, and the programs that score with them."""
    P, G, S, T = axis_sizes(config)
    arrays: dict[str, float] = {"reward models": 0.0}
    programs = []
    for spec, network in zip((spec for spec in config.all_rewards if spec.model), rewards, strict=True):
        scorer = abstract_model(network, dtype=config.model.dtype, param_dtype=config.model.dtype, layout=layout)
        params, n = abstract_params(scorer, layout), spec.batch_prompts
        shapes = ((n, S), (n,), (n, G, T), (n, G))
        texts = [abstract_array(layout, dims, jnp.int32, axes) for dims, axes in zip(shapes, SCORED_AXES, strict=True)]
        place = f"offloaded {spec.label}" if spec.offload else "reward models"
        arrays[place] = arrays.get(place, 0.0) + bytes_per_device(params)
        if spec in config.validation.rewards:
            continue  # no part of a step
        jitted, during = scoring_program(split(scorer)[0]), (place,) if spec.offload else ()
        kernels = attention_kernels(layout, network, config.model.dtype, n, G, T, S)
        score = StepProgram(f"score {spec.label}", -(-P // n), jitted, (params, *texts), {}, during, kernels=kernels)
        programs.append(score)
    return arrays, programs


def updating_parts(config: PlanConfig, layout: Layout, network: Qwen3Config, graphdef: Any, params: Any) -> StepParts:
    """Returns parameters, reference, optimizer state and gradient, and the programs of the update."""
    P, G, S, T = axis_sizes(config)
    optimizer, _ = make_optimizer(config.optimizer, config.max_steps * config.updates_per_step)
    trained, frozen = split_trainable(params)
    opt_state = abstract_opt_state(trained, optimizer, layout)
    scalar: Any = abstract_array(layout, (), jnp.int32, ())
    state = TrainState(trained, frozen, opt_state, scalar)
    ours = trained if config.loss.reference is None else params  # of another model all parameters, adapters or not
    reference = ours if config.loss.beta else None
    update = Update(graphdef, optimizer, config, layout, state).programs
    gradient = jax.tree.map(
        lambda leaf, like: with_sharding(leaf, like.sharding), jax.eval_shape(update.zero_grads, trained), trained
    )
    micro = abstract_microbatch(config.microbatch_prompts, S, G, T, layout)
    count = abstract_array(layout, (), jnp.float32, ())
    denominator = Denominators(count, count) if config.loss.entropy_coef else count
    parts = P // config.microbatch_prompts
    place = "offloaded reference" if config.loss.offload_reference else "reference"
    moments = "offloaded optimizer" if config.optimizer.offload else "optimizer"
    arrays = {
        "parameters": bytes_per_device(trained),
        "base of adapters": bytes_per_device(frozen),
        moments: bytes_per_device(opt_state),
        "gradient": bytes_per_device(gradient),
        place: bytes_per_device(reference),
    }
    given, during = (state, gradient), ("gradient", moments)
    programs = [StepProgram("optimizer", config.updates_per_step, update.apply_gradients, given, {}, during)]
    beside: tuple[str, ...] = ("gradient", place)
    kernels = attention_kernels(layout, network, config.model.dtype, config.microbatch_prompts, G, T, S)
    if config.logprobs_before_update:  # then the update reads them, and no reference policy
        policies = 2 if reference else 1
        logprobs = (params, micro)
        programs.append(
            StepProgram("logprobs", policies * parts, update.logprobs, logprobs, {}, (place,), kernels=kernels)
        )
        like = micro.sampled_PGT
        chosen = dict.fromkeys(config.loss.token_choices, micro.mask_PGT)
        micro = micro._replace(old_PGT=like, ref_PGT=like if reference else None, **chosen)
        reference, beside = None, ("gradient",)
    arguments = (gradient, state, reference, micro, denominator)
    calls = config.num_iterations * parts
    programs.append(StepProgram("gradient", calls, update.accumulate, arguments, {}, beside, kernels=kernels))
    return arrays, programs


def abstract_array(
    layout: Layout, dims: tuple[int, ...], dtype: Any, axes: Sequence[str | None]
) -> jax.ShapeDtypeStruct:
    """Returns a ShapeDtypeStruct, sharded by logical axes."""
    return jax.ShapeDtypeStruct(dims, dtype, sharding=layout.sharding(axes))


def bytes_per_device(tree: Any) -> float:
    """Returns the bytes of a tree of sharded arrays on each device."""
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def cache_bytes(network: Qwen3Config, P: int, G: int, S: int, T: int, layout: Layout, size: int) -> float:
    """Returns the bytes of keys and values on each device; they are among the temporaries of the sampling program."""
    prompts, heads = P / layout.shard_count("prompt"), network.num_key_value_heads / layout.shard_count("kv_heads")
    positions = prompts * (S + G / layout.shard_count("group") * T)
    return 2 * positions * network.num_hidden_layers * heads * network.head_dim * size


def sampling_trips(T: int) -> Trips:
    """Returns the trips of the sampler's loops when no completion ends before T tokens.

    Each token reads those chunks of its cache that are filled by then, half of them on average.
    """
    return lambda depth, index: (T if index == 0 else 0) if depth == 0 else (T / min(CACHE_CHUNK, T) + 1) / 2


def estimated_cost(program: StepProgram, layout: Layout, size: float) -> Cost:
    """Compiles a program for CPUs, without optimisation, and returns what can be told from that.

    Args:
      size: factor of all bytes, the compute dtype's size over that of float32.
    """
    began = time.perf_counter()
    lowered = program.jitted.lower(*program.arguments, **program.options)
    compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})
    text = compiled.as_text()
    work, _ = counted_work(program, text)
    sent = {key: size * count for key, count in work.by_axis(dict(layout.mesh.shape)).items()}
    analysis = compiled.memory_analysis()
    temporaries = analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return Cost(size * temporaries, work, sent, time.perf_counter() - began, text=text)


def predicted_cost(program: StepProgram, layout: Layout, lowered: Any, compiler: Compiler) -> Cost:
    """Compiles a program with its chip's own compiler, and returns its memory and its roofline."""
    compiled = compiler.compile(lowered)
    if not compiled.fits:
        return Cost(compiled.temporaries, Work(), {}, compiled.seconds, fits=False)
    links = link_speed(compiler.chip, compiler.places(list(layout.mesh.devices.flat)))
    work, note = counted_work(program, compiled.text, compiler.chip, links)
    sent, notes = work.by_axis(dict(layout.mesh.shape)), "; ".join(filter(None, (compiled.note, note)))
    return Cost(compiled.temporaries, work, sent, compiled.seconds, True, True, notes, compiled.text)


def counted_work(
    program: StepProgram, text: str, chip: Chip | None = None, links: Links = lambda group: math.inf
) -> tuple[Work, str]:
    """Returns the work that a program's text says, and what is to be known of it; often nothing."""
    unknown = []

    def trips(depth: int, index: int) -> float:
        unknown.append(depth)
        return program.trips(depth, index) if program.trips is not None else 1.0

    roofline = Roofline(read_program(text), chip, trips, taken=program.taken, kernels=program.kernels, links=links)
    work = roofline.work()
    return work, f"{len(unknown)} loops of unknown length count once" if unknown and program.trips is None else ""


@functools.cache
def parameter_count(network: Qwen3Config) -> int:
    """Returns the number of a network's parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(split(abstract_model(network))[1]))
