"""The reward `remote`: batches at a time, tried again, late or wrong answers named, the key in no message."""

import importlib.util
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from train.config import PolicyConfig, RewardSpec
from train.loop import train_policy
from train.rewards import Rewards
from train.rewards.functions import function_scorer
from train.rewards.remote import ADDRESS, KEY, RemoteError, remote
from train.rewards.returned import RewardError
from train.run.directory import read_metrics
from train.running import exit_code

EXAMPLE = Path(__file__).parents[2] / "examples" / "reward_server.py"
PROMPTS, TEXTS = ["p", "q", "r"], [["a", "bb"], ["ccc", ""], ["d", "ee"]]
LENGTHS = [[1.0, 2.0], [3.0, 0.0], [1.0, 2.0]]


class Server(ThreadingHTTPServer):
    """answer(asked) gives a dictionary to send as JSON, or (status, bytes, headers)."""

    daemon_threads = True

    def __init__(self, answer: Callable[[dict[str, Any]], Any]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.asked = answer, list[dict[str, Any]]()
        self.headers = list[dict[str, str]]()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/score"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no error here."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        self.server.headers.append(dict(self.headers.items()))
        answer = self.server.answer(asked)
        status, body, headers = answer if isinstance(answer, tuple) else (200, json.dumps(answer).encode(), {})
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Silence."""


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[dict[str, Any]], Any]], Server]]:
    """serve(answer) starts a server; pauses are short, and no key is in the environment."""
    monkeypatch.setattr("train.rewards.call.PAUSE", 0.01)
    monkeypatch.delenv(KEY, raising=False)
    started: list[Server] = []

    def start(answer: Callable[[dict[str, Any]], Any]) -> Server:
        started.append(Server(answer))
        return started[-1]

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def lengths(asked: dict[str, Any]) -> Any:
    return {"rewards": [len(text) for text in asked["completions"]]}


def score(server: Server, options: Any = None, **settings: Any) -> np.ndarray:
    spec = RewardSpec(function="remote", options={"url": server.url} | (options or {}), **settings)
    return Rewards([spec], None, "float32").score(PROMPTS, TEXTS, {"answer": [1, 2, 3]})[..., 0]


def test_a_server_is_sent_prompts_completions_and_columns_in_batches(serve: Any) -> None:
    server = serve(lengths)
    np.testing.assert_array_equal(score(server, batch_prompts=2), LENGTHS)
    sent = sorted(server.asked, key=lambda asked: asked["prompts"])
    assert [asked["prompts"] for asked in sent] == [["p", "p"], ["q", "q"], ["r", "r"]], "8 at a time: one for each"
    assert sent[1] == {"prompts": ["q", "q"], "completions": ["ccc", ""], "columns": {"answer": [2, 2]}}
    score(server, batch_prompts=2, workers=1)
    assert [len(asked["prompts"]) for asked in server.asked[3:]] == [4, 2]


def test_requests_are_made_at_the_same_time(serve: Any) -> None:
    barrier = threading.Barrier(3)

    def together(asked: dict[str, Any]) -> Any:
        barrier.wait(10)
        return lengths(asked)

    np.testing.assert_array_equal(score(serve(together)), LENGTHS)


def test_an_address_may_be_in_the_environment(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ADDRESS, serve(lengths).url)
    rewards = Rewards([RewardSpec(function="remote")], None, "float32", columns=[])
    np.testing.assert_array_equal(rewards.score(PROMPTS, TEXTS, {})[..., 0], LENGTHS)


def test_null_is_unscorable(serve: Any) -> None:
    assert np.isnan(score(serve(lambda asked: {"rewards": [None] * len(asked["completions"])}))).all()


BROKEN = {
    "status": ((500, b"overloaded", {}), "status 500: overloaded"),
    "not JSON": ((200, b"<html>", {}), "the answer is not JSON"),
    "other JSON": ((200, b"[1, 2]", {}), r'expected ."rewards": \[...\]. with 2 numbers or nulls, got \[1, 2\]'),
    "too few": ({"rewards": [1]}, "with 2 numbers or nulls, got 1 rewards"),
    "text": ({"rewards": ["1", "2"]}, "remote: expected a list of 2 rewards, .* got str '1' for completion 0"),
    "cut": ((200, b"{", {"Content-Length": "100"}), "the answer is not JSON"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_answer_is_asked_for_again_and_then_named(fault: str, serve: Any) -> None:
    answer, words = BROKEN[fault]
    server = serve(lambda asked: answer)
    with pytest.raises(RewardError, match=words):
        score(server, retries=2, workers=1, batch_prompts=1)
    assert len(server.asked) >= 3
    assert np.isnan(score(server, retries=0, on_error="unscorable")).all()


def test_a_server_that_recovers_is_believed(serve: Any) -> None:
    failures = iter([(503, b"", {"Retry-After": "0.02"}), (429, b"", {"Retry-After": "soon"}), (408, b"", {})])
    np.testing.assert_array_equal(score(serve(lambda asked: next(failures, None) or lengths(asked))), LENGTHS)


def test_a_refusal_is_not_asked_again(serve: Any) -> None:
    server = serve(lambda asked: (401, b"who are you", {}))
    with pytest.raises(RemoteError, match="^remote: http://127.0.0.1:.*/score: status 401: who are you$"):
        score(server, workers=1, batch_prompts=3)
    assert len(server.asked) == 1


def test_a_redirect_is_not_followed(serve: Any) -> None:
    other = serve(lengths)
    server = serve(lambda asked: (302, b"", {"Location": other.url}))
    with pytest.raises(RemoteError, match="status 302"):
        score(server)
    assert not other.asked


def test_a_late_answer_is_given_up(serve: Any, tmp_path: Path) -> None:
    def slow(asked: dict[str, Any]) -> Any:
        if "ccc" in asked["completions"]:
            time.sleep(0.5)
        return lengths(asked)

    server = serve(slow)
    with pytest.raises(RewardError, match="rewards.function: remote: no rewards within 0.1 s, for 2 completions"):
        score(server, timeout_s=0.1, retries=0)
    rewards_PG = score(server, timeout_s=0.1, retries=0, on_error="unscorable")
    np.testing.assert_array_equal(rewards_PG, [LENGTHS[0], [np.nan] * 2, LENGTHS[2]])


def test_the_key_is_sent_and_never_shown(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "sesame-sesame")
    monkeypatch.setenv("OTHER_KEY", "open-please")
    quoting = lambda asked: (403, b"no sesame-sesame, no user:word, no open-please", {})  # noqa: E731
    server = serve(quoting)
    sent = lambda: [headers["Authorization"] for headers in server.headers]  # noqa: E731
    with pytest.raises(RemoteError) as caught:
        score(server, retries=0)
    assert "sesame" not in str(caught.value) and "***" in str(caught.value)
    assert "Bearer sesame-sesame" in sent()
    with pytest.raises(RemoteError) as caught:
        score(server, {"key_variable": "OTHER_KEY"}, retries=0)
    assert "open-please" not in str(caught.value)
    assert "Bearer open-please" in sent()
    monkeypatch.delenv(KEY)
    address = server.url.replace("http://", "http://user:secret@")
    with pytest.raises(RemoteError) as caught:
        remote(["p"], ["a"], url=address)
    assert "secret" not in str(caught.value) and "user:***@" in str(caught.value)
    assert "Basic dXNlcjpzZWNyZXQ=" in sent()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("localhost:8000", "remote: url: expected http://HOST:PORT/PATH or https://..., got 'localhost:8000'"),
        (None, "remote: url: expected http://HOST:PORT/PATH or https://..., got ''"),
        ("http://127.0.0.1:9/score", "remote: 127.0.0.1:9: no connection .*; start the server first, or correct url"),
    ],
)
def test_a_server_that_is_not_there_is_said_before_anything_is_sampled(
    url: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ADDRESS, raising=False)
    with pytest.raises(ValueError, match=words):
        Rewards([RewardSpec(function="remote", options={"url": url})], None, "float32", columns=[])
    function_scorer("remote", {"url": url}, [], runs_here=False)  # a dry run asks nobody


def test_the_example_server_scores_a_run(
    policy_config: Callable[..., PolicyConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("reward_server", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example.Handler, "log_message", lambda *_: None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), example.Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    options = {"url": f"http://127.0.0.1:{server.server_address[1]}"}
    config = policy_config(tmp_path, rewards=[RewardSpec(function="remote", options=options)], max_steps=1)
    assert exit_code(lambda: train_policy(config), own_devices=True, several=False) == 0
    server.shutdown()
    server.server_close()
    row = read_metrics(tmp_path / "run")[1]
    for part in ("", "validation/"):
        assert row[f"{part}rewards/remote/unscorable"] == 0 and -2 < row[f"{part}rewards/remote/mean"] <= 0
    assert len(EXAMPLE.read_text().splitlines()) <= 35
