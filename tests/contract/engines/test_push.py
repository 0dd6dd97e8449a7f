"""What each engine promises of a change of weights under load."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.contract.engines.conftest import Lab, together
from tests.support.tiny import make_tiny_model, publish_version, token_logprobs

from honed.artifacts.version import VersionId
from honed.generation.requests import Chunk, Sampling
from honed.kit.errors import Aborted, DataLoss, FailedPrecondition, Unavailable

pytestmark = pytest.mark.asyncio(loop_scope="session")

TOLERANCE = 1e-4


def assert_true(lab: Lab, prompt: list[int], chunk: Chunk) -> None:
    """Each token's log-probability is its labelled version's own, given the whole prefix."""
    assert [span.start for span in chunk.spans] == [0, *(span.end for span in chunk.spans[:-1])]
    assert chunk.spans[-1].end == len(chunk.token_ids)
    for span in chunk.spans:
        own = token_logprobs(lab.model(span.version), [*prompt, *chunk.token_ids])[len(prompt) - 1 :]
        assert chunk.logprobs[span.start : span.end] == pytest.approx(own[span.start : span.end], abs=TOLERANCE)


class Load:
    """Clients that never stop asking, whole and streamed; every answer is kept."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.answers: list[tuple[list[int], Chunk]] = []
        self.stopping = False
        self.progress = asyncio.Event()
        self.random = random.Random(5)

    async def client(self, streamed: bool) -> None:
        while not self.stopping:
            # A shared beginning: a stale prefix would be found.
            prompt = [9] * 140 + [self.random.randrange(2, 258) for _ in range(self.random.randrange(1, 20))]
            request = self.lab.request(prompt, Sampling(60, fixed_length=True))
            if streamed:
                chunk = together([part async for part in self.lab.engine.generate(request)])
            else:
                chunk = await self.lab.engine.complete(request)
            self.answers.append((prompt, chunk))
            self.progress.set()

    async def some_more(self, count: int) -> None:
        goal = len(self.answers) + count
        async with asyncio.timeout(60):
            while len(self.answers) < goal:
                self.progress.clear()
                await self.progress.wait()


@asynccontextmanager
async def load(lab: Lab, clients: int = 8) -> AsyncIterator[Load]:
    """Runs clients around the block; an error in any of them fails the test."""
    running = Load(lab)
    async with asyncio.TaskGroup() as group:
        for index in range(clients):
            group.create_task(running.client(streamed=index % 2 == 1))
        try:
            await running.some_more(clients)
            yield running
            await running.some_more(clients)
        finally:
            running.stopping = True


async def test_every_token_is_its_labels_own_across_pushes_and_no_request_fails(lab: Lab) -> None:
    async with load(lab) as running:
        for model in (1, 2, 0, 1):
            report = await lab.push(model)
            assert report.version == lab.engine.version
            assert report.canary_max_error < TOLERANCE
            assert 0 < report.pause_s < 30
            await asyncio.sleep(0.05)
    for prompt, chunk in running.answers:
        assert_true(lab, prompt, chunk)
    spans = [len(chunk.spans) for _, chunk in running.answers]
    assert max(spans) > 1, "no response spanned a push: the test shows nothing"


async def pushed_within(lab: Lab, prompt: list[int]) -> list[Chunk] | None:
    """A response into which three versions are pushed; None if it was over before the last of them."""
    stream = lab.engine.generate(lab.request(prompt, Sampling(500, fixed_length=True)))
    chunks = [await anext(stream)]
    for model in (2, 0, 1):
        report = await lab.push(model)
        if report.requests_carried == 0:
            rest = [chunk async for chunk in stream]
            assert (rest or chunks)[-1].finish_reason, "no request is under way, and this one has not ended"
            return None
        assert report.requests_carried == 1
        chunks.append(await anext(stream))
    return [*chunks, *[chunk async for chunk in stream]]


async def test_a_response_may_span_several_pushes(lab: Lab) -> None:
    prompt = [3, 4, 5]
    for _ in range(10):  # how fast an engine samples, and a push is prepared, is the machine's business
        if (chunks := await pushed_within(lab, prompt)) is not None:
            break
    else:
        pytest.fail("ten responses were over before three versions had been pushed into them")
    whole = together(chunks)
    assert len({span.version for span in whole.spans}) == 4
    # Spans of a stream meet at the borders of its chunks.
    assert_true(lab, prompt, whole)


async def test_a_cached_prefix_is_not_used_after_a_push(lab: Lab) -> None:
    prompt = [7 + i % 100 for i in range(300)]
    greedy = Sampling(4, temperature=0.0, fixed_length=True)
    for model in (0, 1, 1, 2):
        await lab.push(model)
        for _ in range(2):
            chunk = await lab.engine.complete(lab.request(prompt, greedy))
            assert chunk.spans[0].version == lab.engine.version
            assert_true(lab, prompt, chunk)


async def test_weights_that_are_not_the_learners_never_sample_and_the_last_good_version_serves(lab: Lab) -> None:
    await lab.push(0)
    before = lab.engine.version
    async with load(lab) as running:
        for _ in range(2):
            version, directory = lab.publish(1, canaries_of=2)
            await lab.engine.prepare(version, directory)
            with pytest.raises(Aborted, match=f"canaries of version {version}"):
                await lab.engine.commit(version)
            assert lab.engine.version == before
            await running.some_more(4)
    for prompt, chunk in running.answers:
        assert {span.version for span in chunk.spans} == {before}
        assert_true(lab, prompt, chunk)
    assert (await lab.push(2)).version > before


