"""The built-in rewards are their formulas; the judge's scores are what a server said, or nothing."""

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from train.rewards.builtin import format_match, length, repetition_penalty, rouge, soft_overlong_punishment
from train.rewards.judge import judge, parse_score


@pytest.mark.parametrize(("unit", "letters"), [("words", "a "), ("characters", "a")])
@pytest.mark.parametrize("n", [0, 1, 9, 10, 11, 25])
def test_length_is_the_distance_from_its_target(unit: str, letters: str, n: int) -> None:
    def both(text: str) -> list[float | None]:
        return [length([""], [text], target=10, unit=unit, ceiling=ceiling)[0] for ceiling in (False, True)]

    assert both(letters * n) == [-abs(n - 10) / 10, -max(0, n - 10) / 10]


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>\nwhy\n</think>\nso", 1),
        ("<think></think>", 1),
        ("<think>why\nso", 0),
        (" <think>why</think>so", 0),
        ("<think>a<think>b</think>c", 0),
        ("<think>a</think>b<think>c</think>", 0),
        ("so", 0),
        ("", 0),
    ],
)
def test_the_default_form_is_thoughts_then_answer(text: str, reward: float) -> None:
    assert format_match([""], [text]) == [reward]


def test_a_form_holds_for_the_whole_completion() -> None:
    texts = ["ab", "ab ", "xab", "a\nb"]
    assert format_match([""] * 4, texts, pattern="ab") == [1, 0, 0, 0]
    assert format_match([""] * 4, texts, pattern=".*b") == [1, 0, 1, 1]


@pytest.mark.parametrize(
    ("text", "ngram", "distinct", "total"),
    [
        ("a b c d e", 3, 3, 3),
        ("a b a b a b", 2, 2, 5),
        ("Go go GO go", 3, 1, 2),
        ("a a a a", 1, 1, 4),
        ("a b", 2, 1, 1),
    ],
)
@pytest.mark.parametrize("max_penalty", [0.5, 1.0])
def test_repetition(text: str, ngram: int, distinct: int, total: int, max_penalty: float) -> None:
    rewards = repetition_penalty(["", ""], [text, text.split()[0]], ngram=ngram, max_penalty=max_penalty)
    assert rewards == [pytest.approx(-(1 - distinct / total) * max_penalty), 0]


def test_overlong_is_the_equation() -> None:
    longest, cache = 20, 5
    ids = [[7] * n for n in range(25)]
    expected = [0.0 if n <= 15 else (15 - n) / 5 if n <= 20 else -1.0 for n in range(25)]
    columns: dict[str, Any] = {"max_completion_length": longest, "cache": cache}
    assert soft_overlong_punishment([""] * 25, [""] * 25, ids, **columns) == pytest.approx(expected)


def test_rouge_is_the_harmonic_mean_of_precision_and_recall() -> None:
    texts, references = ["the cat sat", "sat cat the", "a dog", "x", "x"], ["the cat sat down"] * 3 + [None, ""]
    recall, precision = 3 / 4, 3 / 3
    f1 = 2 * precision * recall / (precision + recall)
    one_of_each = 2 * (1 / 3) * (1 / 4) / (1 / 3 + 1 / 4)  # the longest common subsequence is one word
    given: dict[str, Any] = {"completion": references, "other": ["x"] * 5}
    assert rouge([""] * 5, texts, **given) == [pytest.approx(f1), pytest.approx(one_of_each), 0, None, None]
    assert rouge([""] * 5, texts, rouge_type="rouge1", **given)[1] == pytest.approx(f1), "order does not count"
    assert rouge([""] * 5, texts, reference_column="other", **given)[3:] == [1, 1]


def test_equal_overlaps_tie() -> None:
    reference = "a b c"
    texts = [" ".join(reference.split()[:n] + ["x"] * (5 * n - 3 - n)) for n in (1, 2, 3)]  # 2 n / (len + 3) = 2 / 5
    assert len(set(rouge([""] * 3, texts, completion=[reference] * 3))) == 1


