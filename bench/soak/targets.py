"""What is fuzzed: configs, rows, weights, chat templates, a judge's replies; each with what may come of a case.

A target is a function of (materials, folder) that returns a function of a case, which raises what our code raises, or
a `Fault` where it takes what it should not; and the strategy of the cases. A case is a valid input's number with the
changes to it.
"""

import contextlib
import dataclasses
import io
import json
import math
import shutil
import threading
import typing
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import yaml
from hypothesis import strategies as st

from bench.soak.fuzz import fault
from bench.soak.mutations import change_text, change_tree, mutations, text_mutations, tree_mutations
from bench.soak.tiny import (
    ROOT,
    TOKENIZER,
    policy_settings,
    reward_settings,
    sft_settings,
    write_network,
)
from models.hf_weights import load_pretrained
from models.tokenizer import Tokenizer
from train.config import ChatConfig, PolicyConfig, RewardModelConfig, SftConfig
from train.data.prompts import Prompts
from train.data.rows import load_rows
from train.parse import parse
from train.rewards.functions import function_scorer
from train.rewards.judge import HIGHEST, LOWEST
from train.settings import settings

Target = tuple[Callable[[Any], None], Any]
# Settings that may be infinite or negative; every other number of a config is finite and at least 0.
INFINITE = ("optimizer.max_grad_norm",)
NEGATIVE = ("mesh.data", "mesh.fsdp", "mesh.tensor", "rewards[].weight")
LONGEST_PROMPT = 4096  # tokens


class Reached(BaseException):
    """Everything was checked: the weights would be made next."""


def _cases(count: int, changes: Any = mutations) -> Any:
    return st.tuples(st.integers(0, count - 1), changes)


@contextlib.contextmanager
def _silence() -> Iterator[io.StringIO]:
    """What our code prints, on both outputs and the console."""
    from train.console import console

    text = io.StringIO()  # stays open: what has been silenced once may keep it
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        file, console.file = console.file, text
        try:
            yield text
        finally:
            console.file = file


# Configs


def _shipped_configs() -> list[tuple[str, Any]]:
    """Returns the shipped configs with the names of their programs."""
    found = []
    for file in sorted((ROOT / "configs").rglob("*.yaml")):
        place, name = file.relative_to(ROOT / "configs").parts[0], file.stem
        if place in ("launch", "variants") or name == "generate":
            continue
        is_reward = place == "preferences" or "reward" in name or name == "judge"
        found.append(
            ("reward" if is_reward else "sft" if name == "sft" else "policy", yaml.safe_load(file.read_text()))
        )
    return found


