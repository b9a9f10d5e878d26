"""The sampler with what it needs around it: jitted, on a mesh, for prompts of any number."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from models.sampler import Rollout, SamplingParams, sample
from models.sharding import Layout, fetch
from models.tokenizer import Prompt, Tokenizer


class Completions(NamedTuple):
    texts_PG: list[list[str]]
    lengths_PG: np.ndarray
    finished_PG: np.ndarray


class Generator:
    """Draws completions from a policy's parameters, which are an argument: one compilation serves all steps."""

    def __init__(
        self,
        graphdef: Any,
        tokenizer: Tokenizer,
        layout: Layout,
        *,
        max_prompt_length: int,
        max_completion_length: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_tokens: int = 0,
    ) -> None:
        self.tokenizer, self.layout, self.max_prompt_length = tokenizer, layout, max_prompt_length
        eos_ids = np.array(tokenizer.eos_ids, np.int32)
        self.sampling = SamplingParams(temperature, top_k, top_p, min_tokens, eos_ids)
        self._sample = jax.jit(
            partial(_sample, graphdef, max_completion_length, tokenizer.pad_id), static_argnames="num_generations"
        )

    def rollout(
        self,
        params: Any,
        prompt_PS: np.ndarray,
        lengths_P: np.ndarray,
        key: jax.Array,
        num_generations: int,
        first_row: int = 0,
    ) -> Rollout:
        """G completions of each prompt; `first_row` is the number of the first prompt in the whole batch."""
        rows_P = np.arange(first_row, first_row + len(prompt_PS), dtype=np.int32)
        put = self.layout.put
        arrays = (put(prompt_PS, ("prompt", None)), put(lengths_P, ("prompt",)), put(rows_P, ("prompt",)))
        return self._sample(params, *arrays, key, self.sampling, num_generations=num_generations)

    def complete(
        self, params: Any, prompts: Sequence[Prompt], key: jax.Array, num_generations: int, batch_prompts: int
    ) -> Completions:
        """Texts for any number of prompts, `batch_prompts` at a time; the batch size changes no token."""
        parts = []
        for start in range(0, len(prompts), batch_prompts):
            batch = list(prompts[start : start + batch_prompts])
            full = batch + batch[-1:] * (batch_prompts - len(batch))  # one shape: nothing new to compile
            prompt_PS, lengths_P = self.tokenizer.encode_prompts(full, self.max_prompt_length)
            out = self.rollout(params, prompt_PS, lengths_P, key, num_generations, start)
            parts.append([fetch(x)[: len(batch)] for x in (out.tokens_PGT, out.lengths_PG, out.finished_PG)])
        tokens_PGT, lengths_PG, finished_PG = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return Completions(self.tokenizer.decode(tokens_PGT, lengths_PG), lengths_PG, finished_PG)


def _sample(
    graphdef: Any,
    max_completion_length: int,
    pad_id: int,
    params: Any,
    prompt_PS: jax.Array,
    lengths_P: jax.Array,
    rows_P: jax.Array,
    key: jax.Array,
    sampling: SamplingParams,
    *,
    num_generations: int,
) -> Rollout:
    return sample(
        nnx.merge(graphdef, params),
        prompt_PS,
        lengths_P,
        rows_P,
        key,
        sampling,
        num_generations=num_generations,
        max_completion_length=max_completion_length,
        pad_id=pad_id,
    )