@pytest.mark.parametrize(("reference", "other"), [("今天天气很好", "我去学校了吗"), ("ดีมาก", "ผึ้ง"), ("Привет", "пока")])
def test_rouge_compares_words_of_any_script(reference: str, other: str) -> None:
    scores = rouge([""] * 3, [reference, other, "!"], completion=[reference, reference, reference])
    assert scores == [1, 0, 0]
    assert rouge([""], ["!"], completion=["?!"]) == [None], "a reference without a word is none"
    with pytest.raises(ValueError, match="rouge: reference_column: expected texts in the column 'completion', got int"):
        rouge([""], ["4"], completion=[4])


@pytest.mark.parametrize("sign", ["好", "ด", "👍", "あ"])
def test_length_and_repetition_count_characters_where_there_are_no_spaces(sign: str) -> None:
    assert length([""], [sign * 12], target=10) == length([""], ["a " * 12], target=10) == [-0.2]
    assert repetition_penalty([""], [sign * 12]) == repetition_penalty([""], ["a " * 12]) == [pytest.approx(-0.9)]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: length([], [], target=0), "length: target: expected at least 1, got 0"),
        (lambda: length([], [], unit="tokens"), "length: unit: expected one of words, characters, got 'tokens'"),
        (lambda: format_match([], [], pattern="("), "format_match: pattern: not a regular expression"),
        (lambda: repetition_penalty([], [], ngram=0), "repetition_penalty: ngram: expected at least 1, got 0"),
        (lambda: repetition_penalty([], [], max_penalty=-1.0), "max_penalty: expected at least 0, got -1"),
        (lambda: soft_overlong_punishment([], [], [], max_completion_length=4, cache=5), "from 1 to .* = 4, got 5"),
        (lambda: soft_overlong_punishment([], [], [], max_completion_length=4, cache=0), "from 1 to .* = 4, got 0"),
        (lambda: rouge([], [], rouge_type="rougeX", completion=[]), "expected rouge1 to rouge9, .* got 'rougeX'"),
        (lambda: rouge([], [], answer=[]), "no column 'completion'; the columns are answer"),
    ],
)
def test_impossible_options_are_refused_without_a_completion(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


# The judge


@pytest.mark.parametrize("n", range(1, 11))
def test_a_score_is_read(n: int) -> None:
    assert (
        parse_score(f'{{"score": {n}}}')
        == parse_score(f' {{"score":{n}}}\n')
        == parse_score(f'{{"score": {n}.0}}')
        == n
    )


WRAPPED = [
    "```json\n{}\n```",
    "```\n{}\n```\n",
    "```JSON {}```",
    "<think>\nIt asks for {{}}; a 3?\n</think>\n\n{}",
    "<thinking>a</thinking>{}",
    "Hm, a 3.\n</think>\n{}",
    '<think>{{"score": 3}}</think>\n```json\n{}\n```',
]


@pytest.mark.parametrize("form", WRAPPED)
def test_a_score_is_read_in_a_fence_and_behind_thoughts(form: str) -> None:
    assert parse_score(form.format('{"score": 7}')) == 7
    assert parse_score(form.format("7")) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7",
        "[7]",
        '[["score", 7]]',
        '"score"',
        "{}",
        '{"score": 0}',
        '{"score": 11}',
        '{"score": 7.5}',
        '{"score": NaN}',
        '<think>so {"score": 7}',
        '```json\n{"score": 7}\n``` or {"score": 3}',
        '{"score": "7"}',
        '{"score": true}',
        '{"score": null}',
        '{"score": {"score": 7}}',
        '{"score": 3, "score": 9}',
        '{"score": 7, "why": "good"}',
        '{"Score": 7}',
        'I give {"score": 7}',
        '{"score": 7} Or rather {"score": 3}',
        "Score: 7/10",
        "[" * 100_000,
    ],
)
def test_nothing_is_guessed(text: str) -> None:
    assert parse_score(text) is None


