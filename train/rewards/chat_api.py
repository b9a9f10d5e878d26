"""Asks a language model behind an OpenAI-compatible server, which may be slow, wrong or hostile.

The `openai` client retries after connection failures, time-outs, 408, 409, 429 and server errors, with growing pauses
or the server's own (Retry-After). Here every attempt has a deadline as a whole, however often the server sends a byte;
a body that is no chat completion is asked for again; and no message contains a key or a password.
"""

import contextlib
import importlib
import json
import os
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from train.console import visible
from train.private import HIDDEN, without_passwords

PAUSE = 0.5  # seconds, after a broken reply; the client makes all other pauses
SHORTEST_SECRET = 6  # characters; shorter keys, such as "none", are no secret
LONGEST_REPLY = 250_000  # characters of a reply; a longer reply is cut, and so unparsable
LONGEST_REASON = 500  # characters of a failure's reason
LONGEST_BODY = 2**25  # bytes of a reply as it is sent
MOST_TOKENS = 2**40  # a larger count is none
# finish reasons of incomplete replies; an ordinary end has many names ("stop", "eos_token", none at all)
CUT_OFF = (
    *("length", "max_tokens", "max_output_tokens", "content_filter", "content management policy", "safety"),
    *("refusal", "tool_calls", "tool_use", "function_call", "abort", "error"),
)


class BrokenReplyError(ValueError):
    """A server's reply is not a chat completion."""


class Reply(NamedTuple):
    """A server's reply.

    `finish_reason` is the server's own word, "" if it gives none, or "refusal" if the model declined to answer.
    """

    text: str
    finish_reason: str
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def cut_off(self) -> bool:
        """Whether the server reports the reply as incomplete: cut, filtered, or refused."""
        return is_cut_off(self.finish_reason)


class ChatApi:
    """The chat completions of one server.

    Args:
      key: see `key_for`.
      base_url: None: the environment variable OPENAI_BASE_URL, else OpenAI's server.
      timeout: seconds until an attempt has failed, from the connection to the last byte of the reply.
      max_retries: attempts after the first.
    """

    def __init__(self, key: str, base_url: str | None, *, timeout: float, max_retries: int) -> None:
        import openai

        self.max_retries, self._secret = max_retries, key.strip()
        http = client_with_deadline(timeout)
        self._client = openai.OpenAI(
            api_key=key, base_url=base_url, timeout=timeout, max_retries=max_retries, http_client=http
        )
        self.url = str(self._client.base_url)

    @property
    def address(self) -> str:
        """The server's address, to be shown."""
        return without_passwords(self.url)

    def reply(self, **options: Any) -> Reply:
        """Asks for one chat completion; again, if the body of the reply is broken.

        Raises:
          BrokenReplyError: every body was broken.
          openai.OpenAIError: no reply, or a refusal.
        """
        import openai

        broken = (BrokenReplyError, json.JSONDecodeError, UnicodeDecodeError, RecursionError)
        attempts_left = self.max_retries
        while True:
            try:
                return read_completion(self._client.chat.completions.create(**options))
            except (*broken, openai.APIResponseValidationError) as error:
                if attempts_left <= 0:
                    raise BrokenReplyError(f"the body of a reply is broken ({error})") from error
                attempts_left -= 1
                time.sleep(PAUSE)

    def cleaned(self, text: str) -> str:
        """Returns a server's text as a short line without the key and without passwords, which it may quote."""
        if len(self._secret) >= SHORTEST_SECRET:
            text = text.replace(self._secret, HIDDEN)
        line = visible(" ".join(without_passwords(text).split()))
        return line if len(line) <= LONGEST_REASON else f"{line[:LONGEST_REASON]} ..."

    def close(self) -> None:
        self._client.close()


def key_for(base_url: str | None) -> str | None:
    """Returns the key in the environment variable OPENAI_API_KEY; a named server may need none, OpenAI's does."""
    return os.environ.get("OPENAI_API_KEY") or ("none" if base_url else None)


def client_with_deadline(seconds: float) -> Any:
    """Returns an HTTP client for `openai.OpenAI` whose requests end in time, with a reply of bounded size or an error.

    The time-outs of an HTTP client alone are those of a single read: a byte now and then would keep it for ever.
    """
    import openai

    base: Any = openai.DefaultHttpxClient
    http: Any = importlib.import_module(base.__mro__[1].__module__.partition(".")[0])  # httpx, or its successor

    class Bounded(http.SyncByteStream):
        """A reply's body, until the deadline and up to the largest size."""

        def __init__(self, body: Any, until: float) -> None:
            self.body, self.until, self.size = body, until, 0

        def __iter__(self) -> Iterator[bytes]:
            for chunk in self.body:
                self.size += len(chunk)
                if time.monotonic() > self.until:
                    raise http.ReadTimeout("the reply took too long")
                if self.size > LONGEST_BODY:
                    raise http.ReadError(f"the reply is longer than {LONGEST_BODY} bytes")
                yield chunk

        def close(self) -> None:
            self.body.close()

    class Client(base):
        def send(self, request: Any, **options: Any) -> Any:
            """Sends in a thread of its own, which is left behind at the deadline."""
            done: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

            def work() -> None:
                try:
                    done.put((super(Client, self).send(request, **options), None))
                except BaseException as error:  # raised where it is waited for
                    done.put((None, error))

            threading.Thread(target=work, daemon=True).start()
            try:
                response, error = done.get(timeout=seconds)
            except queue.Empty:
                raise http.ReadTimeout(f"no whole reply within {seconds:g} seconds", request=request) from None
            if error is not None:
                raise error
            return response

    def bound(response: Any) -> None:
        response.stream = Bounded(response.stream, time.monotonic() + seconds)

    return Client(event_hooks={"response": [bound]})


def read_completion(reply: Any) -> Reply:
    """Extracts text, finish reason and token counts of a chat completion.

    Raises:
      BrokenReplyError: the reply is not a chat completion.
    """
    choices = getattr(reply, "choices", None)
    first = choices[0] if isinstance(choices, list) and choices else None
    message, usage = getattr(first, "message", None), getattr(reply, "usage", None)
    if message is None or not hasattr(message, "content"):
        raise BrokenReplyError(f"expected a chat completion, got {str(reply)[:100]!r}")
    refusal = refusal if isinstance(refusal := getattr(message, "refusal", None), str) else ""
    text = message.content if isinstance(message.content, str) else refusal
    return Reply(
        # a lone surrogate cannot be written to a file: it becomes "?"
        text=text[:LONGEST_REPLY].encode("utf-8", "replace").decode("utf-8"),
        finish_reason="refusal" if refusal else str(getattr(first, "finish_reason", None) or "")[:100],
        prompt_tokens=_count(usage, "prompt_tokens"),
        completion_tokens=_count(usage, "completion_tokens"),
    )


def _count(usage: Any, name: str) -> int:
    """Returns a count of tokens; 0 where the server gives none that could be one."""
    count = getattr(usage, name, None)
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        count = int(count)  # type: ignore[arg-type]
    return count if type(count) is int and 0 <= count <= MOST_TOKENS else 0


def is_cut_off(finish_reason: str) -> bool:
    return any(word in finish_reason.lower() for word in CUT_OFF)
