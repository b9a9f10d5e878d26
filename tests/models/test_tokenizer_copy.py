"""A run's copy of its tokenizer: what was damaged or edited is refused wherever it is read, what is as saved is not."""

import json
import shutil
from pathlib import Path

import pytest

from models.tokenizer import Tokenizer
from models.tokenizer_copy import TOKENIZER_DIGESTS, check_tokenizer_copy, digest_tokenizer


@pytest.fixture
def copy(tmp_path: Path, tiny_tokenizer_dir: Path) -> Path:
    """The tokenizer of a run, with its digests."""
    copy = tmp_path / "run" / "tokenizer"
    Tokenizer(tiny_tokenizer_dir).save(copy)
    record = digest_tokenizer(copy, "ORIGINAL")
    (copy.parent / TOKENIZER_DIGESTS).write_text(json.dumps(record))
    return copy


def test_a_changed_file_is_refused_by_name(copy: Path) -> None:
    file = copy / "tokenizer_config.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(ValueError) as error:
        Tokenizer(copy)
    digests = copy.parent / TOKENIZER_DIGESTS
    assert str(error.value) == (
        f"{file}: has changed since the run was started, as {digests} says; delete {copy}, and the run's own command "
        f"copies it anew from ORIGINAL; or delete {digests} to accept the files as they are"
    )
    digests.unlink()
    assert Tokenizer(copy).size


def test_a_file_less_or_more_is_refused(copy: Path) -> None:
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(ValueError, match=r"chat_template.jinja: is new since"):
        check_tokenizer_copy(copy)
    (copy / "chat_template.jinja").rename(copy / "notes.txt")  # no file of a tokenizer
    check_tokenizer_copy(copy)
    (copy / "generation_config.json").unlink()
    with pytest.raises(ValueError, match=r"generation_config.json: is missing since"):
        check_tokenizer_copy(copy)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"tokenizer": "x", "sha256": 1}', '{"sha256": {}}'])
def test_damaged_digests_are_refused(copy: Path, content: str) -> None:
    (copy.parent / TOKENIZER_DIGESTS).write_text(content)
    with pytest.raises(ValueError, match=f"{TOKENIZER_DIGESTS}: is damaged, so that .*tokenizer cannot be compared"):
        check_tokenizer_copy(copy)


def test_other_directories_are_not_compared(copy: Path, tmp_path: Path) -> None:
    """A copy of a copy, a run from before there were digests, and one that has moved."""
    shutil.copytree(copy, tmp_path / "other" / "tokenizer")
    shutil.copytree(copy, copy.parent / "mine")
    shutil.copytree(copy.parent, tmp_path / "moved")
    for directory in (tmp_path / "other" / "tokenizer", copy.parent / "mine"):
        (directory / "tokenizer_config.json").write_text("{ }")
        check_tokenizer_copy(directory)
    check_tokenizer_copy(tmp_path / "moved" / "tokenizer")
