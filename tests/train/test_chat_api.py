"""Servers that lie, stall or break: the reward `judge` and `eval judge` lose that question alone, in bounded time."""

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval.judges.cache import Cache
from eval.judges.server import Failure, Request
from eval.judges.server import Server as JudgeServer
from train.config import RewardSpec, resolved
from train.private import hide_secrets, without_passwords
from train.rewards import chat_api, judge
from train.run.directory import check_output_dir

GOOD = {"choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": '{"score": 7}'}}]}
Behaviour = Callable[[socket.socket], None]


def body(content: bytes, kind: str = "application/json", status: str = "200 OK", more: str = "") -> Behaviour:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\n{more}"
    head += "Connection: close\r\n\r\n"

    def send(connection: socket.socket) -> None:
        connection.sendall(head.encode() + content)

    return send


def reply(**changes: Any) -> Behaviour:
    return body(json.dumps(GOOD | changes).encode())


def message(content: Any, **more: Any) -> Behaviour:
    return reply(choices=[{"message": {"content": content, **more}}])


def drip(head: bytes, piece: bytes) -> Behaviour:
    """A server that sends a piece now and then, for ever."""

    def send(connection: socket.socket) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(piece)
            time.sleep(0.05)

    return send


def flood(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
    while True:
        connection.sendall(b" " * 2**16)


LIES: dict[str, Behaviour] = {
    "null": body(b"null"),
    "list": body(b"[]"),
    "number": body(b"5"),
    "text": body(b'"yes"'),
    "empty": body(b""),
    "HTML": body(b"<html>busy</html>", "text/html"),
    "HTML called JSON": body(b"<html>busy</html>"),
    "bytes": body(bytes(range(256)), "application/octet-stream"),
    "bytes called JSON": body(bytes(range(256))),
    "no UTF-8": body(b'{"choices": "\xff"}'),
    "nested": body(b"[" * 100_000),
    "digits": body(b'{"choices": ' + b"9" * 10_000 + b"}"),
    "gzip that is none": body(b"abc", more="Content-Encoding: gzip\r\n"),
    "choices null": reply(choices=None),
    "choices text": reply(choices="abc"),
    "choices number": reply(choices=5),
    "choices object": reply(choices={"0": 1}),
    "choices empty": reply(choices=[]),
    "choice null": reply(choices=[None]),
    "choice list": reply(choices=[[]]),
    "message null": reply(choices=[{"message": None}]),
    "message text": reply(choices=[{"message": "abc"}]),
    "content null": message(None),
    "content number": message(5),
    "content list": message([{"type": "text", "text": '{"score": 7}'}]),
    "content surrogate": message("\ud800"),
    "refusal number": message(None, refusal=5),
    "score 1e999": message('{"score": 1e999}'),
    "score NaN": message('{"score": NaN}'),
    "score true": message('{"score": true}'),
    "not HTTP": lambda connection: connection.sendall(b"SSH-2.0-OpenSSH\r\n"),
    "nothing": lambda connection: None,
    "cut": lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{"),
    "redirects": body(b"", status="307 Temporary Redirect", more="Location: /v1/chat/completions\r\n"),
    "a blank now and then": drip(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n", b" "),
    "a header now and then": drip(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
    "an endless reply": flood,
}
USAGES = (
    "abc",
    5,
    [],
    {"prompt_tokens": "many"},
    {"prompt_tokens": -1},
    {"prompt_tokens": 1e300},
    {"prompt_tokens": {}},
)


class LyingServer:
    """A server of one behaviour, on sockets: what `http.server` would not send can be sent."""

    def __init__(self, behave: Behaviour) -> None:
        self.behave, self.asked = behave, 0
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.url = f"http://{self.address}/v1"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self.answer, args=(connection,), daemon=True).start()

    def answer(self, connection: socket.socket) -> None:
        with connection:
            request = b""
            while b"\r\n\r\n" not in request:
                request += connection.recv(2**16)
            head, _, content = request.partition(b"\r\n\r\n")
            length = next(int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if b"content-length" in line)
            while len(content) < length:
                content += connection.recv(2**16)
            self.asked += 1
            try:
                self.behave(connection)
            except OSError:  # the client has gone
                return


@pytest.fixture
def lying(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Behaviour], LyingServer]]:
    for name in ("openai._base_client.INITIAL_RETRY_DELAY", "openai._base_client.MAX_RETRY_DELAY"):
        monkeypatch.setattr(name, 0.01)
    monkeypatch.setattr(chat_api, "PAUSE", 0.01)
    monkeypatch.setattr(chat_api, "LONGEST_BODY", 2**20)
    monkeypatch.setattr(judge, "ANSWERED", set())
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    started: list[LyingServer] = []

    def start(behave: Behaviour) -> LyingServer:
        started.append(LyingServer(behave))
        return started[-1]

    yield start
    for server in started:
        server.listener.close()


def grade(url: str, count: int = 1, **options: Any) -> list[float | None]:
    settings: dict[str, Any] = {"model": "m", "base_url": url, "timeout": 0.4, "max_retries": 1} | options
    return judge.judge(["p"] * count, [f"answer {i}" for i in range(count)], **settings)


@pytest.mark.parametrize("lie", LIES)
def test_a_reward_survives_a_server_that_lies(lie: str, lying: Callable[[Behaviour], LyingServer]) -> None:
    server, began = lying(LIES[lie]), time.monotonic()
    assert grade(server.url) == [None]
    assert time.monotonic() - began < 5 and 1 <= server.asked <= 60  # redirects are followed a while


@pytest.mark.parametrize("lie", LIES)
def test_a_judge_survives_a_server_that_lies(
    lie: str, lying: Callable[[Behaviour], LyingServer], tmp_path: Path
) -> None:
    cache = Cache(tmp_path / "cache.sqlite")
    server = JudgeServer("m", cache, lying(LIES[lie]).url, timeout=0.4, max_retries=1)
    request = Request((("user", "a"),))
    try:
        answer = server.ask([request], "questions")[request]
    except ValueError as error:  # nothing but failed connections
        answer = Failure(str(error))
    server.close()
    cache.close()
    assert isinstance(answer, Failure) or "7" not in answer.text or lie.startswith(("content", "score"))


@pytest.mark.parametrize("usage", USAGES, ids=str)
def test_a_count_of_tokens_that_is_none_is_0(usage: Any, lying: Callable[[Behaviour], LyingServer]) -> None:
    assert grade(lying(reply(usage=usage)).url) == [7]
    api = chat_api.ChatApi("none", lying(reply(usage=usage)).url, timeout=2, max_retries=0)
    assert api.reply(model="m", messages=[]).prompt_tokens == 0
    api.close()


def test_a_slow_reply_within_the_time_is_one(lying: Callable[[Behaviour], LyingServer]) -> None:
    def slow(connection: socket.socket) -> None:
        content = json.dumps(GOOD).encode()
        connection.sendall(
            f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(content)}".encode()
        )
        connection.sendall(b"\r\n\r\n")
        for i in range(0, len(content), 40):
            connection.sendall(content[i : i + 40])
            time.sleep(0.02)

    assert grade(lying(slow).url, timeout=5) == [7]


