"""From pairs to questions for a server, and from its replies to verdicts.

1. `before`: what the task asks about each prompt alone.
2. Every pair in both orders; with a pointwise task each answer by itself.
3. `reconsider`: in both orders again, where the two contradict each other.
"""

import json
from collections.abc import Sequence
from typing import Any

from eval.judges.cache import Reply
from eval.judges.pairs import CompletionPair, Judgement, shortened, winner_of
from eval.judges.server import Failure, Request, Server
from eval.judges.task import OVERALL, JudgeTask, Question, readable
from eval.judges.verdict import UNPARSABLE, verdict

ORDERS = ("ab", "ba")
ServerAnswer = Reply | Failure


class ServerJudge:
    """A task, put to a server. `replies` are all that the judgements rest on, each once."""

    def __init__(self, server: Server, task: JudgeTask) -> None:
        self.server, self.task = server, task
        self.replies: dict[Request, Reply] = {}

    def judge(self, pairs: Sequence[CompletionPair]) -> list[Judgement]:
        """What the server says of each pair."""
        before = self._before(pairs)
        if self.task.answer == "score":
            return self._scores(pairs, before)
        values = [[self._values(pair, order, before[i]) for order in ORDERS] for i, pair in enumerate(pairs)]
        return self._again(pairs, values, self._both_orders(pairs, values, self.task, self.task.question))

    def _before(self, pairs: Sequence[CompletionPair]) -> list[dict[str, ServerAnswer]]:
        """For each pair the replies about its prompt, by name."""
        named = self.task.before.items()
        asked = [
            {name: self._request(question, {"prompt": readable(pair.prompt)}) for name, question in named}
            for pair in pairs
        ]
        answers = self._ask([request for one in asked for request in one.values()], "before")
        return [{name: answers[request] for name, request in one.items()} for one in asked]

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
        found = [[r if isinstance(r, Failure) else answers[r] for r in both] for both in requests]
        return [
            Judgement([read_order(order, answer, task) for order, answer in zip(ORDERS, both, strict=True)])
            for both in found
        ]

    def _again(
        self, pairs: Sequence[CompletionPair], values: list[list[dict[str, str] | Failure]], judged: list[Judgement]
    ) -> list[Judgement]:
        """The second verdicts of the pairs whose two orders contradict each other; the first ones of all others."""
        if self.task.reconsider is None:
            return judged
        torn = [i for i, one in enumerate(judged) if {order["winner"] for order in one.orders} == {"a", "b"}]
        more: list[list[dict[str, str] | Failure]] = [
            [
                dict(one) | explanations(self.task, judged[i], order)
                for order, one in zip(ORDERS, values[i], strict=True)
                if not isinstance(one, Failure)
            ]
            for i in torn
        ]
        second = self._both_orders([pairs[i] for i in torn], more, self.task.of_reconsidering(), self.task.reconsider)
        for i, one in zip(torn, second, strict=True):
            for order, first in zip(one.orders, judged[i].orders, strict=True):
                order["before"] = first
            judged[i] = one
        return judged

    def _scores(self, pairs: Sequence[CompletionPair], before: Sequence[dict[str, ServerAnswer]]) -> list[Judgement]:
        asked: list[list[Request | Failure]] = []
        for i, pair in enumerate(pairs):
            given = self._given(pair, before[i])
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

    def _given(self, pair: CompletionPair, before: dict[str, ServerAnswer]) -> dict[str, str] | Failure:
        """What is put into a question whatever the order; where a reply about the prompt is missing, why."""
        for answer in before.values():
            if isinstance(answer, Failure):
                return answer
        told = {name: answer.text for name, answer in before.items() if isinstance(answer, Reply)}
        return {"prompt": readable(pair.prompt)} | told

    def _values(self, pair: CompletionPair, order: str, before: dict[str, ServerAnswer]) -> dict[str, str] | Failure:
        given, (first, second) = self._given(pair, before), pair.shown(order)
        return given if isinstance(given, Failure) else given | {"first": first, "second": second}

    def _request(self, question: Question, values: dict[str, str]) -> Request:
        schema = json.dumps(self.task.schema()) if question.answer == "json" else None
        return Request.of(question.messages(values), max_tokens=question.max_tokens, schema=schema)

    def _ask(self, requests: Sequence[Request], title: str) -> dict[Request, ServerAnswer]:
        answers = self.server.ask(requests, title) if requests else {}
        self.replies |= {request: answer for request, answer in answers.items() if isinstance(answer, Reply)}
        return answers


def explanations(task: JudgeTask, judged: Judgement, order: str) -> dict[str, str]:
    """The two contradicting replies, as they would read if both had seen the answers in this order."""
    replies = {}
    for one in judged.orders:
        own = one["shown"] == order
        side = "first" if one["winner"] == order[0] else "second"
        replies[f"explanation_{side}"] = one["text"] if own else task.exchanged(one["text"])
    return replies


def read_answer(answer: ServerAnswer, task: JudgeTask) -> tuple[dict[str, Any], Any]:
    """What is kept of an answer, and its verdict."""
    if isinstance(answer, Failure):
        kind = "too_long" if answer.too_long else "failed"
        return {"kind": kind, "reply": answer.why, "text": "", "finish_reason": None}, UNPARSABLE
    found = UNPARSABLE if answer.cut_off else verdict(answer.text, task)
    tokens = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
    kept = {"reply": shortened(answer.text), "text": answer.text, "finish_reason": answer.finish_reason}
    return {"kind": found.kind} | kept | tokens, found


def read_order(order: str, answer: ServerAnswer, task: JudgeTask) -> dict[str, Any]:
    row, found = read_answer(answer, task)
    aspects = {aspect: winner_of(order, winner) for aspect, winner in found.winners.items()}
    return {"shown": order, "winner": aspects.get(OVERALL), "aspects": aspects} | row
