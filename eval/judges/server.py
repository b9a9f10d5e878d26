"""A judge behind an OpenAI-compatible server: concurrent requests, none sent twice, no reply lost.

`train.rewards.chat_api` sends the requests and retries. Every reply is written to the cache on arrival. Worker threads
send the requests; the main thread alone uses the cache and decides.
"""

import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from eval.judges.cache import Cache, content_key
from train.console import console
from train.rewards.chat_api import BrokenReplyError, ChatApi, Reply, key_for
from train.rewards.refusals import error_text, filtered, too_long

FORMATS = ("json_schema", "json_object", "none")  # ways to request JSON, the strictest first
LEAST_IN_A_ROW = 8  # failures that stop a run: both orders of one bad pair alone do not show a bad server
PATIENCE = 2.5  # seconds to wait at the end for replies in flight
LEAST_REFUSED = 4  # questions, before all count as refused: a refusal arrives sooner than a reply


@dataclass(frozen=True)
class Request:
    """Everything that a reply depends on, except server and model."""

    messages: tuple[tuple[str, str], ...]  # (role, content)
    max_tokens: int | None = None
    schema: str | None = None  # JSON schema of the reply, as JSON text

    @classmethod
    def of(cls, messages: Sequence[dict[str, str]], **options: Any) -> "Request":
        return cls(tuple((message["role"], message["content"]) for message in messages), **options)


@dataclass(frozen=True)
class Failure:
    """The reason why a request got no reply; `too_long`: the question exceeds the model's context."""

    why: str
    too_long: bool = False
    by_connection: bool = False
    refused: bool = False  # wrong key or model: all other requests will fail too
    of_question: bool = False  # 400 or 422: the server refuses this question, or every question
    filtered: bool = False  # a content filter refused this question only


@dataclass
class Server:
    """A model on a server.

    Raises:
      ValueError: no key in OPENAI_API_KEY; not needed with base_url.
    """

    model: str
    cache: Cache
    base_url: str | None = None  # default: environment variable OPENAI_BASE_URL, else OpenAI's server
    concurrency: int = 16  # requests at a time
    timeout: float = 60.0  # seconds until a request has failed
    max_retries: int = 5
    temperature: float | None = 0.0  # None: not sent
    requests: int = 0  # answered in this run
    cached: int = 0
    _format: int = 0
    _limit_name: str = "max_tokens"  # or max_completion_tokens, for models that only know that name
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        key = key_for(self.base_url)
        if key is None:
            raise ValueError("expected a key in the environment variable OPENAI_API_KEY, or --base_url")
        self.api = ChatApi(key, self.base_url, timeout=self.timeout, max_retries=self.max_retries)

    def ask(self, requests: Sequence[Request], title: str) -> dict[Request, Reply | Failure]:
        """Answers the requests from the cache or the server; equal requests are sent once.

        Raises:
          ValueError: the server refuses the key, the model or every request so far, cannot be reached, or has failed
            many times in a row.
        """
        answers: dict[Request, Reply | Failure] = {}
        missing: list[Request] = []
        for request in dict.fromkeys(requests):
            reply = self._cached_reply(request)
            if reply is None:
                missing.append(request)
            else:
                answers[request] = reply
        self.cached += len(answers)
        if missing:
            bar = ProgressBar(title, len(missing), len(answers))
            with bar as advance, contextlib.closing(self._answers(missing)) as arriving:
                for request, answer in arriving:
                    answers[request] = answer
                    advance(answer)
        return answers

    def close(self) -> None:
        self.api.close()

    def key(self, request: Request, how: str) -> str:
        """Cache key of a reply: a hash of everything that determines it."""
        return content_key(
            {
                "backend": "server",
                "base_url": self.api.url,
                "model": self.model,
                "messages": request.messages,
                "temperature": self.temperature,
                "max_tokens": request.max_tokens,
                "response_format": [how, request.schema] if request.schema and how != "none" else None,
            }
        )

    def _cached_reply(self, request: Request) -> Reply | None:
        """The cached reply to a request, in whichever format it was requested."""
        for how in FORMATS if request.schema else ("none",):
            if reply := self.cache.get(self.key(request, how)):
                return reply
        return None

    def _answers(self, requests: Sequence[Request]) -> Generator[tuple[Request, Reply | Failure], None, None]:
        """Yields each request with its answer, in the order of arrival."""
        todo: queue.SimpleQueue[Request] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[Request, str, Reply | Failure]] = queue.SimpleQueue()
        for request in requests:
            todo.put(request)
        stop = threading.Event()

        def work() -> None:
            while not stop.is_set():
                try:
                    request = todo.get_nowait()
                except queue.Empty:
                    return
                try:
                    done.put((request, *self._request(request)))
                except BaseException as error:  # the main thread has to learn of any error
                    done.put((request, "none", Failure(f"{type(error).__name__}: {error}")))

        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(self.concurrency, len(requests)))]
        for thread in threads:
            thread.start()  # daemon: after Ctrl-C the program waits at most PATIENCE
        failures, answered = 0, 0
        try:
            for _ in requests:
                request, how, answer = done.get()
                answer = self._without_key(answer)
                self._store(request, how, answer)
                if isinstance(answer, Failure) and not (answer.too_long or answer.filtered):
                    failures += 1
                    self._check_hopeless(answer, failures, answered, len(requests))
                else:
                    failures, answered = 0, answered + 1
                yield request, answer
        finally:
            stop.set()
            try:
                until = time.monotonic() + PATIENCE
                for thread in threads:
                    thread.join(max(0.0, until - time.monotonic()))
            finally:  # also after a second Ctrl-C
                while not done.empty():  # replies that have arrived meanwhile
                    self._store(*done.get())

    def _store(self, request: Request, how: str, answer: Reply | Failure) -> None:
        if isinstance(answer, Reply):
            self.cache.put(self.key(request, how), answer)
            self.requests += 1

    def _without_key(self, answer: Reply | Failure) -> Reply | Failure:
        """Removes key and passwords from a failure, which is printed and written."""
        return answer if isinstance(answer, Reply) else replace(answer, why=self.api.cleaned(answer.why))

    def _check_hopeless(self, failure: Failure, failed: int, answered: int, asked: int) -> None:
        """Raises ValueError where further requests would be futile."""
        where = f"{self.model} at {self.api.address}"
        all_refused = failure.of_question and failed >= min(max(self.concurrency, LEAST_REFUSED), asked)
        if failure.refused or (all_refused and not self.requests + self.cached):
            raise ValueError(f"{where}: {failure.why}")
        progress = f"{len(self.cache)} replies are kept; the same command goes on from there"
        if failure.by_connection and not answered:
            raise ValueError(f"{where}: cannot be reached ({failure.why}). Is the server running? {progress}")
        if failed >= max(2 * self.concurrency, LEAST_IN_A_ROW):
            raise ValueError(f"{where}: {failed} requests in a row have failed, the last: {failure.why}. {progress}")

    def _request(self, request: Request) -> tuple[str, Reply | Failure]:
        """Sends one request in the strictest format that the server accepts; returns that format and the answer."""
        import openai

        while True:
            level, limit_name = (self._format if request.schema else FORMATS.index("none")), self._limit_name
            try:
                return FORMATS[level], self.api.reply(**self._options(request, FORMATS[level], limit_name))
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                if too_long(error):
                    return FORMATS[level], Failure(str(error), too_long=True)
                if not self._relax_option(error, level, limit_name):
                    return FORMATS[level], Failure(with_advice(error), of_question=True, filtered=filtered(error))
            except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
                return FORMATS[level], Failure(with_advice(error), refused=True)
            except openai.APITimeoutError:
                return FORMATS[level], Failure(f"no reply within {self.timeout:g} seconds; raise --timeout")
            except openai.APIConnectionError as error:
                why = f"{error} {error.__cause__ or ''}".strip()
                return FORMATS[level], Failure(why, by_connection=True)
            except BrokenReplyError as error:
                return FORMATS[level], Failure(str(error))
            except openai.OpenAIError as error:
                return FORMATS[level], Failure(f"{type(error).__name__}: {error}")

    def _options(self, request: Request, how: str, limit_name: str) -> dict[str, Any]:
        messages = [{"role": role, "content": content} for role, content in request.messages]
        options: dict[str, Any] = {"model": self.model, "messages": messages}
        if self.temperature is not None:
            options["temperature"] = self.temperature
        if request.max_tokens is not None:
            options[limit_name] = request.max_tokens
        if request.schema and how != "none":
            options["response_format"] = response_format(request.schema, how)
        return options

    def _relax_option(self, error: Any, level: int, limit_name: str) -> bool:
        """Whether a refused option can be renamed or relaxed for the rest of the run; prints a change once."""
        refusal = error_text(error)
        with self._lock:
            if "max_completion_tokens" in refusal and limit_name == "max_tokens":
                self._limit_name = "max_completion_tokens"
                return True
            if not about_format(refusal) or FORMATS[level] == "none":
                return False
            if self._format == level:
                self._format = level + 1
                console.print(
                    f"{self.model}: the server refuses response_format {FORMATS[level]}; "
                    f"asked with {FORMATS[level + 1]} from here on"
                )
            return True


