"""Grammar of judges' sentences: how they name an answer, and how they call it the better one.

Rules match whole sentences. An unmatched sentence carries no verdict, or makes the reply ambiguous.
Every pattern runs in linear time.
"""

import re
from collections.abc import Iterator
from functools import lru_cache

from eval.judges.task import TIE, JudgeTask
from eval.judges.wording import (
    BALANCED,
    BARE,
    BASIS,
    CALLED,
    CLAUSES,
    CONCLUSIVE,
    DEGREE,
    FAULT,
    FAVOUR,
    FIRST,
    GOOD,
    HEDGED,
    LEAD,
    LONGEST_STATEMENT,
    NO_WINNER,
    NOUNS,
    ONE_RESPECT,
    OPINION,
    OTHER,
    PARTIAL,
    PLACE,
    RESPECT,
    SECOND,
    SENTENCE_BREAK,
    THING,
    TIED,
    TURNED,
    UNDECIDED,
    VERB,
    WHO_ANSWERED,
)


class Grammar:
    """Patterns that name one of the two answers, or call it the better one."""

    def __init__(self, labels: tuple[str, str], ties: bool) -> None:
        cores = [re.findall(r"[0-9A-Za-z]+", label)[-1] for label in labels]
        if cores[0].lower() == cores[1].lower():  # "left one", "right one"
            cores = list(labels)
        self.ties, self._first = ties, cores[0].lower()
        either = "|".join(re.escape(core) for core in cores)
        bare = [core for core, label in zip(cores, labels, strict=True) if core == label]
        nouns = NOUNS + (WHO_ANSWERED if bare else "")
        exact = f"|(?<![0-9A-Za-z])(?-i:(?:{'|'.join(map(re.escape, bare))}))(?![0-9A-Za-z'’])" if bare else ""

        def name(group: str) -> str:
            """Without a noun or brackets the case has to match the label: a bare "a" is an article."""
            return (
                rf"(?P<{group}>(?:the )?(?:(?:{nouns})\s+)?(?:\[\[|\[|\()(?:{either})(?:\]\]|\]|\))|"
                rf"(?:the )?(?:{nouns})\s+(?:{either})(?![0-9A-Za-z'’]){exact})"
            )

        over = rf"(?:\s+(?:than|over|to)\s+{name('other')})?"
        prefer = rf"(?:I|we)(?:'d| would)?(?: strongly| clearly| slightly)? {VERB}"
        statements = "|".join(
            (
                rf"{name('n1')}\s+is\s+(?:(?:considered|deemed|judged)\s+)?{DEGREE}{GOOD}{THING}",
                rf"{name('n2')}(?:\s+clearly)?\s+wins(?:\s+overall)?",
                rf"{prefer}\s+{name('n3')}",
                rf"(?:the|my)\s+(?:overall |final |clearly )?{GOOD}{THING}(?:\s+is:?|:)\s+{name('n4')}",
                rf"(?:(?:(?:the|my)\s+)?(?:final |overall )?{CALLED}|(?:(?:the )?final|my(?: final)?) answer)"
                rf"(?:\s+is\s*:?|\s*:)\s*{name('n5')}",
                rf"{LEAD}{name('n6')}",
                r"(?P<n7>\[\[(?:" + either + r")\]\])",
            )
        )
        reason = r"(?P<reason>,?\s+(?:because|since|as|due to|making it|in that|for its)\s.*)?"
        self._statement = re.compile(
            rf"(?:{LEAD}|{OPINION}){{0,4}}(?:(?P<basis>{BASIS})(?:{LEAD}|{OPINION}){{0,3}})?(?:{statements}){over}{reason}",
            re.IGNORECASE | re.DOTALL,
        )
        self._tied = re.compile(rf"(?:{LEAD})*{TIED}", re.IGNORECASE)
        self._balanced = re.compile(rf"(?:{LEAD})*(?:{BALANCED})", re.IGNORECASE | re.DOTALL)
        self.led = re.compile(rf"(?:\A|,\s+){LEAD}", re.IGNORECASE)
        self._core = re.compile(rf"(?<![0-9A-Za-z])(?:{either})(?![0-9A-Za-z])", re.IGNORECASE)
        self.mention = re.compile(name("any"), re.IGNORECASE)
        self.bracketed = re.compile(r"\[\[")
        called = rf"(?:(?:the |my )?(?:final |overall )?(?:{CALLED}|answer|overall|{GOOD}{THING})"
        called += r"\s*(?:is\b\s*:?|:|=|-)?\s*)?"
        self._alone = re.compile(
            rf"{called}(?:(?:the )?(?:{nouns})\s*)?[(\[]{{0,2}}(?P<core>{either})[)\]]{{0,2}}[.!:]?", re.IGNORECASE
        )

    def alone(self, text: str) -> str | None:
        """The winner of a reply that is only a label, in one of its usual spellings."""
        if len(text) > LONGEST_STATEMENT:
            return None
        text = unwrapped(re.sub(r"\A(?:#+|[*•-])\s+", "", text))
        text = re.sub(r"\[\[([\w ()]+)\]\]", r"\1", text)
        if self.ties and re.fullmatch(r"(?:(?:verdict|answer|overall)\s*:\s*)?\[{0,2}tie\]{0,2}[.!]?", text, re.I):
            return TIE
        match = self._alone.fullmatch(text)
        return self._winner(match["core"]) if match else None

    def parse(self, sentence: str) -> re.Match[str] | None:
        """The match of a sentence that calls an answer better and says nothing else; see `winner_of`."""
        if len(sentence) > LONGEST_STATEMENT or not CONCLUSIVE.search(sentence):
            return None
        return self._statement.fullmatch(without_emphasis(sentence).rstrip(".! \t\n"))

    def statement(self, sentence: str) -> str | None:
        """The answer that a sentence calls better, "tie" or "undecided"; None if the sentence is no verdict.

        The whole sentence has to match; grounds and a reason that do not reverse the verdict may stand in it.
        """
        if match := self.parse(sentence):
            return self._winner_of(match)
        if len(sentence) > LONGEST_STATEMENT:
            return None
        text = without_emphasis(sentence).rstrip(".! \t\n")
        if self._tied.fullmatch(text):
            return TIE
        return UNDECIDED if re.search(GOOD, text, re.I) and self._balanced.fullmatch(text) else None

    def _winner_of(self, match: re.Match[str]) -> str:
        name = next(match[f"n{i}"] for i in range(1, 8) if match[f"n{i}"])
        winner, other = self._named(name), match["other"] and self._named(match["other"])
        grounded = self._is_ground(match["basis"] or "", winner) and self._is_reason(match["reason"] or "", winner)
        return winner if winner != other and grounded else UNDECIDED

    def _is_ground(self, basis: str, winner: str) -> bool:
        """Whether the clause before a verdict is about all that counts, and is no condition or quotation."""
        concession = re.sub(r"\A(?:even though|though|although|in spite of)\b", "while", basis, flags=re.IGNORECASE)
        favours = FAVOUR.search(RESPECT.sub("", basis)) and winner not in self.named_in(basis)
        partial = PARTIAL.search(basis) or ONE_RESPECT.search(basis)
        if favours or partial:
            return False
        reviewed = re.sub(r"\A(?:after|upon)(?: \w+ly)? \w+ing\b", "", concession, flags=re.IGNORECASE)
        return self._is_reason(reviewed, winner)

    def _is_reason(self, reason: str, winner: str) -> bool:
        """Whether a reason speaks for the winner: not for the other answer, and not in a sentence that retracts it."""
        reason = RESPECT.sub("", re.sub(r"\bbut also\b", "", reason, flags=re.IGNORECASE))
        masked = self.mention.sub("@", reason)
        if TURNED.search(reason) or NO_WINNER.search(masked) or re.search(r"n[o']t\s+@", masked):
            return False
        contrast = False
        for clause in CLAUSES.split(reason):
            if clause is None or CLAUSES.fullmatch(clause):
                contrast = contrast or clause is not None
                continue
            named = self.named_in(clause)
            other = bool(named - {winner}) or OTHER.search(clause) is not None
            if other and FAVOUR.search(clause):
                return False
            says = len(re.findall(r"\w+", self.mention.sub("", clause))) > 2
            if other and says and winner not in named and not contrast and not FAULT.search(clause):
                return False
        return True

    def is_cut(self, sentence: str) -> bool:
        """Whether a verdict stops before its sentence ends: within its reason, or behind "Therefore, Response A"."""
        text = without_emphasis(sentence).strip()
        if re.search(r"(?:\.\.|…|\b(?:e\.g|i\.e|vs|cf|etc|viz)\.)\W*$", text, re.IGNORECASE):
            return True
        if re.search(r"[.!]\W*$", text):
            return False
        match = self.parse(sentence)
        if match is None:
            return False
        announced = match["n6"] is None or match.string[: match.start("n6")].rstrip().endswith(":")
        return not announced or bool(match["reason"] or match["basis"])

    def claims(self, text: str) -> set[str]:
        """The verdicts of a text's sentences and lines, each read alone."""
        parts = re.split(rf"{SENTENCE_BREAK}|\n+", text)
        lines = [re.sub(r"\A[ \t]*(?:[-*•>]|#+)[ \t]+", "", part) for part in parts]
        return {winner for line in lines if (winner := self.statement(line))}

    def headline(self, text: str) -> str | None:
        """The label alone on a reply's first line, unless it heads a section: "Response A:", or B has a line too."""
        line, *rest = (line.strip() for line in text.split("\n") if line.strip())
        winner = self.alone(line)
        if not rest or winner in (None, TIE) or line.startswith("#") or line.rstrip(" *").endswith(":"):
            return None
        lines = (re.sub(r"\A(?:[-*•>]|#+)[ \t]+", "", other) for other in rest[:-1])
        return None if {self.alone(other) for other in lines} - {None, winner} else winner

    def leaning(self, sentence: str) -> str | None:
        """The winner that a sentence leans to; "undecided" if it favours an answer without being a clear statement."""
        winner = self.statement(sentence)
        if winner not in (None, UNDECIDED):
            return winner
        text = without_emphasis(sentence)
        if NO_WINNER.search(self.mention.sub("@", text)):
            return UNDECIDED
        named = self.named_in(text)
        if re.search(r"@\s*[<>≻]\s*@|@[^.,;@]{0,9}\b[0-9]+\s*(?:/|out of)\s*[0-9]", self.mention.sub("@", text)):
            return UNDECIDED  # a comparison by a sign or by scores
        if not named:
            return UNDECIDED if FAVOUR.search(text) and PLACE.search(text) else None
        if not FAVOUR.search(RESPECT.sub("", text)):
            rest = self.mention.sub("", text).replace("’", "'")
            alone = len(named) == 1 and len(rest) < 60 and BARE.fullmatch(rest)
            return named.pop() if alone else winner
        return named.pop() if len(named) == 1 and not HEDGED.search(text) else UNDECIDED

    def named_in(self, text: str) -> set[str]:
        """The answers named in a text."""
        return {self._named(match[0]) for match in self.mention.finditer(text)}

    def _named(self, name: str) -> str:
        return self._winner(list(self._core.finditer(name))[-1][0])

    def _winner(self, core: str) -> str:
        return FIRST if core.lower() == self._first else SECOND


