"""The rollout worker: takes admitted prompts, samples them from the live policy, and hands the rollouts on.

A prompt's rollouts go on together or not at all, in the same step that ends the prompt's entry: so a worker that dies in
between costs time, never a rollout, and never makes one twice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace

from google.protobuf.message import DecodeError

from honed.generation.engine import Chunk, EngineRequest
from honed.generation.sampler import Sampler
from honed.kit.errors import HonedError, InvalidArgument
from honed.queue.holding import Holding, holding
from honed.queue.keys import ROLLOUTS
from honed.queue.messages import Delivery, Message
from honed.queue.stream import WorkQueue
from honed.v1 import common_pb2

logger = logging.getLogger(__name__)


class RolloutWorker:
    """Keeps up to `concurrency` training samples in the engine."""

    def __init__(self, sampler: Sampler, queue: WorkQueue, concurrency: int) -> None:
        """`queue` is this process's consumer of the stage `prompts`."""
        self._sampler = sampler
        self._queue = queue
        self._concurrency = concurrency
        self._room = asyncio.Condition()
        self._running = 0
        self._done: asyncio.Queue[tuple[Delivery, list[Message]]] = asyncio.Queue()

    async def run(self, stopping: asyncio.Event) -> None:
        """Works until `stopping` is set; what is in hand then goes back to the queue.

        Raises:
            Unavailable: Redis or the engine is gone for good.
        """
        async with holding(self._queue) as held, asyncio.TaskGroup() as group:
            hand_on = group.create_task(self._hand_on(held))
            working: dict[asyncio.Task[None], Delivery] = {}
            while not stopping.is_set():
                async with self._room:
                    await self._room.wait_for(lambda: self._running < self._concurrency)
                deliveries = await self._queue.take(self._concurrency - self._running, block_ms=500)
                held.add(deliveries)
                self._running += len(deliveries)
                for delivery in deliveries:
                    task = group.create_task(self._work(delivery, held))
                    working[task] = delivery
                    task.add_done_callback(working.pop)
            left = list(working.values())
            for task in (*working, hand_on):
                task.cancel()
        await self._queue.release(left)
        await self._queue.leave()

    async def _work(self, delivery: Delivery, held: Holding) -> None:
        try:
            task = common_pb2.PromptTask.FromString(delivery.message.body)
            requests = self._requests(task)
            chunks = await self._sampler.complete(requests)
            await self._done.put((delivery, self._rollouts(task, chunks)))
        except (DecodeError, InvalidArgument) as error:
            logger.warning("prompt refused", extra={"entry": delivery.entry, "reason": str(error)})
            await self._queue.fail(delivery, str(error), retry=False)
            held.discard([delivery])
        except HonedError as error:
            outcome = await self._queue.fail(delivery, str(error), retry_after_ms=1000)
            logger.warning("prompt failed", extra={"entry": delivery.entry, "reason": str(error), "outcome": outcome})
            held.discard([delivery])
        finally:
            async with self._room:
                self._running -= 1
                self._room.notify_all()

    def _requests(self, task: common_pb2.PromptTask) -> list[EngineRequest]:
        sampling = self._sampler.sampling(task.sampling)
        limit = self._sampler.caps.max_prompt_tokens
        if len(task.prompt_token_ids) > limit:
            raise InvalidArgument("prompt_token_ids", f"has {len(task.prompt_token_ids)} tokens; {limit} at most")
        prompt = list(task.prompt_token_ids)
        return [
            EngineRequest(
                request_id=f"{task.group_id}/{i}@{self._queue.consumer}",
                prompt_token_ids=prompt,
                sampling=sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + i),
                want_text=False,
                want_logprobs=True,
            )
            for i in range(task.samples)
        ]

    def _rollouts(self, task: common_pb2.PromptTask, chunks: Sequence[Chunk]) -> list[Message]:
        messages = []
        for i, chunk in enumerate(chunks):
            sample = self._sampler.message(i, chunk)
            rollout = common_pb2.Rollout(
                rollout_id=f"{task.group_id}/{i}",
                group_id=task.group_id,
                run=task.run,
                prompt_token_ids=task.prompt_token_ids,
                response_token_ids=sample.token_ids,
                logprobs=sample.logprobs,
                version_spans=sample.version_spans,
                sampling=task.sampling,
                finish_reason=sample.finish_reason,
                trace_parent=task.trace_parent,
            )
            messages.append(Message(rollout.rollout_id, rollout.SerializeToString(), task.trace_parent))
        return messages

    async def _hand_on(self, held: Holding) -> None:
        """Hands on what is done, as much as there is in one round trip."""
        while True:
            work = [await self._done.get()]
            while not self._done.empty():
                work.append(self._done.get_nowait())
            for (delivery, _), mine in zip(work, await self._queue.hand_on_each(work, ROLLOUTS), strict=True):
                held.discard([delivery])
                if not mine:
                    logger.warning("prompt was taken over meanwhile", extra={"entry": delivery.entry})
