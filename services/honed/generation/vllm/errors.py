"""vLLM's errors in honed's own terms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from honed.kit.errors import HonedError, InvalidArgument, Overloaded, Unavailable


@contextmanager
def translated() -> Iterator[None]:
    """Turns errors of vLLM into honed's; deadlines and cancellation pass."""
    try:
        yield
    except (HonedError, TimeoutError):
        raise
    except Exception as error:
        raise _translate(error) from error


def _translate(error: Exception) -> HonedError:
    from vllm.exceptions import MaxQueuedTokensError, QueueOverflowError, VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError

    if isinstance(error, QueueOverflowError | MaxQueuedTokensError):
        return Overloaded(f"the engine's queue is full: {error}")
    if isinstance(error, VLLMClientError):
        return InvalidArgument("request", str(error))
    if isinstance(error, EngineDeadError):
        return Unavailable("the vLLM engine process died; the service restarts. Its log has the cause")
    return Unavailable(f"vLLM failed: {type(error).__name__}: {error}")
