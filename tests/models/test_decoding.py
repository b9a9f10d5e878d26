"""The unrolled decoder draws what the scanned one draws, with kernels and without, whatever the network has."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.config import Qwen3Config
from models.decoding import (
    DecodeWeights,
    ScannedDecoder,
    UnrolledDecoder,
    choose_decoding,
    decode_weights,
    kernel_for,
    make_decoder,
)
from models.generate import SamplingCopy, known_drawing, sampling_program
from models.hf_weights import split
from models.lora import Lora
from models.qwen3 import Qwen3
from models.sampler import Drawing, Rollout, SamplingParams, draw, sample
from models.sharding import Layout, make_layout

P, G, S, T, V = 3, 4, 9, 16, 61
PROMPT_PS = np.random.default_rng(0).integers(0, V, (P, S)).astype(np.int32)
LENGTHS_P = np.array([9, 5, 1], np.int32)
SAMPLING = SamplingParams(1.0, 0, 1.0, 0, np.array([3, 5], np.int32))
NETWORKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tied, windows": ({"sliding_window": 6, "layer_types": ("sliding_attention", "full_attention")}, {}),
    "untied, biases, adapters": (
        {"tie_word_embeddings": False, "attention_bias": True},
        {"lora": Lora(rank=2, alpha=3.0)},
    ),
}
SIZES = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
SIZES |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)


def network(name: str, **more: Any) -> tuple[Any, Any]:
    """Graphdef and parameters that are far from their initial values, biases and adapters too."""
    config, options = NETWORKS.get(name, ({}, {}))
    graphdef, params = split(Qwen3(Qwen3Config(**SIZES, **config), nnx.Rngs(0), **options, **more))
    noise = np.random.default_rng(1)
    return graphdef, jax.tree.map(lambda leaf: leaf + noise.normal(0, 0.2, leaf.shape).astype(leaf.dtype), params)


def drawn(decoder: Callable[[], Any]) -> Rollout:
    """Completions of a decoder that is made while it is traced."""

    @jax.jit
    def run() -> Rollout:
        options: Any = {"num_generations": G, "max_completion_length": T}
        return sample(decoder(), PROMPT_PS, LENGTHS_P, jnp.arange(P), jax.random.key(1), SAMPLING, **options)

    return jax.tree.map(np.asarray, run())


@pytest.mark.parametrize("name", NETWORKS)
def test_unrolled_is_scanned(name: str) -> None:
    graphdef, params = network(name)
    expected = drawn(lambda: make_decoder(params, graphdef))
    assert expected.lengths_PG.min() < T < expected.lengths_PG.sum(), "some end early"
    for kernels in (None, "gpu", "tpu"):
        weights = decode_weights(graphdef, params, kernels=kernels)
        found = drawn(partial(UnrolledDecoder, weights, interpret=True))
        np.testing.assert_array_equal(found.tokens_PGT, expected.tokens_PGT)
        np.testing.assert_array_equal(found.finished_PG, expected.finished_PG)
        np.testing.assert_allclose(found.logprobs_PGT, expected.logprobs_PGT, atol=3e-5)


SETTINGS = {"greedy": {"temperature": 0.0}, "top_k": {"top_k": 5}, "top_p": {"top_p": 0.6, "temperature": 0.7}}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_known_before_compiling_changes_no_token(name: str) -> None:
    sampling = SAMPLING._replace(**SETTINGS[name])
    rng = np.random.default_rng(2)
    logits, uniform = jnp.asarray(rng.normal(0, 3, (200, V)), jnp.float32), jnp.asarray(rng.random(200), jnp.float32)
    asked, known = (draw(logits, uniform, jnp.zeros(V, bool), sampling, d) for d in (None, Drawing.of(sampling)))
    np.testing.assert_array_equal(known[0], asked[0])
    np.testing.assert_array_equal(known[1], asked[1])
    assert Drawing.of(sampling) == Drawing(name != "greedy", name == "greedy")


def layout_of(platform: str, **rules: tuple[str, ...]) -> Layout:
    layout = make_layout(devices=jax.devices()[:1])
    mesh: Any = SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)], object))
    return replace(layout, mesh=mesh, rules=tuple((dict(layout.rules) | rules).items()))


def test_cpus_scan_and_other_devices_unroll() -> None:
    wide, narrow = Qwen3Config(**SIZES | {"head_dim": 128}), Qwen3Config(**SIZES)
    chosen = {name: choose_decoding("auto", layout_of(name), wide) for name in ("cpu", "gpu", "cuda", "tpu")}
    assert chosen == {"cpu": "scanned", "gpu": "kernels", "cuda": "kernels", "tpu": "kernels"}
    kernels = {name: kernel_for(layout_of(name), wide.head_dim) for name in chosen}
    assert kernels == {"cpu": None, "gpu": "gpu", "cuda": "gpu", "tpu": "tpu"}
    halves = Qwen3Config(**SIZES | {"head_dim": 64})
    assert [choose_decoding("auto", layout_of(name), halves) for name in ("gpu", "tpu")] == ["kernels", "unrolled"]
    assert choose_decoding("auto", layout_of("gpu"), narrow) == "unrolled"
    assert choose_decoding("auto", layout_of("gpu", kv_heads=()), wide) == "scanned"
    assert choose_decoding("unrolled", layout_of("cpu"), narrow) == "unrolled"
    graphdef, params = network("plain")
    assert isinstance(make_decoder(params, graphdef), ScannedDecoder)


@pytest.mark.parametrize(
    ("decoding", "platform", "rules", "message"),
    [
        (
            "kernels",
            "tpu",
            {},
            "kernels are for heads of 32, 64, 128, ... on GPUs and of 128, 256, ... on TPUs, got heads of 16 on tpu",
        ),
        (
            "unrolled",
            "tpu",
            {"kv_heads": ()},
            "unrolled needs one rule for heads and kv_heads; expected auto or scanned",
        ),
    ],
    ids=["kernels", "heads"],
)
def test_decoding_that_devices_cannot_do(decoding: str, platform: str, rules: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"mesh.decoding: {message}")):
        choose_decoding(decoding, layout_of(platform, **rules), Qwen3Config(**SIZES))


def test_the_copy_for_unrolled_decoding_is_a_copy() -> None:
    """Made once for all calls; the program draws the same from it as from the parameters."""
    layout = make_layout(devices=jax.devices()[:1])
    graphdef, params = network("plain", layout=layout)
    copy = SamplingCopy(graphdef, params, layout, "unrolled")
    weights = copy(params)
    assert isinstance(weights, DecodeWeights) and copy(weights) is weights
    assert [leaf.shape for leaf in jax.tree.leaves(weights)] == [leaf.shape for leaf in copy.new_leaves]
    counts = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (weights, params)]
    assert counts[0] == counts[1], "every weight once"
    program = sampling_program(graphdef, T, 0)
    arguments = (PROMPT_PS, LENGTHS_P, jnp.arange(P), jax.random.key(1), SAMPLING)
    assert known_drawing(params, SAMPLING) is None and known_drawing(weights, SAMPLING) == Drawing(False, False)
    rollouts = [
        program(given, *arguments, num_generations=G, drawing=known_drawing(given, SAMPLING))
        for given in (params, weights)
    ]
    np.testing.assert_array_equal(rollouts[0].tokens_PGT, rollouts[1].tokens_PGT)
