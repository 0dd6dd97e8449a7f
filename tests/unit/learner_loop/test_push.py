"""Claims about a push into the generators that are registered."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from tests.support.learner_world import FakeGenerator, World

from honed.artifacts.manifest import Manifest
from honed.artifacts.version import VersionId
from honed.learner.loop.push import RegisteredGenerators
from honed.queue.members import Member


async def published(world: World, step: int, keep: int = 100) -> Manifest:
    learner = world.learner(keep=keep)
    manifest = await learner.release.publish(VersionId(1, step), [])
    assert not list((world.root / "export").glob("*")), "the export is used up"
    return manifest


async def test_a_generator_that_prepares_slowly_keeps_no_other_at_the_old_version(world: World) -> None:
    slow, quick = FakeGenerator(), FakeGenerator()
    world.generators = [slow, quick]
    free, prepare = asyncio.Event(), slow.PrepareVersion

    async def slowly(request: Any, timeout: float) -> Any:
        await free.wait()
        return await prepare(request, timeout)

    slow.PrepareVersion = slowly  # type: ignore[method-assign]
    pushing = asyncio.ensure_future(world.pusher().push(await published(world, 1)))
    async with asyncio.timeout(30):
        while quick.serving != "1.1":
            await asyncio.sleep(0.001)
    assert slow.calls == []
    free.set()
    report = await pushing
    assert slow.calls == quick.calls == ["prepare 1.1", "commit 1.1"]
    assert (report.committed, report.failures, report.pauses_s, report.carried) == (2, (), (0.002, 0.002), 6)


async def test_a_generator_that_cannot_prepare_is_not_paused_and_the_others_go_on(world: World) -> None:
    broken, good = FakeGenerator(), FakeGenerator()
    broken.broken["prepare"] = 1
    world.generators = [broken, good]
    report = await world.pusher().push(await published(world, 1))
    assert broken.calls == ["prepare 1.1"]
    assert (report.committed, report.failures, report.refused) == (1, ("prepare: UNAVAILABLE: cannot prepare",), False)
    assert (broken.serving, good.serving) == ("", "1.1")


@pytest.mark.parametrize("code", [grpc.StatusCode.ABORTED, grpc.StatusCode.DATA_LOSS])
async def test_a_version_that_one_refuses_and_another_takes_is_not_bad(world: World, code: grpc.StatusCode) -> None:
    refusing, good = FakeGenerator(), FakeGenerator()
    refusing.broken["commit"], refusing.code = 9, code
    world.generators = [refusing, good]
    manifest = await published(world, 1)
    report = await world.pusher().push(manifest)
    assert (report.refusals, report.refused) == (1, False)
    world.generators = [refusing]
    assert (await world.pusher().push(manifest)).refused


async def test_a_push_that_is_repeated_pauses_only_those_that_lack_it(world: World) -> None:
    broken, good = FakeGenerator(), FakeGenerator()
    broken.broken["commit"] = 1
    world.generators = [broken, good]
    pusher, manifest = world.pusher(), await published(world, 1)
    assert (await pusher.push(manifest)).failures == ("commit: UNAVAILABLE: cannot commit",)
    again = await pusher.push(manifest)
    assert (again.committed, again.failures, len(again.pauses_s)) == (2, (), 1)


async def test_without_a_generator_nothing_is_committed_and_nothing_is_refused(world: World) -> None:
    world.generators = []
    report = await world.pusher().push(await published(world, 1))
    assert (report.committed, report.refused, report.failures) == (0, False, ("no generator is registered",))


async def test_old_versions_go_and_the_base_stays(world: World) -> None:
    learner = world.learner(keep=2)
    for step in range(1, 5):
        await learner.release.push(await learner.release.publish(VersionId(1, step), []))
        assert learner.release._pushing is not None
        await learner.release._pushing
    assert [v.label for v in world.store.versions()] == ["0.0", "1.3", "1.4"]


class Channel:
    """What RegisteredGenerators opens."""

    def __init__(self, address: str) -> None:
        self.address, self.closed = address, False

    def unary_unary(self, *_: Any, **__: Any) -> None:
        return None

    async def close(self) -> None:
        self.closed = True


class FakeMembers:
    """A list that changes."""

    def __init__(self) -> None:
        self.now: list[str] = []
        self.ready: set[str] = set()

    async def list(self) -> list[Member]:
        return [Member(address, "", control_address=address, ready=address in self.ready) for address in self.now]


async def test_a_push_goes_to_those_that_are_ready_and_to_all_where_none_is() -> None:
    """One that loads or drains holds no push up; a single one that is not ready yet is not left out."""
    members = FakeMembers()
    generators = RegisteredGenerators(members, Channel)  # type: ignore[arg-type]
    members.now = ["loads:1", "serves:1"]
    sizes = []
    for members.ready in (set(), {"serves:1"}, {"loads:1", "serves:1"}):
        sizes.append(len(await generators()))
    assert sizes == [2, 1, 2]
    await generators.close()


async def test_channels_come_and_go_with_the_members() -> None:
    members, opened = FakeMembers(), []

    def connect(address: str) -> Any:
        opened.append(Channel(address))
        return opened[-1]

    generators = RegisteredGenerators(members, connect, fallback="elsewhere:1")  # type: ignore[arg-type]
    sizes = []
    for members.now in ([], ["a:1"], ["a:1", "b:1"], ["b:1"], ["a:1"]):
        sizes.append(len(await generators()))
    assert sizes == [1, 1, 2, 1, 1]
    assert [(channel.address, channel.closed) for channel in opened] == [
        ("elsewhere:1", True), ("a:1", True), ("b:1", True), ("a:1", False)
    ]  # fmt: skip
    await generators.close()
    assert all(channel.closed for channel in opened)
