"""Words of any script; of ASCII text they are those of `str.split` and of rouge-score."""

import random
import re
import string
import unicodedata

import pytest

from train.rewards.words import RougeTokenizer, plain_words, spaced_words

ALL_THREE = (spaced_words, plain_words, RougeTokenizer().tokenize)


def test_ascii_text_has_the_words_it_always_had() -> None:
    tokenize = pytest.importorskip("rouge_score.tokenize").tokenize
    from nltk.stem.porter import PorterStemmer

    stemmer, draw = PorterStemmer(), random.Random(0)
    for _ in range(300):
        text = "".join(draw.choice(string.printable + "’“–…") for _ in range(60))
        assert spaced_words(text) == text.split()
        assert plain_words(text) == re.findall(r"\w+(?:['’]\w+)*", text.lower())
        assert RougeTokenizer().tokenize(text) == tokenize(text, None)
        assert RougeTokenizer(stem=True).tokenize(text) == tokenize(text, stemmer)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("你好，世界。", ["你", "好", "世", "界"]),
        ("日本語でカー", ["日", "本", "語", "で", "カ", "ー"]),
        ("ที่นี่ดี", ["ที่", "นี่", "ดี"]),  # a character with its marks
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),  # vowel signs are within words
        ("مرحبا بالعالم", ["مرحبا", "بالعالم"]),
        ("안녕 세상", ["안녕", "세상"]),
        ("привет мир", ["привет", "мир"]),
        ("用python写3行", ["用", "python", "写", "3", "行"]),
        ("ok👍🏽👍👨‍👩‍👧🇩🇪🇫🇷", ["ok", "👍🏽", "👍", "👨‍👩‍👧", "🇩🇪", "🇫🇷"]),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    for split in ALL_THREE:
        assert split(text) == words


def test_two_spellings_of_a_letter_are_one() -> None:
    text = "café"
    for split in ALL_THREE[1:]:
        assert split(unicodedata.normalize("NFD", text)) == split(text) == [text]
