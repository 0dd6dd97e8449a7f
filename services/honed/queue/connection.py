"""The link to Redis: it rides out an outage with capped, jittered backoff, and gives up at a deadline with a clear error.

Every operation that goes through `RedisLink.call` may run twice: a connection can die after Redis did the work and before the
reply arrived. So each one must be safe to repeat; `hop.lua` says how the scripts manage that.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Final, Self, TypeVar
from urllib.parse import urlsplit, urlunsplit

import redis.exceptions as rex
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider

from honed.kit.errors import FailedPrecondition, InvalidArgument, Unauthenticated, Unavailable

T = TypeVar("T")

logger = logging.getLogger(__name__)

# A server that answers so is alive but cannot serve yet: loading its AOF, failing over, or out of disk or memory. redis-py
# gives some answers a class of their own and cuts the word off; inside a script's error the word stands in the text.
_PASSING: Final = ("LOADING", "READONLY", "MISCONF", "OOM ", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "BUSY ")
_PASSING_CLASSES: Final = (
    rex.ReadOnlyError, rex.OutOfMemoryError, rex.MasterDownError, rex.ClusterDownError, rex.TryAgainError,
)  # fmt: skip
_SAY_EVERY_S: Final = 60.0
_REPLY_MARGIN_S: Final = 5.0  # how much longer than BLOCK a reply may take before the socket counts as dead


@dataclass(frozen=True)
class RetryPolicy:
    """How long, and how eagerly, to wait for a Redis that is gone.

    Attributes:
        deadline_s: Seconds from the first failure to giving up. `math.inf` never gives up: for workers that live as long as
            their process. A call that a person waits for needs a finite one.
        first_s: The first pause's upper end; it doubles with each failure.
        cap_s: The longest pause's upper end.
    """

    deadline_s: float = 120.0
    first_s: float = 0.05
    cap_s: float = 2.0


def without_password(url: str) -> str:
    """The URL as it may stand in an error or a log: user, host, port and path, no password and no query."""
    parts = urlsplit(url)
    place = parts.netloc.rpartition("@")[2]
    user = parts.username
    return f"{parts.scheme}://{f'{user}@' if user else ''}{place}{parts.path}"


def _without_credentials(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _is_passing(error: Exception) -> bool:
    if isinstance(error, (rex.AuthenticationError, rex.AuthorizationError)):
        return False
    if isinstance(error, (rex.ConnectionError, rex.TimeoutError, OSError)):
        return True
    if isinstance(error, _PASSING_CLASSES):
        return True
    return isinstance(error, rex.ResponseError) and any(word in str(error)[:400] for word in _PASSING)


def _is_demoted(error: Exception) -> bool:
    """Whether the server is no master (any more): the name in the URL may lead to another one by now."""
    demoted = (rex.ReadOnlyError, rex.MasterDownError)
    return isinstance(error, demoted) or (isinstance(error, rex.ResponseError) and "READONLY" in str(error)[:400])


class _Credentials(CredentialProvider):
    """The user of a URL with the password that its source holds when a connection is made."""

    def __init__(self, url: str, password: Callable[[], str]) -> None:
        self._user, self._password = urlsplit(url).username, password

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """See `CredentialProvider`."""
        password = self._password()
        return (self._user, password) if self._user else (password,)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        """See `CredentialProvider`."""
        return self.get_credentials()


class RedisLink:
    """A pool of connections to one Redis, shared by everything in a process that speaks to it.

    Attributes:
        redis: The client. Use it inside `call`, never bare, unless an outage may surface.
        longest_block_s: The longest BLOCK that a caller may ask for; the socket's timeout is longer.
    """

    def __init__(
        self,
        url: str,
        *,
        password: Callable[[], str] | None = None,
        retry: RetryPolicy | None = None,
        longest_block_s: float = 5.0,
        max_connections: int = 32,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Opens nothing yet: the first call connects.

        Args:
            url: `redis://`, `rediss://` or `unix://`, with the password if it never changes.
            password: Asked for each new connection, in place of one in the URL.
            retry: How long to wait for a Redis that is gone.
            longest_block_s: Upper bound for BLOCK, seconds.
            max_connections: Further calls wait for a connection. Each blocked take holds one.
            rng: Draws the jitter.
            clock: Seconds, monotonic.
            sleep: How to pause between tries.

        Raises:
            InvalidArgument: the URL cannot be read.
        """
        self.longest_block_s = longest_block_s
        self._name = without_password(url)
        self._retry = retry or RetryPolicy()
        self._rng = rng or random.Random()
        self._clock = clock
        self._sleep = sleep
        timeout = longest_block_s + _REPLY_MARGIN_S
        try:
            pool = BlockingConnectionPool.from_url(
                url if password is None else _without_credentials(url),
                credential_provider=None if password is None else _Credentials(url, password),
                max_connections=max_connections,
                timeout=timeout,
                socket_timeout=timeout,
                socket_connect_timeout=_REPLY_MARGIN_S,
                protocol=2,  # one reply shape from Redis 6.2 to Valkey
                retry=Retry(NoBackoff(), 0),  # retries are counted in one place: `call`
            )
        except ValueError as error:
            raise InvalidArgument("queue.url", f"{self._name} is no Redis URL ({error})") from error
        self.redis: Redis = Redis.from_pool(pool)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes every connection."""
        await self.redis.aclose()

    def within(self, deadline_s: float) -> Self:
        """The same connections with another outage deadline, for calls that somebody waits for. Close the original only."""
        link = copy.copy(self)
        link._retry = replace(self._retry, deadline_s=deadline_s)
        return link

    async def call(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Runs a repeatable operation until Redis answers.

        Raises:
            Unavailable: Redis did not answer within the outage deadline.
            Unauthenticated: Redis refused the password.
            FailedPrecondition: Redis refused the operation, for example a key of another type or a user without the right.
        """
        gone_since: float | None = None
        said = -_SAY_EVERY_S
        pause_s = self._retry.first_s
        asked_before = _cancellations()
        while True:
            try:
                answer = await operation()
            except (rex.RedisError, OSError) as error:
                _end_if_cancelled(asked_before)
                if isinstance(error, rex.ResponseError) and needs_group(error):
                    raise
                self._refuse_if_final(error)
                if _is_demoted(error):
                    await self.redis.connection_pool.disconnect(inuse_connections=False)
                now = self._clock()
                gone_since = now if gone_since is None else gone_since
                left_s = gone_since + self._retry.deadline_s - now
                if left_s <= 0:
                    raise Unavailable(
                        f"Redis at {self._name} has not served for {self._retry.deadline_s:g} s ({error}): "
                        "check that it runs, has disk and memory to write, and that queue.url is right; a retry is safe"
                    ) from error
                if now - max(said, gone_since) >= _SAY_EVERY_S:
                    said = now
                    facts = {"redis": self._name, "seconds": round(now - gone_since), "reason": str(error)}
                    logger.warning("Redis does not serve; trying on", extra=facts)
            else:
                _end_if_cancelled(asked_before)
                return answer
            await self._sleep(min(left_s, self._rng.uniform(0, pause_s)))
            pause_s = min(self._retry.cap_s, pause_s * 2)

    async def command(self, *parts: str | bytes | int) -> Any:
        """Runs one plain command that is safe to repeat; raises as `call` does."""

        async def execute() -> Any:
            return await self.redis.execute_command(*parts)  # type: ignore[no-untyped-call]

        return await self.call(execute)

    def _refuse_if_final(self, error: Exception) -> None:
        if _is_passing(error):
            return
        if isinstance(error, rex.AuthenticationError):
            raise Unauthenticated(f"Redis at {self._name} refused the credentials ({error}): correct queue.url") from error
        raise FailedPrecondition(f"Redis at {self._name} refused the operation: {error}") from error


def _cancellations() -> int:
    task = asyncio.current_task()
    return 0 if task is None else task.cancelling()


def _end_if_cancelled(asked_before: int) -> None:
    """Raises a cancellation that the client has swallowed.

    redis-py waits for its writes by `asyncio.wait_for`, which up to Python 3.11 forgets a cancellation that comes in the moment
    in which the write ends. Whoever cancelled would wait for ever for a task that goes on.
    """
    if _cancellations() > asked_before:
        raise asyncio.CancelledError


def needs_group(error: rex.ResponseError) -> bool:
    """Whether the consumer group is missing, or its stream went away under a blocked read."""
    return "NOGROUP" in str(error) or "UNBLOCKED" in str(error)
