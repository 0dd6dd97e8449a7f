"""A stand-in of a Kubernetes API server over real HTTP: state, versions, watches, a role, and what goes wrong.

It keeps what the real one promises and the conductor relies on: each change has a resourceVersion of its own, a name exists
once, a replacement of an older version is a conflict, a watch tells every change since a version or says that it is too old,
and a caller may do what its role lists and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import json
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from aiohttp import web

Object = dict[str, Any]

NAMESPACE: Final = "tests"
TOKEN: Final = "a-service-account's-token"
RESOURCES: Final = {
    "cronjobs": "/apis/batch/v1/namespaces/{namespace}/cronjobs",
    "jobs": "/apis/batch/v1/namespaces/{namespace}/jobs",
    "pods": "/api/v1/namespaces/{namespace}/pods",
    "leases": "/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases",
}
ROLE: Final = {
    ("get", "cronjobs", "honed-pretrain"),
    ("get", "cronjobs", "honed-reward-model"),
    ("list", "jobs", ""),
    ("watch", "jobs", ""),
    ("create", "jobs", ""),
    ("update", "jobs", ""),
    ("delete", "jobs", ""),
    ("list", "pods", ""),
    ("get", "pods/log", ""),
    ("get", "leases", "honed-conductor"),
    ("update", "leases", "honed-conductor"),
    ("create", "leases", ""),
}
"""Verb, resource, and the name if the rule is of one object. As `honed.conductor.cluster.api` documents it."""


class Cut(Exception):
    """The connection ends here."""


@dataclass
class Fault:
    """What goes wrong with one request.

    Attributes:
        kind: `refused` (a status, and nothing is done), `cut` (the connection, and nothing is done), `lost` (all is done, and
            the connection is cut instead of an answer), `silent` (nothing is done, and no answer ever comes); of watches also
            `old` (410), `half-open` (no event and no end ever comes), `half-line` (cut in the middle of an event), `ended`.
        status: Of `refused`.
        retry_after: The header of `refused`.
        matches: Which requests; by verb and resource.
    """

    kind: str
    status: int = 503
    retry_after: str = ""
    matches: Callable[[str, str], bool] = lambda verb, resource: True


@dataclass
class Change:
    version: int
    kind: str
    resource: str
    object: Object


@dataclass
class Cluster:
    """One namespace.

    Attributes:
        second_s: How long a second of a watch's `timeoutSeconds` takes.
        faults: What goes wrong next; each one is used up by the first request that it matches.
        requests: Verb, resource and name of every request.
        logs: By pod.
    """

    second_s: float = 1.0
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    logs: dict[str, str] = field(default_factory=dict)
    role: set[tuple[str, str, str]] = field(default_factory=lambda: set(ROLE))
    url: str = ""

    def __post_init__(self) -> None:
        self._objects: dict[tuple[str, str], Object] = {}
        self._changes: list[Change] = []
        self._version, self._compacted = itertools.count(1000), 999
        self._latest = 999
        self._uids = itertools.count(1)
        self._changed = asyncio.Condition()
        self._open: set[asyncio.Task[Any]] = set()

    # What a controller, a person or a test does, without a request.

    def all(self, resource: str) -> list[Object]:
        return [copy.deepcopy(o) for (kind, _), o in self._objects.items() if kind == resource]

    def object(self, resource: str, name: str) -> Object | None:
        return copy.deepcopy(self._objects.get((resource, name)))

    async def put(self, resource: str, thing: Object, *, defaults: bool = False) -> Object:
        """Creates or changes an object, whatever its version; `defaults`: as a newer API server fills in fields of its own."""
        name = thing["metadata"]["name"]
        before = self._objects.get((resource, name))
        thing = copy.deepcopy(thing)
        metadata = thing["metadata"]
        if before is None:
            number = next(self._uids)
            metadata["uid"] = f"uid-{number}"
            metadata["creationTimestamp"] = f"2026-01-01T00:00:{number // 60:02}.{number % 60:02}Z"
        else:
            metadata["uid"], metadata["creationTimestamp"] = (before["metadata"][k] for k in ("uid", "creationTimestamp"))
        same = before is not None and (defaults or before.get("spec") == thing.get("spec"))
        metadata["generation"] = (before["metadata"]["generation"] if before else 0) + (not same)
        metadata["namespace"], metadata["resourceVersion"] = NAMESPACE, str(self._next())
        self._objects[resource, name] = thing
        await self._tell("ADDED" if before is None else "MODIFIED", resource, thing)
        return copy.deepcopy(thing)

    async def change(self, resource: str, name: str, **status: Any) -> None:
        """Merges into the status."""
        thing = self._objects[resource, name]
        await self.put(resource, {**thing, "status": {**thing.get("status", {}), **status}})

    async def delete(self, resource: str, name: str) -> None:
        thing = self._objects.pop((resource, name))
        await self._tell(
            "DELETED", resource, {**thing, "metadata": {**thing["metadata"], "resourceVersion": str(self._next())}}
        )

    def compact(self) -> None:
        """Forgets all changes: versions before this one are too old."""
        self._compacted = self._latest
        self._changes.clear()

    def asked(self, verb: str, resource: str) -> int:
        return sum(found[:2] == (verb, resource) for found in self.requests)

    def _next(self) -> int:
        self._latest = next(self._version)
        return self._latest

    async def _tell(self, kind: str, resource: str, thing: Object) -> None:
        async with self._changed:
            self._changes.append(Change(self._latest, kind, resource, copy.deepcopy(thing)))
            self._changed.notify_all()

    # The server.

    @asynccontextmanager
    async def serving(self, tls: ssl.SSLContext | None = None) -> AsyncIterator[None]:
        app = web.Application()
        for resource, path in RESOURCES.items():
            app.router.add_route("*", path, self._handler(resource))
            app.router.add_route("*", path + "/{name}", self._handler(resource))
        app.router.add_route("*", RESOURCES["pods"] + "/{name}/log", self._handler("pods/log"))
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.01)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
        await site.start()
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield
        finally:
            for task in self._open:
                task.cancel()
            await runner.cleanup()

    def kubeconfig(self) -> Object:
        """As `kubectl config view` would show it."""
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u", "namespace": NAMESPACE}}],
            "clusters": [{"name": "c", "cluster": {"server": self.url}}],
            "users": [{"name": "u", "user": {"token": TOKEN}}],
        }

    def _handler(self, resource: str) -> Callable[[web.Request], Any]:
        async def handle(request: web.Request) -> web.StreamResponse:
            task = asyncio.current_task()
            assert task is not None
            self._open.add(task)
            try:
                return await self._handle(resource, request)
            except Cut:
                assert request.transport is not None
                request.transport.abort()
                return web.Response()
            except ConnectionResetError:  # whoever watched has gone
                return web.Response()
            finally:
                self._open.discard(task)

        return handle

    async def _handle(self, resource: str, request: web.Request) -> web.StreamResponse:
        name = request.match_info.get("name", "")
        verb = _verb(request, name)
        self.requests.append((verb, resource, name))
        body = json.loads(await request.read() or b"null")
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if (scheme.lower(), token) != ("bearer", TOKEN):
            return _status(401, "Unauthorized", "Unauthorized")
        if request.match_info["namespace"] != NAMESPACE or not {(verb, resource, ""), (verb, resource, name)} & self.role:
            return _status(403, "Forbidden", f"User honed-conductor cannot {verb} resource {resource} {name!r}")
        fault = self._fault(verb, resource)
        match fault.kind if fault else "":
            case "refused":
                assert fault is not None
                return _status(fault.status, "ServerError", "it hurts", fault.retry_after)
            case "cut":
                raise Cut
            case "silent":
                await asyncio.Event().wait()
        answer = await self._answer(verb, resource, name, request, body, fault)
        if fault is not None and fault.kind == "lost":
            raise Cut
        return answer

    async def _answer(
        self, verb: str, resource: str, name: str, request: web.Request, body: Any, fault: Fault | None
    ) -> web.StreamResponse:
        match verb:
            case "watch":
                return await self._watch(resource, request, fault)
            case "list":
                found = [o for o in self.all(resource) if _selects(request.query, o)]
                return web.json_response({"metadata": {"resourceVersion": str(self._latest)}, "items": found or None})
            case "create":
                if (resource, body["metadata"]["name"]) in self._objects:
                    return _status(409, "AlreadyExists", f"{resource} {body['metadata']['name']!r} already exists")
                return web.json_response(await self.put(resource, body), status=201)
            case "update":
                thing = self._objects.get((resource, name))
                if thing is None:
                    return _status(404, "NotFound", f"{resource} {name!r} not found")
                if body["metadata"].get("resourceVersion") != thing["metadata"]["resourceVersion"]:
                    return _status(
                        409, "Conflict", "the object has been modified; please apply your changes to the latest version"
                    )
                return web.json_response(await self.put(resource, body))
            case "delete":
                thing = self._objects.get((resource, name))
                if thing is None:
                    return _status(404, "NotFound", f"{resource} {name!r} not found")
                if body["preconditions"]["resourceVersion"] != thing["metadata"]["resourceVersion"]:
                    return _status(409, "Conflict", "the ResourceVersion in the precondition does not match the one in record")
                await self.delete(resource, name)
                return web.json_response({"kind": "Status", "status": "Success"})
        of, _, sub = resource.partition("/")
        if (of, name) not in self._objects or (sub == "log" and name not in self.logs):
            return _status(404, "NotFound", f"{resource} {name!r} not found")
        if sub == "log":
            lines = self.logs[name].splitlines(keepends=True)
            return web.Response(text="".join(lines[-int(request.query["tailLines"]) :]))
        return web.json_response(self._objects[of, name])

    async def _watch(self, resource: str, request: web.Request, fault: Fault | None) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        seen = int(request.query["resourceVersion"])
        kind = fault.kind if fault else ""
        if kind == "half-open":
            await asyncio.Event().wait()
        if kind == "old" or seen < self._compacted:
            gone = {"kind": "Status", "code": 410, "reason": "Expired", "message": f"too old resource version: {seen}"}
            await _line(response, {"type": "ERROR", "object": gone})
            return response
        if kind == "ended":
            return response
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(int(request.query["timeoutSeconds"]) * self.second_s):
                while True:
                    async with self._changed:
                        while self._latest <= seen:
                            await self._changed.wait()
                        new = [c for c in self._changes if c.version > seen]
                        seen = self._latest
                    for change in new:
                        if change.resource != resource or not _selects(request.query, change.object):
                            continue
                        if kind == "half-line":
                            await response.write(json.dumps({"type": change.kind, "object": change.object}).encode()[:40])
                            raise Cut
                        await _line(response, {"type": change.kind, "object": change.object})
                    if request.query.get("allowWatchBookmarks") == "true":
                        mark = {"metadata": {"resourceVersion": str(seen)}}
                        await _line(response, {"type": "BOOKMARK", "object": mark})
        return response

    def _fault(self, verb: str, resource: str) -> Fault | None:
        found = next((fault for fault in self.faults if fault.matches(verb, resource)), None)
        if found is not None:
            self.faults.remove(found)
        return found


def _verb(request: web.Request, name: str) -> str:
    if request.method == "GET" and not name:
        return "watch" if request.query.get("watch") == "true" else "list"
    return {"GET": "get", "POST": "create", "PUT": "update", "DELETE": "delete", "PATCH": "patch"}[request.method]


def _selects(query: Mapping[str, str], thing: Object) -> bool:
    labels = thing["metadata"].get("labels", {})
    wanted = [part.split("=", 1) for part in query.get("labelSelector", "").split(",") if part]
    name = query.get("fieldSelector", "").removeprefix("metadata.name=")
    return all(labels.get(key) == value for key, value in wanted) and name in ("", thing["metadata"]["name"])


def _status(code: int, reason: str, message: str, retry_after: str = "") -> web.Response:
    headers = {"Retry-After": retry_after} if retry_after else {}
    body = {"kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": message}
    return web.json_response(body, status=code, headers=headers)


async def _line(response: web.StreamResponse, event: Object) -> None:
    await response.write(json.dumps(event).encode() + b"\n")