def test_a_refusal_later_on_costs_its_completions_alone(
    lying: Callable[[Behaviour], LyingServer], caplog: pytest.LogCaptureFixture
) -> None:
    refusal = body(b'{"error": {"message": "expired"}}', status="401 Unauthorized")
    server = lying(reply())
    assert grade(server.url, 3) == [7, 7, 7]
    server.behave = refusal
    with caplog.at_level(logging.WARNING, "train.rewards.judge"):
        assert grade(server.url, 3) == [None] * 3
    assert "no score for 3 of 3 completions; the first: " in caplog.text and "expired" in caplog.text


def test_a_refusal_at_first_ends_the_run_before_everything_is_asked(
    lying: Callable[[Behaviour], LyingServer],
) -> None:
    server = lying(body(b'{"error": {"message": "no such key"}}', status="401 Unauthorized"))
    with pytest.raises(ValueError, match=r"^judge: m at http://127.*no such key"):
        grade(server.url, 200, concurrency=2)
    assert server.asked <= 4


@pytest.mark.parametrize("status", ["401 Unauthorized", "400 Bad Request", "500 Internal Server Error"])
def test_keys_and_passwords_are_in_no_message(
    status: str,
    lying: Callable[[Behaviour], LyingServer],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    server = lying(
        body(b'{"error": {"message": "what is sk-very-secret at http://me:pass-word@host/?"}}', status=status)
    )
    said = ""
    with caplog.at_level(logging.WARNING):
        try:
            grade(f"http://me:pass-word@{server.address}/v1")
        except ValueError as refusal:
            said = str(refusal)
    said += caplog.text
    assert "what is ***" in said and "sk-very-secret" not in said and "pass-word" not in said


def test_a_reason_is_one_short_line(
    lying: Callable[[Behaviour], LyingServer], caplog: pytest.LogCaptureFixture
) -> None:
    page = json.dumps({"error": {"message": "<html>\n\x1b[2J" + "busy\r\n" * 100_000}}).encode()
    with caplog.at_level(logging.WARNING):
        assert grade(lying(body(page, status="500 Internal Server Error")).url) == [None]
    (text,) = [record.getMessage() for record in caplog.records if record.name == "train.rewards.judge"]
    assert "busy busy" in text and "\\x1b[2J" in text and len(text) < 700 and text.isprintable()


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("http://me:secret@host:1/v1", "http://me:***@host:1/v1"),
        ("see https://me:p@ss@host/v1?x=1", "see https://me:***@host/v1?x=1"),
        ("http://:secret@host", "http://:***@host"),
        ("http://host/v1?api_key=secret&x=1", "http://host/v1?api_key=***&x=1"),
        ("http://host/v1?x=1&access_token=secret", "http://host/v1?x=1&access_token=***"),
        ("http://host:80/a@b", "http://host:80/a@b"),
        ("http://me@host/v1", "http://me@host/v1"),
        ("a: b@c", "a: b@c"),
    ],
)
def test_passwords_in_addresses_are_not_shown(text: str, hidden: str) -> None:
    assert without_passwords(text) == hidden


