"""docker, podman and buildah: images built by scripts/images.py, and containers that run as a kubelet would run them."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from scripts import images as script

TAG: Final = "tested"
BUILD_S: Final = 3600.0
COMMAND_S: Final = 120.0


@dataclass(frozen=True)
class Tool:
    """One of the programs, with its options before each command."""

    name: str
    options: tuple[str, ...]

    def __call__(self, *arguments: str, timeout_s: float = COMMAND_S, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [self.name, *self.options, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
        assert not check or done.returncode == 0, f"{shlex.join(command)}: {done.stderr[-2000:]}"
        return done


def find_builder() -> Tool:
    """What `make images` takes, with TOOL= and TOOL_OPTIONS=. Without any the tests end with what to install."""
    try:
        name = script.find_tool(os.environ.get("TOOL") or None)
    except SystemExit as error:
        pytest.exit(str(error), returncode=1)
    return Tool(name, tuple(shlex.split(os.environ.get("TOOL_OPTIONS", ""))))


def find_runner(builder: Tool) -> Tool | None:
    """What runs containers of the images that `builder` has: itself, or podman on the storage that it shares with buildah."""
    if builder.name != "buildah":
        return builder
    return Tool("podman", builder.options) if shutil.which("podman") else None


class Images:
    """The images of `make images` under a tag of the tests' own: they replace none that is in use."""

    def __init__(self, tool: Tool, base: str, build_options: str) -> None:
        self.tool, self._base, self._build_options = tool, base, build_options
        self.names = [name for name, image in script.KNOWN.items() if image.default]

    def build(self) -> None:
        command = [
            sys.executable,
            str(script.ROOT / "scripts" / "images.py"),
            *self.names,
            "--tag",
            TAG,
            "--tool",
            self.tool.name,
        ]
        command += [f"--tool-options={shlex.join(self.tool.options)}", f"--build-options={self._build_options}"]
        if self._base:
            command += ["--base", self._base]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=BUILD_S)
        if done.returncode != 0:
            pytest.exit("the images were not built; the reason is above", returncode=1)
        self.printed = done.stdout

    def base(self, name: str) -> str:
        return self._base or script.pinned_base(name)

    def reference(self, name: str) -> str:
        """How the tool finds it: docker.io's short names lead to a registry in podman, and to the local image in docker."""
        return f"{name}:{TAG}" if self.tool.name == "docker" else f"localhost/{name}:{TAG}"

    def size(self, reference: str) -> int:
        found = script.size(self.tool.name, reference, self.tool.options)
        assert found is not None, f"{self.tool.name} does not know {reference}"
        return found

    def configuration(self, name: str) -> dict[str, Any]:
        """The image's own: User, Labels, Entrypoint, Env."""
        if self.tool.name == "buildah":
            found = json.loads(self.tool("inspect", "--type", "image", self.reference(name)).stdout)["OCIv1"]["config"]
        else:
            found = json.loads(self.tool("image", "inspect", self.reference(name)).stdout)[0]["Config"]
        configuration: dict[str, Any] = found
        return configuration


# What overlays/local-cpu asks of every pod, and a kubelet does: tests/deploy/test_workloads.py holds the manifests to it.
RESTRICTED: Final = ("--read-only", "--cap-drop", "all", "--security-opt", "no-new-privileges", "--network", "host")


class Container:
    """One that was started. It ends with the block, whatever happened."""

    def __init__(self, tool: Tool, image: str, user: str, options: Sequence[str], command: Sequence[str]) -> None:
        self._tool = tool
        self.name = f"honed-tested-{uuid.uuid4().hex[:8]}"
        own = shlex.split(os.environ.get("RUN_OPTIONS", ""))
        # podman would make /run, /tmp and /var/tmp writable by itself, which a kubelet does not.
        strict = ["--read-only-tmpfs=false"] if tool.name == "podman" else []
        first, *rest = command
        place = ["--detach", "--name", self.name, "--user", user, *RESTRICTED, *strict, *own, *options, "--entrypoint", first]
        self._arguments = ["run", *place, image, *rest]

    def __enter__(self) -> Container:
        try:
            self._tool(*self._arguments)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._tool("rm", "--force", "--volumes", self.name, check=False)

    def exit_code(self) -> int | None:
        """None while it runs."""
        state = json.loads(self._tool("inspect", self.name).stdout)[0]["State"]
        return None if state["Running"] else int(state["ExitCode"])

    def logs(self) -> str:
        done = self._tool("logs", self.name, check=False)
        return (done.stdout + done.stderr)[-6000:]

    def wait(self, timeout_s: float) -> None:
        """Until it has ended well."""
        end = time.monotonic() + timeout_s
        while (code := self.exit_code()) is None:
            assert time.monotonic() < end, f"it still runs after {timeout_s:g} s: {self.logs()}"
            time.sleep(0.5)
        assert code == 0, f"exit status {code}: {self.logs()}"

    def until_it_answers(self, *command: str, timeout_s: float = 60.0) -> None:
        """Until a command inside of it ends well, as a kubelet's exec probe."""
        end = time.monotonic() + timeout_s
        while self._tool("exec", self.name, *command, check=False).returncode != 0:
            assert self.exit_code() is None, f"it has ended: {self.logs()}"
            assert time.monotonic() < end, f"no answer after {timeout_s:g} s: {self.logs()}"
            time.sleep(0.5)

    def until_it_serves(self, port: int, service: str, timeout_s: float) -> None:
        """Until its health port says SERVING, as a kubelet's grpc probe."""
        end, answer = time.monotonic() + timeout_s, "nothing"
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while True:
                try:
                    status = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5).status
                    answer = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
                except grpc.RpcError as error:
                    answer = str(error)
                if answer == "SERVING":
                    return
                where = f"the health of {service or 'the process'} at {port}: {answer}"
                assert self.exit_code() is None, f"it has ended; {where}\n{self.logs()}"
                assert time.monotonic() < end, f"after {timeout_s:g} s {where}\n{self.logs()}"
                time.sleep(0.5)
