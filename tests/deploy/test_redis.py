"""The scripts of the Redis pod, run with a real server: the password is in no argument, and is replaced while it runs."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import redis.exceptions as rex
from tests.deploy.manifests import DEPLOY, named, overlay
from tests.support.waiting import wait_until

from honed.config import RunSettings
from honed.queue.connection import RetryPolicy
from honed.queue.embedded import free_port, redis_server_binary
from honed.runtime import redis_link

pytestmark = pytest.mark.redis

COMPONENT = DEPLOY / "components" / "redis"
DEADLINE_S = 20.0


class Pod:
    """The pod's main container, as far as its scripts go."""

    def __init__(self, folder: Path) -> None:
        self.port, self.folder = free_port(), folder
        self.password = folder / "password"
        binary = Path(redis_server_binary())
        for name in ("redis-server", "redis-cli"):
            (folder / "bin").mkdir(exist_ok=True)
            found = shutil.which(name) or str(binary.with_name(name))
            (folder / "bin" / name).symlink_to(found)
        (folder / "data").mkdir()
        self.environment = {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "PORT": str(self.port),
            "PASSWORD_FILE": str(self.password),
            "TMPDIR": str(folder),
            "DATA": str(folder / "data"),
            "LOOK_S": "0.2",
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = ["/bin/sh", str(COMPONENT / "serve.sh")]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        wait_until(lambda: self.ping() == 0)

    def stop(self) -> int:
        assert self._process is not None
        self._process.terminate()
        code = self._process.wait(DEADLINE_S)
        # In a container what is left ends with its first process.
        subprocess.run(["pkill", "-g", str(self._process.pid)], check=False)
        return code

    @property
    def command_line(self) -> str:
        assert self._process is not None
        return Path(f"/proc/{self._process.pid}/cmdline").read_text().replace("\0", " ")

    def ping(self) -> int:
        return subprocess.run(["/bin/sh", str(COMPONENT / "ping.sh")], env=self.environment, capture_output=True).returncode

    def client(self, password: str) -> redis.Redis:
        return redis.Redis(port=self.port, password=password, socket_timeout=5)


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Pod]:
    pod = Pod(tmp_path)
    pod.password.write_text("first\n")
    pod.start()
    yield pod
    pod.stop()


def accepts(pod: Pod, password: str) -> bool:
    with pod.client(password) as client:
        try:
            return bool(client.execute_command("PING"))
        except (rex.AuthenticationError, rex.ResponseError):
            return False


def test_it_asks_for_the_password_and_shows_it_to_nobody(pod: Pod) -> None:
    assert accepts(pod, "first")
    assert not accepts(pod, "wrong")
    assert "redis-server" in pod.command_line
    assert "first" not in pod.command_line
    assert (pod.folder / "redis.conf").stat().st_mode & 0o077 == 0


def test_a_new_password_is_taken_while_it_runs_and_the_old_one_ends_with_the_next_start(pod: Pod) -> None:
    with pod.client("first") as client:
        client.set("kept", "yes")
    pod.password.write_text("second\n")
    wait_until(lambda: accepts(pod, "second"))
    assert accepts(pod, "first")
    assert pod.ping() == 0
    pod.stop()
    pod.start()
    assert (accepts(pod, "second"), accepts(pod, "first")) == (True, False)
    with pod.client("second") as client:
        assert client.get("kept") == b"yes"  # the append-only file


def test_it_never_throws_work_away(pod: Pod) -> None:
    with pod.client("first") as client:
        told = {name: client.config_get(name)[name] for name in ("appendonly", "maxmemory-policy", "save")}
    assert told == {"appendonly": "yes", "maxmemory-policy": "noeviction", "save": ""}


def test_without_a_password_it_does_not_start(tmp_path: Path) -> None:
    pod = Pod(tmp_path)
    pod.password.write_text("\n")
    done = subprocess.run(
        ["/bin/sh", str(COMPONENT / "serve.sh")], env=pod.environment, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.returncode == 1
    assert done.stderr == "the Secret honed-redis holds an empty password\n"


def test_its_memory_stays_below_the_limit_with_a_rewrite_of_the_file() -> None:
    [container] = named(overlay("local-cpu"), "StatefulSet", "honed-redis")["spec"]["template"]["spec"]["containers"]
    [line] = [line for line in (COMPONENT / "redis.conf").read_text().splitlines() if line.startswith("maxmemory ")]
    assert container["resources"]["limits"]["memory"] == "768Mi"
    assert int(line.split()[1].removesuffix("mb")) * 2 <= 768


async def test_a_service_follows_the_password_without_a_restart_of_its_own(pod: Pod) -> None:
    queue = {"url": f"redis://127.0.0.1:{pod.port}/0", "password_file": str(pod.password)}
    settings = RunSettings.model_validate({"run": "r", "queue": queue})
    async with redis_link(settings, RetryPolicy(deadline_s=DEADLINE_S)) as link:
        assert await link.command("SET", "kept", "yes")
        await asyncio.to_thread(pod.password.write_text, "second\n")
        await asyncio.to_thread(wait_until, lambda: accepts(pod, "second"))
        await asyncio.to_thread(pod.stop)
        await asyncio.to_thread(pod.start)
        assert not await asyncio.to_thread(accepts, pod, "first")
        assert await link.command("GET", "kept") == b"yes"