@lru_cache(maxsize=16)
def _grammar(labels: tuple[str, str], ties: bool) -> Grammar:
    return Grammar(labels, ties)


def grammar_of(task: JudgeTask) -> Grammar:
    return _grammar(task.labels, task.ties)


def sentences(text: str) -> Iterator[str]:
    """Splits a text into sentences; a line without a sentence end continues on the next line."""
    pending = ""
    for part in re.split(rf"{SENTENCE_BREAK}|\n+", text):
        part = part.strip()
        if not part:
            continue
        if part.startswith("#") and pending:
            yield pending
            pending = ""
        pending = f"{pending} {part}" if pending else part
        abbreviated = re.search(r"\b(?:e\.g|i\.e|vs|cf|etc|viz)\.$", pending[-6:], re.IGNORECASE)
        ended = re.search(r"(?:[.!?;。！？][)\"'*]{0,3}|\]\])$", pending[-5:]) and not abbreviated
        if ended or part.startswith("#"):
            yield pending
            pending = ""
    if pending:
        yield pending


def without_emphasis(text: str) -> str:
    return re.sub(r"(\*{1,3}|`)([^*`\n]{1,200})\1", r"\2", text)


def unwrapped(text: str) -> str:
    """Strips emphasis, quotation marks or a code fence from around a short text."""
    if len(text) > LONGEST_STATEMENT:
        return text
    fenced = re.fullmatch(r"```[a-z]*\s*(.*?)\s*```", text, re.DOTALL)
    text = without_emphasis(fenced[1] if fenced else text).strip()
    quoted = re.fullmatch(r"(['\"])([^'\"]*)\1", text)
    return quoted[2].strip() if quoted else text
