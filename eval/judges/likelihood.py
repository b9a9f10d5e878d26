"""A Qwen3 policy as the judge, without free text: it compares the next-token probabilities of the two labels.

For each order of a pair

  p(first) = p(label 1) / (p(label 1) + p(label 2)),   p(label): probability of the label as the next token,

and A's probability is the mean over both orders. The question is the task's own, rendered by the model's chat template
with thinking off; INSTRUCTION, which asks for one label, replaces the task's `reply`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from eval.judges.pairs import CompletionPair, Judgement, winner_of
from eval.judges.task import JudgeTask, readable
from models.checkpoint import load_model
from models.hf_weights import split
from models.precision import products_in
from models.qwen3 import Qwen3
from models.sharding import Layout, fetch
from models.tokenizer import Prompt, Tokenizer, pad, tokenizer_path

INSTRUCTION = "Which one is better, all in all? Reply with {0} or {1} and nothing else."


class LikelihoodJudge:
    """Judges by a policy's probabilities of the two labels."""

    def __init__(
        self, path: str, task: JudgeTask, *, layout: Layout, dtype: str, max_length: int, batch_prompts: int
    ) -> None:
        """Loads the policy of a run, RUN@STEP, a Hugging Face directory or Hub name.

        Raises:
          ValueError: a reward model; a task of several questions or of scores; labels that are not one token each.
        """
        if task.answer == "score" or task.before or task.reconsider:
            raise ValueError(f"--task {task.name}: likelihood can judge by one question about two answers alone")
        self.task, self.layout = task, layout
        self.max_length, self.batch_prompts = max_length, batch_prompts
        self.tokenizer = Tokenizer(tokenizer_path(path))
        self.labels = self._label_ids()
        model = load_model(path, mesh=layout, dtype=dtype)
        if not isinstance(model, Qwen3):
            raise ValueError(f"{path}: expected a policy, got a reward model; --backend reward_model judges with those")
        self.tokenizer.check_vocab_size(model.config.vocab_size, path)
        graphdef, self.params = split(model)
        self._score = label_program(graphdef)

    def judge(self, pairs: Sequence[CompletionPair]) -> list[Judgement]:
        """Judges both orders of each pair."""
        questions = [self.question(pair.prompt, *pair.shown(order)) for pair in pairs for order in ("ab", "ba")]
        rows = self.tokenizer.prompt_ids(questions)
        logprobs = self.label_logprobs(rows)
        return [self._judged(logprobs[2 * i : 2 * i + 2]) for i in range(len(pairs))]

    def question(self, prompt: Any, first: str, second: str) -> Prompt:
        """Chat messages; without a chat template, plain text that the label continues."""
        values = {"prompt": readable(prompt), "first": first, "second": second}
        messages = self.task.question.messages(values, reply=INSTRUCTION.format(*self.task.labels))
        if self.tokenizer.hf.chat_template:
            return messages
        return "\n\n".join(message["content"] for message in messages) + "\n\nAnswer:\n"

    def label_logprobs(self, rows: Sequence[list[int]]) -> list[tuple[float, float] | None]:
        """log p of the two labels after each row of tokens; None for a row that is too long.

        Equal rows are computed once, in sorted order: neither the order of the pairs nor swapping A and B changes a
        rounding.
        """
        distinct = sorted({tuple(row) for row in rows if 0 < len(row) <= self.max_length}, key=lambda r: (len(r), r))
        logprobs_of: dict[tuple[int, ...], tuple[float, float]] = {}
        for start in range(0, len(distinct), self.batch_prompts):
            batch = distinct[start : start + self.batch_prompts]
            full = batch + batch[-1:] * (self.batch_prompts - len(batch))  # one shape: one compilation
            tokens_PS, lengths_P = pad(full, self.tokenizer.pad_id, self.max_length)
            arrays = (self.layout.put(tokens_PS, ("prompt", None)), self.layout.put(lengths_P, ("prompt",)))
            logprobs_P2 = fetch(self._score(self.params, *arrays, np.array(self.labels, np.int32)))
            logprobs_of |= {row: (float(one), float(two)) for row, (one, two) in zip(batch, logprobs_P2, strict=False)}
        return [logprobs_of.get(tuple(row)) for row in rows]

    def _judged(self, both: Sequence[tuple[float, float] | None]) -> Judgement:
        orders: list[dict[str, Any]] = []
        for order, logprobs in zip(("ab", "ba"), both, strict=True):
            if logprobs is None:
                orders.append({"shown": order, "winner": None, "kind": "too_long", "aspects": {}})
                continue
            one, two = logprobs
            winner = winner_of(order, "tie" if one == two else "first" if one > two else "second")
            p_first = 1 / (1 + float(np.exp(np.float64(two) - one)))
            mass = float(np.exp(one) + np.exp(two))  # probability that the next token is a label at all
            shown = {"shown": order, "winner": winner, "kind": "likelihood", "aspects": {"overall": winner}}
            orders.append(shown | {"p_first": p_first, "label_mass": mass})
        if None in both:
            return Judgement(orders)
        # difference of both orders, so that swapping A and B mirrors p exactly; a mean of p and 1 - p would round
        p = 0.5 + (orders[0]["p_first"] - orders[1]["p_first"]) / 2
        return Judgement(orders, p=p)

    def _label_ids(self) -> tuple[int, int]:
        ids = self.tokenizer.encode(list(self.task.labels))
        for label, row in zip(self.task.labels, ids, strict=True):
            if len(row) != 1:
                raise ValueError(
                    f"--task {self.task.name}: likelihood needs labels of one token each; {label!r} is {len(row)} "
                    f"tokens of {self.tokenizer.path}. Use a task with labels such as A and B"
                )
        if ids[0] == ids[1]:
            raise ValueError(f"--task {self.task.name}: both labels are the same token of {self.tokenizer.path}")
        return ids[0][0], ids[1][0]


def label_program(graphdef: Any) -> Any:
    """Jits (params, tokens_PS, lengths_P, labels_2) -> float32 log p of the labels as the next token, [P, 2]."""
    return jax.jit(partial(_label_logprobs, graphdef))


def _label_logprobs(graphdef: Any, params: Any, tokens_PS: Any, lengths_P: Any, labels_2: Any) -> jax.Array:
    model = nnx.merge(graphdef, params)
    last_PD = model.prefill(tokens_PS, lengths_P)[1].last_PD
    # float32: in bfloat16 the two logits would often be equal, a false tie
    with products_in(jnp.float32):
        logits_PV = jnp.einsum("pd,vd->pv", last_PD.astype(jnp.float32), model.head_VD)
    return jax.nn.log_softmax(logits_PV, axis=-1)[:, labels_2]
