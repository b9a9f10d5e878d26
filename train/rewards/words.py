"""Counts and compares words in any script.

Where a script separates words by spaces, a word is what stands between them. Chinese, Japanese, Thai, Lao, Khmer,
Burmese and Tibetan do not: there every character, with the marks on it, counts as a word, and so does every emoji. Of a
text in ASCII nothing differs from what `str.split` and rouge-score give.
"""

import functools
import re
import unicodedata
from typing import Any

# Scripts without spaces: Thai, Lao, Tibetan, Burmese, Khmer, Tai; kana, bopomofo, ideographs, half-width kana.
UNSPACED = (
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ece\u0edc-\u0edf\u0f40-\u0fbc\u1000-\u103f\u1050-\u108f\u1780-\u17d3"
    "\u1950-\u19c9\u1a20-\u1a7c\u3005-\u3007\u3031-\u3035\u303b\u303c\u3041-\u3096\u309d-\u309f\u30a1-\u30fa"
    "\u30fc-\u30ff\u3105-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uaa60-\uaa7f\uf900-\ufaff"
    "\uff66-\uff9d\U00016fe0-\U00018cff\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
EMOJI = "\u231a\u231b\u23e9-\u23fa\u2600-\u27bf\u2b50\u2b55\U0001f000-\U0001faff"
FLAG_LETTERS, JOINERS = "\U0001f1e6-\U0001f1ff", "\u200c\u200d"  # two of the former are a flag
APOSTROPHES = "'’"


@functools.cache
def _marks() -> str:
    """Ranges of the characters that Unicode calls marks (vowel signs, accents); `re` has no class for them."""
    points = (*range(0x300, 0x20000), *range(0xE0100, 0xE01F0))
    marks = [point for point in points if unicodedata.category(chr(point)).startswith("M")]
    starts = [point for point, before in zip(marks, [-1, *marks[:-1]], strict=True) if point != before + 1]
    ends = [point for point, after in zip(marks, [*marks[1:], -1], strict=True) if point != after - 1]
    return "".join(f"{chr(start)}-{chr(end)}" for start, end in zip(starts, ends, strict=True))


@functools.cache
def _patterns() -> dict[str, re.Pattern[str]]:
    marks = _marks()
    emoji = rf"[{FLAG_LETTERS}]{{2}}|[{EMOJI}][{marks}\U0001f3fb-\U0001f3ff]*(?:\u200d[{EMOJI}][{marks}]*)*"
    unit = rf"{emoji}|[{UNSPACED}][{marks}]*"  # a word by itself

    def run(letter: str) -> str:
        spaced = f"(?![{UNSPACED}]){letter}"
        return f"{spaced}(?:{spaced}|[{marks}{JOINERS}])*"

    letters, word = run(r"[^\W_]"), run(r"\w")
    return {
        "unit": re.compile(unit),
        "part": re.compile(rf"{unit}|[^{UNSPACED}{EMOJI}]+"),
        "rouge": re.compile(rf"{unit}|{letters}"),
        "word": re.compile(rf"{unit}|{word}(?:[{APOSTROPHES}]{word})*"),
    }


def spaced_words(text: str) -> list[str]:
    """Splits a text at white space, and around every character that is a word by itself."""
    unit, part = _patterns()["unit"], _patterns()["part"]
    words: list[str] = []
    for chunk in text.split():
        if chunk.isascii() or not unit.search(chunk):
            words.append(chunk)
        else:  # punctuation beside such a character belongs to it
            words += [
                piece for piece in part.findall(chunk) if unit.match(piece) or any(sign.isalnum() for sign in piece)
            ]
    return words


def plain_words(text: str) -> list[str]:
    """Returns the words of a text in lower case, without punctuation; "don't" is one word."""
    return _patterns()["word"].findall(unicodedata.normalize("NFC", text).lower())


class RougeTokenizer:
    """Splits texts for `rouge_score.rouge_scorer.RougeScorer`, whose own tokenizer drops all but a-z and 0-9.

    Of ASCII text the tokens are its own, stemmed by Porter's rules if they have more than three letters.
    """

    def __init__(self, *, stem: bool = False) -> None:
        from nltk.stem.porter import PorterStemmer

        self._stemmer: Any = PorterStemmer() if stem else None

    def tokenize(self, text: str) -> list[str]:
        tokens: list[str] = _patterns()["rouge"].findall(unicodedata.normalize("NFC", text).lower())
        if self._stemmer is None:
            return tokens
        return [self._stemmer.stem(token) if len(token) > 3 and token.isascii() else token for token in tokens]
