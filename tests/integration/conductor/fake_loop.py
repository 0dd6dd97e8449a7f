"""The loop behind the feeder on a real Redis: workers that pass on, and a learner that only counts.

It writes its progress, acknowledges at checkpoints, drops what is stale or comes again, and can be killed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from honed.conductor.feeder import Feeder
from honed.conductor.prompt_file import FilePrompt
from honed.conductor.prompts import PromptMix
from honed.conductor.settings import ConductorSettings, PromptMixSettings
from honed.queue.admission import AdmissionPolicy
from honed.queue.connection import RedisLink
from honed.queue.keys import PROMPTS, ROLLOUTS, SCORED, RunKeys
from honed.queue.lease import Leases
from honed.queue.messages import Delivery, Message
from honed.queue.progress import LearnerProgress, ProgressBoard
from honed.queue.stream import DeliverySettings, WorkQueue
from honed.v1 import common_pb2

QUEUE = DeliverySettings(lease_ms=2_000, sweep_ms=50)
HEARTBEAT_S = 0.1


class NumberFile:
    """A prompt file of three tokens a prompt, in their own order."""

    def at(self, position: int, seed: int) -> FilePrompt:
        return FilePrompt([1, position // 250, position % 250])


class FakeLoop:
    def __init__(
        self, link: RedisLink, keys: RunKeys, *, batch: int = 8, samples: int = 1, max_staleness: int = 2,
        checkpoint_every: int = 1, steps: int | None = 12, seconds: float = 0.0,
        refuse: Callable[[str], bool] = lambda rollout: False,
    ) -> None:  # fmt: skip
        self.link, self.keys = link, keys
        self.batch, self.samples, self.max_staleness, self.steps = batch, samples, max_staleness, steps
        self.checkpoint_every, self.seconds, self.refuse = checkpoint_every, seconds, refuse
        self.board = ProgressBoard(link, keys)
        self.served = 0
        self.prompts: dict[str, tuple[int, ...]] = {}
        """What each id named."""
        self.sources: list[str] = []
        self.trained: list[tuple[str, int]] = []
        """Rollout and staleness, of the updates that stand."""
        self.saved = 0
        self.fence = 0
        self.update = 0
        self.finished = asyncio.Event()
        self.reached: dict[int, asyncio.Event] = {}

    def at_update(self, update: int) -> asyncio.Event:
        return self.reached.setdefault(update, asyncio.Event())

    @asynccontextmanager
    async def workers(self) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self._sample()), asyncio.create_task(self._score())]
        try:
            yield
        finally:
            await stop(*tasks)

    @asynccontextmanager
    async def learner(self) -> AsyncIterator[None]:
        """A learner until the block ends, which kills it: what no checkpoint has is forgotten."""
        task = asyncio.create_task(self._learn())
        try:
            yield
            if task.done():
                task.result()
        finally:
            await stop(task)

    async def _sample(self) -> None:
        queue = WorkQueue(self.link, self.keys, PROMPTS, "sampler", QUEUE)
        while True:
            for delivery in await queue.take(64, block_ms=20):
                task = common_pb2.PromptTask.FromString(delivery.message.body)
                prompt = tuple(task.prompt_token_ids)
                assert self.prompts.setdefault(task.group_id, prompt) == prompt, f"{task.group_id} names two prompts"
                self.sources.append(task.source)
                body = str(self.served).encode()
                await queue.hand_on(delivery, [Message(f"{task.group_id}/{i}", body) for i in range(task.samples)], ROLLOUTS)

    async def _score(self) -> None:
        queue = WorkQueue(self.link, self.keys, ROLLOUTS, "scorer", QUEUE)
        while True:
            held = await queue.take(64, block_ms=20)
            await queue.hand_on_each([(delivery, [delivery.message]) for delivery in held], SCORED)

    async def _learn(self) -> None:
        self.fence += 1
        self.trained = self.trained[: self.saved * self.batch]
        self.update = self.saved
        unsaved: list[Delivery] = []
        waited = False

        async def write() -> None:
            turns = [int(rollout.rpartition("-")[2].partition("/")[0]) for rollout, _ in self.trained]
            await self.board.write(
                LearnerProgress(
                    fence=self.fence, update=self.update, served=self.served, unsaved=len(unsaved), samples=self.samples,
                    turn=max(turns, default=-1) + 1, finished=self.update == self.steps, waited_s=float(waited),
                )
            )  # fmt: skip

        async def beat() -> None:
            while True:
                await write()
                await asyncio.sleep(HEARTBEAT_S)

        queue = WorkQueue(self.link, self.keys, SCORED, f"learner-{self.fence}", QUEUE)
        waiting = await queue.pending_of(f"learner-{self.fence - 1}") if self.fence > 1 else []
        known = {rollout for rollout, _ in self.trained}
        in_hand: dict[str, Delivery] = {}
        beating = asyncio.create_task(beat())
        try:
            while self.update != self.steps:
                fresh: list[tuple[Delivery, int]] = []
                while len(fresh) < self.batch:
                    for delivery in waiting or await queue.take(self.batch - len(fresh), block_ms=20):
                        rollout, age = delivery.message.id, self.update - int(delivery.message.body)
                        if rollout in known or rollout in in_hand:
                            await queue.drop([delivery], "duplicate")
                        elif age > self.max_staleness:
                            await queue.drop([delivery], "stale")
                        elif self.refuse(rollout):
                            await queue.drop([delivery], "refused")
                        else:
                            in_hand[rollout] = delivery
                            fresh.append((delivery, age))
                    waiting = []
                await asyncio.sleep(self.seconds)
                batch = fresh[: self.batch]
                waiting = [delivery for delivery, _ in fresh[self.batch :]]
                for delivery, age in batch:
                    self.trained.append((delivery.message.id, age))
                    known.add(delivery.message.id)
                    unsaved.append(delivery)
                in_hand = {}
                self.update += 1
                await write()
                self.served = self.update
                await write()
                if self.update % self.checkpoint_every == 0 or self.update == self.steps:
                    self.saved = self.update
                    ended, unsaved = unsaved, []
                    await write()
                    await queue.ack(ended)
                if (event := self.reached.get(self.update)) is not None:
                    event.set()
            while rest := await queue.take(64, block_ms=100):
                await queue.drop(rest, "run_finished")
            self.finished.set()
            await asyncio.Event().wait()
        finally:
            await stop(beating)

    @asynccontextmanager
    async def feeder(
        self, mix: PromptMix | None = None, max_in_flight: int = 1000, ttl_ms: int = 5_000
    ) -> AsyncIterator[Feeder]:
        """A conductor until the block ends."""
        stopping = asyncio.Event()
        policy = AdmissionPolicy(self.batch, self.max_staleness, max_in_flight, self.samples)
        async with Leases(self.link, self.keys).held("conductor", f"conductor-{id(stopping)}", 5_000) as lease:
            feeder = Feeder(
                self.link, self.keys, lease, mix or self.mix(), policy, steps=self.steps, sleep=lambda _: asyncio.sleep(0.003)
            )
            task = asyncio.create_task(feeder.run(stopping))
            try:
                yield feeder
                if task.done():
                    task.result()
            finally:
                await stop(task)

    def mix(self, **weights: float) -> PromptMix:
        settings = ConductorSettings(
            samples_per_prompt=self.samples, prompt_mix=PromptMixSettings(**{"submitted": 0.0, "application": 0.0, **weights})
        )
        return PromptMix(self.keys.run, NumberFile(), None, 0, settings)  # type: ignore[arg-type]


async def stop(*tasks: asyncio.Task[None]) -> None:
    """Cancels tasks; raises what one of them had failed with."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.result()