class Server:
    """A double of an OpenAI-compatible server: answers[text of the completion] is a reply, or an HTTP status with or
    without the reason."""

    def __init__(self) -> None:
        self.answers: dict[str, str | int] = {}
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.now = self.most = 0
        self.meeting: threading.Barrier | None = None
        lock, double = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    double.requests.append(body)
                    double.keys.add(self.headers["Authorization"])
                    double.now += 1
                    double.most = max(double.most, double.now)
                if double.meeting:
                    double.meeting.wait(10)
                    time.sleep(0.05)  # for one too many to come
                with lock:
                    double.now -= 1
                answer = double.answers[json.loads(body["messages"][-1]["content"])["answer"]]
                message = {"role": "assistant", "content": answer}
                choice = {"index": 0, "finish_reason": "stop", "message": message}
                right = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
                status, _, why = str(answer).partition(" ")
                refuses = status.isdigit()
                error = {"error": {"message": why or "no", "code": None}}
                reply = json.dumps(error if refuses else right).encode()
                self.send_response(int(status) if refuses else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    double = Server()
    thread = threading.Thread(target=double.http.serve_forever, args=(0.01,))
    thread.start()
    yield double
    double.http.shutdown()
    double.http.server_close()
    thread.join()


def test_scores_come_in_the_completions_order_and_what_is_unclear_is_none(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.answers = {"a": '{"score": 3}', "b": "Seven.", "c": '{"score": 10}', "d": 422}
    prompts: list[Any] = ["p", [{"role": "user", "content": "q"}], "r", "s"]
    with caplog.at_level(logging.WARNING, "train.rewards.judge"):
        scores = judge(prompts, list("abcd"), model="m", base_url=server.url, source=["x"] * 4)
    assert scores == [3, None, 10, None]
    (message,) = [record.getMessage() for record in caplog.records if record.name == "train.rewards.judge"]
    assert message == "judge: no score for 2 of 4 completions; the first: not a score: 'Seven.'"
    assert all((body["model"], body["temperature"]) == ("m", 0) for body in server.requests)
    asked = [json.loads(body["messages"][-1]["content"]) for body in server.requests]
    pairs = [{"conversation": p, "answer": c} for p, c in zip(prompts, "abcd", strict=True)]
    assert sorted(asked, key=lambda one: one["answer"]) == pairs


def test_no_more_requests_at_a_time_than_allowed(server: Server) -> None:
    server.answers, server.meeting = {str(i): '{"score": 5}' for i in range(6)}, threading.Barrier(3)
    texts = list(server.answers)
    assert judge(["p"] * 6, texts, model="m", base_url=server.url, concurrency=3) == [5.0] * 6
    assert server.most == 3


def test_a_failure_is_tried_again_and_then_none(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    server.answers = {"a": 500}
    assert judge(["p"], ["a"], model="m", base_url=server.url, max_retries=2) == [None]
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    "refusal",
    [
        "400 refused by the content management policy",
        "400 Content Exists Risk",
        "403 your input was flagged",
        "400 This model's maximum context length is 4096 tokens",
    ],
)
def test_what_a_filter_refuses_or_the_context_cannot_hold_is_none(
    server: Server, refusal: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.answers = {"a": '{"score": 3}', "b": refusal}
    with caplog.at_level(logging.WARNING, "train.rewards.judge"):
        assert judge(["p"] * 2, ["a", "b"], model="m", base_url=server.url) == [3, None]
    assert refusal.partition(" ")[2] in caplog.text


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_refused_key_model_or_request_stops_the_run(server: Server, status: int) -> None:
    server.answers = {"a": status}
    with pytest.raises(ValueError, match=f"judge: m at {server.url}/: .*{status}"):
        judge(["p"], ["a"], model="m", base_url=server.url)


def test_the_key_comes_from_the_environment_alone(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="OPENAI_API_KEY"):
        judge([], [], model="m")
    server.answers = {"a": '{"score": 1}'}
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert judge(["p"], ["a"], model="m", base_url=server.url) == [1]
    assert server.keys == {"Bearer secret"}


def test_no_reward_is_nan() -> None:
    given: dict[str, Any] = {"completion_ids": [[]], "completion": ["a"]}
    functions: list[Callable[..., list[float | None]]] = [length, format_match, repetition_penalty, rouge]
    for function in functions:
        (reward,) = function(["p"], [""], **given)
        assert reward is not None and math.isfinite(reward)
