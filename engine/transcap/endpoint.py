"""Captions by any server that speaks OpenAI's chat completions: what can pass is tried again, the rest is said clearly.

Knows HTTP and that interface; does not know label files, cleaning or storing.

The API key comes from the environment and goes into one header: into no error, file or log, and over plain HTTP to this
machine only. Redirects are not followed.
"""

import email.utils
import json
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import httpx

from miss.engine.transcap.labels import LabelSet
from miss.engine.transcap.prompts import Prompt
from miss.engine.transcap.writer import Candidate, WriterError, Written, number

MOST_BYTES = 8 * 1024 * 1024
LONGEST_WAIT = 120.0
NOTHING_NEW = 3  # requests in a row that brought no new text: the server does not sample, and would say it for ever
LOOPBACK = ("127.0.0.1", "localhost", "::1")
AGAIN = frozenset({408, 409, 425, 429})
HINTS = {
    400: "the server refuses the request as it is: see what it says; --model, --max-tokens and --candidates go into it",
    401: "the key is missing or wrong: set the environment variable that --key-variable names",
    403: "the key may not use this model: choose another --model or key",
    404: "--url must end where chat/completions follows (often …/v1), and --model be one that the server has",
    413: "the request is too large for the server: lower --candidates",
}


class EndpointError(WriterError):
    """The endpoint refuses, or does not answer within all tries. What was written before is kept."""


class _Passing(Exception):
    """What may pass: another try is worth it, after `wait` seconds where the server says so."""

    def __init__(self, what: str, wait: float | None = None) -> None:
        super().__init__(what)
        self.wait = wait


@dataclass(frozen=True)
class Endpoint:
    """Where the server is and how it may be used: `timeout` in seconds for a whole answer, `rate` in requests a minute,
    `parallel` requests at a time, `backoff` the seconds before the second try, doubled with each further one."""

    url: str
    model: str
    key_variable: str = "MISS_TRANSCAP_KEY"
    timeout: float = 60.0
    retries: int = 6
    rate: float = 60.0
    parallel: int = 4
    backoff: float = 1.0

    def __post_init__(self) -> None:
        url = _url(self.url)
        if url.scheme not in ("http", "https") or not url.host:
            raise EndpointError(
                f"--url: got {self.url!r}; wanted where the API starts, such as http://127.0.0.1:8000/v1"
            )
        if url.userinfo or url.query:
            raise EndpointError(
                f"--url: holds a name, password or query, which would be written down; a key belongs into "
                f"${self.key_variable}"
            )
        if not self.model:
            raise EndpointError("--model: missing; wanted the name of a model that the endpoint has")
        for name, least in (("timeout", 0.001), ("retries", 0), ("rate", 0.001), ("parallel", 1)):
            if getattr(self, name) < least:
                raise EndpointError(f"--{name}: got {getattr(self, name)}; wanted at least {least}")
        if self.key() and url.scheme == "http" and url.host not in LOOPBACK:
            raise EndpointError(
                f"--url: {url.host} over plain http would carry the key of ${self.key_variable} in the clear; "
                "use https, or unset the variable"
            )

    def key(self) -> str:
        return os.environ.get(self.key_variable, "").strip()

    @property
    def address(self) -> str:
        return str(_url(self.url)).rstrip("/") + "/chat/completions"


def _url(text: str) -> httpx.URL:
    try:
        return httpx.URL(text)
    except httpx.InvalidURL as error:
        raise EndpointError(f"--url: got {text[:80]!r}: {error}; wanted such as http://127.0.0.1:8000/v1") from None


class Rate:
    """Lets callers of all threads through at most so often a minute, evenly."""

    def __init__(self, per_minute: float) -> None:
        self._gap, self._next, self._lock = 60.0 / per_minute, 0.0, threading.Lock()

    def wait(self) -> None:
        with self._lock:
            now = time.monotonic()
            at = max(now, self._next)
            self._next = at + self._gap
        time.sleep(max(0.0, at - now))