class ProgressBar:
    """Shows progress, requests per second, tokens and the number of cached replies."""

    def __init__(self, title: str, total: int, cached: int) -> None:
        columns: tuple[ProgressColumn, ...] = (
            TextColumn("{task.description}", markup=False),
            *(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()),
            TextColumn(f"{cached} cached" + "  {task.fields[rate]:.1f}/s  {task.fields[tokens]} tokens"),
        )
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task(title, total=total, tokens=0, rate=0.0)
        self.started = time.monotonic()
        self.tokens = 0

    def __enter__(self) -> Callable[[Reply | Failure], None]:
        self.bar.start()
        return self.advance

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()

    def advance(self, answer: Reply | Failure) -> None:
        if isinstance(answer, Reply):
            self.tokens += answer.prompt_tokens + answer.completion_tokens
        done = self.bar.tasks[0].completed + 1
        rate = done / max(time.monotonic() - self.started, 1e-3)
        self.bar.update(self.task, completed=done, tokens=self.tokens, rate=rate)


def response_format(schema: str, how: str) -> dict[str, Any]:
    """The request option that makes a server reply in JSON."""
    if how == "json_object":
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": "judgement", "strict": True, "schema": json.loads(schema)}}


def with_advice(error: Any) -> str:
    """Adds to a server's error the setting to check."""
    if error.status_code in (401, 403):
        return f"{error}. Is the key in OPENAI_API_KEY right?"
    if error.status_code == 404:
        return f"{error}. Are --model and --base_url right?"
    if "temperature" in error_text(error):
        return f"{error}. If the model takes no temperature, use --temperature null"
    return str(error)


def about_format(text: str) -> bool:
    """Whether an error concerns the format of the reply."""
    return any(word in text for word in ("response_format", "json_schema", "json_object", "guided_json"))