def test_settings_that_are_secrets_are_not_kept() -> None:
    options = {"api_key": "secret", "url": "http://me:secret@h", "list": [{"token": "secret"}], "tokens": 5, "key": "k"}
    assert hide_secrets(options) == {
        "api_key": "***",
        "url": "http://me:***@h",
        "list": [{"token": "***"}],
        "tokens": 5,
        "key": "k",
    }


def test_a_config_is_saved_without_passwords_and_goes_on_with_them(
    policy_config: Callable[..., Any], tmp_path: Path
) -> None:
    reward = RewardSpec(function="judge", options={"model": "m", "base_url": "http://me:pass-word@host/v1"})
    config = policy_config(tmp_path, rewards=[reward])
    (tmp_path / "run").mkdir()
    for options in (resolved(config)["rewards"][0]["options"], reward.options):  # as now, and as formerly saved
        saved = resolved(config)
        saved["rewards"][0]["options"] = dict(options)
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(saved))))
        check_output_dir(config)  # the same run
    assert "pass-word" not in json.dumps(resolved(config)) and reward.options["base_url"].count("pass-word") == 1
    other = replace(reward, options={"model": "m", "base_url": "http://me:pass-word@elsewhere/v1"})
    with pytest.raises(ValueError, match="another config") as refusal:
        check_output_dir(replace(config, rewards=[other]))
    assert "pass-word" not in str(refusal.value)
