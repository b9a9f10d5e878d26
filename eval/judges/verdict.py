"""What a judge's reply says, and never what it may have meant.

`verdict` reads the form that was asked for. A reply in another form is read by fixed rules, of which each knows whole
forms: all of a reply, or all of its last sentence, has to be one of them, and nothing else in it may say otherwise. So
"Overall, Response B is better" is B, and a reply that no rule knows is unparsable, which is counted.

No rule looks at a part of the text more than a few times: 100 kB of braces cost milliseconds.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from eval.judges.grammar import (
    ABOUT_QUESTION,
    AGAINST,
    ASPECT,
    CONCLUSION,
    DENIED,
    FAVOUR,
    FIRST,
    HYPOTHETICAL,
    LONGEST_STATEMENT,
    NO_WINNER,
    QUOTED,
    SECOND,
    SUSPECT,
    UNDECIDED,
    Grammar,
    grammar_of,
    sentences,
    unwrapped,
    without_emphasis,
)
from eval.judges.task import OVERALL, TIE, JudgeTask

LONGEST = 200_000  # characters; nobody who was asked for a label writes a book
SENTENCE_ENDS = re.compile(  # so that what stands behind begins a sentence
    r"(?:[.!?…。！？][)\"'*`”’»\]]{0,3}\s+|[^\w\s:,;–—\-(\[{“‘\"'`*<>~/=+]\s+|\n\s*)$"
)
EXPLANATION = re.compile(
    r"\s*\W{0,4}(?:explanation|reasoning|reasons?|rationale|justification)\b\W{0,3}[:\n]\W{0,5}", re.IGNORECASE
)
NUMBER = r"(?:0|[1-9][0-9]{0,2})"
SCORED = re.compile(
    r"(?P<called>(?:(?:the |my )?(?:final |overall )?(?:score|rating|grade)\s*(?:is\s*:?|:|=)?\s*)|"
    r"i(?:'d| would)? (?:rate|score|grade) (?:it|(?:this|the) (?:output|answer|response)) (?:(?:an?|at|as) )?)?"
    rf"(?P<open>\[\[|\[|\()?(?P<value>{NUMBER})(?(open)(?:\]\]|\]|\)))"
    rf"(?:\s*(?:/|out of)\s*(?P<of>{NUMBER}))?[.!]?",
    re.IGNORECASE,
)
# All of what may stand on a line that leads to a JSON object: it has no other words than these.
HARMLESS = re.compile(
    r"(?:(?:here|here'?s|is|are|the|my|your|in|json|format(?:ted)?|form|requested|required|response|object|verdict|"
    r"evaluations?|judge?ment|comparison|assessment|analysis|results?|output|reply|final|overall|you|asked|for|as|below|"
    r"of|both|two|answers|responses|sure|certainly|okay|ok|structured|comparing|based|on|valid|and|this|have)\b[ ,]*)+"
    r"[:.!]?",
    re.IGNORECASE,
)
LACKS = re.compile(r"\A[\w ()]{1,30} (?:does not|doesn't|fails|lacks)\b[^,;:]*\Z", re.IGNORECASE)
COURTESY = re.compile(
    r"(?:please )?let me know if you(?: need| have|'d like| would like| want)[\w ,']{1,40}|"
    r"(?:i )?hope (?:this|that) helps|thank(?: you|s)(?: very much)?",
    re.IGNORECASE,
)


class Verdict(NamedTuple):
    """`kind`: the form that was asked for, another one that leaves no doubt, or none.

    `winners` has "first", "second" or "tie" for the aspects that the reply judges, `score` a pointwise reply's number.
    """

    kind: Literal["strict", "fallback", "unparsable"]
    winners: Mapping[str, str] = {}
    score: int | None = None

    @property
    def overall(self) -> str | None:
        return self.winners.get(OVERALL)


UNPARSABLE = Verdict("unparsable")


def verdict(reply: str, task: JudgeTask) -> Verdict:
    """What the reply says in the form that the task asks for, or beyond doubt in another one; else "unparsable"."""
    if len(reply) > LONGEST:
        return UNPARSABLE
    thoughts, closed, rest = reply.partition("</think>")  # templates that open them leave no <think> in the reply
    text = (rest if closed and "<think>" not in thoughts.strip().removeprefix("<think>") else reply).strip()
    if not text or "<think>" in text or "</think>" in text:
        return UNPARSABLE
    if task.answer == "score":
        return _score(text, task)
    strict = STRICT[task.answer](text, task)
    if strict is not None:
        return Verdict("strict", strict)
    winners = _otherwise(text, task)
    return Verdict("fallback", winners) if winners else UNPARSABLE


# The forms that are asked for


def _strict_json(text: str, task: JudgeTask) -> dict[str, str] | None:
    return _judged(text, task, lambda value: _label(value, task))


def _strict_choice(text: str, task: JudgeTask) -> dict[str, str] | None:
    winner = _label(text, task)
    return {OVERALL: winner} if winner else None


def _strict_closing(text: str, task: JudgeTask) -> dict[str, str] | None:
    """The closing sentence ends the reply and begins a sentence; no other sentence is a verdict for the other label."""
    closings = [task.closing.replace("{label}", label) for label in task.labels]
    for winner, own, other in ((FIRST, *closings), (SECOND, *closings[::-1])):
        if not text.endswith(own):
            continue
        before = text[: -len(own)]
        last = ["", *sentences(before[-LONGEST_STATEMENT:])][-1]
        if (before and not SENTENCE_ENDS.search(before[-12:])) or DENIED.search(last):
            return None
        if last.endswith(":") and (HYPOTHETICAL.search(last) or QUOTED.search(last)):
            return None
        contradicted = re.search(rf"(?:^|[.!?\n]\W{{0,9}}){re.escape(other)}", text, re.IGNORECASE)
        own_label = re.escape(task.labels[0] if winner == FIRST else task.labels[1])
        contradicted = contradicted or re.search(
            rf"(?:^|[.!?\n]\W{{0,9}}){own_label} is worse[.!]", text, re.IGNORECASE
        )
        claims = grammar_of(task).claims(before) - {UNDECIDED, winner}
        return None if contradicted or claims else {OVERALL: winner}
    return None


STRICT: dict[str, Callable[[str, JudgeTask], dict[str, str] | None]] = {
    "json": _strict_json,
    "choice": _strict_choice,
    "closing": _strict_closing,
}


def _label(value: Any, task: JudgeTask) -> str | None:
    """The winner that a label, exactly as the task writes it, stands for."""
    if value == TIE:
        return TIE if task.ties else None
    return {task.labels[0]: FIRST, task.labels[1]: SECOND}.get(value) if isinstance(value, str) else None


def _judged(text: str, task: JudgeTask, winner_of: Callable[[Any], str | None]) -> dict[str, str] | None:
    """The winners in a JSON object that has every aspect once, and nothing else."""
    try:
        pairs = json.loads(text, object_pairs_hook=list, parse_constant=_refuse)  # pairs: a second key is seen
    except (ValueError, RecursionError):
        return None
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        return None
    winners = {key: winner_of(value) for key, value in pairs}
    complete = len(pairs) == len(winners) and winners.keys() == set(task.aspects) and None not in winners.values()
    return {aspect: str(winners[aspect]) for aspect in task.aspects} if complete else None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _score(text: str, task: JudgeTask) -> Verdict:
    """A number alone; or one that is called the score, in the last paragraph, if no other one is spoken of."""
    if re.fullmatch(NUMBER, text):
        kind, value, of = "strict", text, None
    else:
        before, _, last = text.rpartition("\n\n")
        last = unwrapped(last.strip())
        object_ = re.fullmatch(rf'\{{\s*"(?:score|rating)"\s*:\s*({NUMBER})\s*\}}', last)
        found = object_ or SCORED.fullmatch(last)
        spoken = re.search(r"\b(?:scor|rat(?:e|ing)|grad|point)|[0-9]\s*(?:/|out of)|~~", before, re.IGNORECASE)
        if found is None or (
            before and (spoken or not (object_ or found["called"]) or not before.rstrip().endswith("."))
        ):
            return UNPARSABLE
        kind, value, of = "fallback", found[1] if object_ else found["value"], None if object_ else found["of"]
    if not task.lowest <= int(value) <= task.highest or (of is not None and int(of) != task.highest):
        return UNPARSABLE
    return Verdict("strict" if kind == "strict" else "fallback", {}, int(value))


# Other forms


def _otherwise(text: str, task: JudgeTask) -> dict[str, str] | None:
    """One JSON object, a label alone or with its explanation, or a last sentence that says it."""
    grammar = grammar_of(task)
    if alone := grammar.alone(text):
        return {OVERALL: alone}
    if "~~" in text:
        return None
    if task.answer == "json" and any(f'"{aspect}"' in text for aspect in task.aspects):
        return _json_in_prose(text, task, grammar)
    winner = _explained_label(text, grammar) or _last_sentence(text, task, grammar)
    return {OVERALL: winner} if winner else None


def _json_in_prose(text: str, task: JudgeTask, grammar: Grammar) -> dict[str, str] | None:
    """The winners of the only JSON object, if all that stands beside it is known to be harmless."""
    blocks = [block for block in re.finditer(r"\{[^{}]*\}", text) if any(f'"{a}"' in block[0] for a in task.aspects)]
    if len(blocks) != 1:
        return None
    start, end = blocks[0].span()
    before, after = text[:start], text[end:]
    if any(sign in before + after for sign in ("{", "}", *(f'"{aspect}"' for aspect in task.aspects))):
        return None  # a part of something, or a second one that is broken
    winners = _judged(blocks[0][0], task, lambda value: grammar.alone(value) if isinstance(value, str) else None)
    if winners is None:
        return None
    fence = re.compile(r"^[ \t]*```(?:json)?[ \t]*$", re.IGNORECASE | re.MULTILINE)
    before, after = fence.sub("", before), fence.sub("", after)
    beside = [before.rpartition("\n")[2], after.partition("\n")[0]]  # on the object's own lines
    if any(part.strip() for part in beside) or not _leads_to_object(before, winners[OVERALL], grammar):
        return None
    return winners if _follows(after, winners[OVERALL], grammar) else None


def _leads_to_object(before: str, winner: str, grammar: Grammar) -> bool:
    """Whether what stands before the object is an introduction of known words, or whole sentences of reasons."""
    told = list(sentences(before))
    for sentence in told:
        said = grammar.statement(sentence) or grammar.alone(sentence)
        if said and said != winner:
            return False
        if said or HARMLESS.fullmatch(_plain(sentence)):
            continue
        doubt = FAVOUR.search(sentence) or SUSPECT.search(sentence) or NO_WINNER.search(sentence)
        if doubt or not grammar.mention.search(sentence) or not re.search(r"[.!][)\"'*]{0,3}$", sentence):
            return False
    last = told[-1] if told else ""
    return (
        HARMLESS.fullmatch(_plain(last)) is not None
        or grammar.mention.search(last) is not None
        or not HYPOTHETICAL.search(last)
    )


def _plain(sentence: str) -> str:
    return without_emphasis(sentence[: LONGEST_STATEMENT + 1]).replace("’", "'")


def _follows(after: str, winner: str, grammar: Grammar) -> bool:
    """Whether what stands behind a verdict is an explanation of it, the same once more, or a courtesy."""
    heading = EXPLANATION.match(after)
    for sentence in sentences(after[heading.end() :] if heading else after):
        same = grammar.statement(sentence) == winner
        claim, contrast, other = sentence.partition(", while ")
        explains = heading and grammar.named_in(claim) == {winner} and not AGAINST.search(claim)
        if contrast and not (grammar.named_in(other).isdisjoint({winner}) and LACKS.search(other)):
            return False
        if not (same or explains or COURTESY.fullmatch(sentence.rstrip(".! "))):
            return False
    return True


def _explained_label(text: str, grammar: Grammar) -> str | None:
    """A label alone on the first line with an explanation of it behind, or alone in the last paragraph."""
    line, _, rest = text.partition("\n")
    winner = grammar.alone(line.strip())
    if winner and EXPLANATION.match(rest) and _follows(rest, winner, grammar):
        return winner
    before, _, last = text.rpartition("\n\n")
    winner = grammar.alone(last.strip())
    if winner is None or not re.search(r"[.!][)\"'*]{0,3}\s*$", before[-9:]):
        return None
    told = ["", *sentences(before)]
    doubt = HYPOTHETICAL.search(told[-1]) or ABOUT_QUESTION.search(told[-1])
    return winner if not doubt and _agree(told, winner, grammar) else None


def _last_sentence(text: str, task: JudgeTask, grammar: Grammar) -> str | None:
    """What the last sentence says, if it is nothing but a verdict and no other sentence says otherwise."""
    told = ["", "", *sentences(text)]
    before, last = told[-2], told[-1]
    winner = grammar.statement(last)
    if winner in (None, UNDECIDED) or (winner == TIE and not grammar.ties) or len(grammar.bracketed.findall(text)) > 1:
        return None
    if not grammar.led.match(without_emphasis(last)):
        if HYPOTHETICAL.search(before) and not grammar.mention.search(before):
            return None  # a sentence about no answer may be about the next sentence
        if _is_fragment(before) or _names_aspect(before, task):
            return None
    if re.search(r"\banswer\b", last, re.IGNORECASE) and ABOUT_QUESTION.search(before):
        return None
    head = text[: text.rindex(last.split()[-1])]
    headings = re.findall(r"^[ \t]*(?:#+[^\n]*|\*\*[^*\n]+\*\*:?)[ \t]*$", head, re.MULTILINE)
    led = grammar.led.match(without_emphasis(last))
    if (
        headings
        and not CONCLUSION.search(headings[-1])
        and (ASPECT.search(headings[-1]) or _names_aspect(headings[-1], task) or not led)
    ):
        return None
    return winner if _agree(told[:-1], winner, grammar) else None


def _is_fragment(sentence: str) -> bool:
    """Three words or fewer: a heading of what comes next, unless it is one of a conclusion."""
    return 0 < len(sentence.split()) <= 3 and not CONCLUSION.search(sentence)


def _names_aspect(sentence: str, task: JudgeTask) -> bool:
    return any(re.search(rf"\b{aspect}\b", sentence, re.IGNORECASE) for aspect in task.aspects if aspect != OVERALL)


def _agree(told: list[str], winner: str | None, grammar: Grammar) -> bool:
    """Whether no earlier sentence leans to anything else than the winner, or says that what comes next is not meant."""
    before = told[-1]
    asked = before.endswith("?") and ABOUT_QUESTION.search(before)
    if asked or DENIED.search(before) or QUOTED.search(before):
        return False
    said = [grammar.leaning(sentence) or grammar.alone(sentence) for sentence in told]
    return all(other in (None, winner) for other in said)
