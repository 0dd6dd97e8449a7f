"""The API of a Kubernetes cluster as far as the conductor needs it, in one namespace.

Connections, TLS, tokens that rotate and kubeconfigs are the official client's (`kubernetes.aio`). Objects stay
plain JSON: a Job made from a template keeps fields that the client's models do not know, and those models would cost
130 MB. Each call has a deadline. What may pass raises `ApiUnavailable`; repeating it is the caller's (`patience`).

The conductor's service account needs just this:

    batch                cronjobs   get, of honed-pretrain and honed-reward-model
    batch                jobs       list, watch, create, update, delete
    (core)               pods       list
    (core)               pods/log   get
    coordination.k8s.io  leases     get and update, of honed-conductor; create
"""

from __future__ import annotations

import asyncio
import json
import math
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import aiohttp
import yaml
from kubernetes.aio import config
from kubernetes.aio.client import ApiClient, Configuration

from honed.conductor.settings import KubernetesSettings
from honed.kit.errors import Conflict, FailedPrecondition, HonedError, NotFound, Unavailable

Object = dict[str, Any]

CRON_JOBS: Final = "/apis/batch/v1/namespaces/{}/cronjobs"
JOBS: Final = "/apis/batch/v1/namespaces/{}/jobs"
PODS: Final = "/api/v1/namespaces/{}/pods"
LEASES: Final = "/apis/coordination.k8s.io/v1/namespaces/{}/leases"
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")

LONGEST_ASKED_S: Final = 60.0
"""The longest wait that a server may ask for: a proxy's hour is not ours."""
_LOG_BYTES: Final = 4 << 20
_BROKEN: Final = (aiohttp.ClientError, TimeoutError, OSError, ValueError)


class ApiUnavailable(Unavailable):
    """The API server did not answer, could not serve the request now, or does not let this process in.

    Attributes:
        retry_after_s: How long it asks to wait; None if it does not say.
    """

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        """`reason` is for people."""
        super().__init__(reason)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Listing:
    """Objects as they were at one version of the cluster's state, from which a watch can go on."""

    items: list[Object]
    version: str


@dataclass(frozen=True)
class Event:
    """What a watch tells: `kind` is ADDED, MODIFIED or DELETED."""

    kind: str
    object: Object


class Api:
    """Calls in one namespace.

    Every method raises ApiUnavailable, and FailedPrecondition for a request that is wrong by itself.
    """

    def __init__(self, client: Any, namespace: str, timeout_s: float) -> None:
        """`client` is an `ApiClient`; `timeout_s` is the deadline of each call."""
        self._client, self.namespace, self._timeout_s = client, namespace, timeout_s

    async def get(self, resource: str, name: str) -> Object:
        """One object.

        Raises:
            NotFound: There is none of this name.
        """
        return await self._object("GET", self._path(resource, name))

    async def find(self, resource: str, *, labels: Mapping[str, str] | None = None, name: str | None = None) -> Listing:
        """The objects with these labels, or the one of this name if it is there."""
        with _always_there():
            found = await self._object("GET", self._path(resource), _selected(labels or {}, name))
        items, version = found.get("items"), found.get("metadata", {}).get("resourceVersion", "")
        return Listing(list(items or ()), str(version))

    async def create(self, resource: str, body: Object) -> Object:
        """Creates an object. If no answer comes, it may exist all the same.

        Raises:
            Conflict: One of this name exists already, or something else changed at the same moment.
        """
        with _always_there():
            return await self._object("POST", self._path(resource), body=body)

    async def replace(self, resource: str, body: Object) -> Object:
        """Writes an object anew, if it is still of the `resourceVersion` that `body` has.

        Raises:
            Conflict: Somebody else has changed it since.
            NotFound: It has been deleted.
        """
        return await self._object("PUT", self._path(resource, body["metadata"]["name"]), body=body)

    async def delete(self, resource: str, body: Object) -> None:
        """Has an object deleted if it is still of the `resourceVersion` that `body` has; ends when all is gone that it owns.

        Raises:
            Conflict: Somebody else has changed it since.
            NotFound: It has been deleted.
        """
        metadata = body["metadata"]
        unchanged = {"resourceVersion": metadata["resourceVersion"]}
        options = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Foreground", "preconditions": unchanged}
        await self._object("DELETE", self._path(resource, metadata["name"]), body=options)

    async def log(self, pod: str, container: str, lines: int) -> str:
        """The last lines of a container's log.

        Raises:
            NotFound: The pod is gone.
        """
        query = [("container", container), ("tailLines", str(lines)), ("limitBytes", str(_LOG_BYTES))]
        return (await self._read("GET", f"{self._path(PODS, pod)}/log", query)).decode(errors="replace")

    async def watch(self, resource: str, name: str, version: str, timeout_s: float) -> AsyncGenerator[Event, None]:
        """Changes of one object since a version, until the server ends the watch, which it does after `timeout_s`.

        A connection that is dead on one side only is given up a little later: an end that is missing is an error.

        Raises:
            ApiUnavailable: Also when the version is too old to go on from (410).
        """
        query = [
            *_selected({}, name),
            *(("watch", "true"), ("resourceVersion", version), ("allowWatchBookmarks", "true")),
            ("timeoutSeconds", str(math.ceil(timeout_s))),
        ]
        with _always_there():
            response = await self._send("GET", self._path(resource), query, None, timeout_s + self._timeout_s)
        try:
            while line := await response.content.readline():
                event = json.loads(line)
                if event["type"] == "ERROR":
                    raise _refusal(int(event["object"].get("code", 500)), event["object"], None)
                if event["type"] != "BOOKMARK":
                    yield Event(event["type"], event["object"])
        except (*_BROKEN, KeyError, TypeError) as error:
            raise ApiUnavailable(f"a watch of the API broke off: {_reason(error)}") from error
        finally:
            response.close()

    def _path(self, resource: str, name: str | None = None) -> str:
        path = resource.format(quote(self.namespace, safe=""))
        return path if name is None else f"{path}/{quote(name, safe='')}"

    async def _object(self, method: str, path: str, query: list[tuple[str, str]] | None = None, body: Any = None) -> Object:
        try:
            found = json.loads(await self._read(method, path, query, body))
        except ValueError as error:
            raise ApiUnavailable(f"the API server's answer to {method} {path} cannot be read: {error}") from error
        if not isinstance(found, dict):
            raise ApiUnavailable(f"the API server's answer to {method} {path} is no object")
        return found

    async def _read(self, method: str, path: str, query: list[tuple[str, str]] | None = None, body: Any = None) -> bytes:
        response = await self._send(method, path, query, body, self._timeout_s)
        try:
            return bytes(await response.read())
        except _BROKEN as error:
            raise ApiUnavailable(f"the API server's answer broke off: {_reason(error)}") from error
        finally:
            response.close()

    async def _send(self, method: str, path: str, query: list[tuple[str, str]] | None, body: Any, timeout_s: float) -> Any:
        """The response of a request that succeeded, its body unread. Whoever takes it closes it."""
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=self._timeout_s)
        accepted = {"Accept": "application/json, */*", "Content-Type": "application/json"}
        try:
            request = await self._client.param_serialize(
                method, path, query_params=query, header_params=accepted, body=body, auth_settings=["BearerToken"]
            )
            async with asyncio.timeout(self._timeout_s):  # the body of a watch may take longer, its beginning may not
                response = (await self._client.call_api(*request, _request_timeout=timeout)).response
        except (*_BROKEN, config.ConfigException) as error:  # the last: a token file that is being replaced
            raise ApiUnavailable(f"the API server does not answer: {_reason(error)}") from error
        if response.status < 300:
            return response
        try:
            status = json.loads(await response.read())
        except _BROKEN:
            status = None
        finally:
            response.close()
        said = status if isinstance(status, dict) else {}
        raise _refusal(response.status, said, response.headers.get("Retry-After"))