class EndpointWriter:
    """Asks for several choices a request, and again where the server gives fewer, until there are enough or nothing new
    comes."""

    name = "endpoint"

    def __init__(
        self, endpoint: Endpoint, prompt: Prompt, temperature: float = 0.7, top_p: float = 0.95, max_tokens: int = 48
    ) -> None:
        self.endpoint, self.prompt = endpoint, prompt
        self._sampling = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
        self._rate = Rate(endpoint.rate)
        headers = {"Authorization": f"Bearer {endpoint.key()}"} if endpoint.key() else {}
        limits = httpx.Limits(max_connections=endpoint.parallel)
        timeout = httpx.Timeout(endpoint.timeout, connect=min(10.0, endpoint.timeout))
        self._client = httpx.Client(headers=headers, timeout=timeout, limits=limits)

    @property
    def identity(self) -> dict[str, str]:
        sampling = ", ".join(f"{key.replace('_', '-')} {value}" for key, value in self._sampling.items())
        return {"model": self.endpoint.model, "revision": self.endpoint.url, "sampling": sampling}

    def prepare(self) -> None:
        """There is nothing to load."""

    def write(self, sets: Sequence[LabelSet], wanted: int, seed: int) -> list[Written]:
        with ThreadPoolExecutor(self.endpoint.parallel) as pool:
            futures = [pool.submit(self._write_one, s, wanted, seed) for s in sets]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _write_one(self, label_set: LabelSet, wanted: int, seed: int) -> Written:
        written = Written([], {"read": 0, "written": 0, "requests": 0})
        messages = self.prompt.messages(label_set.facts)
        texts, idle = set[str](), 0
        for request in range(wanted):
            left = wanted - len(written.candidates)
            if left <= 0 or idle == NOTHING_NEW:
                break
            drawn = number(seed, label_set.key, self.prompt.hash, request) % 2**31
            body = {"model": self.endpoint.model, "messages": messages, "n": left, "seed": drawn, **self._sampling}
            self._take(written, self._ask(body, drawn), left)
            known, texts = texts, {c.text for c in written.candidates}
            idle = idle + 1 if texts == known else 0
        return written

    def _take(self, written: Written, answer: dict[str, Any], left: int) -> None:
        usage = answer.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        for name, key in (("read", "prompt_tokens"), ("written", "completion_tokens")):
            written.tokens[name] += usage[key] if isinstance(usage.get(key), int) else 0
        written.tokens["requests"] += 1
        written.model = str(answer.get("model") or self.endpoint.model)
        written.candidates += [_candidate(choice) for choice in answer["choices"][:left]]

    def _ask(self, body: dict[str, Any], seed: int) -> dict[str, Any]:
        """One request, made again as often as is allowed while what goes wrong may pass."""
        draw, last = random.Random(seed), ""
        for attempt in range(self.endpoint.retries + 1):
            self._rate.wait()
            try:
                return self._once(body)
            except _Passing as error:
                last = str(error)
                wait = error.wait
                if wait is not None and wait > LONGEST_WAIT:
                    raise EndpointError(
                        f"{self.endpoint.address}: {last}; it asks to wait {wait:.0f} s, more than {LONGEST_WAIT:.0f}; "
                        "start the same command again then: it goes on where it was"
                    ) from None
                if attempt < self.endpoint.retries:
                    spread = draw.uniform(0.5, 1.0)  # so that requests that failed together do not come back together
                    time.sleep(
                        wait if wait is not None else min(LONGEST_WAIT, self.endpoint.backoff * 2**attempt) * spread
                    )
        raise EndpointError(
            f"{self.endpoint.address}: {last}, {self.endpoint.retries + 1} times; what was written is kept: start "
            "the same command again when the server answers, or give it longer with --timeout and --retries"
        )

    def _once(self, body: dict[str, Any]) -> dict[str, Any]:
        try:
            with self._client.stream("POST", self.endpoint.address, json=body) as response:
                content = _read(response, time.monotonic() + self.endpoint.timeout)
                status, headers = response.status_code, response.headers
        except httpx.TimeoutException as error:
            raise _Passing(f"no answer within {self.endpoint.timeout:g} s ({type(error).__name__})") from None
        except httpx.TransportError as error:  # refused, reset, cut off in the middle
            raise _Passing(f"the connection failed ({type(error).__name__})") from None
        except httpx.HTTPError as error:
            raise EndpointError(f"{self.endpoint.address}: {type(error).__name__}") from None
        if status in AGAIN or status >= 500:
            raise _Passing(f"the server answered {status}", retry_after(headers.get("Retry-After")))
        if status != 200:
            hint = HINTS.get(status, "wanted 200; is this an OpenAI-compatible chat completions endpoint?")
            raise EndpointError(f"{self.endpoint.address} answered {status}: {self._hide(content)}; {hint}")
        return _parse(content)

    def _hide(self, content: bytes) -> str:
        """The start of what a server said, without the key, should it repeat it."""
        text = " ".join(content.decode("utf-8", "replace").split())
        key = self.endpoint.key()
        return (text.replace(key, "…") if key else text)[:200]


def _read(response: httpx.Response, deadline: float) -> bytes:
    """The whole body, within its size and time: a server that sends a byte now and then is no answer."""
    parts, size = [], 0
    for part in response.iter_bytes():
        parts.append(part)
        size += len(part)
        if size > MOST_BYTES:
            raise EndpointError(f"{response.url}: an answer of more than {MOST_BYTES:,} bytes; wanted a few captions")
        if time.monotonic() > deadline:
            raise httpx.ReadTimeout("the whole answer takes too long")
    return b"".join(parts)


def _parse(content: bytes) -> dict[str, Any]:
    """An answer with at least one choice that has text."""
    try:
        answer = json.loads(content)
    except ValueError:
        raise _Passing("the answer is not JSON") from None
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices or not all(_has_text(choice) for choice in choices):
        raise _Passing("the answer has no choices with text")
    return dict(answer)


def _has_text(choice: Any) -> bool:
    message = choice.get("message") if isinstance(choice, dict) else None
    return isinstance(message, dict) and isinstance(message.get("content"), str)


def _candidate(choice: dict[str, Any]) -> Candidate:
    """The first line that says something: a model asked for a sentence may write more."""
    lines = [line.strip() for line in choice["message"]["content"].splitlines() if line.strip()]
    reason = choice.get("finish_reason")
    return Candidate(lines[0] if lines else "", _score(choice), reason != "length" or len(lines) > 1)


def _score(choice: dict[str, Any]) -> float | None:
    """The mean log-probability a token, where the server sends any."""
    logprobs = choice.get("logprobs")
    tokens = logprobs.get("content") if isinstance(logprobs, dict) else None
    found = [t["logprob"] for t in tokens or [] if isinstance(t, dict) and isinstance(t.get("logprob"), int | float)]
    return round(sum(found) / len(found), 4) if found else None


def retry_after(value: str | None, now: Callable[[], float] = time.time) -> float | None:
    """Seconds of a Retry-After header, which holds them or a date; None where it says nothing."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        at = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return max(0.0, (at - datetime.fromtimestamp(now(), UTC)).total_seconds())
