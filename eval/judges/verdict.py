"""Parses a judge's reply into a verdict, without guessing what the reply may have meant.

`verdict` first parses the requested form. Fixed fallback rules then match whole forms: the entire reply, or its entire
last sentence, has to match one, and no other sentence may contradict it. So "Overall, Response B is better" is B, and
a reply that no rule matches is unparsable, which is counted.

Every rule runs in linear time: 100 kB of braces cost milliseconds.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from eval.judges.grammar import Grammar, grammar_of, sentences, unwrapped, without_emphasis
from eval.judges.task import OVERALL, TIE, JudgeTask
from eval.judges.wording import (
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
)

LONGEST = 200_000  # characters; longer replies are unparsable
SENTENCE_ENDS = re.compile(  # the text that follows a match begins a sentence
    r"(?:[.!?…。！？][)\"'*`”’»\]]{0,3}\s+|[^\w\s:,;–—\-(\[{“‘\"'`*<>~/=+]\s+|\n\s*)$"
)
FULL_WIDTH = str.maketrans("，。！？：；（）", ",.!?:;()")
DANGLING = re.compile(
    r"(?:[,;:(-]|\b(?:an?|the|and|or|but|of|to|in|on|at|by|for|with|from|as|is|are|was|it|its|that|which|than|because))\W*$",
    re.IGNORECASE,
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
# A line that introduces a JSON object may contain only these words.
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
    """`kind`: "strict" for the requested form, "fallback" for another unambiguous form, else "unparsable".

    `winners` maps each judged aspect to "first", "second" or "tie"; `score` is the number of a pointwise reply.
    """

    kind: Literal["strict", "fallback", "unparsable"]
    winners: Mapping[str, str] = {}
    score: int | None = None

    @property
    def overall(self) -> str | None:
        return self.winners.get(OVERALL)


UNPARSABLE = Verdict("unparsable")


def verdict(reply: str, task: JudgeTask) -> Verdict:
    """Parses a reply in the form that the task requests, or in another unambiguous form; else UNPARSABLE."""
    if len(reply) > LONGEST:
        return UNPARSABLE
    thoughts, closed, rest = reply.partition("</think>")  # a template that opens the thoughts leaves no <think>
    text = (rest if closed and "<think>" not in thoughts.strip().removeprefix("<think>") else reply).strip()
    if not text or "<think>" in text or "</think>" in text:
        return UNPARSABLE
    if task.answer == "score":
        return _score(text, task)
    strict = STRICT[task.answer](text, task)
    if strict is not None:
        return Verdict("strict", strict)
    winners = _fallback(text, task)
    return Verdict("fallback", winners) if winners else UNPARSABLE


# Requested forms


def _strict_json(text: str, task: JudgeTask) -> dict[str, str] | None:
    return _json_winners(text, task, lambda value: _label(value, task))


def _strict_choice(text: str, task: JudgeTask) -> dict[str, str] | None:
    winner = _label(text, task)
    return {OVERALL: winner} if winner else None


def _strict_closing(text: str, task: JudgeTask) -> dict[str, str] | None:
    """The closing sentence ends the reply and starts a sentence; no other sentence is a verdict for the other label."""
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
        claims = (grammar_of(task).claims(before) | {grammar_of(task).headline(text)}) - {None, UNDECIDED, winner}
        return None if contradicted or claims else {OVERALL: winner}
    return None


STRICT: dict[str, Callable[[str, JudgeTask], dict[str, str] | None]] = {
    "json": _strict_json,
    "choice": _strict_choice,
    "closing": _strict_closing,
}


def _label(value: Any, task: JudgeTask) -> str | None:
    """The winner for a label, written exactly as in the task."""
    if value == TIE:
        return TIE if task.ties else None
    return {task.labels[0]: FIRST, task.labels[1]: SECOND}.get(value) if isinstance(value, str) else None


def _json_winners(text: str, task: JudgeTask, winner_of: Callable[[Any], str | None]) -> dict[str, str] | None:
    """The winners in a JSON object that has every aspect exactly once and no other key."""
    try:
        pairs = json.loads(text, object_pairs_hook=list, parse_constant=_refuse)  # pairs: duplicate keys are seen
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
    """A number alone; or a number named as the score in the last paragraph, if no other score is mentioned."""
    if re.fullmatch(NUMBER, text):
        kind, value, of = "strict", text, None
    else:
        before, _, last = text.rpartition("\n\n")
        last = unwrapped(last.strip())
        object_ = re.fullmatch(rf'\{{\s*"(?:score|rating)"\s*:\s*({NUMBER})\s*\}}', last)
        match = object_ or SCORED.fullmatch(last)
        mentioned = re.search(r"\b(?:scor|rat(?:e|ing)|grad|point)|[0-9]\s*(?:/|out of)|~~", before, re.IGNORECASE)
        if match is None or (
            before and (mentioned or not (object_ or match["called"]) or not before.rstrip().endswith("."))
        ):
            return UNPARSABLE
        kind, value, of = "fallback", match[1] if object_ else match["value"], None if object_ else match["of"]
    if not task.lowest <= int(value) <= task.highest or (of is not None and int(of) != task.highest):
        return UNPARSABLE
    return Verdict("strict" if kind == "strict" else "fallback", {}, int(value))


# Fallback forms


def _fallback(text: str, task: JudgeTask) -> dict[str, str] | None:
    """Matches one JSON object in prose, a label with or without an explanation, or a last sentence with a verdict."""
    grammar, text = grammar_of(task), text.translate(FULL_WIDTH)
    if alone := grammar.alone(text):
        return {OVERALL: alone}
    if "~~" in text:
        return None
    if task.answer == "json" and any(f'"{aspect}"' in text for aspect in task.aspects):
        return _json_in_prose(text, task, grammar)
    winner = _explained_label(text, task, grammar) or _last_sentence(text, task, grammar)
    return {OVERALL: winner} if winner and grammar.headline(text) in (None, winner) else None


def _json_in_prose(text: str, task: JudgeTask, grammar: Grammar) -> dict[str, str] | None:
    """The winners of the only JSON object, if the text around it is known to be harmless."""
    blocks = [block for block in re.finditer(r"\{[^{}]*\}", text) if any(f'"{a}"' in block[0] for a in task.aspects)]
    if len(blocks) != 1:
        return None
    start, end = blocks[0].span()
    before, after = text[:start], text[end:]
    if any(sign in before + after for sign in ("{", "}", *(f'"{aspect}"' for aspect in task.aspects))):
        return None  # part of a larger object, or a second, broken one
    winners = _json_winners(blocks[0][0], task, lambda value: grammar.alone(value) if isinstance(value, str) else None)
    if winners is None:
        return None
    fence = re.compile(r"^[ \t]*```(?:json)?[ \t]*$", re.IGNORECASE | re.MULTILINE)
    before, after = fence.sub("", before), fence.sub("", after)
    adjacent = [before.rpartition("\n")[2], after.partition("\n")[0]]  # on the object's own lines
    if any(part.strip() for part in adjacent) or not _leads_to_object(before, winners[OVERALL], grammar):
        return None
    return winners if _follows(after, winners[OVERALL], grammar) else None


def _leads_to_object(before: str, winner: str, grammar: Grammar) -> bool:
    """Whether the text before the object is an introduction of known words, or complete sentences of reasons."""
    earlier = list(sentences(before))
    for sentence in earlier:
        claim = grammar.statement(sentence) or grammar.alone(sentence)
        if claim and claim != winner:
            return False
        if claim or HARMLESS.fullmatch(_plain(sentence)):
            continue
        doubt = FAVOUR.search(sentence) or SUSPECT.search(sentence) or NO_WINNER.search(sentence)
        if doubt or not grammar.mention.search(sentence) or not re.search(r"[.!][)\"'*]{0,3}$", sentence):
            return False
    last = earlier[-1] if earlier else ""
    return (
        HARMLESS.fullmatch(_plain(last)) is not None
        or grammar.mention.search(last) is not None
        or not HYPOTHETICAL.search(last)
    )


def _plain(sentence: str) -> str:
    return without_emphasis(sentence[: LONGEST_STATEMENT + 1]).replace("’", "'")


def _follows(after: str, winner: str, grammar: Grammar) -> bool:
    """Whether the text after a verdict explains it, repeats it, or is a courtesy."""
    heading = EXPLANATION.match(after)
    if heading and _stops_in_sentence(after):
        return False
    for sentence in sentences(after[heading.end() :] if heading else after):
        same = grammar.statement(sentence) == winner
        claim, contrast, other = sentence.partition(", while ")
        explains = heading and grammar.named_in(claim) == {winner} and not AGAINST.search(claim)
        if contrast and not (grammar.named_in(other).isdisjoint({winner}) and LACKS.search(other)):
            return False
        if not (same or explains or COURTESY.fullmatch(sentence.rstrip(".! "))):
            return False
    return True


def _stops_in_sentence(text: str) -> bool:
    """Whether a text ends without a stop, other than behind an item of a list."""
    last = text.rstrip().rpartition("\n")[2]
    item = re.match(r"\s*(?:[-*•]|[0-9]+[.)])\s", last) and not DANGLING.search(last)
    return not item and not re.search(r"[.!?][)\"'*`”’\]]{0,3}$", last)


def _explained_label(text: str, task: JudgeTask, grammar: Grammar) -> str | None:
    """A label alone on the first line followed by its explanation, or alone in the last paragraph."""
    line, _, rest = text.partition("\n")
    winner = grammar.alone(line.strip())
    if winner and EXPLANATION.match(rest) and _follows(rest, winner, grammar):
        return winner
    before, _, last = text.rpartition("\n\n")
    winner = grammar.alone(last.strip())
    if winner is None or not re.search(r"[.!][)\"'*]{0,3}\s*$", before[-9:]):
        return None
    if task.answer != "choice" and " " in last.strip() and grammar.mention.fullmatch(last.strip()):
        return None  # "Response B" may be the first two words of a sentence
    earlier = ["", *sentences(before)]
    doubt = HYPOTHETICAL.search(earlier[-1]) or ABOUT_QUESTION.search(earlier[-1])
    return winner if not doubt and _uncontradicted(earlier, winner, grammar) else None


def _last_sentence(text: str, task: JudgeTask, grammar: Grammar) -> str | None:
    """The verdict of the last sentence, if that is all it says and no other sentence contradicts it."""
    all_sentences = ["", "", *sentences(text)]
    before, last = all_sentences[-2], all_sentences[-1]
    winner = grammar.statement(last)
    if (
        winner in (None, UNDECIDED)
        or grammar.is_cut(last)
        or (winner == TIE and not grammar.ties)
        or len(grammar.bracketed.findall(text)) > 1
    ):
        return None
    led = grammar.led.search(without_emphasis(last))
    if not led:
        if HYPOTHETICAL.search(before) and not grammar.mention.search(before):
            return None  # a sentence that names no answer may be about the next sentence
        if _is_fragment(before) or _names_aspect(before, task):
            return None
    match = grammar.parse(last)
    claim = last if match is None else match.string[: match.start("reason") if match["reason"] else None]
    if match and match["basis"] and _names_aspect(match["basis"], task) and len(ASPECT.findall(match["basis"])) == 1:
        return None  # a verdict about one aspect
    if re.search(r"\banswer\b", claim, re.IGNORECASE) and ABOUT_QUESTION.search(before):
        return None
    head = text[: text.rindex(last.split()[-1])]
    headings = re.findall(r"^[ \t]*(?:#+[^\n]*|\*\*[^*\n]+\*\*:?)[ \t]*$", head, re.MULTILINE)
    if (
        headings
        and not CONCLUSION.search(headings[-1])
        and (ASPECT.search(headings[-1]) or _names_aspect(headings[-1], task) or not led)
    ):
        return None
    return winner if _uncontradicted(all_sentences[:-1], winner, grammar) else None


def _is_fragment(sentence: str) -> bool:
    """At most three words: a heading for the next text, unless it announces a conclusion."""
    return 0 < len(sentence.split()) <= 3 and not CONCLUSION.search(sentence)


def _names_aspect(sentence: str, task: JudgeTask) -> bool:
    return any(re.search(rf"\b{aspect}\b", sentence, re.IGNORECASE) for aspect in task.aspects if aspect != OVERALL)


def _uncontradicted(earlier: list[str], winner: str | None, grammar: Grammar) -> bool:
    """Whether no earlier sentence leans against the winner, or says that the next sentence is not meant."""
    before = earlier[-1]
    asked = before.endswith("?") and ABOUT_QUESTION.search(before)
    if asked or DENIED.search(before) or QUOTED.search(before):
        return False
    leanings = [grammar.leaning(sentence) or grammar.alone(sentence) for sentence in earlier]
    return all(other in (None, winner) for other in leanings)
