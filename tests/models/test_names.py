"""What the names of models mean: an @ in a path is a step only where nothing else is meant."""

import re
from pathlib import Path

import jax.numpy as jnp
import pytest

from models.checkpoint import STOPPED, Checkpoints, find_step, is_run, read_about, resolve_step
from models.names import split_commit, split_step
from models.tokenizer import tokenizer_path

COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("runs/sft", ("runs/sft", "")),
        ("runs/sft@20", ("runs/sft", "20")),
        ("runs/sft@best", ("runs/sft", "best")),
        ("runs/sft/@20", ("runs/sft/", "20")),
        ("runs/sft@20/", ("runs/sft", "20")),
        ("ann@lab/sft", ("ann@lab/sft", "")),
        ("ann@2/sft", ("ann@2/sft", "")),
        ("ann@lab/sft@20", ("ann@lab/sft", "20")),
        ("runs/a@b@20", ("runs/a@b", "20")),
        ("runs/lr@1e-4", ("runs/lr@1e-4", "")),
        ("runs/sft@", ("runs/sft@", "")),
        ("runs/sft@\u00b2", ("runs/sft@\u00b2", "")),  # a digit to str.isdigit, a number to nobody
        ("runs/sft@last", ("runs/sft@last", "")),
        ("runs/@20", ("runs/", "20")),
        ("@20", ("@20", "")),
        (f"Qwen/Qwen3-0.6B@{COMMIT}", (f"Qwen/Qwen3-0.6B@{COMMIT}", "")),
    ],
)
def test_only_an_at_sign_behind_the_last_separator_is_a_step(name: str, expected: tuple[str, str]) -> None:
    assert split_step(name) == expected == split_step(Path(name) if "/@" not in name and name[-1] != "/" else name)


def test_a_commit_is_of_a_name_on_the_hub() -> None:
    assert split_commit(f"Qwen/Qwen3-0.6B@{COMMIT}") == ("Qwen/Qwen3-0.6B", COMMIT)
    for name in ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B@main", f"a/b/c@{COMMIT}", f"runs@{COMMIT}"):
        assert split_commit(name) == (name, None)


@pytest.mark.parametrize("name", ["ann@lab/run", "ann@2/run", "ann@lab/run@2", "run@best"])
def test_a_run_is_found_whatever_its_path_has_an_at_sign_for(tmp_path: Path, name: str) -> None:
    run = tmp_path / name
    checkpoints = Checkpoints(run)
    for step in (2, 7):
        checkpoints.save(step, {"x": jnp.zeros(1)}, {"step": jnp.zeros(())}, {"model": {"step": step}})
    checkpoints.close()
    (run / "tokenizer").mkdir()
    assert is_run(run) and is_run(f"{run}@2") and find_step(run) == (run, 7) and find_step(f"{run}@2") == (run, 2)
    assert resolve_step(str(run)) == f"{run}@7" and resolve_step(f"{run}@2") == f"{run}@2"
    assert tokenizer_path(run) == tokenizer_path(f"{run}@2") == str(run / "tokenizer")
    assert read_about(f"{run}@2")["model"] == {"step": 2}
    with pytest.raises(
        FileNotFoundError, match=f"{re.escape(str(run))}@best: no best step is known.*expected one of 2, 7"
    ):
        find_step(f"{run}@best")
    (run / STOPPED).write_text('{"step": 7, "best_step": 2}')
    assert resolve_step(f"{run}@best") == f"{run}@2"
