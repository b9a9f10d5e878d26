"""The sampler as a program: jitted, on a mesh, from prompts of any number to texts."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from models.decoding import (
    DecodeWeights,
    choose_decoding,
    decode_weights,
    kernel_for,
    make_decoder,
    with_weight_shardings,
)
from models.sampler import Drawing, Rollout, SamplingParams, sample
from models.sharding import Layout, fetch, parameter_shardings
from models.slots import Batch, Part, SlotRollouts, has_finish, slot_programs
from models.stop_strings import StopStrings, StopTable
from models.tokenizer import Prompt, Tokenizer


class Completions(NamedTuple):
    """Completions on the host, as texts and as tokens."""

    texts_PG: list[list[str]]
    lengths_PG: np.ndarray
    finished_PG: np.ndarray
    tokens_PGT: np.ndarray


class Generator:
    """Draws completions from a policy. Its parameters are arguments of every call: one compilation serves all steps."""

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
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
        sampling_copy: bool = True,
        decoding: str = "auto",
        rollout_prompts: int | None = None,
    ) -> None:
        """
        Args:
          stop: texts that end a completion, with the token in which the first of them ends.
          rollout_prompts: prompts that `rollouts` decodes at a time; None: all.

        Raises:
          ValueError: see `models.stop_strings.check_stop_strings`.
        """
        self.tokenizer, self.layout, self.max_prompt_length = tokenizer, layout, max_prompt_length
        self._graphdef, self._sampling_copy, self._decoding = graphdef, sampling_copy, decoding
        self._copy: SamplingCopy | None = None
        eos_ids = np.array(tokenizer.eos_ids, np.int32)
        self.stop_strings = StopStrings(stop, tokenizer) if stop else None
        table = None if self.stop_strings is None else self.stop_strings.table
        options = optional_settings(min_p, repetition_penalty, table)
        self.sampling = SamplingParams(temperature, top_k, top_p, min_tokens, eos_ids, **options)
        self._rollout_prompts, self._max_completion_length = rollout_prompts, max_completion_length
        self._sample = sampling_program(graphdef, max_completion_length, tokenizer.pad_id)
        tracked = self.sampling.tracked
        self._slots = slot_programs(graphdef, max_completion_length, tokenizer.pad_id, layout, tracked)

    def rollout(
        self,
        params: Any,
        prompt_PS: np.ndarray,
        lengths_P: np.ndarray,
        key: jax.Array,
        num_generations: int,
        first_row: int = 0,
        streams_PG: np.ndarray | None = None,
    ) -> Rollout:
        """Draws G completions of each prompt; `first_row` is the number of the first prompt in the whole batch.

        `streams_PG`, if given, numbers each completion's random stream instead (see `models.sampler.sample`, `rows_P`).
        """
        rows = np.arange(first_row, first_row + len(prompt_PS), dtype=np.int32) if streams_PG is None else streams_PG
        put = self.layout.put
        prompts = (put(prompt_PS, ("prompt", None)), put(lengths_P, ("prompt",)))
        numbers, weights = put(rows, ("prompt", "group")[: rows.ndim]), self.sampling_weights(params)
        sampling = self._sampling_of(params)
        options = {"num_generations": num_generations, "drawing": known_drawing(weights, sampling)}
        return self._sample(weights, *prompts, numbers, key, sampling, **options)

    def rollouts(
        self, params: Any, prompt_PS: np.ndarray, lengths_P: np.ndarray, key: jax.Array, num_generations: int
    ) -> Iterable[Part]:
        """Draws G completions of each prompt, `rollout_prompts` at a time; gives the groups in parts, as they end.

        The devices are at work when this returns. While the caller works on a part, they decode the next one.
        """
        P, slots = len(prompt_PS), self._rollout_prompts
        if slots is None or slots >= P:
            rollout = self.rollout(params, prompt_PS, lengths_P, key, num_generations)
            return (Part(np.arange(P), jax.tree.map(fetch, whole)) for whole in [rollout])
        weights, sampling = self.sampling_weights(params), self._sampling_of(params)
        sizes = (slots, num_generations, self._max_completion_length)
        return iter(
            SlotRollouts(
                self._slots,
                weights,
                Batch(prompt_PS, lengths_P, key),
                sampling,
                slots=slots,
                num_generations=num_generations,
                layout=self.layout,
                drawing=known_drawing(weights, sampling),
                finishes=has_finish(weights, self._graphdef, *sizes),
            )
        )

    def _sampling_of(self, params: Any) -> SamplingParams:
        """Returns the settings, with the ids that have no token."""
        embed_VD = params.embed_VD if isinstance(params, DecodeWeights) else params["embed_VD"]
        return self.sampling._replace(absent_V=self.tokenizer.absent_ids(len(embed_VD)))

    def endings(self, completions: Rollout | Completions) -> list[list[str | None]] | None:
        """Returns the stop string that ended each completion of arrays on the host; None without stop strings."""
        if self.stop_strings is None:
            return None
        return self.stop_strings.endings(completions.tokens_PGT, completions.lengths_PG, completions.finished_PG)

    def sampling_weights(self, params: Any) -> Any:
        """Returns the weights to sample from. Idempotent."""
        if not self._sampling_copy:
            return params
        if self._copy is None:
            self._copy = SamplingCopy(self._graphdef, params, self.layout, self._decoding)
        return self._copy(params)

    def complete(
        self,
        params: Any,
        prompts: Sequence[Prompt],
        key: jax.Array,
        num_generations: int,
        batch_prompts: int,
        streams_PG: np.ndarray | None = None,
    ) -> Completions:
        """Draws completions of any number of prompts, `batch_prompts` at a time; the batch size changes no token.

        `streams_PG` is that of `rollout`.
        """
        parts, params = [], self.sampling_weights(params)
        for start in range(0, len(prompts), batch_prompts):
            batch = list(prompts[start : start + batch_prompts])
            padding = batch_prompts - len(batch)
            padded = batch + batch[-1:] * padding  # one shape, one compilation
            streams = None if streams_PG is None else streams_PG[start : start + batch_prompts]
            if streams is not None:
                streams = np.pad(streams, [(0, padding), (0, 0)], "edge")
            prompt_PS, lengths_P = self.tokenizer.encode_prompts(padded, self.max_prompt_length)
            out = self.rollout(params, prompt_PS, lengths_P, key, num_generations, start, streams)
            parts.append([fetch(x)[: len(batch)] for x in (out.tokens_PGT, out.lengths_PG, out.finished_PG)])
        tokens_PGT, lengths_PG, finished_PG = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return Completions(self.tokenizer.decode(tokens_PGT, lengths_PG), lengths_PG, finished_PG, tokens_PGT)


class SamplingCopy:
    """Copies parameters for sampling: to the compute dtype, and gathered over the devices that share the prompts.

    Leaves that already match are not copied. Sampled tokens do not change: the copy is rounded as each layer would
    round its parameters when it uses them. On accelerators the copy is `DecodeWeights`, and copies all.

    Args:
      params: parameters, or ShapeDtypeStructs with shardings, that fix the layout.
      decoding: what the copy is for, see `models.decoding.choose_decoding`.

    Raises:
      ValueError: see `choose_decoding`.
    """

    def __init__(self, graphdef: Any, params: Any, layout: Layout, decoding: str = "auto") -> None:
        model, sampling = nnx.merge(graphdef, params), layout.for_sampling()
        chosen = choose_decoding(decoding, layout, model.config)
        self.unrolled = chosen != "scanned"
        if self.unrolled:
            kernels = kernel_for(layout, model.config.head_dim) if chosen == "kernels" else None
            convert = partial(decode_weights, graphdef, kernels=kernels)
            self.targets: Any = with_weight_shardings(jax.eval_shape(convert, params), sampling)
            self.is_copied = [True] * len(jax.tree.leaves(params))
            shardings = jax.tree.map(lambda target: target.sharding, self.targets)
            self.program = jax.jit(jax.named_scope("copy")(convert), out_shardings=shardings)
            return
        shardings = parameter_shardings(model, sampling)
        self.targets = jax.tree.map(
            lambda p, s: jax.ShapeDtypeStruct(p.shape, model.dtype, sharding=s), params, shardings
        )
        self.is_copied = self._differs(params)
        targets = self.copied_leaves(self.targets)

        @partial(jax.jit, out_shardings=[target.sharding for target in targets])
        @jax.named_scope("copy")
        def cast(leaves: list[Any]) -> list[Any]:
            return [leaf.astype(target.dtype) for leaf, target in zip(leaves, targets, strict=True)]

        self.program = cast

    @property
    def new_leaves(self) -> list[Any]:
        """The shapes of what is in memory beside the parameters."""
        return jax.tree.leaves(self.targets) if self.unrolled else self.copied_leaves(self.targets)

    def argument(self, params: Any) -> Any:
        """Returns what `program` takes of parameters."""
        return params if self.unrolled else self.copied_leaves(params)

    def _differs(self, params: Any) -> list[bool]:
        """Returns for each leaf whether its dtype or sharding is not the target's."""
        differs = lambda p, t: p.dtype != t.dtype or not p.sharding.is_equivalent_to(t.sharding, p.ndim)  # noqa: E731
        return jax.tree.leaves(jax.tree.map(differs, params, self.targets))

    def copied_leaves(self, tree: Any) -> list[Any]:
        """Returns the leaves of a tree like the parameters' that are copied."""
        return [leaf for leaf, copied in zip(jax.tree.leaves(tree), self.is_copied, strict=True) if copied]

    def __call__(self, params: Any) -> Any:
        """Copies params; returns them unchanged if they already match."""
        if isinstance(params, DecodeWeights):
            return params
        if self.unrolled:
            return self.program(params)
        if not any(self._differs(params)):
            return params
        leaves, structure = jax.tree.flatten(params)
        copies = iter(self.program(self.copied_leaves(params)))
        return jax.tree.unflatten(
            structure, [next(copies) if copied else leaf for leaf, copied in zip(leaves, self.is_copied, strict=True)]
        )