def _selected(labels: Mapping[str, str], name: str | None) -> list[tuple[str, str]]:
    query = [("labelSelector", ",".join(f"{key}={value}" for key, value in labels.items()))] if labels else []
    return query if name is None else [*query, ("fieldSelector", f"metadata.name={name}")]


@contextmanager
def _always_there() -> Iterator[None]:
    """A namespace's objects of one kind are never missing: something between here and the API server says so, for a while."""
    try:
        yield
    except NotFound as error:
        raise ApiUnavailable(f"the API server does not know the namespace's objects: {error}") from error


def _refusal(code: int, status: Object, retry_after: str | None) -> HonedError:
    message = str(status.get("message") or f"status {code}")
    match code:
        case 404:
            return NotFound(message)
        case 409:
            return Conflict(message)
        case 400 | 405 | 413 | 415 | 422:
            return FailedPrecondition(f"the API server refuses this: {message}")
        case 401 | 403:
            return ApiUnavailable(f"the API server does not let the conductor do this: {message}")
    details = status.get("details")
    seconds = retry_after or (details.get("retryAfterSeconds") if isinstance(details, dict) else None)
    return ApiUnavailable(f"the API server cannot serve this now: {message}", _seconds(seconds))


def _seconds(text: object) -> float | None:
    try:
        return min(max(0.0, float(str(text))), LONGEST_ASKED_S)
    except ValueError:  # a date, which no API server sends
        return None


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


@asynccontextmanager
async def connected(settings: KubernetesSettings) -> AsyncIterator[Api]:
    """The API of the cluster that the settings name, as long as the block runs. Nothing is asked yet.

    Raises:
        FailedPrecondition: This process runs in no pod and no kubeconfig is named, or it cannot be used.
    """
    configuration = Configuration()
    try:
        namespace = await _configure(configuration, settings)
    except (config.ConfigException, OSError, yaml.YAMLError, KeyError) as error:
        raise FailedPrecondition(
            f"there is no way to the cluster's API ({_reason(error)}): run in a pod whose service account's token is mounted, "
            "or name a file by conductor.kubernetes.kubeconfig"
        ) from error
    async with ApiClient(configuration) as client:
        client.user_agent = f"honed-conductor/{socket.gethostname()}"
        yield Api(client, namespace, settings.request_timeout_s)


async def _configure(configuration: Configuration, settings: KubernetesSettings) -> str:
    """Fills the client's configuration in; returns the namespace."""
    if settings.kubeconfig is None:
        config.load_incluster_config(client_configuration=configuration)
        return settings.namespace or (SERVICE_ACCOUNT / "namespace").read_text().strip()
    file = str(settings.kubeconfig)
    await config.load_kube_config(file, settings.context, client_configuration=configuration, persist_config=False)
    contexts, current = config.list_kube_config_contexts(file)
    chosen = next((found for found in contexts if found["name"] == settings.context), current)
    return settings.namespace or str(chosen["context"].get("namespace") or "default")
