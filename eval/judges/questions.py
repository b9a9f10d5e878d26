"""Asks a server about pairs of answers, and reads verdicts from its replies.

1. `before`: the task's questions about each prompt alone.
2. Every pair in both orders; a pointwise task asks about each answer alone.
3. `reconsider`: a second question in both orders, where the two verdicts contradict each other.
"""

import json
from collections.abc import Sequence
from typing import Any

from eval.judges.pairs import CompletionPair, Judgement, shortened, winner_of
from eval.judges.server import Failure, Request, Server
from eval.judges.task import OVERALL, JudgeTask, Question, readable
from eval.judges.verdict import UNPARSABLE, verdict
from train.rewards.chat_api import Reply

ORDERS = ("ab", "ba")
ServerAnswer = Reply | Failure


class ServerJudge:
    """Judges pairs by asking a server the questions of a task; `replies` collects every reply once."""

    def __init__(self, server: Server, task: JudgeTask) -> None:
        self.server, self.task = server, task
        self.replies: dict[Request, Reply] = {}

    def judge(self, pairs: Sequence[CompletionPair]) -> list[Judgement]:
        """One judgement per pair."""
        before = self._before(pairs)
        if self.task.answer == "score":
            return self._scores(pairs, before)
        values = [[self._values(pair, order, before[i]) for order in ORDERS] for i, pair in enumerate(pairs)]
        return self._reconsidered(pairs, values, self._both_orders(pairs, values, self.task, self.task.question))

    def _before(self, pairs: Sequence[CompletionPair]) -> list[dict[str, ServerAnswer]]:
        """The replies about each pair's prompt, by name."""
        named = self.task.before.items()
        requests = [
            {name: self._request(question, {"prompt": readable(pair.prompt)}) for name, question in named}
            for pair in pairs
        ]
        answers = self._ask([request for by_name in requests for request in by_name.values()], "before")
        return [{name: answers[request] for name, request in by_name.items()} for by_name in requests]

    def _both_orders(
        self,
        pairs: Sequence[CompletionPair],
        values: list[list[dict[str, str] | Failure]],
        task: JudgeTask,
        question: Question,
    ) -> list[Judgement]:
        requests = [
            [one if isinstance(one, Failure) else self._request(question, one) for one in both] for both in values
        ]
        answers = self._ask([r for both in requests for r in both if isinstance(r, Request)], "pairs")
        order_answers = [[r if isinstance(r, Failure) else answers[r] for r in both] for both in requests]
        return [
            Judgement([read_order(order, answer, task) for order, answer in zip(ORDERS, both, strict=True)])
            for both in order_answers
        ]

    def _reconsidered(
        self, pairs: Sequence[CompletionPair], values: list[list[dict[str, str] | Failure]], judged: list[Judgement]
    ) -> list[Judgement]:
        """Replaces the judgements whose two orders contradict each other by those of the second question."""
        if self.task.reconsider is None:
            return judged
        conflicts = [i for i, first in enumerate(judged) if {order["winner"] for order in first.orders} == {"a", "b"}]
        again: list[list[dict[str, str] | Failure]] = [
            [
                dict(inserted) | explanations(self.task, judged[i], order)
                for order, inserted in zip(ORDERS, values[i], strict=True)
                if not isinstance(inserted, Failure)
            ]
            for i in conflicts
        ]
        task = self.task.of_reconsidering()
        second = self._both_orders([pairs[i] for i in conflicts], again, task, self.task.reconsider)
        for i, judgement in zip(conflicts, second, strict=True):
            for order, before in zip(judgement.orders, judged[i].orders, strict=True):
                order["before"] = before
            judged[i] = judgement
        return judged

    def _scores(self, pairs: Sequence[CompletionPair], before: Sequence[dict[str, ServerAnswer]]) -> list[Judgement]:
        asked: list[list[Request | Failure]] = []
        for i, pair in enumerate(pairs):
            given = self._shared_values(pair, before[i])
            if isinstance(given, Failure):
                asked.append([given, given])
            else:
                question = self.task.question
                asked.append([self._request(question, given | {"answer": text}) for text in (pair.a, pair.b)])
        answers = self._ask([r for both in asked for r in both if isinstance(r, Request)], "answers")
        judged = []
        for requests in asked:
            read = [read_answer(r if isinstance(r, Failure) else answers[r], self.task) for r in requests]
            faults = [row["kind"] for row, _ in read if row["kind"] not in ("strict", "fallback")]
            orders = [row | {"answer": side} for (row, _), side in zip(read, "ab", strict=True)]
            scores = (read[0][1].score, read[1][1].score)
            judged.append(Judgement(orders, scores, kind=faults[0] if faults else None))
        return judged

    def _shared_values(self, pair: CompletionPair, before: dict[str, ServerAnswer]) -> dict[str, str] | Failure:
        """The values of a question that do not depend on the order; the Failure if a reply about the prompt failed."""
        for answer in before.values():
            if isinstance(answer, Failure):
                return answer
        prompt_replies = {name: answer.text for name, answer in before.items() if isinstance(answer, Reply)}
        return {"prompt": readable(pair.prompt)} | prompt_replies

    def _values(self, pair: CompletionPair, order: str, before: dict[str, ServerAnswer]) -> dict[str, str] | Failure:
        given, (first, second) = self._shared_values(pair, before), pair.shown(order)
        return given if isinstance(given, Failure) else given | {"first": first, "second": second}

    def _request(self, question: Question, values: dict[str, str]) -> Request:
        schema = json.dumps(self.task.schema()) if question.answer == "json" else None
        return Request.of(question.messages(values), max_tokens=question.max_tokens, schema=schema)

    def _ask(self, requests: Sequence[Request], title: str) -> dict[Request, ServerAnswer]:
        answers = self.server.ask(requests, title) if requests else {}
        self.replies |= {request: answer for request, answer in answers.items() if isinstance(answer, Reply)}
        return answers


def explanations(task: JudgeTask, judged: Judgement, order: str) -> dict[str, str]:
    """The two contradicting replies, rewritten as if both had seen the answers in this order."""
    replies = {}
    for one in judged.orders:
        own = one["shown"] == order
        side = "first" if one["winner"] == order[0] else "second"
        replies[f"explanation_{side}"] = one["text"] if own else task.exchanged(one["text"])
    return replies


def read_answer(answer: ServerAnswer, task: JudgeTask) -> tuple[dict[str, Any], Any]:
    """Returns the fields to store of an answer, and its verdict."""
    if isinstance(answer, Failure):
        kind = "too_long" if answer.too_long else "failed"
        return {"kind": kind, "reply": answer.why, "text": "", "finish_reason": None}, UNPARSABLE
    parsed = UNPARSABLE if answer.cut_off else verdict(answer.text, task)
    tokens = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
    stored = {"reply": shortened(answer.text), "text": answer.text, "finish_reason": answer.finish_reason}
    return {"kind": parsed.kind} | stored | tokens, parsed


def read_order(order: str, answer: ServerAnswer, task: JudgeTask) -> dict[str, Any]:
    row, parsed = read_answer(answer, task)
    aspects = {aspect: winner_of(order, winner) for aspect, winner in parsed.winners.items()}
    return {"shown": order, "winner": aspects.get(OVERALL), "aspects": aspects} | row
