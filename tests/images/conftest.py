"""Images that are really built, and containers that really run: `make test-images`. Nothing here belongs to `make test`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.images.containers import Images, Tool, find_builder, find_runner
from tests.images.world import World
from tests.support.listening import local_table

if "HONED_TEST_IMAGES" not in os.environ:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def builder() -> Tool:
    return find_builder()


@pytest.fixture(scope="session")
def images(builder: Tool) -> Images:
    """All images of overlays/local-cpu, built now."""
    images = Images(builder, os.environ.get("BASE", ""), os.environ.get("BUILD_OPTIONS", ""))
    images.build()
    return images


@pytest.fixture(scope="session")
def runner(builder: Tool) -> Tool:
    """docker or podman: buildah builds, and runs nothing as a kubelet would."""
    runner = find_runner(builder)
    if runner is None:
        pytest.fail("neither docker nor podman is there to run containers; buildah only builds them")
    return runner


@pytest.fixture(scope="session")
def world(images: Images, runner: Tool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """What the pods of overlays/local-cpu find in their volumes; its files are removed by the user who wrote them."""
    root = tmp_path_factory.mktemp("world")
    local_table(root / "made-tokens")
    world = World(root, images, runner)
    try:
        yield world
    finally:
        world.clear()


@pytest.fixture(scope="session")
def redis(world: World) -> Iterator[None]:
    """Redis as the cluster runs it."""
    with world.running("honed-redis") as container:
        container.until_it_answers("/bin/sh", "/etc/redis/ping.sh")
        yield


@pytest.fixture(scope="session")
def version(world: World) -> None:
    """The first version of the policy, by the pretraining job's own containers."""
    world.to_its_end("honed-pretrain", init="data")
    world.to_its_end("honed-pretrain")
    assert list(world.store.rglob("model.safetensors")), "the job ended well and published nothing"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Images of gigabytes take longer to build than the timeout of other tests; every wait here has a deadline of its own."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.timeout(0))