async def test_a_prepared_version_needs_its_files_no_more(lab: Lab) -> None:
    version, directory = lab.publish(1)
    await lab.engine.prepare(version, directory)
    (directory / "model.safetensors").unlink()
    async with load(lab) as running:
        await lab.engine.commit(version)
    for prompt, chunk in running.answers:
        assert_true(lab, prompt, chunk)
    assert lab.engine.version == version
    await lab.push(0)  # the next one has files again


async def test_weights_that_cannot_be_read_are_rolled_back(lab: Lab) -> None:
    await lab.push(1)
    before = lab.engine.version
    version, directory = lab.publish(2)
    await lab.engine.prepare(version, directory)
    other, other_directory = lab.publish(0)
    await lab.engine.prepare(other, other_directory)  # takes the memory: the first is to be loaded in the pause
    (directory / "model.safetensors").unlink()
    async with load(lab) as running:
        with pytest.raises(Unavailable):  # the version is whole in the store: its copy here says nothing of it
            await lab.engine.commit(version)
    for prompt, chunk in running.answers:
        assert_true(lab, prompt, chunk)
        assert chunk.spans[-1].version == before


async def test_a_damaged_version_is_refused_before_any_pause(lab: Lab, tmp_path: Path) -> None:
    before = lab.engine.version
    version, directory = lab.publish(1)
    damaged = shutil.copytree(directory, tmp_path / "damaged")
    data = bytearray((damaged / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(data)
    stream = lab.engine.generate(lab.request([5], Sampling(400, fixed_length=True)))
    await anext(stream)
    with pytest.raises(DataLoss, match=r"model\.safetensors"):
        await lab.engine.prepare(version, damaged)
    with pytest.raises(DataLoss, match="holds version"):
        await lab.engine.prepare(VersionId(9, 9), directory)
    await anext(stream)
    await stream.aclose()
    with pytest.raises(FailedPrecondition, match="not prepared"):
        await lab.engine.commit(version)
    assert lab.engine.version == before


async def test_another_architecture_or_a_version_without_canaries_is_refused(lab: Lab, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", 0, layers=1)
    publish_version(lab.store, other, VersionId(7, 0))
    with pytest.raises(FailedPrecondition, match="architecture"):
        await lab.engine.prepare(VersionId(7, 0), lab.store.fetch(VersionId(7, 0), tmp_path))
    publish_version(lab.store, lab.models[0], VersionId(7, 1), canaries=())
    with pytest.raises(FailedPrecondition, match="no canaries"):
        await lab.engine.prepare(VersionId(7, 1), lab.store.fetch(VersionId(7, 1), tmp_path))


async def test_committing_twice_answers_twice_and_a_forgotten_version_cannot_be_committed(lab: Lab) -> None:
    report = await lab.push(0)
    assert await lab.engine.commit(report.version) == report
    version, directory = lab.publish(1)
    await lab.engine.prepare(version, directory)
    await lab.engine.abort_version(version)
    with pytest.raises(FailedPrecondition, match="not prepared"):
        await lab.engine.commit(version)


async def test_while_paused_nothing_is_sampled_and_a_commit_leaves_the_pause(lab: Lab) -> None:
    prompt = [11, 12]
    task = asyncio.create_task(lab.engine.complete(lab.request(prompt, Sampling(300, fixed_length=True))))
    await asyncio.sleep(0.05)
    await lab.engine.pause()
    late = asyncio.create_task(lab.engine.complete(lab.request(prompt, Sampling(4, fixed_length=True))))
    report = await lab.push(1)
    done, _ = await asyncio.wait([task, late], timeout=0.3)
    assert not done
    await lab.engine.resume()
    async with asyncio.timeout(60):
        chunk, after = await task, await late
    assert_true(lab, prompt, chunk)
    assert [span.version for span in after.spans] == [report.version]
    assert_true(lab, prompt, after)


async def test_a_caller_that_gives_up_does_not_leave_the_engine_half_way(lab: Lab) -> None:
    version, directory = lab.publish(2)
    await lab.engine.prepare(version, directory)
    async with load(lab) as running:
        commit = asyncio.create_task(lab.engine.commit(version))
        await asyncio.sleep(0.005)
        commit.cancel()
        with pytest.raises(asyncio.CancelledError):
            await commit
        assert lab.engine.version == version
    for prompt, chunk in running.answers:
        assert_true(lab, prompt, chunk)


async def test_requests_can_be_cancelled_during_a_push(lab: Lab) -> None:
    version, directory = lab.publish(0)
    await lab.engine.prepare(version, directory)
    sampling = Sampling(300, fixed_length=True)
    tasks = [asyncio.create_task(lab.engine.complete(lab.request([5, i], sampling))) for i in range(2, 8)]
    await asyncio.sleep(0.1)
    commit = asyncio.create_task(lab.engine.commit(version))
    late = [asyncio.create_task(lab.engine.complete(lab.request([6, i], sampling))) for i in range(2, 4)]
    await asyncio.sleep(0.01)
    for task in [*tasks[:5], *late]:
        task.cancel()
    await commit
    chunk = await tasks[5]
    assert_true(lab, [5, 7], chunk)
    await asyncio.gather(*tasks, *late, return_exceptions=True)
    assert lab.engine.in_flight == 0
