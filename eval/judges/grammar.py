"""Grammar of judges' sentences: how they name an answer, and how they call it the better one.

Rules match whole sentences. An unmatched sentence carries no verdict, or makes the reply ambiguous.
Every pattern runs in linear time.
"""

import re
from collections.abc import Iterator
from functools import lru_cache

from eval.judges.task import TIE, JudgeTask

LONGEST_STATEMENT = 400  # characters of a sentence that may be a verdict
FIRST, SECOND = "first", "second"
UNDECIDED = "undecided"  # a conclusive sentence whose winner is unclear

NOUNS = "response|answer|output|option|completion|candidate|summary|reply|text|choice"
WHO_ANSWERED = "|model|assistant|chatbot"  # only for bare labels: else, as in a debate, they may not be the answers
# Whitespace after a sentence; a semicolon before "therefore" ends a sentence.
SENTENCE_BREAK = (
    r"(?<=[.!?])\s+|(?<=[.!?][)\"'*”’])\s+|(?<=[.!?][)\"'*”’][)\"'*”’])\s+|(?<=;)\s+(?=(?:therefore|thus|hence)\b)|"
    r"(?<=[。！？])\s*"
)
LEAD = (
    r"(?:(?:therefore|thus|hence|so|overall|ultimately|finally|consequently|accordingly|conclusion|in conclusion|"
    r"in summary|to conclude|to summari[sz]e|to sum up|in short|all in all|on balance|in the end|as a result|"
    r"for (?:this|these) reasons?|all things considered|(?:my |the )?(?:final )?(?:verdict|decision))[,:]?\s+)"
)
OPINION = (  # may precede a verdict, but draws no conclusion from earlier text
    r"(?:(?:i (?:think|believe|find|feel|would say|'d say)(?: that)?|in my (?:opinion|view|judge?ment),?|"
    r"(?:based on|after|given) (?:the|my|this) (?:above )?(?:analysis|evaluation|comparison)(?: above)?,?|"
    r"after (?:a )?(?:careful )?(?:comparison|consideration|analysis|evaluation),|"
    rf"(?:while|although|though) both(?: (?:{NOUNS})s?)? are \w+,)\s+)"
)
DEGREE = r"(?:(?:the|a|clearly|slightly|much|far|by far|overall|definitely|significantly|considerably|somewhat)\s+)*"
GOOD = r"(?:better|best|superior|stronger|preferable|preferred|winning|winner)"
THING = rf"(?:\s+(?:one|of the two|{NOUNS}))?(?:\s+overall)?"
VERB = r"(?:prefer|choose|pick|select|favou?r|recommend|go with|vote for)"
CALLED = r"(?:verdict|choice|decision|winner|preference|judge?ment|pick)"
TIED = r"(?:it|this|the (?:result|verdict))(?: is|'s) (?:a )?(?:tie|draw|tied)"
BALANCED = rf"(?:both|the two)(?: (?:of them|(?:{NOUNS})(?:s|es)?))? are .*|neither(?: of them| (?:{NOUNS}))? is .*"
# Words with which a sentence may retract, quote or condition another sentence.
TURNED = re.compile(
    r"n[o']t\b|\b(?:no|nor|neither|both|but|however|although|though|if|unless|except|only|would|could|might|should|"
    r"yet|still|while|whereas|otherwise|instead|rather|better|best|superior|prefer\w*)\b|\?",
    re.IGNORECASE,
)
# A sentence that says that the next one is not meant.
DENIED = re.compile(
    r"\b(?:following|next) (?:sentence|statement|claim|conclusion|line) (?:is|would be) (?:not|n't|false|wrong|untrue|"
    r"incorrect|a lie|nonsense)\b|\b(?:just|only) kidding\b|\bopposite of (?:what i|my|the truth)\b|\bas follows\W*$|"
    r"\bwhat follows\b|"
    # without an end: the next text completes it
    r"\b(?:would|might|could|may|to|will) (?:say|conclude|write|argue|think|claim|reply|answer)\b[^.!?]{0,20}$|"
    r"\b(?:not|n't) (?:true|the case|so|correct|right) that\W*$|^(?:so,? )?(?:it is not|it isn't) the case\W*$",
    re.IGNORECASE,
)
QUOTED = re.compile(
    r"\b(?:being sarcastic|pretend(?:ing)? (?:that|to)|ignore (?:the|my|this|that|all|what)|untrue|not true|"
    r"(?:someone|people|they|readers?|judges?|critics?)(?: \w+){0,6} (?:would|might|could|may) (?:say|argue|think)|"
    r"end (?:\w+ ){0,3}with|(?:told|asked|instructed|allowed|supposed) to (?:say|write|end|reply|conclude)|"
    r"(?:if|what if|imagine|assuming|had|were) (?:i|we|length|only))\b|"
    r"\b(?:e\.g\.|i\.e\.|such as|for example,?|for instance,?|says?|said)\W*$",
    re.IGNORECASE,
)
HYPOTHETICAL = re.compile(
    r"n[o']t\b|\b(?:example|e\.g\.|such as|like this|format|template|schema|would|could|might|if|instruct\w*|asked|"
    r"told|asks?|demands?|wants?|says?|said|claims?|ignore|draft|not|suppose\w*|wrong|incorrect|false|opposite|invalid|placeholder|never|neither)\b",
    re.IGNORECASE,
)
FAVOUR = re.compile(
    r"\b(?:better|best|win\w*|won|prefer(?:s|red|able|ably)?|preference (?:is|goes)|superior|stronger|favou?r\w*|"
    r"choose|chose|choice|edge|ahead|recommend\w*|verdict|overall|top|tie|tied|beats?|outperform\w*|surpass\w*|"
    r"outclass\w*|outshin\w*|victor\w*|vot\w*|opt|lean\w*|rank\w*|deserves?|go(?:es|ing)? (?:with|for)|goes to|"
    r"decision|conclusion|worse|worst|loses|loser|inferior|"
    r"(?:i|we|i['’]d|would|my|must|have to)\b[^.!?]{0,40}\b(?:select|pick)\w*)\b",
    re.IGNORECASE,
)
# States that there is no winner, whatever a later sentence says.
NO_WINNER = re.compile(
    r"\b(?:ties?|tied|a draw|undecided|unsure|indistinguishable|toss-?up|"
    r"no (?:preference|(?:clear |real )?(?:winner|difference)|"
    r"better)|(?:are|is|be|about|much) (?:the same|equal\w*|identical)|"
    r"(?:cannot|can['’]t|can not|impossible to|hard to|unable to|not able to) "
    r"(?:say|tell|judge|decide|choose|determine|pick|compare|rank|prefer))\b",
    re.IGNORECASE,
)
# Words that a sentence before a JSON object must not contain.
SUSPECT = re.compile(
    r"\b(?:this|these|labels?|more|less|asked|wrote|writ\w*|contains|inject\w*|tri(?:ck|es)\w*|"
    r"demand\w*|old|initial\w*|refers?|first|second|former|latter|worse|json|object|follow\w*|"
    r"below|next|ignore|draft|wants?|asks?|told|previous\w*|system|prompt)\b",
    re.IGNORECASE,
)
# Words that an explanation of a verdict must not contain.
AGAINST = re.compile(
    r"n[o']t\b|\b(?:not|no|none|never|neither|both|nor|but|however|although|though|if|unless|except|would|should|could|might|"
    r"worse|worst|less|least|lacks?|fail\w*|miss\w*|wrong|false|error\w*|mistake\w*|bad|poor\w*|ignor\w*|inferior|loses|"
    r"instead|rather|opposite|swap\w*|revers\w*|invert\w*|wait|actually|sorry|correct(?:ion|ing)s?|first|second|former|latter|"
    r"inject\w*|trick\w*|demand\w*|draft|above|example|meant?|joke|kidding|chang\w*|reconsider\w*|too|incorrect\w*|in\w+ly)\b|\?",
    re.IGNORECASE,
)
# A sentence whose question the next one may answer instead of which answer is better.
ABOUT_QUESTION = re.compile(
    r"\b(?:worse|worst|errors?|wrong|(?:in)?correct answer|says? (?:that )?the answer|the answer is)\b", re.IGNORECASE
)
ASPECT = re.compile(
    r"\b(?:helpful\w*|correct\w*|coheren\w*|complex\w*|verbos\w*|style|tone|length|concise\w*|clarity|accura\w*|format\w*|"
    r"depth|details?|creativ\w*|relevan\w*|faithful\w*|fluen\w*|safety|honest\w*|harm\w*)\b",
    re.IGNORECASE,
)
PLACE = re.compile(r"\b(?:first|second|former|latter|1st|2nd)\b", re.IGNORECASE)
CONCLUSION = re.compile(
    r"\b(?:verdict|overall|conclusions?|final|winner|answer|decision|judge?ment|summary|result|preference|"
    r"recommendation)\b",
    re.IGNORECASE,
)
HEDGED = re.compile(
    r"n[o']t\b|\b(?:no|not|than|if|would|could|might|neither|nor|never|worse|worst|inferior|loses|nobody|loser)\b|\?",
    re.I,
)
# A sentence of a name and only these words is a verdict too short for a rule: "B it is", "clearly B".
BARE = re.compile(
    r"(?:clearly|definitely|obviously|certainly|surely|it|is|it's|so|boxed|text|go|with|for|my|vote|i|i'd|say|me|final|finally|answer|[\W\d_])*",
    re.IGNORECASE,
)
# Better in one respect, which a verdict may concede; or words that describe an answer's content.
RESPECT = re.compile(
    r"\b(?:better (?:(?:written|structured|organi[sz]ed|formatted|worded)|at \w+ing)|for better|best way|choose to)\b",
    re.IGNORECASE,
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
        exact = f"|(?-i:(?:{'|'.join(map(re.escape, bare))}))(?![0-9A-Za-z'’])" if bare else ""

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
                rf"{name('n1')}\s+is\s+{DEGREE}{GOOD}{THING}",
                rf"{name('n2')}(?:\s+clearly)?\s+wins(?:\s+overall)?",
                rf"{prefer}\s+{name('n3')}",
                rf"(?:the|my)\s+(?:overall |final |clearly )?{GOOD}{THING}(?:\s+is:?|:)\s+{name('n4')}",
                rf"(?:(?:(?:the|my)\s+)?(?:final |overall )?{CALLED}|(?:(?:the )?final|my(?: final)?) answer)"
                rf"(?:\s+is\s*:?|\s*:)\s*{name('n5')}",
                rf"{LEAD}{name('n6')}",
                r"(?P<n7>\[\[(?:" + either + r")\]\])",
            )
        )
        self._statement = re.compile(
            rf"(?:{LEAD}|{OPINION}){{0,4}}(?:{statements}){over}(?P<reason>,?\s+(?:because|since|as it)\s.*)?",
            re.IGNORECASE | re.DOTALL,
        )
        self._tied = re.compile(rf"(?:{LEAD})*{TIED}", re.IGNORECASE)
        self._balanced = re.compile(rf"(?:{LEAD})*(?:{BALANCED})", re.IGNORECASE | re.DOTALL)
        self.led = re.compile(LEAD, re.IGNORECASE)
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
        if self.ties and re.fullmatch(r"(?:(?:verdict|answer|overall)\s*:\s*)?\[{0,2}tie\]{0,2}[.!]?", text, re.I):
            return TIE
        match = self._alone.fullmatch(text)
        return self._winner(match["core"]) if match else None

    def statement(self, sentence: str) -> str | None:
        """The answer that a sentence calls better, "tie" or "undecided"; None if the sentence is no verdict.

        The whole sentence has to match; only a reason that does not reverse the verdict may follow.
        """
        if len(sentence) > LONGEST_STATEMENT:
            return None
        text = without_emphasis(sentence).rstrip(".! \t\n")
        if self._tied.fullmatch(text):
            return TIE
        match = self._statement.fullmatch(text)
        if match is None:
            return UNDECIDED if re.search(GOOD, text, re.I) and self._balanced.fullmatch(text) else None
        name = next(match[f"n{i}"] for i in range(1, 8) if match[f"n{i}"])
        winner, other = self._named(name), match["other"] and self._named(match["other"])
        if winner == other or TURNED.search(match["reason"] or "") or FAVOUR.search(match["reason"] or ""):
            return UNDECIDED
        return winner

    def claims(self, text: str) -> set[str]:
        """The verdicts of a text's sentences and lines, each read alone."""
        parts = re.split(rf"{SENTENCE_BREAK}|\n+", text)
        lines = [re.sub(r"\A[ \t]*(?:[-*•>]|#+)[ \t]+", "", part) for part in parts]
        return {winner for line in lines if (winner := self.statement(line))}

    def leaning(self, sentence: str) -> str | None:
        """The winner that a sentence leans to; "undecided" if it favours an answer without being a clear statement."""
        if winner := self.statement(sentence):
            return winner
        text = without_emphasis(sentence)
        if NO_WINNER.search(text):
            return UNDECIDED
        named = self.named_in(text)
        if re.search(r"@\s*[<>≻]\s*@|@[^.,;@]{0,9}\b[0-9]+\s*(?:/|out of)\s*[0-9]", self.mention.sub("@", text)):
            return UNDECIDED  # a comparison by a sign or by scores
        if not named:
            return UNDECIDED if FAVOUR.search(text) and PLACE.search(text) else None
        if not FAVOUR.search(RESPECT.sub("", text)):
            rest = self.mention.sub("", text).replace("’", "'")
            return named.pop() if len(named) == 1 and len(rest) < 60 and BARE.fullmatch(rest) else None
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
