"""Claims about the images, of what was really built; and each service's container serves, started as a cluster starts it."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import ipaddress
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from scripts import images as script
from scripts import locks
from tests.images.containers import Container, Images, Tool
from tests.images.world import ACCOUNT, World
from tests.support import cluster as stand_in
from tests.support.authority import Authority
from tests.unit.reward.support import make_reward_model

from honed.client import Client

LIMIT_MB = 250
LOCKS = {
    "honed": "honed",
    "honed-reward": "reward",
    "honed-learner-cpu": "learner-cpu",
    "honed-generation-cpu": "generation-cpu",
}
BUILT = ("honed", "honed-redis", "honed-demo-data", "honed-reward", "honed-learner-cpu", "honed-generation-cpu")
NEVER = ("pip", "pip3", "gcc", "g++", "cc", "c++", "clang", "make", "ld")
UNWRITABLE = ("/", "/etc", "/opt/honed", "/run", "/var/tmp")
START_S = 180.0


def said(runner: Tool, images: Images, name: str, command: str) -> list[str]:
    """What a shell in an image prints, line by line, as a pod's user on a read-only root."""
    with Container(runner, images.reference(name), "65532:65532", [], ["/bin/sh", "-c", command]) as container:
        container.wait(60)
        return container.logs().splitlines()


def test_the_tests_build_what_make_images_builds(images: Images) -> None:
    assert set(images.names) == set(BUILT)
    lines = images.printed.splitlines()
    assert len(lines) == len(BUILT)
    assert all(" MB over its base" in line for line in lines), lines


def test_the_image_without_torch_is_small(images: Images) -> None:
    own = images.size(images.reference("honed")) - images.size(images.base("honed"))
    assert 0 < own / 1e6 <= LIMIT_MB


@pytest.mark.parametrize("name", BUILT)
def test_an_image_says_what_it_is_and_runs_as_nobody_special(images: Images, name: str) -> None:
    configuration = images.configuration(name)
    assert configuration["User"] == "65532:65532"
    labels = {key.removeprefix("org.opencontainers.image."): value for key, value in configuration["Labels"].items()}
    assert labels["title"] == name.removesuffix("-cpu")
    assert (labels["version"], labels["revision"]) == (script.version(), script.revision())
    assert labels["base.name"] == images.base(name)
    assert labels["description"]
    assert name == "honed-demo-data" or labels["licenses"]
    kept = " ".join(configuration["Env"])
    assert not [word for word in ("PIP_", "PROXY", "proxy") if word in kept], kept  # of the machine that built it


@pytest.mark.parametrize("name", BUILT)
def test_an_image_has_no_pip_and_no_compiler(images: Images, runner: Tool, name: str) -> None:
    search = f"for name in {' '.join(NEVER)}; do command -v $name; done; python3 -c 'import pip' 2>/dev/null && echo pip; true"
    assert said(runner, images, name, search) == []


@pytest.mark.parametrize("name", BUILT)
def test_its_user_can_write_nowhere(images: Images, runner: Tool, name: str) -> None:
    tries = "; ".join(f"touch {place}/x 2>/dev/null && echo {place}" for place in UNWRITABLE)
    assert said(runner, images, name, f"id -u; {tries}; true") == ["65532"]


@pytest.mark.parametrize("name", LOCKS)
def test_the_list_of_packages_is_the_lock_and_honed(images: Images, runner: Tool, name: str) -> None:
    listed = "json.load(open('/opt/honed/share/sbom.cdx.json'))['components']"
    read = f"import json; print([(found['name'], found['version']) for found in {listed}])"
    [line] = said(runner, images, name, f'python3 -c "{read}"')
    found = {
        package.lower().replace("_", "-").replace(".", "-"): version.partition("+")[0]
        for package, version in ast.literal_eval(line)
    }
    wanted = {**locks.pins(locks.LOCKS / f"{LOCKS[name]}.lock"), "honed": script.version()}
    assert found == wanted


