"""What float32 means: products in full on every device, by the text of programs; other dtypes are as JAX has them."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from models.config import REWARD_MODEL, Qwen3Config
from models.hf_weights import abstract_model, split
from models.lora import Lora
from models.precision import products_in
from models.sampler import SamplingParams, sample

P, G, S, T = 2, 4, 4, 6
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
PROMPTS = jax.ShapeDtypeStruct((P, S), jnp.int32), jax.ShapeDtypeStruct((P,), jnp.int32)
TOKENS, LENGTHS = jax.ShapeDtypeStruct((P, G, T), jnp.int32), jax.ShapeDtypeStruct((P, G), jnp.int32)


def product_precisions(function: Any, *arguments: Any) -> list[str]:
    """The precision of every product of a program, before any compiler has seen it."""
    text = jax.jit(function).lower(*arguments).as_text()
    return re.findall(r"stablehlo\.dot_general .*?(?:precision = \[(\w+), \w+\])", text)


def sampled(model: Any, prompt_PS: jax.Array, lengths_P: jax.Array) -> Any:
    settings = SamplingParams(1.0, 0, 1.0, 0, jnp.array([1]))
    options = {"num_generations": G, "max_completion_length": T, "pad_id": 0}
    return sample(model, prompt_PS, lengths_P, jnp.arange(P), jax.random.key(0), settings, **options)


def loss(model: Any, *batch: jax.Array) -> jax.Array:
    return model.logprobs(model.predict(*batch), batch[-1], chunk_tokens=8).sum()


@pytest.mark.parametrize(("dtype", "expected"), [("float32", {"HIGHEST"}), ("bfloat16", {"DEFAULT"})])
def test_a_policys_products_are_in_its_dtype(dtype: str, expected: set[str]) -> None:
    """Forward and backward, prompts and tokens, adapters, attention and head."""
    graphdef, params = split(abstract_model(Qwen3Config(**SIZES), dtype=dtype, lora=Lora(rank=2)))
    backward = jax.grad(lambda params, *batch: loss(nnx.merge(graphdef, params), *batch))
    found = product_precisions(backward, params, *PROMPTS, TOKENS)
    assert len(found) > 30 and set(found) == expected
    found = product_precisions(
        lambda params, *prompts: sampled(nnx.merge(graphdef, params), *prompts), params, *PROMPTS
    )
    assert len(found) > 10 and set(found) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_reward_models_head_is_float32_whatever_its_dtype(dtype: str) -> None:
    config = Qwen3Config(**SIZES, architecture=REWARD_MODEL)
    graphdef, params = split(abstract_model(config, dtype=dtype))
    score = lambda params, *texts: nnx.merge(graphdef, params).score_group(*texts)  # noqa: E731
    texts = (*PROMPTS, TOKENS, LENGTHS)
    backward = jax.grad(lambda *arguments: score(*arguments).sum())
    for program, of_head in ((score, 1), (backward, 2)):  # rewards; gradients of hidden states and head
        found = product_precisions(program, params, *texts)
        assert found.count("HIGHEST") == (len(found) if dtype == "float32" else of_head)


def test_other_dtypes_follow_jaxs_own_setting() -> None:
    product = lambda x: x @ x  # noqa: E731
    for dtype, expected in (("bfloat16", "HIGH"), ("float32", "HIGHEST")):
        with jax.default_matmul_precision("high"), products_in(dtype):
            assert product_precisions(product, jax.ShapeDtypeStruct((4, 4), dtype)) == [expected]