def configs(materials: Path, folder: Path) -> Target:
    """A command line with a YAML file: shipped ones, and three that could train here, up to the making of weights."""
    from train.__main__ import main

    kinds: dict[str, Any] = {"policy": PolicyConfig, "sft": SftConfig, "reward": RewardModelConfig}
    functions = [{"function": "length", "weight": 0.5}, {"function": "rouge", "options": {"rouge_type": "rouge1"}}]
    columns = {"columns": {"reference": "wanted"}}
    own = [
        ("policy", policy_settings(materials, Path("run"), rewards=functions, data=columns)),
        ("sft", sft_settings(materials, Path("run"), early_stopping={"patience": 3})),
        ("reward", reward_settings(materials, Path("run"))),
    ]
    shipped = _shipped_configs()
    bases = [*shipped, *own * max(1, len(shipped) // len(own))]  # one half each
    file = folder / "case.yaml"
    folder.mkdir()

    def target(case: Any) -> None:
        number, (tree, text) = case
        program, base = bases[number]
        written = change_text(yaml.safe_dump(change_tree(base, tree), sort_keys=False), text)
        file.write_bytes(written.encode("utf-8", "surrogatepass"))
        config = parse(kinds[program], ["--config", str(file)])
        check_numbers(config)
        if number < len(shipped):
            return
        shutil.rmtree("run", ignore_errors=True)
        reached = (
            mock.patch.multiple("train.loop", make_model=_reached),
            mock.patch("train.supervised.program.make_model", _reached),
        )
        with _silence() as said, reached[0], reached[1]:
            try:
                code = main([program, "--config", str(file)])
            except Reached:
                return
        lines = said.getvalue().splitlines()
        if code != 2 or not lines or not lines[-1].startswith("error: "):
            fault(f"exit code {code}: {lines[-3:]}")

    return target, _cases(len(bases))


def _reached(*_: Any, **__: Any) -> Any:
    raise Reached


def check_numbers(config: Any) -> None:
    """Refuses a config with a value of another type than its setting's, or a number that cannot be meant."""
    for setting in settings(type(config)).values():
        for value in _values_of(config, setting.key.replace("[]", "").split(".")):
            if not _has_type(value, setting.hint):
                fault(f"{setting.key}: {value!r} was taken as {setting.hint}")
            for number in value if isinstance(value, list | tuple) else [value]:
                is_number = isinstance(number, int | float) and not isinstance(number, bool)
                if is_number and not math.isfinite(number) and setting.key not in INFINITE:
                    fault(f"{setting.key}: {number!r} was taken")
                if is_number and number < 0 and setting.key not in NEGATIVE:
                    fault(f"{setting.key}: {number!r} was taken")


def _values_of(config: Any, names: Sequence[str]) -> Iterator[Any]:
    """Yields the values of a setting, several where it is one of the items of a list."""
    if isinstance(config, list | tuple):
        for item in config:
            yield from _values_of(item, names)
    elif not names:
        yield config
    elif dataclasses.is_dataclass(config):  # a section may be null, or a single value in place of a list
        value = getattr(config, names[0])
        yield from _values_of(value, names[1:]) if names[1:] else [value]


def _has_type(value: Any, hint: Any) -> bool:
    """Whether a value is what its annotation says; an int is a float, a bool is neither."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in arguments
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(_has_type(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_has_type(v, arguments[1]) for v in value.values())
    if arguments:
        return any(_has_type(value, argument) for argument in arguments)
    if dataclasses.is_dataclass(hint):
        return isinstance(value, typing.cast(type, hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is bool and value is None:  # an empty switch is off
        return True
    return type(value) is hint


# Rows

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Two and two?"}]
SAID = {"role": "assistant", "content": "Four."}
ANSWERED = {"role": "assistant", "content": "Four.", "reasoning_content": "2 + 2"}
TEMPLATE = (  # renders whatever a message may have
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.role }}:{% if m.reasoning_content %}"
    "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}"
    "{% endif %}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
ROWS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("sft", {"text": "A good film."}),
    ("sft", {"prompt": "Two and two?", "completion": " Four."}),
    ("sft", {"messages": [*ASKED, ANSWERED]}),
    ("sft", {"prompt": ASKED, "completion": [ANSWERED]}),
    ("sft", {"messages": [*ASKED, CALL, {"role": "tool", "content": "4"}, ANSWERED], "tools": TOOLS}),
    ("reward", {"prompt": "Two and two?", "chosen": " Four.", "rejected": " Five.", "margin": 0.5}),
    ("reward", {"chosen": [*ASKED, SAID], "rejected": [*ASKED, {"role": "assistant", "content": "Five."}]}),
    ("reward", {"prompt": "Two?", "completions": ["Four.", "Five.", "Six."], "scores": [3, 1.5, 1]}),
    ("reward", {"prompt": ASKED, "completions": ["Four.", "Five."], "scores": [1, 0]}),
    ("rouge", {"prompt": "Two and two?", "completion": "Four.", "solution": "4", "n": 7}),
    ("rouge", {"prompt": ASKED, "completion": "Four."}),
)


def rows(materials: Path, folder: Path) -> Target:
    """A file of three rows, one of them changed: read, rendered, tokenized, made a batch; or scored by functions."""
    from train.supervised.reward_model import reward_model_task
    from train.supervised.sft import sft_task

    folder.mkdir()
    tokenizer = _chat_tokenizer(materials, folder)
    run = Path("run")
    supervised = {
        "sft": sft_task(parse(SftConfig, _as_options(sft_settings(materials, run), folder))),
        "reward": reward_model_task(parse(RewardModelConfig, _as_options(reward_settings(materials, run), folder))),
    }
    policy = parse(PolicyConfig, _as_options(policy_settings(materials, run, max_prompt_length=LONGEST_PROMPT), folder))

    def target(case: Any) -> None:
        number, (tree, text), as_array = case
        kind, row = ROWS[number]
        three = [row, change_tree(row, tree), row]
        lines = [json.dumps(one) for one in three]
        written = f"[{', '.join(lines)}]" if as_array else "".join(f"{line}\n" for line in lines)
        file = folder / f"rows.{'json' if as_array else 'jsonl'}"
        file.write_bytes(change_text(written, text).encode("utf-8", "surrogatepass"))
        with _silence():
            read = load_rows(str(file))
            if kind in supervised:
                _check_batch(supervised[kind], read, tokenizer, str(file))
            else:
                _check_prompts(policy, kind, read, tokenizer, str(file))

    return target, st.tuples(st.integers(0, len(ROWS) - 1), mutations, st.booleans())


def _chat_tokenizer(materials: Path, folder: Path) -> Tokenizer:
    """Returns the tiny tokenizer with a chat template."""
    shutil.copytree(materials / TOKENIZER, folder / TOKENIZER)
    (folder / TOKENIZER / "chat_template.jinja").write_text(TEMPLATE)
    return Tokenizer(folder / TOKENIZER)


def _as_options(values: dict[str, Any], folder: Path) -> list[str]:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    return ["--config", str(file)]


def _check_batch(task: Any, read: list[Any], tokenizer: Tokenizer, source: str) -> None:
    examples = task.encode(read, tokenizer, source, ChatConfig())
    fitting = [example for example in examples if 2 <= task.length(example) <= LONGEST_PROMPT]
    if not fitting:
        return
    batch = task.collate(task.pack(fitting, source), tokenizer, LONGEST_PROMPT)
    for name, array in batch.items():
        if not np.isfinite(array).all() or (name.startswith("tokens") and not _are_ids(array, tokenizer)):
            fault(f"{name}: {array!r} was made of the rows")


def _are_ids(array: np.ndarray, tokenizer: Tokenizer) -> bool:
    return bool(((array >= 0) & (array < tokenizer.size)).all())


def _check_prompts(policy: PolicyConfig, kind: str, read: list[Any], tokenizer: Tokenizer, source: str) -> None:
    from train.data.chats import normalize_prompts

    prompts = Prompts(normalize_prompts(read, source, "prompt", policy.chat), source, policy, tokenizer)
    if not _are_ids(prompts.encode(prompts.rows)[0], tokenizer):
        fault("ids: not in the vocabulary")
    scorer, columns = function_scorer(kind, {}, prompts.other_columns), prompts.columns(prompts.rows)
    rewards_PG = scorer(prompts.prompts(prompts.rows), [["Four two.", ""]] * len(prompts), columns)
    if np.isinf(rewards_PG).any():
        fault(f"{kind}: rewards {rewards_PG}")


# Weights


def weights(materials: Path, folder: Path) -> Target:
    """A directory of weights in one file or in two with an index; the config, the index, a header or data changed."""
    folder.mkdir()
    write_network(folder / "base", materials / TOKENIZER)
    whole = {file.name: file.read_bytes() for file in (folder / "base").iterdir()}
    parts = {"config.json": whole["config.json"], **_in_two(whole["model.safetensors"])}
    bases = [
        (files, name)
        for files in (whole, parts)
        for name in sorted(files)
        if name == "config.json" or "safetensors" in name
    ]

    def target(case: Any) -> None:
        number, (tree, text) = case
        files, name = bases[number]
        directory = folder / "case"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        for other, content in files.items():
            if other == name or "safetensors" in other or other == "config.json":
                (directory / other).write_bytes(_changed(content, tree, text) if other == name else content)
        with _silence():
            from models.hf_weights import flatten, split

            model = load_pretrained(directory)
            for field, hint in typing.get_type_hints(type(model.config)).items():
                if not _has_type(value := getattr(model.config, field), hint):
                    fault(f"{field}: {value!r} was taken as {hint}")
            for parameter, array in flatten(split(model)[1]).items():
                if not np.isfinite(np.asarray(array)).all():
                    fault(f"{parameter}: has NaN or infinite values")

    return target, _cases(len(bases))


def _in_two(content: bytes) -> dict[str, bytes]:
    """Returns a safetensors file as two with an index."""
    from safetensors.numpy import load, save

    tensors = load(content)
    names, files, where = sorted(tensors), dict[str, bytes](), dict[str, str]()
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        files[file] = save({name: tensors[name] for name in part})
        where |= dict.fromkeys(part, file)
    return files | {"model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": where}).encode()}


def _changed(content: bytes, tree: Any, text: Any) -> bytes:
    """Returns a JSON file, or a safetensors file, with changes in its JSON or in its bytes."""
    if content[:1] == b"{":
        if tree:
            return json.dumps(change_tree(json.loads(content), tree)).encode("utf-8", "surrogatepass")
        return change_text(content.decode(), text).encode("utf-8", "surrogatepass")
    size = int.from_bytes(content[:8], "little")
    if tree:
        header = json.dumps(change_tree(json.loads(content[8 : 8 + size]), tree)).encode()
        return len(header).to_bytes(8, "little") + header + content[8 + size :]
    return change_text(content.decode("latin-1"), text).encode("latin-1", "replace")


# Chat templates

CONVERSATIONS: tuple[tuple[list[Any], Any, Any], ...] = (
    (ASKED, "Four.", None),
    ([*ASKED[:1], {"role": "user", "content": "<|im_end|></think>{{ 2 }}"}], "</tool_call>", None),
    (ASKED[1:], ANSWERED, None),
    ([*ASKED, CALL, {"role": "tool", "content": "4"}], ANSWERED, TOOLS),
    (ASKED, CALL, TOOLS),
)


def templates(materials: Path, folder: Path) -> Target:
    """A tokenizer with a changed chat template, or changed settings: conversations are rendered and tokenized."""
    from models.turns import encode_turn, render_comparison, render_turn

    folder.mkdir()
    tokenizer = _chat_tokenizer(materials, folder)
    base = Path(tokenizer.path)
    sources = [TEMPLATE, (ROOT / "data" / "tokenizer" / "chat_template.jinja").read_text(encoding="utf-8")]
    settings_files = [name for name in ("tokenizer_config.json", "generation_config.json") if (base / name).is_file()]

    def target(case: Any) -> None:
        number, changes, tree, (prompt, answer, tools) = case
        directory = folder / "case"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(base, directory)
        file = directory / "chat_template.jinja"
        if number < len(sources):
            file.write_bytes(change_text(sources[number], changes).encode("utf-8", "surrogatepass"))
        else:
            file = directory / settings_files[number - len(sources)]
            file.write_text(json.dumps(change_tree(json.loads(file.read_text()), tree)))
        with _silence():
            changed = Tokenizer(directory)
            ids = changed.prompt_ids([prompt])[0]
            turn = render_turn(changed, prompt, answer, tools)
            asked, written = changed.encode_rendered([turn.prompt, turn.written])
            ids += encode_turn(changed, turn, asked, written)
            ids += changed.encode_rendered([render_comparison(changed, prompt, answer, tools)])[0]
            if not _are_ids(np.array(ids), changed):
                fault(f"ids: {ids} are not in the vocabulary")

    count = len(sources) + len(settings_files)
    numbers = st.one_of(st.integers(0, len(sources) - 1), st.integers(0, count - 1))
    return target, st.tuples(numbers, text_mutations, tree_mutations, st.sampled_from(CONVERSATIONS))


# A judge's replies

REPLIES = (
    '{"score": 7}',
    '<think>Hm.</think>```json\n{"score": 7}\n```',
    '{"overall": "A", "explanation": "It is shorter."}',
    "Output (a) is better. Therefore, Output (a) is better.",
    "[[8]]",
)


def replies(materials: Path, folder: Path) -> Target:
    """A server's answer to a question, changed as JSON, as bytes or in the judge's own words; scores and verdicts."""
    from eval.judges.task import load_task
    from eval.judges.verdict import verdict
    from train.rewards import chat_api, judge

    tasks = [load_task(file.stem) for file in sorted((ROOT / "eval" / "judges" / "tasks").glob("*.yaml"))]
    server = _Server()
    chat_api.PAUSE = 0.0

    def target(case: Any) -> None:
        number, (tree, text), words = case
        said = change_text(REPLIES[number], words)
        message = {"role": "assistant", "content": said}
        reply = {"choices": [{"index": 0, "finish_reason": "stop", "message": message}], "usage": {"prompt_tokens": 3}}
        server.body = change_text(json.dumps(change_tree(reply, tree)), text).encode("utf-8", "surrogatepass")
        judge.ANSWERED.add(("m", server.url))  # a refusal later on is no end
        with _silence(), mock.patch("logging.Logger.warning"):
            options: dict[str, Any] = {"model": "m", "base_url": server.url, "concurrency": 1, "max_retries": 0}
            scores = judge.judge(["Two and two?"], ["Four."], timeout=5.0, **options)
        if len(scores) != 1 or not (scores[0] is None or (scores[0] % 1 == 0 and LOWEST <= scores[0] <= HIGHEST)):
            fault(f"score: {scores} was read")
        for task in tasks:
            given = verdict(said, task)
            lowest, highest = task.lowest, task.highest
            if given.score is not None and not lowest <= given.score <= highest:
                fault(f"verdict: {given} was read by {task.name}")

    return target, st.tuples(st.integers(0, len(REPLIES) - 1), mutations, st.one_of(st.just([]), text_mutations))


class _Server(ThreadingHTTPServer):
    """Answers every question with `body`."""

    daemon_threads = True
    body = b""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Silence."""


TARGETS: dict[str, Callable[[Path, Path], Target]] = {
    "configs": configs,
    "rows": rows,
    "weights": weights,
    "templates": templates,
    "judge replies": replies,
}
