"""One OpenAI-compatible endpoint for chat completions: deadlines, repetitions, and what a failure means.

What may pass (no connection, 408, 425, 429, 5xx) is tried again with growing pauses, or when `Retry-After` says, as far as the
deadline and the number of tries allow; then it is an outage. So is what the endpoint refuses to everybody (401 to 404): a wrong
key is no rollout's fault. Anything else is about the request.
"""

from __future__ import annotations

import json
import random
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final

import httpx2

from honed.kit.errors import FailedPrecondition, Unavailable

_PAUSES_S: Final = (0.5, 8.0)
_PASSING: Final = (408, 425, 429)
_SHOWN: Final = 300  # characters of an answer that an error repeats
_ANSWER_BYTES: Final = 8 << 20
_REFUSED: Final = {
    401: "check the key (api_key_env, api_key_file)",
    402: "the account has no credit",
    403: "the key may not use this model",
    404: "check base_url, which often ends in /v1, and model",
}


class Refused(Unavailable):
    """The endpoint refuses every request until somebody changes something: the key, the model, the URL."""


class _Passing(Exception):
    """A try that failed, and may succeed later."""

    def __init__(self, reason: str, after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.after_s = after_s


@dataclass(frozen=True, slots=True)
class Timing:
    """How time passes; tests bring their own.

    Attributes:
        clock: Seconds, monotonic.
        sleep: Waits so many seconds.
        now: What an HTTP date is compared with.
    """

    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    now: Callable[[], datetime] = lambda: datetime.now(UTC)


class ChatEndpoint:
    """Asks for chat completions. For several threads at once."""

    def __init__(
        self,
        base_url: str,
        key: Callable[[], str] | None,
        *,
        timeout_s: float,
        tries: int,
        connections: int,
        timing: Timing | None = None,
    ) -> None:
        """Connects at the first call.

        Args:
            base_url: What `/chat/completions` is appended to.
            key: Gives the bearer token to use now; None for none.
            timeout_s: Seconds of one try.
            tries: Of one call at most.
            connections: Open at once at most.
            timing: See there.
        """
        self._url, self._key = f"{base_url.rstrip('/')}/chat/completions", key
        self._timeout_s, self._tries, self._timing = timeout_s, tries, timing or Timing()
        limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
        self._client = httpx2.Client(limits=limits)
        weakref.finalize(self, self._client.close)  # nobody closes a scorer

    def ask(self, body: Mapping[str, Any], end: float) -> Mapping[str, Any]:
        """The first choice of a completion.

        Args:
            body: The request, as the API has it.
            end: When to give up, by the clock.

        Raises:
            Refused: The endpoint would refuse any request.
            Unavailable: No answer came in time, or within the tries.
            FailedPrecondition: This request is refused, or the answer is none of this API.
        """
        pause_s, clock = _PAUSES_S[0], self._timing.clock
        for left in reversed(range(self._tries)):
            try:
                return self._first_choice(self._post(body, min(end, clock() + self._timeout_s)))
            except _Passing as error:
                wait_s = max(error.after_s, pause_s * random.uniform(0.75, 1.0))
                if not left or clock() + wait_s >= end:
                    raise Unavailable(f"{self._url}: {error}") from error
            self._timing.sleep(wait_s)
            pause_s = min(_PAUSES_S[1], 2 * pause_s)
        raise AssertionError("the last try returns or raises")

    def _post(self, body: Mapping[str, Any], end: float) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key()}"
        left = end - self._timing.clock()
        if left <= 0:
            raise _Passing("no time is left")
        try:
            with self._client.stream("POST", self._url, content=json.dumps(body), headers=headers, timeout=left) as response:
                answer = self._read(response, end)
        except httpx2.TransportError as error:
            raise _Passing(f"{type(error).__name__}: {error}") from error
        if response.is_success:
            return answer
        said = f"status {response.status_code}: {answer[:_SHOWN].decode(errors='replace').strip()}"
        if response.status_code in _PASSING or response.status_code >= 500:
            raise _Passing(said, self._retry_after(response.headers.get("retry-after", "")))
        if response.status_code in _REFUSED:
            raise Refused(f"{self._url} answered {said}; {_REFUSED[response.status_code]}")
        raise FailedPrecondition(
            f"{self._url} answered {said}; check the model's limits, and the options max_tokens, temperature and extra"
        )

    def _read(self, response: httpx2.Response, end: float) -> bytes:
        """The body; a server that sends it in drops does not get around the deadline."""
        body = bytearray()
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > _ANSWER_BYTES:
                raise FailedPrecondition(f"{self._url} answers with more than {_ANSWER_BYTES >> 20} MiB")
            if self._timing.clock() > end:
                raise _Passing("the answer did not end in time")
        return bytes(body)

    def _first_choice(self, answer: bytes) -> Mapping[str, Any]:
        try:
            choice = json.loads(answer)["choices"][0]
            if isinstance(choice["message"], Mapping):
                return dict(choice)
        except (ValueError, LookupError, TypeError):
            pass
        shown = answer[:_SHOWN].decode(errors="replace").strip()
        raise FailedPrecondition(f"{self._url} is no OpenAI-compatible endpoint: it answered {shown}")

    def _retry_after(self, value: str) -> float:
        """Seconds that the header asks to wait; 0 where it says nothing that can be read."""
        try:
            return max(0.0, float(value))
        except ValueError:
            pass
        try:
            return max(0.0, (parsedate_to_datetime(value) - self._timing.now()).total_seconds())
        except (ValueError, TypeError):
            return 0.0
