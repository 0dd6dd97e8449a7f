"""The rollout worker: takes prompts, samples them from the live policy, hands the rollouts on.

A prompt's rollouts go on together or not at all, in the same step that ends the prompt's entry: so
a worker that dies in between costs time, never a rollout, and never makes one twice.

What is not the prompt's fault costs it no delivery: when the engine is full, drains or is gone, the
prompt goes back with a pause, and the worker takes nothing until the pause is over. One that the
engine did not finish in time goes back too, and `late` tells of it: if it can never be finished, it
takes an engine's place again and again until a person does something. A Redis that is away stops
this work and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

from google.protobuf.message import DecodeError

from honed.generation.backoff import Backoff
from honed.generation.frontend import SamplingFrontend
from honed.kit import tracing
from honed.kit.aio import raise_if_cancelled, unless
from honed.kit.errors import DeadlineExceeded, HonedError, InvalidArgument, Overloaded, Unavailable, root_cause
from honed.kit.tracing import Span
from honed.queue.holding import Holding, holding
from honed.queue.keys import ROLLOUTS
from honed.queue.messages import Delivery, Message
from honed.queue.spans import about, listed, work_span
from honed.queue.stream import WorkQueue
from honed.v1 import common_pb2

logger = logging.getLogger(__name__)

WORKING: Final = "working"
_BLOCK_MS: Final = 500
_CHECK_EVERY_S: Final = 10.0
_RETRY_MS: Final = 1000
_END_S: Final = 2.0
"""Of the time of a drain, what is kept for handing on and giving back."""


class RolloutWorker:
    """Keeps as many training samples in the engine as the gate has room for."""

    def __init__(
        self,
        frontend: SamplingFrontend,
        queue: WorkQueue,
        check: Callable[[], Awaitable[None]],
        *,
        drain_s: float = 15.0,
        late_shown_s: float = 1200.0,
        backoff: Backoff | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is taken yet.

        Args:
            frontend: Samples.
            queue: This process's consumer of the stage `prompts`.
            check: Raises while this process must not work for the run; asked before the first
                prompt and now and then.
            drain_s: How long what is in hand may take at the end.
            late_shown_s: How long `late` tells of a prompt that was not finished in time. Longer than
                the engine's time, so that it goes on telling of a prompt that is tried again and again.
            backoff: Of the whole worker.
            clock: Seconds, monotonic.
        """
        self._frontend = frontend
        self._gate = frontend.gate
        self._queue = queue
        self._check = check
        self._drain_s = drain_s
        self._late_shown_s = late_shown_s
        self._late = ""
        self._late_at = 0.0
        self._backoff = backoff or Backoff()
        self._clock = clock
        self._check_due = clock()
        self._done: asyncio.Queue[tuple[Delivery, list[Message]]] = asyncio.Queue()
        self._working: set[asyncio.Task[None]] = set()
        self._samples = self._gate.window  # of the last prompt; before the first one, as many as may be
        self.allowed = asyncio.Event()
        """Set while prompts may be taken; cleared when an old version would sample them."""
        self.allowed.set()
        self.state = "starting"
        """`working`, or why no prompts are taken."""

    @property
    def late(self) -> str:
        """What to know of prompts that the engine did not finish in time lately; empty if there were none."""
        return self._late if self._clock() - self._late_at < self._late_shown_s else ""

    async def run(self, stopping: asyncio.Event) -> None:
        """Works until `stopping` is set; then finishes what it can and gives the rest back."""
        while not stopping.is_set():
            try:
                await unless(stopping, self._check_identity())
                await self._work_until(stopping)
            except Exception as error:  # serving must not end because training cannot go on
                raise_if_cancelled()
                cause = root_cause(error)
                self.state = f"{type(cause).__name__}: {cause}"
                pause_s = self._backoff.failed()
                logger.warning(
                    "training work stopped; trying again",
                    extra={"reason": str(cause), "pause_s": pause_s},
                    exc_info=not isinstance(cause, HonedError | TimeoutError),
                )
                await unless(stopping, asyncio.sleep(pause_s))
        self.state = "stopped"

    async def _work_until(self, stopping: asyncio.Event) -> None:
        async with holding(self._queue) as held, asyncio.TaskGroup() as group:
            await unless(stopping, self._settle(held))  # what a try before has left, cut off by an outage
            hand_on = group.create_task(self._hand_on_for_ever(held))
            try:
                while not stopping.is_set():
                    room = await unless(stopping, self._room())
                    if room is not None:
                        await unless(stopping, self._take(-(-room // self._samples), held, group))
                if self._working:
                    await asyncio.wait(self._working, timeout=max(0.0, self._drain_s - _END_S))
            finally:
                for task in list(self._working):
                    task.cancel()
                hand_on.cancel()
            async with asyncio.timeout(_END_S):
                await asyncio.gather(hand_on, *self._working, return_exceptions=True)
                await self._settle(held)
                await self._queue.leave()

    async def _room(self) -> int:
        """Waits until prompts may be taken; returns for how many samples there is room."""
        while True:
            if self._backoff.left_s:
                await asyncio.sleep(self._backoff.left_s)
            elif not self.allowed.is_set():
                self.state = "waiting for the version that the others serve"
                await self.allowed.wait()
            elif self._frontend.draining:
                self.state = "draining"
                await asyncio.sleep(_BLOCK_MS / 1000)
            else:
                self.state = WORKING
                return await self._gate.wait_for_training_room()

    async def _take(self, count: int, held: Holding, group: asyncio.TaskGroup) -> None:
        if self._clock() >= self._check_due:
            await self._check_identity()
        for delivery in await self._queue.take(count, block_ms=_BLOCK_MS):
            with contextlib.suppress(DecodeError):
                self._samples = max(1, common_pb2.PromptTask.FromString(delivery.message.body).samples)
            claim = self._gate.claim(self._samples)
            task = group.create_task(self._work(delivery, held))
            self._working.add(task)
            task.add_done_callback(self._working.discard)
            task.add_done_callback(partial(_call, claim.release))
            # Once somebody else has the prompt, what is sampled here adds nothing.
            held.add([delivery], on_lost=partial(_call, task.cancel))

    async def _check_identity(self) -> None:
        await self._check()
        self._check_due = self._clock() + _CHECK_EVERY_S

    async def _work(self, delivery: Delivery, held: Holding) -> None:
        try:
            with tracing.within(work_span("generate", delivery)) as span:
                messages = await self._sample(common_pb2.PromptTask.FromString(delivery.message.body), span)
        except (DecodeError, InvalidArgument) as error:
            held.discard([delivery])
            logger.warning("prompt refused", extra={**about(delivery), "reason": str(error)})
            await self._queue.fail(delivery, str(error), retry=False)
        except (Overloaded, Unavailable) as error:
            held.discard([delivery])
            pause_s = self._backoff.failed()
            logger.info("prompt given back", extra={**about(delivery), "reason": str(error), "pause_s": pause_s})
            await self._queue.release([delivery], after_ms=int(pause_s * 1000))
        except DeadlineExceeded as error:
            held.discard([delivery])
            self._late = f"training prompt {delivery.message.id} goes back to the queue: {error}"
            self._late_at = self._clock()
            logger.warning("prompt not finished in time", extra={**about(delivery), "reason": str(error)})
            await self._queue.release([delivery], after_ms=_RETRY_MS)
        except Exception as error:  # a prompt that nothing can be done with must not stop the others
            held.discard([delivery])
            outcome = await self._queue.fail(delivery, f"{type(error).__name__}: {error}", retry_after_ms=_RETRY_MS)
            logger.warning(
                "prompt failed",
                extra={**about(delivery), "reason": str(error), "outcome": outcome},
                exc_info=not isinstance(error, HonedError),
            )
        else:
            self._backoff.succeeded()
            self._done.put_nowait((delivery, messages))

    async def _sample(self, task: common_pb2.PromptTask, span: Span) -> list[Message]:
        """The rollouts of a prompt, as entries of the next stage."""
        requests = self._frontend.training_requests(task, self._queue.consumer)
        chunks = await self._frontend.complete(requests)
        codec = self._frontend.codec
        rollouts = [codec.rollout(task, i, chunk, span.traceparent) for i, chunk in enumerate(chunks)]
        if span.recorded:
            span.set(
                {
                    "honed.rollouts": listed([rollout.rollout_id for rollout in rollouts]),
                    "honed.versions": listed([part.version.label for chunk in chunks for part in chunk.spans]),
                    "honed.prompt_tokens": len(task.prompt_token_ids),
                    "honed.response_tokens": sum(len(chunk.token_ids) for chunk in chunks),
                }
            )
        return [Message(rollout.rollout_id, rollout.SerializeToString(), rollout.trace_parent) for rollout in rollouts]

    async def _settle(self, held: Holding) -> None:
        """Hands on what is done, and gives back all else that this consumer has."""
        await self._hand_on(held)
        await self._queue.release(await self._queue.pending_of())

    async def _hand_on_for_ever(self, held: Holding) -> None:
        while True:
            first = await self._done.get()
            self._done.put_nowait(first)
            await self._hand_on(held)

    async def _hand_on(self, held: Holding) -> None:
        """Hands on all that is done, in one round trip."""
        work = [self._done.get_nowait() for _ in range(self._done.qsize())]
        try:
            handed_on = await self._queue.hand_on_each(work, ROLLOUTS)
        except BaseException:  # not known to have happened; a second time changes nothing
            for item in work:
                self._done.put_nowait(item)
            raise
        for (delivery, _), ours in zip(work, handed_on, strict=True):
            held.discard([delivery])
            if not ours:
                logger.warning("prompt was taken over meanwhile", extra=about(delivery))


def _call(action: Callable[[], object], _: object) -> None:
    """A callback that needs no argument."""
    action()
