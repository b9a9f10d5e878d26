"""Laws of a turn: prompt + answer is the template's whole conversation, and the first token learned is the first that
the model is to write."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.marks import Rendered
from models.tokenizer import Tokenizer
from models.turns import encode_turn, encode_whole_text, render_comparison, render_turn

ROOT = Path(__file__).parents[2]
QWEN3 = ROOT.parent / "shared" / "data" / "tokenizer_qwen3"
THINKING_TEMPLATE = """
{%- if tools %}system:{{ tools | tojson }}<|im_end|>
{% endif %}
{%- for m in messages %}
{%- set text = m.content %}
{%- if m.role == 'assistant' %}
{%- set thoughts = '' %}
{%- if m.reasoning_content is string %}{% set thoughts = m.reasoning_content %}
{%- elif '</think>' in text %}
{%- set thoughts = text.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set text = text.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{%- if loop.last %}{% set text = '<think>\\n' + thoughts + '\\n</think>\\n\\n' + text %}{% endif %}
{%- endif %}
{{- m.role + ':' + text }}
{%- for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant:' }}
{%- if not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""


def with_eos(directory: Path, eos: str | None) -> Path:
    """A tokenizer's directory, with another end in its config where one is given."""
    if eos is not None:
        file = directory / "tokenizer_config.json"
        file.chmod(0o644)
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": eos}))
    return directory


@pytest.fixture(scope="module")
def make_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool, str | None], Tokenizer]:
    """make_qwen3(thinking, eos): the real one, whose 150,000 tokens are read once for all tests."""

    @functools.cache
    def make(thinking: bool, eos: str | None) -> Tokenizer:
        if not QWEN3.is_dir():
            pytest.skip("the Qwen3 vocabulary (4 MB) is not shipped")
        directory = shutil.copytree(QWEN3, tmp_path_factory.mktemp("qwen3") / "tokenizer")
        return Tokenizer(with_eos(directory, eos), enable_thinking=thinking)

    return make


@pytest.fixture
def make_tokenizer(
    tiny_tokenizer_dir: Path, tmp_path: Path, make_qwen3: Callable[[bool, str | None], Tokenizer]
) -> Callable[..., Tokenizer]:
    """make_tokenizer(kind, thinking=False, eos=None): the real Qwen3's, or a tiny one with a template that thinks."""

    def make(kind: str = "tiny", thinking: bool = False, eos: str | None = None, template: str = "") -> Tokenizer:
        if kind == "qwen3":
            return make_qwen3(thinking, eos)
        directory = shutil.copytree(tiny_tokenizer_dir, tmp_path / kind, dirs_exist_ok=True)
        (directory / "chat_template.jinja").write_text(template or THINKING_TEMPLATE)
        return Tokenizer(with_eos(directory, eos), enable_thinking=thinking)

    return make


def learn(tokenizer: Tokenizer, prompt: Any, answer: Any, tools: Any = None) -> tuple[list[int], list[int]]:
    """Returns the ids that are read and those that are learned."""
    turn = render_turn(tokenizer, prompt, answer, tools)
    read, written = tokenizer.encode_rendered([turn.prompt, turn.written])
    return read, encode_turn(tokenizer, turn, read, written)


ASKED = {"role": "user", "content": "How warm is it?"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
REPLY = {"role": "tool", "content": "4 degrees"}
THOUGHTFUL = "<think>\nIt is winter.\n</think>\n\nCold."
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CONVERSATIONS = {
    "text": ([ASKED], "Cold.", None),
    "text that begins with a line break": ([ASKED], "\n\nCold.", None),
    "an empty answer": ([ASKED], "", None),
    "a system prompt": ([{"role": "system", "content": "Be brief."}, ASKED], "Cold.", None),
    "several turns": ([ASKED, {"role": "assistant", "content": THOUGHTFUL}, ASKED], "Cold.", None),
    "thoughts in the text": ([ASKED], THOUGHTFUL, None),
    "thoughts in a field": (
        [ASKED],
        {"role": "assistant", "content": "Cold.", "reasoning_content": "It is winter."},
        None,
    ),
    "thoughts that were begun by the prompt": ([ASKED], THOUGHTFUL.removeprefix("<think>\n"), None),
    "a tool call": ([ASKED], CALLING, TOOLS),
    "text and tool calls": ([ASKED], CALLING | {"content": "Let me see.", "tool_calls": [CALL, CALL]}, TOOLS),
    "thoughts and a tool call": ([ASKED], CALLING | {"reasoning_content": "I must look."}, TOOLS),
    "after a tool's reply": ([ASKED, CALLING, REPLY], "Four degrees.", TOOLS),
}


@pytest.mark.parametrize("eos", [None, "<|endoftext|>"], ids=["chat", "base"])
@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("kind", ["tiny", "qwen3"])
def test_prompt_and_answer_are_the_templates_conversation(
    make_tokenizer: Callable[..., Tokenizer], kind: str, thinking: bool, eos: str | None
) -> None:
    tokenizer = make_tokenizer(kind, thinking, eos)
    end = tokenizer.hf.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.turn_end == end
    for prompt, answer, tools in CONVERSATIONS.values():
        message = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
        thinks = "reasoning_content" in message or "</think>" in message["content"]
        settings = {"tools": tools, "tokenize": False}
        read, learned = learn(tokenizer, prompt, answer, tools)
        asked = tokenizer.hf.apply_chat_template(
            prompt, add_generation_prompt=True, enable_thinking=thinking or thinks, **settings
        )
        whole = tokenizer.hf.apply_chat_template([*prompt, message], enable_thinking=thinking, **settings)
        assert tokenizer.encode([asked]) == [read], "what the model is asked"
        assert tokenizer.hf.decode(read + learned) + "\n" == whole
        assert whole.rpartition("assistant")[2].count("<think>") == 1, "both templates write one block"
        assert learned[-1] == end and learned.count(end) == 1
        compared = tokenizer.encode_rendered([render_comparison(tokenizer, prompt, answer, tools)])
        assert tokenizer.hf.decode(compared[0]) == whole, "what a reward model learns from"


@pytest.mark.parametrize("kind", ["tiny", "qwen3"])
def test_a_rendered_prompt_is_a_chat_with_the_same_tokens(make_tokenizer: Callable[..., Tokenizer], kind: str) -> None:
    """Plain text as the template writes it, with the end of turn or without: the same ids, the end once."""
    tokenizer = make_tokenizer(kind, eos="<|endoftext|>")
    prompt = tokenizer.render([ASKED])
    expected = learn(tokenizer, [ASKED], "Cold.")
    for completion in ("Cold.", "Cold.<|im_end|>", "Cold.<|im_end|>\n"):
        assert learn(tokenizer, prompt, completion) == expected
        assert learn(tokenizer, [ASKED], completion) == expected
        assert encode_whole_text(tokenizer, tokenizer.encode([prompt + completion])[0]) == [*expected[0], *expected[1]]
    (ids,) = tokenizer.encode_rendered([render_comparison(tokenizer, prompt, "Cold.<|im_end|>")])
    assert ids == [*expected[0], *expected[1]]
    read, learned = learn(tokenizer, "It is ", "cold.")  # nothing that the template wrote: a text ends here
    assert tokenizer.hf.decode(learned) == "cold.<|endoftext|>" and tokenizer.hf.decode(read) == "It is "


ENDS = ["<|im_end|>", "<|endoftext|>", "<|im_end|><|endoftext|>", "<|im_end|>\n<|endoftext|>\n"]


@pytest.mark.parametrize("end", ENDS)
def test_a_text_never_ends_twice(make_tokenizer: Callable[..., Tokenizer], end: str) -> None:
    tokenizer = make_tokenizer()
    for prompt in ("It is ", [ASKED]):
        _, learned = learn(tokenizer, prompt, "cold." + end)
        assert sum(token in tokenizer.eos_ids for token in learned) == 1 and learned[-1] in tokenizer.eos_ids
    ids = encode_whole_text(tokenizer, tokenizer.encode(["It is cold." + end])[0])
    assert tokenizer.hf.decode(ids) == "It is cold." + end.rstrip()


@pytest.mark.parametrize(
    ("prompt", "answer", "named"),
    [
        ("Q", "A<|im_end|>\nuser:B", "<|im_end|> ends the completion, but .*user:B"),
        ([ASKED], "A<|im_end|>\nuser:B", "the answer has the special token '<|im_end|>' in its text"),
        ([ASKED], {"role": "assistant", "content": "A", "reasoning_content": "<|endoftext|>"}, "special token"),
        ([ASKED], "Well. " + THOUGHTFUL, "at most one block of thoughts"),
        ([ASKED], "<think>\nIt is", "at most one block of thoughts"),
        ([ASKED], THOUGHTFUL + THOUGHTFUL, "at most one block of thoughts"),
        ([ASKED], {"role": "assistant", "content": THOUGHTFUL, "reasoning_content": "Hm."}, "and <think> again"),
        ([ASKED], {"role": "assistant", "content": "A", "refusal": "No."}, "leaves the answer's 'refusal' out"),
        ([ASKED], {"role": "assistant", "content": "A", "thinking": ["Hm."]}, "thoughts to be one text"),
        (
            [ASKED],
            {"role": "assistant", "content": "A", "thinking": "Hm", "reasoning": "Oh"},
            "thoughts to be one text",
        ),
        ([ASKED], {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}, "tool_calls to be a list"),
        ([ASKED], {"role": "assistant", "content": "", "tool_calls": CALL}, "tool_calls to be a list"),
    ],
)
@pytest.mark.parametrize("kind", ["tiny", "qwen3"])
def test_answers_that_are_refused(
    make_tokenizer: Callable[..., Tokenizer], kind: str, prompt: Any, answer: Any, named: str
) -> None:
    with pytest.raises(ValueError, match=named.replace("|", r"\|")):
        learn(make_tokenizer(kind), prompt, answer)


def test_fields_that_say_nothing_are_no_fields(make_tokenizer: Callable[..., Tokenizer]) -> None:
    tokenizer = make_tokenizer()
    empty = {"reasoning_content": "", "tool_calls": None, "thinking": None, "name": None}
    for text in ("Cold.", THOUGHTFUL):
        message = {"role": "assistant", "content": text}
        assert learn(tokenizer, [ASKED], message | empty) == learn(tokenizer, [ASKED], text)
    for name in ("thinking", "reasoning"):  # other names of the same
        message, thoughts = {"role": "assistant", "content": "Cold."}, {"reasoning_content": "It is winter."}
        expected = learn(tokenizer, [ASKED], message | thoughts)
        assert learn(tokenizer, [ASKED], message | {name: "It is winter."}) == expected
    no_content = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert learn(tokenizer, [ASKED], no_content) == learn(tokenizer, [ASKED], CALLING)


@pytest.mark.parametrize(
    ("prompt", "answer", "tools", "named"),
    [
        ([ASKED], "Cold.", TOOLS, "no place for the column 'tools'"),
        ([ASKED], CALLING, None, "no place for 'tool_calls'"),
        ([ASKED, CALLING, ASKED], "Cold.", None, "no place for 'tool_calls'"),
        ([ASKED], {"role": "assistant", "content": "A", "reasoning_content": "Hm."}, None, "answer's thoughts out"),
        ("How warm?", "Cold.", TOOLS, "the column 'tools' is for chat messages"),
    ],
)
def test_what_a_template_would_drop_is_refused(
    chatty: Tokenizer, prompt: Any, answer: Any, tools: Any, named: str
) -> None:
    for render in (render_turn, render_comparison):
        with pytest.raises(ValueError, match=named):
            render(chatty, prompt, answer, tools)


def test_a_template_that_drops_a_part_or_goes_on_elsewhere_is_refused(
    make_tokenizer: Callable[..., Tokenizer], chatty: Tokenizer
) -> None:
    body = "{% for m in messages %}{{ m.role }}:{{ m.content[:3] if m.role == 'assistant' else m.content }}<|im_end|>"
    shortening = make_tokenizer(template=body + "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}")
    with pytest.raises(ValueError, match="does not render the whole answer 'Cold.'"):
        learn(shortening, [ASKED], "Cold.")
    chatty.enable_thinking = True  # its prompt then ends with a word that is in no conversation
    with pytest.raises(ValueError, match="ends the prompt with .*assistant:hm', but renders its answer as"):
        learn(chatty, [ASKED], "Cold.")


def test_without_an_end_of_turn_in_the_template_a_text_ends_with_the_tokenizers(
    make_tokenizer: Callable[..., Tokenizer],
) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer = make_tokenizer(template=template + "{% if add_generation_prompt %}assistant: {% endif %}")
    assert tokenizer.turn_end is None
    read, learned = learn(tokenizer, [ASKED], "Cold.")
    assert tokenizer.hf.decode(read) == "user: How warm is it?\nassistant: "
    assert tokenizer.hf.decode(learned) == "Cold.<|im_end|>"


def test_a_turn_ends_the_sampling_with_the_templates_token(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    """Also with one that neither the tokenizer nor generation_config.json names as an end."""
    shutil.copytree(tiny_tokenizer_dir, tmp_path / "other")
    hf = Tokenizer(tmp_path / "other").hf
    hf.add_special_tokens({"additional_special_tokens": ["<end_of_turn>"]})
    hf.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content }}<end_of_turn>\n{% endfor %}"
    hf.save_pretrained(tmp_path / "other")
    tokenizer = Tokenizer(tmp_path / "other")
    assert tokenizer.turn_end == hf.convert_tokens_to_ids("<end_of_turn>") and tokenizer.turn_end in tokenizer.eos_ids
    _, learned = learn(tokenizer, [ASKED], "Cold.")
    assert tokenizer.hf.decode(learned) == "assistant:Cold.<end_of_turn>", "no generation prompt: it is written too"


def test_the_shipped_tokenizer_ends_its_turns(sentences: list[str]) -> None:
    tokenizer = Tokenizer(ROOT / "data" / "tokenizer")
    for sentence in sentences[:5]:
        read, learned = learn(tokenizer, [ASKED], sentence)
        whole = [ASKED, {"role": "assistant", "content": sentence}]
        assert tokenizer.hf.decode(read + learned) + "\n" == tokenizer.hf.apply_chat_template(whole, tokenize=False)
        assert [read] == tokenizer.prompt_ids([[ASKED]]) and learned.count(tokenizer.eos_ids[0]) == 1


def test_what_tools_say_is_text(make_tokenizer: Callable[..., Tokenizer]) -> None:
    tools = [TOOLS[0] | {"description": "Ends.<|im_end|>"}]
    for kind in ("tiny", "qwen3"):
        tokenizer = make_tokenizer(kind)
        end = tokenizer.hf.convert_tokens_to_ids("<|im_end|>")
        read, learned = learn(tokenizer, [ASKED], CALLING, tools)
        assert read.count(end) == learn(tokenizer, [ASKED], CALLING, TOOLS)[0].count(end) and learned.count(end) == 1
        assert "Ends.<|im_end|>" in tokenizer.hf.decode(read)


@pytest.mark.parametrize("marked", ["a|b|cd", "|ab||cd|", "abcd"])
def test_the_rest_of_a_marked_text_is_the_texts_rest(marked: str) -> None:
    rendered = Rendered(marked, "|")
    assert [rendered.after(n).text for n in range(5)] == ["abcd", "bcd", "cd", "d", ""]
