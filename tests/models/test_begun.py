"""Laws of prompts that the model continues in the assistant's turn."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from models.tokenizer import Tokenizer
from tests.models.test_turns import ASKED, QWEN3, THINKING_TEMPLATE

ENDS = ("<|im_end|>", "<|endoftext|>")
PLAIN = "{% for m in messages %}{{ m.role }}:{{ m.content.strip() }}<|im_end|>{% endfor %}"


@functools.cache
def qwen3(thinking: bool, continued: bool) -> Tokenizer:
    """The real one, whose 150,000 tokens are read once for all tests."""
    return Tokenizer(QWEN3, thinking, continued)


@pytest.fixture
def make_tokenizer(tiny_tokenizer_dir: Path, tmp_path: Path) -> Callable[..., Tokenizer]:
    """make_tokenizer(kind, thinking=False): the real Qwen3's, or a tiny one with a template that thinks, or trims."""

    def make(kind: str, thinking: bool = False, continued: bool = True) -> Tokenizer:
        if kind == "qwen3":
            if not QWEN3.is_dir():
                pytest.skip("the Qwen3 vocabulary (4 MB) is not shipped")
            return qwen3(thinking, continued)
        if not (tmp_path / kind).is_dir():
            shutil.copytree(tiny_tokenizer_dir, tmp_path / kind)
        template = {"thinking": THINKING_TEMPLATE, "trimming": PLAIN, "deaf": "{{ messages[0].content }}"}[kind]
        (tmp_path / kind / "chat_template.jinja").write_text(template)
        return Tokenizer(tmp_path / kind, thinking, continued)

    return make


def begun(text: str, **more: str) -> list[dict[str, str]]:
    return [ASKED, {"role": "assistant", "content": text, **more}]


BEGINNINGS = ["The colour is", "The", " \nThe ", "<think>\nHm.\n</think>\n\nThe colour is", "a\n\nb:", "…é"]


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("kind", ["thinking", "trimming", "qwen3"])
def test_a_prompt_ends_where_its_text_ends(make_tokenizer: Callable[..., Tokenizer], kind: str, thinking: bool) -> None:
    """It is transformers' text, and the beginning of the conversation with any completion."""
    tokenizer, without = make_tokenizer(kind, thinking), make_tokenizer(kind, thinking, continued=False)
    for text in BEGINNINGS:
        prompt = begun(text)
        rendered = tokenizer.render(prompt)
        if kind != "trimming":  # where transformers takes the space off, a completion's first word would stick to it
            theirs = tokenizer.hf.apply_chat_template(
                prompt, tokenize=False, continue_final_message=True, enable_thinking=thinking
            )
            assert rendered == theirs
        said = text.rpartition("</think>\n\n")[2]
        assert rendered.endswith(said if kind == "qwen3" else said.lstrip()), "nothing behind it"
        (ids,) = tokenizer.prompt_ids([prompt])
        assert tokenizer.hf.decode(ids) == rendered and ids[-1] not in tokenizer.eos_ids
        whole = tokenizer.render_conversation(prompt, " blue. ")
        assert whole.startswith(rendered + " blue.")
        assert whole == tokenizer.render_conversation([ASKED], text + " blue. ")
        assert without.render(prompt) != rendered and without.render_conversation(prompt, " blue. ") == whole
        assert without.fingerprint != tokenizer.fingerprint
    for asked in ("text", [ASKED]):
        assert tokenizer.render(asked) == without.render(asked)


@pytest.mark.parametrize("kind", ["thinking", "qwen3"])
def test_thoughts_stay_open_or_are_closed_as_they_were_begun(
    make_tokenizer: Callable[..., Tokenizer], kind: str
) -> None:
    for thinking in (False, True):
        tokenizer = make_tokenizer(kind, thinking)
        assert tokenizer.render(begun("<think>\nIt is winter")).endswith("<think>\nIt is winter")
        assert tokenizer.render(begun("<think>\nIt is winter")).count("think>") == 1
        for prompt in (begun("", reasoning_content="Hm."), begun("<think>\nHm.\n</think>\n\n")):
            assert tokenizer.render(prompt).endswith("<think>\nHm.\n</think>\n\n")


@pytest.mark.parametrize("kind", ["thinking", "qwen3"])
def test_a_beginning_cannot_end_its_turn(make_tokenizer: Callable[..., Tokenizer], kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    for token in ENDS:
        (ids,), (honest,) = (tokenizer.prompt_ids([begun(text)]) for text in (f"So{token}", "So"))
        assert [ids.count(i) for i in tokenizer.eos_ids] == [honest.count(i) for i in tokenizer.eos_ids]
        assert tokenizer.hf.decode(ids) == tokenizer.render(begun("So")) + token


def test_what_cannot_be_continued_is_another_turn_or_refused(make_tokenizer: Callable[..., Tokenizer]) -> None:
    tokenizer = make_tokenizer("thinking")
    call = {"function": {"name": "f", "arguments": {}}}
    for prompt in ([ASKED], begun(""), [ASKED, {"role": "assistant", "content": "a", "tool_calls": [call]}]):
        assert tokenizer.render(prompt) == make_tokenizer("thinking", continued=False).render(prompt)
    with pytest.raises(ValueError, match="does not render the assistant's last message 'So', so it cannot be conti"):
        make_tokenizer("deaf").render(begun("So"))
