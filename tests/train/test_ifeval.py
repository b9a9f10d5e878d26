"""IFEval's verifiers against the official checker's recorded answers, and the rewards that are made of them."""

import gzip
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nltk
import pytest

from train.config import RewardSpec
from train.rewards import Rewards, ifeval

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "tests" / "data" / "ifeval_sample.jsonl.gz"
SHARED = ROOT.parent / "shared" / "data"
LABELS, CASES = "official_labels_4models.jsonl.gz", "verifier_regression_stratified.jsonl.gz"
REQUIRE_SPLITTER = ifeval.require_splitter  # the fixture below may replace it
NEED_SPLITTER = {"length_constraints:number_sentences", "change_case:capital_word_frequency"}


def read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        pytest.skip(f"{path.name}: is not part of the project")
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def has_splitter() -> bool:
    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
    except LookupError:
        return False
    return True


@pytest.fixture(scope="module", autouse=True)
def verifiers() -> Iterator[None]:
    """Loaded without a download: where the sentence splitter is missing, what needs it is skipped."""
    pytest.importorskip("lm_eval", reason="pip install --no-deps lm-eval")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk.data, "path", [*nltk.data.path, str(SHARED / "nltk_data")])
        patch.setattr(nltk, "download", lambda *_, **__: False)
        if not has_splitter():
            patch.setattr(ifeval, "require_splitter", lambda: None)
        ifeval.load_verifiers()
        yield


def disagreements(cases: list[dict[str, Any]]) -> list[Any]:
    found = []
    for case in cases:
        strict, loose = ifeval.outcomes("", case["response"], [case["instruction_id"]], [case["kwargs"]])
        if (strict, loose) != ([case["strict"]], [case["loose"]]):
            found.append((case["model"], case["key"], case["instruction_id"]))
    return found


@pytest.mark.parametrize("splits_sentences", [False, True])
def test_a_sample_of_the_official_labels(splits_sentences: bool) -> None:
    if splits_sentences and not has_splitter():
        pytest.skip("NLTK's punkt_tab is not there; set NLTK_DATA")
    cases = [case for case in read(SAMPLE) if (case["instruction_id"] in NEED_SPLITTER) is splits_sentences]
    assert disagreements(cases) == []
    assert {(case["strict"], case["loose"]) for case in cases} == {(False, False), (False, True), (True, True)}


def test_the_sample_has_every_kind_of_instruction() -> None:
    registry = ifeval.load_verifiers().instructions_registry.INSTRUCTION_DICT
    assert {case["instruction_id"] for case in read(SAMPLE)} == registry.keys()


def test_the_verifiers_are_loaded_without_the_package_around_them() -> None:
    assert Path(ifeval.load_verifiers().__file__).parts[-4:] == ("lm_eval", "tasks", "ifeval", "utils.py")
    assert [name for name in sys.modules if name.startswith("lm_eval.tasks")] == []


@pytest.mark.slow
def test_every_stable_official_label() -> None:
    prompts = {row["key"]: row for row in read(SHARED / "ifeval" / "input_data.jsonl")}
    if not has_splitter():
        pytest.skip("NLTK's punkt_tab is not there; set NLTK_DATA")
    compared, wrong = 0, []
    for row in read(SHARED / "ifeval" / LABELS):
        asked = prompts[row["key"]]
        names, arguments = asked["instruction_id_list"], asked["kwargs"]
        answers = ifeval.outcomes(asked["prompt"], row["response"] or "", names, arguments)
        for kind, answer in zip(("strict", "loose"), answers, strict=True):
            for j, (mine, official, stable) in enumerate(zip(answer, row[kind], row["stable"], strict=True)):
                compared += stable
                if stable and mine != official:
                    wrong.append((row["model"], row["key"], names[j], kind))
    assert wrong == [] and compared == 6618


