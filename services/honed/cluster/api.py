"""One namespace of a Kubernetes cluster, as its API server answers for it: plain JSON, a deadline a request, clear errors.

The official client reads the kubeconfig, authenticates and sends; its models are left out: they take seconds to import, and
refuse what a newer API server adds.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

import urllib3
from kubernetes.client import Configuration
from kubernetes.client.exceptions import ApiException
from kubernetes.client.rest import RESTClientObject
from kubernetes.config import ConfigException, load_incluster_config, load_kube_config

from honed import __version__
from honed.cluster.kubeconfig import NAMESPACE, choose, find_kubeconfigs, read_contexts
from honed.kit.errors import Conflict, FailedPrecondition, HonedError, NotFound, PermissionDenied, Unauthenticated, Unavailable

MERGE_PATCH: Final = "application/merge-patch+json"

_CONNECT_S: Final = 5.0
_READ_S: Final = 30.0
_RETRIES: Final = 2
_LONGEST_PAUSE_S: Final = 5
_SERVICE_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class Cluster:
    """One namespace of a cluster.

    Attributes:
        configuration: of the official client.
        namespace: where the run is.
        context: of the kubeconfig; empty inside of a cluster.
    """

    def __init__(self, configuration: Any, namespace: str, context: str = "") -> None:
        """Connects to nothing yet; `configuration` names the server and says who asks."""
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # it tells of each retry
        configuration.retries = urllib3.Retry(
            total=_RETRIES,
            status_forcelist=(429, 500, 502, 503, 504),
            # Everything that is sent from here may be sent twice: what exists already is read instead.
            allowed_methods=None,
            backoff_factor=0.2,
            raise_on_status=False,
            retry_after_max=_LONGEST_PAUSE_S,
        )
        self.configuration, self.namespace, self.context = configuration, namespace, context
        self._rest = RESTClientObject(configuration)
        self._end: float | None = None

    @contextmanager
    def briefly(self, seconds: float) -> Iterator[Cluster]:
        """The same namespace; all that is asked of it in the block ends within so many seconds, and nothing is tried again.

        For what is worth no longer wait, such as the words of an error.
        """
        brief = copy.copy(self)
        brief.configuration = copy.copy(self.configuration)
        brief.configuration.retries = urllib3.Retry(total=0)
        brief._rest = RESTClientObject(brief.configuration)
        brief._end = time.monotonic() + seconds
        try:
            yield brief
        finally:
            brief._rest.pool_manager.clear()

    @classmethod
    def of(cls, asked: str = "", environment: Mapping[str, str] = os.environ) -> Cluster:
        """The cluster that a person means.

        Args:
            asked: CONTEXT/NAMESPACE; either may be left out: the current context, the context's namespace or `honed`.
            environment: has KUBECONFIG, if it is set.

        Raises:
            FailedPrecondition: there is no kubeconfig, or no such context; says what to do.
        """
        configuration = Configuration()
        paths = find_kubeconfigs(environment)
        if not paths:
            if "KUBERNETES_SERVICE_HOST" not in environment:
                raise FailedPrecondition(
                    f"there is no kubeconfig at {environment.get('KUBECONFIG') or '~/.kube/config'}: let your cluster's tool "
                    "write one (such as `kind export kubeconfig`), or name yours by KUBECONFIG"
                )
            try:
                load_incluster_config(client_configuration=configuration)
            except ConfigException as error:
                raise FailedPrecondition(f"this Pod has no usable service account: {error}") from error
            return cls(configuration, asked.strip("/") or _own_namespace())
        context, namespace = choose(asked, *read_contexts(paths))
        try:
            load_kube_config(os.pathsep.join(map(str, paths)), context.name, configuration)
        except (ConfigException, OSError, ValueError, KeyError, TypeError) as error:
            raise FailedPrecondition(f"context {context.name!r} of the kubeconfig cannot be used: {error}") from error
        return cls(configuration, namespace, context.name)

    @property
    def name(self) -> str:
        """The namespace with its context, for people."""
        return f"{self.context}/{self.namespace}" if self.context else self.namespace

    @property
    def kubectl(self) -> str:
        """How kubectl is told to look here, for advice."""
        return " ".join(("kubectl", *(("--context", self.context) if self.context else ()), "-n", self.namespace))

    def core(self, kind: str, name: str = "", sub: str = "") -> str:
        """The path of objects of the core API in the namespace, or of one of them."""
        return "/".join(part for part in (f"/api/v1/namespaces/{self.namespace}/{kind}", name, sub) if part)

    def group(self, group: str, kind: str, name: str = "", sub: str = "") -> str:
        """The same for an API group, such as `apps/v1`."""
        return "/".join(part for part in (f"/apis/{group}/namespaces/{self.namespace}/{kind}", name, sub) if part)

    def get(self, path: str, **query: str) -> dict[str, Any]:
        """Reads an object or a list.

        Raises:
            HonedError: as `call`.
        """
        return self.call("GET", path + (f"?{urlencode(query)}" if query else ""))

    def find(self, path: str) -> dict[str, Any] | None:
        """Reads an object; None if it is not there.

        Raises:
            HonedError: as `call`.
        """
        try:
            return self.get(path)
        except NotFound:
            return None

    def call(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> dict[str, Any]:
        """Makes one request. Overload and a server that is away for a moment are waited out.

        Raises:
            Unauthenticated: the server does not know who asks.
            PermissionDenied: who asks has not the right.
            NotFound: no such object.
            Conflict: the object is there already.
            FailedPrecondition: the server refuses what is asked.
            Unavailable: it does not answer, or something else does.
        """
        headers = {**self.headers(), "Accept": "application/json", "User-Agent": f"honed/{__version__}"}
        if body is not None:
            headers["Content-Type"] = kind
        try:
            response = self._rest.request(
                method, self.configuration.host + path, headers, body, _request_timeout=self._timeouts_s()
            )
            data = response.read()
        except (ApiException, urllib3.exceptions.HTTPError, OSError) as error:
            raise self.away(error) from error
        if not 200 <= response.status < 300:
            raise self.refused(response.status, data)
        try:
            tree = json.loads(data)
        except ValueError:
            tree = None
        if not isinstance(tree, dict):
            raise self.away(ValueError(f"status {response.status} with no JSON object: a proxy or a login page is there"))
        return tree

    def _timeouts_s(self) -> tuple[float, float]:
        """For connecting and for reading, in seconds."""
        if self._end is None:
            return _CONNECT_S, _READ_S
        left_s = self._end - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("there was no time left to ask it")
        return left_s / 2, left_s / 2

    def headers(self) -> dict[str, str]:
        """Who asks, for the official client's functions that take headers; refreshed when it has run out."""
        token = self.configuration.get_api_key_with_prefix("BearerToken", alias="authorization")
        return {"authorization": token} if token else {}

    def away(self, error: Exception) -> Unavailable:
        """What a request becomes that no answer came to."""
        reason = getattr(error, "reason", None) or error
        said = " ".join(str(reason).split()) or type(error).__name__
        return Unavailable(
            f"the API server {self.configuration.host}{self._of_context} does not answer ({said}): check the network, or the "
            f"kubeconfig; `{self.kubectl} get pods` shows the same"
        )

    def refused(self, status: int, body: bytes) -> HonedError:
        """What an answer other than success becomes."""
        said = _message(body) or f"HTTP status {status}"
        if status == 401:
            return Unauthenticated(
                f"the API server {self.configuration.host} does not accept the credentials{self._of_context}: log in again, as "
                f"your cluster's tool does it; `{self.kubectl} auth whoami` shows who you are"
            )
        if status == 403:
            return PermissionDenied(f"{said}: ask who runs the cluster for that right{self._of_context}")
        if status == 404:
            return NotFound(said)
        if status == 409:
            return Conflict(said)
        if status == 429 or status >= 500:
            return Unavailable(f"the API server {self.configuration.host} answers {status}: {said}; try again")
        return FailedPrecondition(f"the API server refuses that: {said}")

    @property
    def _of_context(self) -> str:
        return f" of context {self.context!r}" if self.context else ""


def _own_namespace() -> str:
    try:
        return (_SERVICE_ACCOUNT / "namespace").read_text().strip()
    except OSError:
        return NAMESPACE


def _message(body: bytes) -> str:
    """What a Status object says, or the first line of another answer."""
    try:
        tree = json.loads(body)
        return str(tree.get("message") or tree.get("reason") or "") if isinstance(tree, dict) else ""
    except ValueError:
        lines = body.decode(errors="replace").strip().splitlines()
        return lines[0][:200] if lines else ""


def items(tree: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The objects of a list."""
    yield from tree.get("items") or ()
