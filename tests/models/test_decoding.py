"""The unrolled decoder draws what the scanned one draws, with kernels and without, whatever the network has."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import Qwen3Config
from models.decoding import DecodeWeights, ScannedDecoder, UnrolledDecoder, decode_weights, make_decoder, unrolls
from models.generate import SamplingCopy, known_drawing, sampling_program
from models.hf_weights import split
from models.lora import Lora
from models.qwen3 import Backbone
from models.sampler import Drawing, Rollout, SamplingParams, sample
from models.sharding import make_layout

P, G, S, T, V = 3, 4, 9, 24, 61
PROMPT_PS = np.random.default_rng(0).integers(0, V, (P, S)).astype(np.int32)
LENGTHS_P = np.array([9, 5, 1], np.int32)
SAMPLING = SamplingParams(1.0, 0, 1.0, 0, np.array([3, 5], np.int32))
NETWORKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tied": ({}, {}),
    "untied, biases": ({"tie_word_embeddings": False, "attention_bias": True}, {}),
    "adapters": ({}, {"lora": Lora(rank=2, alpha=3.0)}),
    "windows": ({"sliding_window": 6, "layer_types": ("sliding_attention", "full_attention")}, {}),
}
SIZES = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
SIZES |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)


def network(name: str, make_model: Callable[..., Backbone]) -> tuple[Any, Any]:
    """Graphdef and parameters that are far from their initial values, biases and adapters too."""
    config, options = NETWORKS[name]
    graphdef, params = split(make_model(Qwen3Config(**SIZES, **config), **options))
    noise = np.random.default_rng(1)
    return graphdef, jax.tree.map(lambda leaf: leaf + noise.normal(0, 0.2, leaf.shape).astype(leaf.dtype), params)


def drawn(decoder: Callable[[], Any], params: SamplingParams = SAMPLING, drawing: Drawing | None = None) -> Rollout:
    """Completions of a decoder that is made while it is traced."""

    @jax.jit
    def run() -> Rollout:
        options: Any = {"num_generations": G, "max_completion_length": T, "drawing": drawing}
        return sample(decoder(), PROMPT_PS, LENGTHS_P, jnp.arange(P), jax.random.key(1), params, **options)

    return jax.tree.map(np.asarray, run())


@pytest.mark.parametrize("name", NETWORKS)
def test_unrolled_is_scanned(name: str, make_model: Callable[..., Backbone]) -> None:
    graphdef, params = network(name, make_model)
    weights = decode_weights(graphdef, params)
    expected = drawn(lambda: make_decoder(params, graphdef))
    assert expected.lengths_PG.min() < T < expected.lengths_PG.sum(), "some end early"
    for kernel in (False, True):
        found = drawn(lambda kernel=kernel: UnrolledDecoder(weights, kernel=kernel, interpret=True))  # type: ignore[misc]
        np.testing.assert_array_equal(found.tokens_PGT, expected.tokens_PGT)
        np.testing.assert_array_equal(found.finished_PG, expected.finished_PG)
        np.testing.assert_allclose(found.logprobs_PGT, expected.logprobs_PGT, atol=3e-5)


@pytest.mark.parametrize(
    "changes",
    [{"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.6, "temperature": 0.7}],
    ids=["greedy", "top_k", "top_p"],
)
def test_what_is_known_before_compiling_changes_no_token(
    changes: dict[str, Any], make_model: Callable[..., Backbone]
) -> None:
    graphdef, params = network("tied", make_model)
    sampling = SAMPLING._replace(**changes)
    decoder = partial(UnrolledDecoder, decode_weights(graphdef, params), kernel=False)
    open_choice, known = (drawn(decoder, sampling, drawing) for drawing in (None, Drawing.of(sampling)))
    np.testing.assert_array_equal(known.tokens_PGT, open_choice.tokens_PGT)


def test_cpus_scan_and_other_devices_unroll(make_model: Callable[..., Backbone]) -> None:
    layout = make_layout(devices=jax.devices()[:1])

    class Accelerators:
        devices = np.array([type("Device", (), {"platform": "tpu"})()], object)

    accelerators = replace(layout, mesh=Accelerators())  # type: ignore[arg-type]
    assert not unrolls(layout) and unrolls(accelerators)
    split_heads = replace(accelerators, rules=tuple((dict(layout.rules) | {"kv_heads": ()}).items()))
    assert not unrolls(split_heads), "query heads that are split where their key is not have no product of their own"
    graphdef, params = network("tied", make_model)
    assert isinstance(make_decoder(params, graphdef), ScannedDecoder)


def test_the_copy_for_unrolled_decoding_is_a_copy(make_model: Callable[..., Backbone]) -> None:
    """Made once for all calls; the program draws the same from it as from the parameters."""
    layout = make_layout(devices=jax.devices()[:1])
    config, options = NETWORKS["tied"]
    graphdef, params = split(make_model(Qwen3Config(**SIZES, **config), layout=layout, **options))
    copy = SamplingCopy(graphdef, params, layout, unrolled=True)
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