@pytest.mark.slow
def test_every_stratified_case() -> None:
    cases = read(SHARED / "ifeval" / CASES)
    if not has_splitter():
        pytest.skip("NLTK's punkt_tab is not there; set NLTK_DATA")
    assert disagreements(cases) == []


@pytest.mark.parametrize(
    ("text", "sentences", "capitals"),
    [
        ("He said “No.” SHE left.", 1, 1),  # a curly or angular quote behind a full stop ends no sentence
        ("He said «Non.» SHE left.", 1, 1),
        ("It’s ‘Fine.’ REALLY.", 1, 1),
        ('He said "No." SHE left.', 2, 1),
        ("NASA–ESA and EU—UN.", 1, 2),  # dashes do not separate words
        ("One. Two! Three? FOUR.", 4, 1),
    ],
)
def test_texts_are_split_as_the_official_labels_were(text: str, sentences: int, capitals: int) -> None:
    """Counted by the official checker's splitter; NLTK 3.10.2 and later split differently."""
    if not has_splitter():
        pytest.skip("NLTK's punkt_tab is not there; set NLTK_DATA")
    names = ["length_constraints:number_sentences", "change_case:capital_word_frequency"]
    for more in (0, 1):
        arguments: list[dict[str, Any]] = [{"relation": "at least", "num_sentences": sentences + more}]
        arguments.append({"capital_relation": "at least", "capital_frequency": capitals + more})
        assert ifeval.outcomes("p", text, names, arguments)[0] == [not more, not more]


NAMES = ["punctuation:no_comma", "startend:quotation"]
TEXTS = {'"a"': (1.0, 1.0), '"a, b"': (0.5, 0.5), "a": (0.5, 0.5), 'Here:\n"a"': (0.5, 1.0), "a, b": (0.0, 0.0)}


@pytest.mark.parametrize("all_or_nothing", [False, True])
def test_the_reward_is_the_share_of_followed_instructions(all_or_nothing: bool) -> None:
    count = len(TEXTS)
    columns: dict[str, Any] = {"instruction_id_list": [NAMES] * count, "kwargs": [[{}, {}]] * count, "key": [1] * count}
    for i, function in enumerate((ifeval.strict, ifeval.loose)):
        rewards = function(["p"] * count, list(TEXTS), **columns, all_or_nothing=all_or_nothing)
        shares = [both[i] for both in TEXTS.values()]
        assert rewards == [float(share == 1) if all_or_nothing else share for share in shares]


def test_without_instructions_there_is_no_reward() -> None:
    lists: list[list[str] | None] = [None, [], NAMES]
    assert ifeval.strict(["p"] * 3, ['"a"'] * 3, lists, [None, [], [{}, {}]]) == [None, None, 1.0]


def test_arguments_that_are_none_are_left_out() -> None:
    names = ["keywords:forbidden_words"]
    for text in ("a b", "b"):
        few = ifeval.outcomes("p", text, names, [{"forbidden_words": ["a"]}])
        many = ifeval.outcomes("p", text, names, [{"forbidden_words": ["a"], "num_words": None, "relation": None}])
        assert few == many == ([text == "b"], [text == "b"])


def test_chance_is_the_same_every_time_and_leaves_other_chance_alone() -> None:
    names, arguments = ["keywords:letter_frequency"], [{"letter": "#", "let_frequency": 1, "let_relation": "at least"}]
    random.seed(5)
    expected = random.random()
    found = []
    for seed in range(20):
        random.seed(seed)
        found.append(ifeval.outcomes("p", "abcdefgh", names, arguments))
    assert len({str(one) for one in found}) == 1
    random.seed(5)
    ifeval.outcomes("p", "abc", names, arguments)
    assert random.random() == expected


