"""The reward `remote`: another machine's scores, by HTTP: a reward model that is no Qwen3, a verifier, a sandbox.

    POST {"prompts": [...], "completions": [...], "columns": {name: [...]}}   ->   {"rewards": [number or null, ...]}

One entry per completion. `train.rewards.runners.InThreads` makes several requests at a time, gives up those that are
late and tries again (`rewards[].workers`, `timeout_s`, `retries`). No message contains the key or a password.
"""

import base64
import json
import os
import socket
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from email.message import Message
from typing import Any

from train.console import visible
from train.private import without_passwords
from train.rewards.returned import RewardError

KEY, ADDRESS = "REWARD_API_KEY", "REWARD_URL"  # environment variables
LONGEST_BODY = 2**25  # bytes of an answer
LONGEST_REASON = 300  # characters of a server's own words
SILENT_SECONDS = 300.0  # without a byte, until a connection that nobody waits for any more is closed
CONNECT_SECONDS = 10.0  # of the trial at set-up
AGAIN = (408, 409, 425, 429)  # and all from 500 on: another attempt may succeed
LONGEST_WAIT = 60.0  # seconds that a server may ask to wait (Retry-After)


class RemoteError(RewardError):
    """A server gave no rewards.

    Attributes:
      is_final: another attempt would fail too.
      pause: seconds that the server asks to wait; None: it does not say.
    """

    def __init__(self, message: str, *, is_final: bool = False, pause: float | None = None) -> None:
        super().__init__(message)
        self.is_final, self.pause = is_final, pause


def remote(
    prompts: Sequence[Any],
    completions: Sequence[str],
    *,
    url: str | None = None,
    key_variable: str = KEY,
    **columns: Any,
) -> list[float | None]:
    """Returns the rewards that a server gives, by one request.

    Without completions it tries whether the server can be reached.

    Args:
      url: e.g. http://localhost:8000/score; default: the environment variable REWARD_URL.
      key_variable: the environment variable with the key, sent as a bearer's token; none is sent if it is not set.

    Raises:
      ValueError: no address of a server, or nobody listens there.
      RemoteError: no rewards.
    """
    url = os.environ.get(ADDRESS, "") if url is None else url
    address = urllib.parse.urlsplit(str(url))
    if address.scheme not in ("http", "https") or not address.hostname or not _has_valid_port(address):
        shown = without_passwords(url) if isinstance(url, str) else url
        raise ValueError(f"remote: url: expected http://HOST:PORT/PATH or https://..., got {shown!r}")
    if not completions:
        _try_connection(address)
        return []
    columns.pop("completion_ids", None)
    body = {"prompts": prompts, "completions": completions, "columns": columns}
    request = urllib.request.Request(_without_user(address), json.dumps(body, default=str).encode(), method="POST")
    for name, value in _headers(address, key_variable).items():
        request.add_unredirected_header(name, value)
    return _rewards_in(_answer(request, without_passwords(url)), len(completions), without_passwords(url))


def _headers(address: urllib.parse.SplitResult, key_variable: str) -> dict[str, str]:
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if key := os.environ.get(key_variable, "").strip():
        headers["Authorization"] = f"Bearer {key}"
    elif address.username:
        user = f"{urllib.parse.unquote(address.username)}:{urllib.parse.unquote(address.password or '')}"
        headers["Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
    return headers


def _without_user(address: urllib.parse.SplitResult) -> str:
    return address._replace(netloc=address.netloc.rpartition("@")[2]).geturl()


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would turn the request into a GET, and might carry the key elsewhere."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


def _answer(request: urllib.request.Request, shown: str) -> bytes:
    """Returns the body of a server's answer.

    Raises:
      RemoteError: no answer, another status than 2xx, or a body that is too long.
    """
    try:
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=SILENT_SECONDS) as response:
            body = response.read(LONGEST_BODY + 1)
    except urllib.error.HTTPError as error:
        reason = _cleaned(error.read(LONGEST_REASON * 4).decode("utf-8", "replace"), request)
        is_final = error.code < 500 and error.code not in AGAIN
        pause = _seconds(error.headers)
        raise RemoteError(f"remote: {shown}: status {error.code}: {reason}", is_final=is_final, pause=pause) from None
    except Exception as error:  # a network fails in many ways; all of them may be gone the next time
        reason = _cleaned(str(getattr(error, "reason", None) or error), request)
        raise RemoteError(f"remote: {shown}: no answer ({type(error).__name__}: {reason})") from None
    if len(body) > LONGEST_BODY:
        raise RemoteError(f"remote: {shown}: the answer is longer than {LONGEST_BODY} bytes", is_final=True)
    return body


def _rewards_in(body: bytes, count: int, shown: str) -> list[float | None]:
    """Returns the rewards in an answer; `train.rewards.returned` looks at each of them."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RemoteError(f"remote: {shown}: the answer is not JSON ({error})") from None
    rewards = answer.get("rewards") if isinstance(answer, dict) else None
    if not isinstance(rewards, list) or len(rewards) != count:
        got = f"{len(rewards)} rewards" if isinstance(rewards, list) else visible(body[:60].decode("utf-8", "replace"))
        raise RemoteError(f'remote: {shown}: expected {{"rewards": [...]}} with {count} numbers or nulls, got {got}')
    return rewards


def _seconds(headers: Message) -> float | None:
    """Returns the seconds of Retry-After; None if there are none."""
    try:
        return min(max(float(headers.get("Retry-After", "")), 0.0), LONGEST_WAIT)
    except ValueError:  # a date, or nothing
        return None


def _cleaned(text: str, request: urllib.request.Request) -> str:
    """Returns a server's words as a short line without the key, which it may quote."""
    secret = request.unredirected_hdrs.get("Authorization", "").partition(" ")[2]
    line = visible(" ".join(without_passwords(text.replace(secret, "***") if secret else text).split()))
    return line[:LONGEST_REASON]


def _has_valid_port(address: urllib.parse.SplitResult) -> bool:
    try:
        return address.port is None or address.port > 0
    except ValueError:  # not a number, or above 65535
        return False


def _try_connection(address: urllib.parse.SplitResult) -> None:
    """Refuses an address at which nobody listens, before anything is sampled; a proxy is not tried."""
    host = str(address.hostname)
    if address.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host):
        return
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((host, port), CONNECT_SECONDS).close()
    except OSError as error:
        raise ValueError(
            f"remote: {host}:{port}: no connection ({error}); start the server first, or correct url"
        ) from None
