"""Laws of a judge on a server: what fails is asked again, what came never is, and interrupted = uninterrupted."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from eval.__main__ import main
from eval.judges.cache import Cache
from eval.judges.server import Failure, Request, Server
from train.rewards.chat_api import Reply

ROOT = Path(__file__).parents[2]
ASPECTS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity", "overall")
PROMPTS = 8
Answer = Callable[[dict[str, Any]], Any]


def longer(body: dict[str, Any]) -> str:
    """A judge that likes the longer answer, and of equally long ones the first."""
    text = body["messages"][-1]["content"]
    first, second = (re.search(rf"<answer_{x}>\n(.*)\n</answer_{x}>", text, re.DOTALL)[1] for x in "AB")  # type: ignore[index]
    return json.dumps(dict.fromkeys(ASPECTS, "A" if len(first) >= len(second) else "B"))


def question(body: dict[str, Any]) -> str:
    return body["messages"][-1]["content"]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Two files of completions of 8 prompts; of two prompts the answers are equally long."""
    names = []
    for side in "ab":
        rows = [
            {"prompt_id": p, "prompt": f"question {p}", "completion": f"{side}{'+' * (p % 4 if side == 'a' else 2)}"}
            for p in range(PROMPTS)
        ]
        names.append(str(tmp_path / f"{side}.jsonl"))
        Path(names[-1]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return names


@pytest.fixture
def run(files: list[str], tmp_path: Path) -> Callable[..., Any]:
    """run(url, *more, out="out") -> the exit code, and what judge.json holds."""

    def judge(url: str, *more: str, out: str = "out") -> tuple[int, dict[str, Any] | None]:
        folder = tmp_path / out
        command = ["judge", *files, "--out", str(folder), "--backend", "server", "--model", "m", "--base_url", url]
        try:
            code = main([*command, *more])
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        file = folder / "judge.json"
        return code, json.loads(file.read_text()) if file.exists() else None

    return judge


def without_counts(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key not in ("requests", "cached")}


# The rule


def test_both_orders_of_every_pair_once(run: Callable[..., Any], chat_server: Callable[[Answer], Any]) -> None:
    server = chat_server(longer)
    code, result = run(server.url, "--price_prompt", "2", "--price_completion", "10")
    assert code == 0
    assert (result["requests"], result["cached"], len(server.bodies)) == (2 * PROMPTS, 0, 2 * PROMPTS)
    assert len({question(body) for body in server.bodies}) == 2 * PROMPTS
    assert (result["wins"], result["ties"], result["losses"]) == (2, 2, 4)  # + signs: 0 1 2 3 0 1 2 3 against 2
    assert result["consistent"] == 6 / 8 and result["position_bias"]["share"] == (6 + 4) / 16
    words = sum(len(m["content"].split()) for body in server.bodies for m in body["messages"])
    assert result["tokens"] == {"prompt": words, "completion": 2 * PROMPTS}
    assert result["cost"] == pytest.approx((2 * words + 10 * 2 * PROMPTS) / 1e6)
    for body in server.bodies:
        assert body["model"] == "m" and body["temperature"] == 0
        assert body["response_format"]["json_schema"]["schema"]["required"] == list(ASPECTS)


def test_exchanged_files_ask_nothing_new_and_mirror(
    run: Callable[..., Any], chat_server: Callable[[Answer], Any], files: list[str], tmp_path: Path
) -> None:
    server = chat_server(longer)
    cache = str(tmp_path / "cache.sqlite")
    _, one = run(server.url, "--cache", cache)
    files.reverse()
    _, other = run(server.url, "--cache", cache, out="other")
    assert len(server.bodies) == 2 * PROMPTS and (other["requests"], other["cached"]) == (0, 2 * PROMPTS)
    assert (one["wins"], one["ties"], one["losses"]) == (other["losses"], other["ties"], other["wins"])
    for key in ("win_rate", "length_controlled"):
        mirrored(one[key], other[key])
    for name in ASPECTS:
        mirrored(one["aspects"][name], other["aspects"][name])
    assert one["position_bias"] == other["position_bias"] and one["consistent"] == other["consistent"]


def mirrored(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert (one["mean"], one["low"], one["high"]) == (1 - other["mean"], 1 - other["high"], 1 - other["low"])


def test_the_key_is_sent_and_written_nowhere(
    run: Callable[..., Any],
    chat_server: Callable[[Answer], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server = chat_server(longer)
    assert run(server.url)[0] == 0
    assert {headers["authorization"] for headers in server.headers} == {"Bearer sk-secret"}
    assert not any(b"sk-secret" in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert "sk-secret" not in capsys.readouterr().out


def test_without_a_key_only_a_named_server_is_asked(
    files: list[str], tmp_path: Path, chat_server: Callable[[Answer], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    chat_server(longer)  # takes the key from the environment
    command = ["judge", *files, "--out", str(tmp_path / "out"), "--backend", "server", "--model", "m"]
    assert main(command) == 2
    assert "OPENAI_API_KEY" in capsys.readouterr().err


def test_openai_base_url_is_respected(
    files: list[str], tmp_path: Path, chat_server: Callable[[Answer], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = chat_server(longer)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    assert main(["judge", *files, "--out", str(tmp_path / "out"), "--backend", "server", "--model", "m"]) == 0
    assert len(server.bodies) == 2 * PROMPTS


# Faults that pass


def once(fault: dict[str, Any]) -> Answer:
    """The fault for the first request of every question, then the judge's answer."""
    seen: Counter[str] = Counter()
    lock = threading.Lock()

    def answer(body: dict[str, Any]) -> Any:
        with lock:
            seen[question(body)] += 1
            first = seen[question(body)] == 1
        return fault if first else longer(body)

    return answer


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param({"status": 429, "headers": {"Retry-After": "0.02"}}, id="429"),
        pytest.param({"status": 408}, id="408"),
        pytest.param({"status": 409}, id="409"),
        pytest.param({"status": 500}, id="500"),
        pytest.param({"status": 503, "raw": b"<html>busy</html>", "headers": {"Content-Type": "text/html"}}, id="503"),
        pytest.param({"raw": b'{"choices": [{"mess'}, id="broken JSON"),
        pytest.param({"raw": b"hello", "headers": {"Content-Type": "text/plain"}}, id="no JSON"),
        pytest.param({"raw": b'{"error": "busy"}'}, id="no completion"),
        pytest.param({"raw": b'{"choices": []}'}, id="no choice"),
        pytest.param({"text": "x" * 50, "cut": True}, id="cut"),
    ],
)
def test_a_fault_that_passes_changes_nothing(
    fault: dict[str, Any], run: Callable[..., Any], chat_server: Callable[[Answer], Any]
) -> None:
    server = chat_server(once(fault))
    code, result = run(server.url)
    assert code == 0 and len(server.bodies) == 4 * PROMPTS
    assert (result["wins"], result["ties"], result["losses"], result["requests"]) == (2, 2, 4, 2 * PROMPTS)
    assert result["tokens"]["completion"] == 2 * PROMPTS


def test_a_server_that_is_slow_once_is_asked_again(
    run: Callable[..., Any], chat_server: Callable[[Answer], Any]
) -> None:
    free = threading.Event()
    seen: set[str] = set()

    def answer(body: dict[str, Any]) -> Any:
        if question(body) not in seen:
            seen.add(question(body))
            free.wait(20)
        return longer(body)

    server = chat_server(answer)
    code, result = run(server.url, "--timeout", "0.3")
    free.set()
    assert code == 0 and result["judged"] == PROMPTS and len(server.bodies) >= 4 * PROMPTS


def test_retry_after_is_waited_for(
    run: Callable[..., Any], chat_server: Callable[[Answer], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's own pause, not ours: ours would be endless here."""
    waited: list[float] = []
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 1000.0)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 1000.0)
    monkeypatch.setattr("openai._base_client.time.sleep", waited.append)
    server = chat_server(once({"status": 429, "headers": {"Retry-After": "7"}}))
    assert run(server.url)[0] == 0
    assert waited == [7.0] * 2 * PROMPTS


# Faults that stay


def test_a_server_that_is_down(
    run: Callable[..., Any], chat_server: Callable[[Answer], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    server = chat_server(longer)
    server.shutdown()
    server.server_close()
    code, result = run(server.url, "--max_retries", "1")
    error = capsys.readouterr().err
    assert code == 2 and result is None
    assert error.count("\n") == 1 and "cannot be reached" in error and "0 replies are kept" in error


def test_a_server_that_dies_keeps_what_came(
    run: Callable[..., Any], chat_server: Callable[[Answer], Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    served: list[str] = []
    alive = True

    def answer(body: dict[str, Any]) -> Any:
        if alive and len(served) >= 5:
            return {"status": 500}
        served.append(question(body))
        return longer(body)

    server = chat_server(answer)
    code, result = run(server.url, "--concurrency", "1", "--max_retries", "0")
    assert code == 2 and result is None
    assert "in a row" in (error := capsys.readouterr().err) and "5 replies are kept" in error
    alive = False
    code, result = run(server.url)
    assert code == 0 and (result["requests"], result["cached"]) == (2 * PROMPTS - 5, 5)
    assert len(served) == len(set(served)) == 2 * PROMPTS
    _, expected = run(chat_server(longer).url, out="undisturbed")
    assert without_counts(result) == without_counts(expected)


def test_some_questions_that_fail_are_counted_and_asked_again(
    run: Callable[..., Any], chat_server: Callable[[Answer], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    broken = True

    def answer(body: dict[str, Any]) -> Any:
        return {"status": 500} if broken and "question 3" in question(body) else longer(body)

    server = chat_server(answer)
    code, result = run(server.url, "--max_retries", "1")
    assert code == 1 and (result["failed"], result["judged"]) == (1, PROMPTS - 1)
    assert "1 pairs have failed" in capsys.readouterr().out
    broken = False
    before = len(server.bodies)
    code, result = run(server.url)
    assert code == 0 and result["failed"] == 0 and len(server.bodies) == before + 2


@pytest.mark.parametrize(
    ("status", "text"), [(401, "bad key"), (403, "not you"), (404, "no such model"), (400, "what?")]
)
def test_a_refusal_ends_it_with_one_line(
    status: int,
    text: str,
    run: Callable[..., Any],
    chat_server: Callable[[Answer], Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = chat_server(lambda body: {"status": status, "text": text})
    code, result = run(server.url, "--concurrency", "2")
    error = capsys.readouterr().err
    assert code == 2 and result is None and text in error and error.count("\n") == 1
    assert len(server.bodies) <= 8 < 2 * PROMPTS, "it is not asked on and on"


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        ({"status": 401, "text": "no"}, "OPENAI_API_KEY"),
        ({"status": 404, "text": "no"}, "--model"),
        ({"status": 400, "text": "'temperature' does not support 0 with this model."}, "--temperature null"),
    ],
)
def test_a_refusal_names_the_setting(
    error: dict[str, Any],
    advice: str,
    run: Callable[..., Any],
    chat_server: Callable[[Answer], Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(chat_server(lambda body: error).url)[0] == 2
    assert advice in capsys.readouterr().err


def test_a_slow_server_names_the_time_out(cache: Cache, chat_server: Callable[[Answer], Any]) -> None:
    server = Server("m", cache, chat_server(lambda body: time.sleep(0.3) or "").url, timeout=0.05, max_retries=0)
    assert "--timeout" in ask(server, ["q"])[0].why  # type: ignore[union-attr]


@pytest.mark.parametrize("status", [400, 401, 500])
def test_a_key_that_comes_back_in_an_error_is_written_nowhere(
    status: int,
    run: Callable[..., Any],
    chat_server: Callable[[Answer], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")

    def answer(body: dict[str, Any]) -> Any:
        bad = status == 401 or "question 3" in question(body)
        return {"status": status, "text": "what is sk-secret?"} if bad else longer(body)

    run(chat_server(answer).url, "--max_retries", "0")
    said = capsys.readouterr()
    written = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert "sk-secret" not in said.out + said.err and not any(b"sk-secret" in text for text in written)
    assert "***" in said.err or any(b"***" in text for text in written)


@pytest.mark.parametrize(
    "error",
    [
        {"text": "too many tokens", "code": "context_length_exceeded"},
        {"text": "The decoder prompt (length 5000) is longer than the maximum model length of 4096."},
        {"text": "the request exceeds the available context size, try increasing it"},
        {"status": 422, "text": "`inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000 and 512"},
        {"text": "prompt is too long: 210000 tokens > 200000 maximum"},
    ],
    ids=lambda error: error["text"][:12],
)
def test_what_the_model_cannot_read_is_counted(
    error: dict[str, Any], run: Callable[..., Any], chat_server: Callable[[Answer], Any]
) -> None:
    def answer(body: dict[str, Any]) -> Any:
        return {"status": 400} | error if "question 3" in question(body) else longer(body)

    code, result = run(chat_server(answer).url)
    assert code == 0 and (result["too_long"], result["judged"]) == (1, PROMPTS - 1)


@pytest.mark.parametrize("concurrency", ["1", "16"])
@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (0, {"status": 400, "text": "your request was rejected", "code": "content_policy_violation"}),
        (0, {"status": 400, "text": "the prompt triggered Azure OpenAI's content management policy"}),
        (0, {"status": 400, "text": "what?"}),
        (3, {"status": 400, "text": "what?"}),
        (3, {"status": 422, "text": "what?"}),
    ],
)
def test_one_refused_question_costs_one_pair(
    bad: int, error: dict[str, Any], concurrency: str, run: Callable[..., Any], chat_server: Callable[[Answer], Any]
) -> None:
    """Even the first one, and even if the refusal is there before any reply."""

    def answer(body: dict[str, Any]) -> Any:
        if f"question {bad}" in question(body):
            return error
        time.sleep(0.02)
        return longer(body)

    code, result = run(chat_server(answer).url, "--concurrency", concurrency)
    assert code == 1 and (result["failed"], result["judged"]) == (1, PROMPTS - 1)


# Replies that are none


@pytest.mark.parametrize(
    "reply",
    [
        {"finish_reason": "length"},
        {"finish_reason": "content_filter"},
        {"text": "", "refusal": "I cannot judge this."},
        {"text": "Both are fine."},
        {"text": None},
        {"text": "\ud800"},
        {"text": '{"overall": "A"}' + "x" * 300_000},
    ],
)
def test_what_is_no_verdict_is_counted_and_kept(
    reply: dict[str, Any], run: Callable[..., Any], chat_server: Callable[[Answer], Any], tmp_path: Path
) -> None:
    """One order alone gives no outcome; and what was paid for is not asked again."""

    def answer(body: dict[str, Any]) -> Any:
        mine = "question 3" in question(body) and "<answer_A>\na" in question(body)
        return {"text": longer(body)} | reply if mine else longer(body)

    server = chat_server(answer)
    code, result = run(server.url)
    assert code == 0 and (result["unparsable"], result["judged"]) == (1, PROMPTS - 1)
    assert result["win_rate"]["prompts"] == PROMPTS - 1
    rows = [json.loads(line) for line in (tmp_path / "out" / "judgements.jsonl").read_text().splitlines()]
    assert rows[3]["outcome"] is None and rows[3]["kind"] == "unparsable"
    assert [order["winner"] for order in rows[3]["orders"]] == [None, "a"]
    assert (tmp_path / "out" / "judgements.jsonl").stat().st_size < 100_000
    again = run(server.url)[1]
    assert without_counts(again) == without_counts(result) and len(server.bodies) == 2 * PROMPTS


@pytest.mark.parametrize("end", ["stop", "", None, "eos_token", "EOS"])
def test_every_word_for_an_ordinary_end_is_one(
    end: str | None, run: Callable[..., Any], chat_server: Callable[[Answer], Any], tmp_path: Path
) -> None:
    server = chat_server(lambda body: {"text": longer(body), "finish_reason": end})
    code, result = run(server.url)
    assert code == 0 and (result["judged"], result["cut_off"]) == (PROMPTS, 0)
    rows = [json.loads(line) for line in (tmp_path / "out" / "judgements.jsonl").read_text().splitlines()]
    assert {order["finish_reason"] for row in rows for order in row["orders"]} == {end or ""}


@pytest.mark.parametrize("end", ["length", "MAX_TOKENS", "content_filter", "tool_calls", "content management policy"])
def test_a_reply_that_is_not_whole_is_counted_and_said(
    end: str, run: Callable[..., Any], chat_server: Callable[[Answer], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(body: dict[str, Any]) -> Any:
        return {"text": longer(body), "finish_reason": end if "question 3" in question(body) else "stop"}

    code, result = run(chat_server(answer).url)
    assert code == 0 and (result["judged"], result["unparsable"], result["cut_off"]) == (PROMPTS - 1, 1, 2)
    assert re.search("cut off, filtered or refused *│ *2 ", capsys.readouterr().out)


# What a server does not know


@pytest.mark.parametrize("known", [("json_object",), ()])
def test_a_server_without_response_format(
    known: tuple[str, ...],
    run: Callable[..., Any],
    chat_server: Callable[[Answer], Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def answer(body: dict[str, Any]) -> Any:
        how = body.get("response_format", {}).get("type")
        if how and how not in known:
            return {"status": 400, "text": f"response_format of type {how} is not supported"}
        return longer(body)

    server = chat_server(answer)
    code, result = run(server.url, "--concurrency", "2")
    assert code == 0 and result["judged"] == PROMPTS
    assert capsys.readouterr().out.count("refuses response_format") == 2 - len(known)
    before = len(server.bodies)
    assert run(server.url)[1]["cached"] == 2 * PROMPTS and len(server.bodies) == before


def test_a_server_that_knows_max_completion_tokens_alone(
    run: Callable[..., Any], chat_server: Callable[[Answer], Any]
) -> None:
    def answer(body: dict[str, Any]) -> Any:
        if "max_tokens" in body:
            return {"status": 400, "text": "'max_tokens' is not supported; use 'max_completion_tokens' instead."}
        return longer(body)

    server = chat_server(answer)
    assert run(server.url, "--temperature", "null")[0] == 0
    assert "temperature" not in server.bodies[-1] and server.bodies[-1]["max_completion_tokens"] == 512


# The pool and the cache


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    cache = Cache(tmp_path / "cache.sqlite")
    yield cache
    cache.close()


def ask(server: Server, texts: list[str]) -> list[Reply | Failure]:
    requests = [Request((("user", text),)) for text in texts]
    found = server.ask(requests, "questions")
    server.close()
    return [found[request] for request in requests]


def test_no_more_at_a_time_than_asked_for(cache: Cache, chat_server: Callable[[Answer], Any]) -> None:
    now, most, lock = [0], [0], threading.Lock()
    together = threading.Barrier(3, timeout=20)

    def answer(body: dict[str, Any]) -> str:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        together.wait()  # three are asked at once, or this fails
        with lock:
            now[0] -= 1
        return "yes"

    ask(Server("m", cache, chat_server(answer).url, concurrency=3), [f"q{i}" for i in range(12)])
    assert most == [3]


def test_equal_requests_are_one(cache: Cache, chat_server: Callable[[Answer], Any]) -> None:
    server = chat_server(question)
    replies = ask(Server("m", cache, server.url), ["a", "b", "a", "a"])
    assert [reply.text for reply in replies if isinstance(reply, Reply)] == ["a", "b", "a", "a"]
    assert len(server.bodies) == 2


def test_whatever_determines_a_reply_is_in_its_key(cache: Cache, chat_server: Callable[[Answer], Any]) -> None:
    request = Request((("user", "a"),), max_tokens=5, schema="{}")
    servers = [
        Server("m", cache, "http://one/v1"),
        Server("n", cache, "http://one/v1"),
        Server("m", cache, "http://two/v1"),
        Server("m", cache, "http://one/v1", temperature=1.0),
    ]
    keys = [server.key(request, "json_schema") for server in servers]
    keys += [servers[0].key(request, how) for how in ("json_object", "none")]
    keys += [
        servers[0].key(other, "json_schema")
        for other in (
            Request((("system", "a"),), max_tokens=5, schema="{}"),
            Request((("user", "b"),), max_tokens=5, schema="{}"),
            Request((("user", "a"),), max_tokens=6, schema="{}"),
            Request((("user", "a"),), max_tokens=5, schema="[]"),
        )
    ]
    assert len(set(keys)) == len(keys)
    assert servers[0].key(Request((("user", "a"),), max_tokens=5, schema="{}"), "json_schema") == keys[0]
    for server in servers:
        server.close()


def test_a_file_that_is_no_cache(
    run: Callable[..., Any], tmp_path: Path, chat_server: Callable[[Answer], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("something else " * 100)
    assert run(chat_server(longer).url, "--cache", str(tmp_path / "notes.txt"))[0] == 2
    assert "cannot be used as a cache" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "something else " * 100


def test_ctrl_c_keeps_what_came(
    run: Callable[..., Any], chat_server: Callable[[Answer], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[str] = []
    put = Cache.put

    def interrupted(self: Cache, key: str, reply: Reply) -> None:
        put(self, key, reply)
        kept.append(key)
        if len(kept) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Cache, "put", interrupted)
    server = chat_server(longer)
    code, result = run(server.url, "--concurrency", "1")
    assert code == 130 and result is None and len(kept) >= 5
    code, result = run(server.url)
    assert code == 0 and result["cached"] >= 5 and result["requests"] + result["cached"] == 2 * PROMPTS
    assert len(server.bodies) == 2 * PROMPTS


def test_ctrl_c_waits_a_moment_for_what_is_under_way(
    run: Callable[..., Any], chat_server: Callable[[Answer], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four are asked, one is answered at once, and three come after Ctrl-C: all four are kept."""
    stopped, all_asked, calls = threading.Event(), threading.Barrier(4, timeout=20), iter(range(10**6))
    put = Cache.put

    def interrupted(self: Cache, key: str, reply: Reply) -> None:
        put(self, key, reply)
        if not stopped.is_set():
            stopped.set()
            raise KeyboardInterrupt

    def answer(body: dict[str, Any]) -> Any:
        number = next(calls)
        if number < 4:
            all_asked.wait()
            if number:
                stopped.wait(20)
                time.sleep(0.1)
        return longer(body)

    monkeypatch.setattr(Cache, "put", interrupted)
    server = chat_server(answer)
    assert run(server.url, "--concurrency", "4") == (130, None)
    asked = len(server.bodies)
    code, result = run(server.url)
    assert code == 0 and result["cached"] == asked and len(server.bodies) == 2 * PROMPTS


@pytest.mark.slow
def test_killed_half_way_and_started_again(
    run: Callable[..., Any], chat_server: Callable[[Answer], Any], files: list[str], tmp_path: Path
) -> None:
    """No question is answered twice, and the result is that of a run that nothing disturbed."""
    open_, killed = 7, threading.Event()
    gate = threading.Semaphore(open_)

    def answer(body: dict[str, Any]) -> Any:
        gate.acquire()  # all but the first few wait until the program is dead
        if killed.is_set() and not resumed:
            refused.append(question(body))
            return {"status": 500}
        return longer(body)

    resumed, refused = False, []
    server = chat_server(answer)
    out, cache = tmp_path / "out", tmp_path / "out" / "cache.sqlite"
    command = [sys.executable, "-m", "eval", "judge", *files, "--out", str(out), "--backend", "server", "--model", "m"]
    command += ["--base_url", server.url, "--concurrency", "4"]
    program = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.DEVNULL)
    while rows_of(cache) < open_:
        assert program.poll() is None
        time.sleep(0.05)
    os.kill(program.pid, signal.SIGKILL)
    program.wait()
    killed.set()
    assert not (out / "judge.json").exists() and server.answered == open_
    gate.release(10_000)
    while len(refused) < len(server.bodies) - open_:  # those that were under way get no answer any more
        time.sleep(0.01)
    resumed = True
    code, result = run(server.url)
    assert code == 0 and (result["requests"], result["cached"]) == (2 * PROMPTS - open_, open_)
    assert server.answered == 2 * PROMPTS
    _, expected = run(chat_server(longer).url, out="undisturbed")
    assert without_counts(result) == without_counts(expected)
    one, other = ((tmp_path / name / "judgements.jsonl").read_text() for name in ("out", "undisturbed"))
    assert one == other


def rows_of(file: Path) -> int:
    if not file.exists():
        return 0
    try:
        rows = sqlite3.connect(f"file:{file}?mode=ro", uri=True)
        count = rows.execute("SELECT count(*) FROM replies").fetchone()[0]
        rows.close()
        return count
    except sqlite3.Error:
        return 0  # not there yet
