"""A run on a cluster: the way to its services and its Redis, with the tokens and certificates that the caller may read."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit

import yaml

from honed.cluster import names
from honed.cluster.api import Cluster
from honed.cluster.forward import Forward
from honed.cluster.peer import ForwardedPeer
from honed.cluster.pods import Pod, list_pods, none_ready
from honed.kit.errors import DataLoss, FailedPrecondition, PermissionDenied
from honed.kit.tls import TlsTexts
from honed.kit.tokens import read_token

_CERTIFICATES: Final = ("ca.crt", "tls.crt", "tls.key")
# The application's token is enough for what applications call.
_TOKENS: Final = {"generation": ("operator", "application"), "reward": ("operator", "application")}


@dataclass(frozen=True)
class Facts:
    """What a client has to know of a run's settings. The run file itself may be of a newer honed than this one."""

    run: str = "local"
    authentication: bool = True
    tls: bool = False
    server_name: str = ""
    redis_url: str = ""


class ClusterRun:
    """One run in one namespace."""

    def __init__(self, cluster: Cluster, environment: Mapping[str, str] = os.environ) -> None:
        """Asks for nothing yet; `environment` may have HONED_TOKEN."""
        self.cluster, self._environment = cluster, environment
        self._secrets: dict[str, dict[str, str] | None] = {}

    @cached_property
    def pods(self) -> list[Pod]:
        """The run's Pods when they were first asked for; see `look_again`."""
        return list_pods(self.cluster)

    def look_again(self) -> None:
        """Lets the Pods and the Secrets be asked for anew: either may be replaced while a person watches."""
        self.__dict__.pop("pods", None)
        self._secrets.clear()

    @cached_property
    def facts(self) -> Facts:
        """What the run's Pods were started with.

        Raises:
            PermissionDenied: the caller must not read the run file.
            FailedPrecondition: the Pods name none.
        """
        for pod in self._with_run_file():
            if found := self.cluster.find(self.cluster.core("configmaps", _run_map(pod))):
                return read_facts(found.get("data", {}).get(names.RUN_KEY, ""), _variables(pod))
        raise FailedPrecondition(
            f"no Pod in namespace {self.cluster.name} has a run file (ConfigMap {names.RUN_MAP}-…): is honed deployed there?"
        )

    def peer(self, service: str, token_file: Path | None = None, pod: Pod | None = None) -> ForwardedPeer:
        """A connection to one service, or to one Pod of it; nothing is sent to it yet.

        Raises:
            HonedError: no Pod is ready, there is no token, or the API server refuses.
            ValueError: the token file cannot be read.
        """
        pods = [pod] if pod is not None else [each for each in self.pods if each.component == service]
        if not any(each.ready for each in pods):
            raise none_ready(self.cluster, service, pods)
        token, source = self._token(service, token_file)
        tls = self._tls(service)
        forward = Forward(self.cluster, service, "grpc", pods, pinned=pod is not None)
        return ForwardedPeer(service, forward, token, source, tls)

    @contextmanager
    def redis(self) -> Iterator[str]:
        """The URL of the run's Redis, with its password, as long as the block runs.

        Raises:
            HonedError: no Pod is ready, or the API server refuses.
        """
        pods = [pod for pod in self.pods if pod.component == "redis"]
        at = urlsplit(self.facts.redis_url)
        if not pods:
            raise FailedPrecondition(
                f"the run's Redis, {at.hostname or 'which its run file does not name'}, is no Pod of namespace "
                f"{self.cluster.name}: run this where it can be reached, with a run file that names it (--run-file)"
            )
        if not any(pod.ready for pod in pods):
            raise none_ready(self.cluster, "redis", pods)
        secret = self._secret(names.REDIS)
        password = f":{quote(_value(names.REDIS, secret, names.PASSWORD_KEY), safe='')}@" if secret else ""
        with Forward(self.cluster, "redis", "redis", pods) as forward:
            yield f"redis://{password}{forward.address}{at.path or '/0'}"

    def _token(self, service: str, token_file: Path | None) -> tuple[str | None, str]:
        """The token for a service, and where it came from."""
        if token_file is not None:
            return read_token(token_file), str(token_file)
        refused = ""
        for name in _TOKENS.get(service, ("operator",)):
            secret = names.of_token(name)
            try:
                found = self._secret(secret)
            except PermissionDenied as error:
                refused = refused or str(error)
                continue
            if found is not None:
                return _value(secret, found, names.of_token_key(name)), f"Secret {secret}"
        if token := self._environment.get("HONED_TOKEN"):
            return token, "$HONED_TOKEN"
        if not self._known.authentication:
            return None, "nobody"
        why = refused or f"there is no Secret {names.of_token('operator')} in namespace {self.cluster.name}"
        raise FailedPrecondition(f"no token for the {service} service: {why}; or give a token by --token-file or $HONED_TOKEN")

    def _tls(self, service: str) -> TlsTexts | None:
        """The operator's certificate. It goes into no file: its key would stay there when a signal ends this process."""
        if not self._known.tls:
            return None
        secret = self._secret(names.OPERATOR_TLS)
        if secret is None:
            raise FailedPrecondition(
                f"the run's services want certificates (security.tls), and namespace {self.cluster.name} has no Secret "
                f"{names.OPERATOR_TLS} with {', '.join(_CERTIFICATES)}: the component mtls makes it"
            )
        authority, certificate, key = (f"{_value(names.OPERATOR_TLS, secret, name)}\n".encode() for name in _CERTIFICATES)
        return TlsTexts(authority, certificate, key, self._known.server_name or f"honed-{service}")

    @property
    def _known(self) -> Facts:
        """The facts; for who must not read the run file, those that the Pods themselves tell."""
        try:
            return self.facts
        except (PermissionDenied, FailedPrecondition):
            return next((read_facts("", _variables(pod)) for pod in self._with_run_file()), Facts())

    def _with_run_file(self) -> list[Pod]:
        """The Pods that have one, those first that are ready, and the conductor's."""
        found = [pod for pod in self.pods if _run_map(pod)]
        return sorted(found, key=lambda pod: (not pod.ready, pod.component != "conductor"))

    def _secret(self, name: str) -> dict[str, str] | None:
        """A Secret's texts by key; None if there is none of that name."""
        if name not in self._secrets:
            found = self.cluster.find(self.cluster.core("secrets", name))
            data = None if found is None else found.get("data") or {}
            self._secrets[name] = data and {key: base64.b64decode(value).decode() for key, value in data.items()}
        return self._secrets[name]