@pytest.mark.parametrize(
    ("names", "arguments", "words"),
    [
        (["punctuation:no_coma"], [{}], "there is no instruction 'punctuation:no_coma'; expected one of .*no_comma"),
        (NAMES, [{}], "kwargs: expected one mapping for each of .* got 1"),
    ],
)
def test_data_that_cannot_be_checked_is_refused(names: list[str], arguments: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ifeval.strict(["p"], ["text"], [names], [arguments])


NEEDED: dict[str, dict[str, Any]] = {
    "length_constraints:number_words": {"num_words": 300, "relation": "at least"},
    "length_constraints:number_paragraphs": {"num_paragraphs": 2},
    "keywords:existence": {"keywords": ["a"]},
    "keywords:frequency": {"keyword": "a", "frequency": 2, "relation": "less than"},
    "keywords:letter_frequency": {"letter": "a", "let_frequency": 2, "let_relation": "at least"},
    "language:response_language": {"language": "de"},
    "length_constraints:nth_paragraph_first_word": {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "a"},
    "startend:end_checker": {"end_phrase": "a"},
    "change_case:capital_word_frequency": {"capital_frequency": 2, "capital_relation": "at least"},
}


@pytest.mark.parametrize("name", NEEDED)
def test_an_instruction_without_an_argument_that_it_needs_is_refused(name: str) -> None:
    ifeval.check_instructions([name], [NEEDED[name]])
    for argument in NEEDED[name]:
        for value in (None, "", 0, [], float("nan")):
            with pytest.raises(ValueError, match=f"ifeval: {name} needs '{argument}', got"):
                ifeval.check_instructions([name], [NEEDED[name] | {argument: value}])
        with pytest.raises(ValueError, match=f"ifeval: {name} needs '{argument}', got None"):
            ifeval.outcomes("p", "text", [name], [{k: v for k, v in NEEDED[name].items() if k != argument}])


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("length_constraints:number_words", {"num_words": -3}, "cannot use its kwargs"),
        ("length_constraints:nth_paragraph_first_word", {"nth_paragraph": 3}, "cannot use its kwargs"),
        ("length_constraints:number_words", {"relation": "exactly"}, "cannot be checked .*relation"),
        ("length_constraints:number_words", {"num_words": "300"}, "cannot be checked"),
        ("language:response_language", {"language": "xx"}, "cannot be checked"),
        ("keywords:existence", {"keywords": "cat"}, "keywords: expected a list of words, got 'cat'"),
        ("keywords:existence", {"keywords": ["a("]}, "cannot be checked"),
        ("keywords:existence", {"keyword": "c"}, "cannot be checked"),
    ],
)
def test_arguments_that_a_verifier_cannot_use_are_refused(name: str, changes: dict[str, Any], words: str) -> None:
    before = random.getstate()
    with pytest.raises(ValueError, match=f"ifeval: {name}.*{words}"):
        ifeval.check_columns([None, [], [name]], [None, [], [NEEDED[name] | changes]])
    assert random.getstate() == before


def test_every_prompt_of_google_ifeval_is_accepted() -> None:
    rows = read(ROOT / "data" / "ifeval" / "input_data.jsonl.gz")
    ifeval.check_columns([row["instruction_id_list"] for row in rows], [row["kwargs"] for row in rows])


def test_the_row_is_named_before_anything_is_sampled() -> None:
    rewards = Rewards([RewardSpec(function="ifeval")], None, "float32", columns=["instruction_id_list", "kwargs"])
    good, bad = NEEDED["startend:end_checker"], {}
    columns: dict[str, list[Any]] = {"instruction_id_list": [["startend:end_checker"]] * 2, "kwargs": [[good], [bad]]}
    with pytest.raises(ValueError, match=r"needs 'end_phrase', got None; .* \(row 2 of the prompts\)"):
        rewards.check_rows(columns)


def test_a_missing_splitter_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(nltk, "download", lambda *_, **__: False)
    with pytest.raises(FileNotFoundError, match="python -m nltk.downloader -d DIRECTORY punkt_tab"):
        REQUIRE_SPLITTER()