def test_the_image_without_torch_opens_a_bucket_and_a_cluster(images: Images, runner: Tool) -> None:
    program = """
import importlib.util, os
assert importlib.util.find_spec("torch") is None
os.environ |= {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
from honed.artifacts.files import open_backend
from honed.kit.errors import Unavailable
import honed.conductor.cluster.api, honed.cluster.portforward
try:
    open_backend("s3://bucket/policy", 5.0).list_names("bucket/policy")
except Unavailable as error:
    print("unavailable")
"""
    with Container(
        runner, images.reference("honed"), "65532:65532", ["--tmpfs", "/tmp:rw,mode=1777"], ["python3", "-c", program]
    ) as container:
        container.wait(60)
        assert container.logs().splitlines()[-1:] == ["unavailable"]


def test_preference_serves(world: World) -> None:
    with world.running("honed-preference") as container:
        both(world, container, "preference")


@pytest.mark.usefixtures("redis", "version")
def test_generation_serves_with_vllm_and_without_a_compiler(world: World) -> None:
    assert "is there" in world.to_its_end("honed-generation", init="version")
    with world.running("honed-generation") as container:
        both(world, container, "generation")
        # Sampling has steps of its own, some of which vLLM would have compiled at the first request.
        token = world.root / "made-tokens" / "application.token"
        with Client(generation=world.tree["generation"]["address"], token_file=token) as client:
            samples = client.generate("the film is", n=2, max_tokens=8, fixed_length=True, top_k=9, top_p=0.9, logprobs=True)
        assert [len(sample.logprobs) for sample in samples] == [8, 8], samples


@pytest.mark.usefixtures("redis", "version")
def test_the_learner_serves(world: World) -> None:
    with world.running("honed-learner") as container:
        both(world, container, "learner")


@pytest.mark.usefixtures("redis", "version")
def test_reward_serves_a_trained_model(world: World, tmp_path: Path) -> None:
    [scorer] = world.tree["reward"]["scorers"]
    with world.running("honed-reward") as container:
        container.until_it_serves(world.health_port("honed-reward"), "", START_S)
        world.publish_reward_model(make_reward_model(tmp_path / "model", seed=1), scorer["source"])
        both(world, container, "reward")


@pytest.mark.usefixtures("redis")
def test_the_conductor_serves_in_a_pod(world: World, cluster: dict[str, str], account: Path) -> None:
    world.to_its_end("honed-conductor", init="data")
    with world.running("honed-conductor", {ACCOUNT: account}, cluster) as container:
        both(world, container, "conductor")


def both(world: World, container: Container, service: str) -> None:
    """Alive, and ready for work."""
    port = world.health_port(f"honed-{service}")
    container.until_it_serves(port, "", START_S)
    container.until_it_serves(port, f"honed.v1.{service.capitalize()}Service", START_S)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "authority", x509.IPAddress(ipaddress.ip_address("127.0.0.1")))


@pytest.fixture
def account(tmp_path: Path, authority: Authority) -> Path:
    """A service account as a kubelet mounts it."""
    folder = tmp_path / "account"
    folder.mkdir()
    (folder / "ca.crt").write_bytes((tmp_path / "authority.pem").read_bytes())
    (folder / "token").write_text(stand_in.TOKEN)
    (folder / "namespace").write_text(stand_in.NAMESPACE)
    return folder


@pytest.fixture
def cluster(authority: Authority) -> Iterator[dict[str, str]]:
    """The API that the conductor asks (tests/support/cluster.py), and the variables by which a pod finds it."""
    files = authority.issue("api")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    api = stand_in.Cluster()
    serving = api.serving(context)
    try:
        with contextlib.ExitStack() as stack:
            asyncio.run_coroutine_threadsafe(serving.__aenter__(), loop).result(30)
            stack.callback(lambda: asyncio.run_coroutine_threadsafe(serving.__aexit__(None, None, None), loop).result(30))
            host, _, port = api.url.removeprefix("https://").partition(":")
            yield {"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port}
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