def read_facts(text: str, variables: Mapping[str, str]) -> Facts:
    """Reads a run file's facts, with environment variables over it.

    Raises:
        DataLoss: it is no run file.
    """
    try:
        tree = yaml.safe_load(text) or {}
        setting = _Settings(tree, variables)
        tls = setting("security.tls")
        return Facts(
            run=str(setting("run") or Facts.run),
            authentication=bool(setting("security.authentication", default=True)),
            tls=bool(tls),
            server_name=str(setting("security.tls.server_name") or ""),
            redis_url=str(setting("queue.url") or ""),
        )
    except (yaml.YAMLError, AttributeError, TypeError) as error:
        raise DataLoss(f"the run file in ConfigMap {names.RUN_MAP} cannot be read: apply the overlay again") from error


class _Settings:
    """Looks keys up in a run file and in the environment over it."""

    def __init__(self, tree: Mapping[str, Any], variables: Mapping[str, str]) -> None:
        self._tree, self._variables = tree, variables

    def __call__(self, key: str, default: Any = None) -> Any:
        variable = "HONED_" + key.upper().replace(".", "__")
        if variable in self._variables:
            return yaml.safe_load(self._variables[variable])
        if any(name.startswith(f"{variable}__") for name in self._variables):
            return True  # a section that the environment alone fills
        found: Any = self._tree
        for part in key.split("."):
            found = (found or {}).get(part)
        return default if found is None else found


def _run_map(pod: Pod) -> str:
    """The ConfigMap with the run file of a Pod; empty if it has none."""
    for volume in pod.tree["spec"].get("volumes") or ():
        for source in (volume, *(volume.get("projected", {}).get("sources") or ())):
            name = str((source.get("configMap") or {}).get("name") or "")
            if name == names.RUN_MAP or name.startswith(f"{names.RUN_MAP}-"):
                return name
    return ""


def _variables(pod: Pod) -> dict[str, str]:
    """What the manifests themselves set, beside the run file."""
    containers = pod.tree["spec"].get("containers") or ()
    variables = (entry for container in containers for entry in container.get("env") or ())
    return {entry["name"]: str(entry["value"]) for entry in variables if "value" in entry}


def _value(secret: str, found: Mapping[str, str], key: str) -> str:
    try:
        return found[key].strip()
    except KeyError:
        raise FailedPrecondition(f"Secret {secret} has no key {key}: it has {', '.join(found) or 'none'}") from None