def optional_settings(min_p: float, repetition_penalty: float, stop: StopTable | None) -> dict[str, Any]:
    """Returns the settings of `SamplingParams` that can be off, None where they are."""
    penalty = None if repetition_penalty == 1 else repetition_penalty
    return {"min_p": min_p or None, "repetition_penalty": penalty, "stop": stop}


def sampling_program(graphdef: Any, max_completion_length: int, pad_id: int) -> Any:
    """Returns the jitted (params, prompt_PS, lengths_P, rows_P, key, sampling, *, num_generations) -> Rollout.

    Its option `drawing` is `models.sampler.sample`'s.
    """
    static = ("num_generations", "drawing")
    return jax.jit(partial(_sample, graphdef, max_completion_length, pad_id), static_argnames=static)


def known_drawing(params: Any, sampling: SamplingParams) -> Drawing | None:
    """Returns what to compile the program for: on accelerators, where the host waits for every branch, one case."""
    return Drawing.of(sampling) if isinstance(params, DecodeWeights) else None


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
    drawing: Drawing | None = None,
) -> Rollout:
    return sample(
        make_decoder(params, graphdef),
        prompt_PS,
        lengths_P,
        rows_P,
        key,
        sampling,
        num_generations=num_generations,
        max_completion_length=max_completion_length,
        pad_id=pad_id,
        drawing=drawing,
    )
