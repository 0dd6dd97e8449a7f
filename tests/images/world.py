"""The volumes of overlays/local-cpu as directories of this machine, and its pods' containers with the manifests' commands."""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import yaml
from tests.deploy.manifests import Workload, of_kind, overlay, run_tree, workloads
from tests.images.containers import Container, Images, Tool

OVERLAY: Final = "local-cpu"
SECTIONS: Final = ("generation", "reward", "preference", "learner", "conductor")
PORTS: Final = ("port", "control_port", "health_port", "metrics_port")
JOB_S: Final = 300.0
USER: Final = "65532:65532"
ACCOUNT: Final = "/var/run/secrets/kubernetes.io/serviceaccount"


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on: they are held together, so that none comes twice."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [int(found.getsockname()[1]) for found in sockets]
    finally:
        for found in sockets:
            found.close()


class World:
    """One run's volumes. All containers share the machine's network, so every service has ports of its own there."""

    def __init__(self, root: Path, images: Images, tool: Tool) -> None:
        self.root, self._images, self._tool = root, images, tool
        self.workloads = {workload.name: workload for workload in workloads(OVERLAY)}
        self.tree = run_tree(OVERLAY)
        self._claims = {
            claim: self._open(root / claim)
            for workload in self.workloads.values()
            for volume in workload.pod.get("volumes", [])
            if (claim := volume.get("persistentVolumeClaim", {}).get("claimName"))
        }
        (root / "password").write_text("a-password-of-tests")
        self._localise()

    @property
    def store(self) -> Path:
        """Where the policy store is."""
        return self._claims["honed-store"]

    def health_port(self, workload: str) -> int:
        return int(self.tree[workload.removeprefix("honed-")]["health_port"])

    def _localise(self) -> None:
        """The overlay's run file, but for ports and addresses, and a pretraining that is over soon."""
        ports = iter(free_ports(len(SECTIONS) * len(PORTS) + 1))
        for name in SECTIONS:
            section = self.tree[name]
            section |= {port: next(ports) for port in PORTS if port in section} | {"host": "127.0.0.1"}
            section["address"] = f"127.0.0.1:{section['port']}"
        self.redis_port = next(ports)
        self.tree["queue"]["url"] = f"redis://127.0.0.1:{self.redis_port}/0"
        self.tree["pretrain"] |= {"seconds": 5, "tokens": 20_000, "vocabulary": 512, "hidden_size": 64}
        (self.root / "run.yaml").write_text(yaml.safe_dump(self.tree))

    @contextmanager
    def running(
        self, name: str, mounts: Mapping[str, Path] | None = None, variables: Mapping[str, str] | None = None
    ) -> Iterator[Container]:
        """The main container of a workload, as long as the block runs; `mounts` beside what the manifest names."""
        with self._container(self.workloads[name], None, mounts or {}, variables or {}) as container:
            yield container

    def to_its_end(self, name: str, init: str | None = None) -> str:
        """Runs the container of a job, or an init container of that name, and what it left stays for the next; its logs."""
        with self._container(self.workloads[name], init, {}, {}) as container:
            container.wait(JOB_S)
            return container.logs()

    def publish_reward_model(self, model: Path, source: str) -> None:
        """What the reward model's job leaves in the store, of the directory `model`; by the store's own user."""
        program = f"""
from pathlib import Path
from honed.artifacts.manifest import Lineage
from honed.artifacts.reward_models import RewardModelStore
store = RewardModelStore("/store", {self.tree["run"]!r}, {source!r})
store.publish_next(Path("/model"), Lineage(created_at="2026-01-01T00:00:00+00:00"))
"""
        for path in model.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes files that its own user alone reads
        mounts = ["--volume", f"{self.store}:/store", "--volume", f"{model}:/model:ro", "--tmpfs", "/tmp:rw,mode=1777"]
        with Container(self._tool, self._images.reference("honed"), USER, mounts, ["python3", "-c", program]) as container:
            container.wait(60)

    def clear(self) -> None:
        """Removes everything as the user who wrote it: that may be none of this machine's."""
        # What belongs to somebody else stays, and is removed from outside.
        remove = ["/bin/sh", "-c", "rm -rf /world/*/* 2>/dev/null; true"]
        mount = ["--volume", f"{self.root}:/world"]
        with Container(self._tool, self._images.reference("honed"), USER, mount, remove) as container:
            container.wait(60)
        shutil.rmtree(self.root)

    def _container(
        self, workload: Workload, init: str | None, mounts: Mapping[str, Path], more: Mapping[str, str]
    ) -> Container:
        tree = next(c for c in workload.every_container if c["name"] == init) if init else workload.containers[0]
        found = {**self._variables(tree), **more}
        if workload.name == "honed-redis":
            found["PORT"] = str(self.redis_port)
        security = workload.pod["securityContext"]
        options = [part for name, value in found.items() for part in ("--env", f"{name}={value}")]
        for mount in tree["volumeMounts"]:
            options += self._mount(workload, mount)
        for place, path in mounts.items():
            options += ["--volume", f"{path}:{place}:ro"]
        image, _, _ = tree["image"].partition(":")
        command = [_expand(part, found) for part in [*tree["command"], *tree.get("args", [])]]
        user = f"{security['runAsUser']}:{security['runAsGroup']}"
        return Container(self._tool, self._images.reference(image), user, options, command)

    def _variables(self, container: Mapping[str, Any]) -> dict[str, str]:
        """The manifest's environment, as a kubelet gives it."""
        fields = {"metadata.namespace": "honed", "metadata.name": "pod", "metadata.uid": "uid", "status.podIP": "127.0.0.1"}
        found: dict[str, str] = {}
        for variable in container.get("env", []):
            source = variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
            found[variable["name"]] = fields[source] if source else _expand(variable["value"], found)
        return found

    def _mount(self, workload: Workload, mount: Mapping[str, Any]) -> list[str]:
        volume, place = workload.volume(mount["name"]), mount["mountPath"]
        if "persistentVolumeClaim" in volume:
            path = self._claims[volume["persistentVolumeClaim"]["claimName"]]
        elif "configMap" in volume:
            path = self._config(volume["configMap"]["name"], mount.get("subPath"))
        elif "emptyDir" not in volume:
            path = self._secrets(workload)
            path = path / "redis" if place.endswith("redis") else path / "tokens"
        elif place == "/dev/shm":
            return ["--shm-size", volume["emptyDir"]["sizeLimit"].replace("Mi", "m")]
        elif place == "/tmp":
            return ["--tmpfs", "/tmp:rw,exec,mode=1777"]
        else:
            # Init containers leave things there for the others of the pod.
            path = self._open(self.root / f"{workload.name}-{mount['name']}")
        return ["--volume", f"{path}:{place}" + (":ro" if mount.get("readOnly") else "")]

    def _config(self, name: str, key: str | None) -> Path:
        """A ConfigMap's files; of the run file, this machine's."""
        if key == "run.yaml":
            return self.root / key
        [found] = [tree for tree in of_kind(overlay(OVERLAY), "ConfigMap") if tree["metadata"]["name"] == name]
        folder = self._open(self.root / name)
        for file, text in found["data"].items():
            (folder / file).write_text(text)
        return folder

    def _secrets(self, workload: Workload) -> Path:
        """Those Secrets' keys that the pod sees, and no others."""
        root = self._open(self.root / f"{workload.name}-secrets")
        for folder in ("tokens", "redis"):
            self._open(root / folder)
        for secret, key in workload.secrets():
            source = self.root / "password" if secret == "honed-redis" else self.root / "made-tokens" / key
            target = root / ("redis" if secret == "honed-redis" else "tokens") / key
            target.write_bytes(source.read_bytes())
            target.chmod(0o444)
        return root

    @staticmethod
    def _open(folder: Path) -> Path:
        """A directory that the containers' user may write to: a kubelet does it by fsGroup."""
        folder.mkdir(exist_ok=True)
        folder.chmod(0o777)
        return folder


def _expand(text: str, variables: Mapping[str, str]) -> str:
    """`$(NAME)` in a manifest."""
    return re.sub(r"\$\((\w+)\)", lambda found: variables[found[1]], text)
