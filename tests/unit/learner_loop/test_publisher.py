"""Claims about a push into several generators."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.unit.learner_loop.conftest import FakeGenerator, World

from honed.artifacts import Lineage, Manifest, VersionDraft, VersionId


async def publish(world: World, step: int) -> Manifest:
    loop = world.loop()
    directory, canaries = loop._exporter.export(VersionId(1, step))
    draft = VersionDraft(VersionId(1, step), canaries, Lineage(created_at="2026-01-01T00:00:00+00:00"))
    manifest = await world.publisher().publish(directory, draft)
    assert not directory.exists(), "it is used up"
    return manifest


async def test_all_prepare_before_any_commits(world: World) -> None:
    one, other = FakeGenerator(), FakeGenerator()
    log: list[str] = []
    one.calls = other.calls = log
    report = await world.publisher(one, other).bring_in(await publish(world, 1))
    assert log == ["prepare 1.1", "prepare 1.1", "commit 1.1", "commit 1.1"]
    assert (report.committed, report.failures, report.pauses_s, report.carried) == (2, (), (0.002, 0.002), 6)


async def test_a_generator_that_cannot_prepare_is_not_paused_and_the_others_go_on(world: World) -> None:
    broken, good = FakeGenerator(), FakeGenerator()
    broken.broken["prepare"] = 1
    report = await world.publisher(broken, good).bring_in(await publish(world, 1))
    assert broken.calls == ["prepare 1.1"]
    assert (report.committed, report.failures) == (1, ("prepare: UNAVAILABLE: cannot prepare",))
    assert (broken.serving, good.serving) == ("", "1.1")


async def test_a_push_that_is_repeated_pauses_only_those_that_lack_it(world: World) -> None:
    broken, good = FakeGenerator(), FakeGenerator()
    broken.broken["commit"] = 1
    publisher, manifest = world.publisher(broken, good), await publish(world, 1)
    assert (await publisher.bring_in(manifest)).failures == ("commit: UNAVAILABLE: cannot commit",)
    again = await publisher.bring_in(manifest)
    assert (again.committed, again.failures, len(again.pauses_s)) == (2, (), 1)


async def test_old_versions_go_and_the_base_stays(world: World, tmp_path: Path) -> None:
    publisher = world.publisher(keep=2)
    loop = world.loop()
    directory, canaries = loop._exporter.export(VersionId(0, 0))
    world.store.publish(directory, VersionDraft(VersionId(0, 0), canaries))
    for step in range(1, 5):
        await publisher.bring_in(await publish(world, step))
    assert [v.label for v in world.store.versions()] == ["0.0", "1.3", "1.4"]


async def test_the_manifest_of_a_published_version_can_be_had_again(world: World) -> None:
    manifest = await publish(world, 1)
    assert await world.publisher().published(VersionId(1, 1)) == manifest
    with pytest.raises(Exception, match=r"1\.2"):
        await world.publisher().published(VersionId(1, 2))
