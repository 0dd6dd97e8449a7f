"""A stand-in for the API server of Kubernetes, over real HTTP and real WebSockets, in a thread of its own.

It keeps objects, refuses what is forbidden, and forwards ports to real servers of this machine as the kubelet does: by the
subprotocol v4.channel.k8s.io.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ssl
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from aiohttp import WSCloseCode, WSMsgType, web
from tests.support.authority import Authority

TOKEN = "ticket-of-a-person"
CONTEXT = "kind-test"
NAMESPACE = "honed"
FORWARD = "v4.channel.k8s.io"
_KINDS = {
    "horizontalpodautoscalers": "autoscaling/v2",
    "deployments": "apps/v1",
    "statefulsets": "apps/v1",
    "cronjobs": "batch/v1",
}


class KubernetesApi:
    """Objects of one namespace by kind and name; everything may be changed while it serves.

    Attributes:
        objects: by kind, then name.
        forbidden: (verb, kind) or (verb, kind, name) that the person may not do.
        allowed: rights that the person has alone, as rules of a Role; None for all.
        refusals: what was refused, as (verb, kind, name).
        backends: where the ports of Pods lead: by (Pod, port) an address of this machine.
        answers: statuses that the next requests get in place of an answer, with headers.
        page: what each request gets in place of an answer, with status 200; None for answers.
        hanging: whether requests get no answer at all.
        requests: what was asked, as (method, path).
        forwards: the Pod of each port-forward that was opened, in order.
    """

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, dict[str, Any]]] = {}
        self.forbidden: set[tuple[str, ...]] = set()
        self.allowed: list[Mapping[str, Any]] | None = None
        self.refusals: list[tuple[str, str, str]] = []
        self.backends: dict[tuple[str, int], tuple[str, int]] = {}
        self.answers: list[tuple[int, Mapping[str, str]]] = []
        self.page: str | None = None
        self.requests: list[tuple[str, str]] = []
        self.forwards: list[str] = []
        self.ping = self.hanging = False
        self._streams: dict[str, list[web.Request]] = {}
        self._transports: set[asyncio.Transport] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def start(self, tls: ssl.SSLContext | None = None) -> int:
        """Serves on a free port; returns it."""
        self._thread.start()
        return asyncio.run_coroutine_threadsafe(self._start(tls), self._loop).result(30)

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()

    def put(self, kind: str, name: str, tree: Mapping[str, Any]) -> None:
        """Makes or replaces an object."""
        metadata = {**tree.get("metadata", {}), "name": name}
        self.objects.setdefault(kind, {})[name] = {**tree, "metadata": metadata}

    def remove(self, kind: str, name: str) -> None:
        del self.objects[kind][name]

    def secret(self, name: str, **texts: str) -> None:
        """Makes a Secret; `_` in a key stands for a dot."""
        data = {key.replace("_", "."): base64.b64encode(text.encode()).decode() for key, text in texts.items()}
        self.put("secrets", name, {"data": data})

    def texts(self, name: str) -> dict[str, str]:
        """What a Secret holds."""
        return {key: base64.b64decode(value).decode() for key, value in self.objects["secrets"][name]["data"].items()}

    def break_streams(self, pod: str) -> None:
        """Cuts every port-forward into a Pod, without a word."""

        def cut() -> None:
            for request in self._streams.pop(pod, []):
                if request.transport is not None:
                    request.transport.abort()

        self._loop.call_soon_threadsafe(cut)

    async def _start(self, tls: ssl.SSLContext | None) -> int:
        application = web.Application(client_max_size=1 << 20)
        application.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(application, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=tls)
        await site.start()
        port: int = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        return port

    async def _stop(self) -> None:
        for transport in self._transports:  # clients keep their connections, and over TLS the end of one takes two
            transport.abort()
        await self._runner.cleanup()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        await asyncio.sleep(0.05)  # transports close in the loop's next rounds

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, request.path))
        if request.transport is not None:
            self._transports.add(request.transport)
        if self.hanging:
            await asyncio.Event().wait()
        if self.page is not None:
            return web.Response(text=self.page)
        if self.answers:
            status, headers = self.answers.pop(0)
            return _status(status, "asked for by the test", headers)
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return _status(401, "Unauthorized")
        before, found, after = request.path.partition(f"/namespaces/{NAMESPACE}/")
        if not found:
            return _status(404, "the server could not find the requested resource")
        kind, _, rest = after.partition("/")
        name, _, sub = rest.partition("/")
        if before != (f"/apis/{_KINDS[kind]}" if kind in _KINDS else "/api/v1"):
            return _status(404, "the server could not find the requested resource")
        verbs = [{"GET": "get" if name else "list", "POST": "create", "PATCH": "patch"}[request.method]]
        what = f"{kind}/{sub}" if sub else kind
        if sub == "portforward":
            verbs.append("create")  # as Kubernetes 1.35: what a WebSocket's GET opens must be allowed to be created
        for verb in verbs:
            if not self._may(verb, kind, what, name):
                self.refusals.append((verb, what, name))
                return _status(403, f'{what} "{name}" is forbidden: User "person" cannot {verb} resource "{what}"')
        there = self.objects.setdefault(kind, {})
        if request.method == "POST":
            return await self._create(request, there)
        if name and name not in there:
            return _status(404, f'{kind} "{name}" not found')
        if sub == "portforward":
            return await self._forward(request, name)
        if request.method == "PATCH":
            tree = await request.json()
            _merge(there[name], tree)
            return web.json_response(there[name])
        return web.json_response(there[name] if name else {"items": list(_selected(request, there.values()))})

    def _may(self, verb: str, kind: str, what: str, name: str) -> bool:
        if {(verb, what), (verb, what, name)} & self.forbidden:
            return False
        group = _KINDS.get(kind, "/").partition("/")[0]
        return self.allowed is None or any(
            group in rule["apiGroups"]
            and what in rule["resources"]
            and verb in rule["verbs"]
            and name in rule.get("resourceNames", [name])
            for rule in self.allowed
        )

    async def _create(self, request: web.Request, there: dict[str, dict[str, Any]]) -> web.Response:
        tree = await request.json()
        name = tree["metadata"]["name"]
        if name in there:
            return _status(409, f'"{name}" already exists')
        there[name] = tree
        return web.json_response(tree, status=201)

    async def _forward(self, request: web.Request, pod: str) -> web.StreamResponse:
        """What the kubelet does: a channel for bytes and one for errors, each begun by the port."""
        port = int(request.query["ports"])
        socket = web.WebSocketResponse(protocols=(FORWARD,), max_msg_size=0)
        await socket.prepare(request)
        assert socket.ws_protocol == FORWARD
        self.forwards.append(pod)
        for channel in (0, 1):
            await socket.send_bytes(bytes([channel]) + port.to_bytes(2, "little"))
        try:
            reader, writer = await asyncio.open_connection(*self.backends[pod, port])
        except (KeyError, OSError):
            await socket.send_bytes(b"\x01" + f"error forwarding port {port} to pod {pod}: connection refused".encode())
            await socket.close()
            return socket
        self._streams.setdefault(pod, []).append(request)
        down = asyncio.ensure_future(self._from_backend(reader, socket))
        try:
            async for message in socket:
                if message.type is WSMsgType.BINARY and message.data[0] == 0:
                    writer.write(message.data[1:])
                    await writer.drain()
        except OSError:
            pass
        finally:
            down.cancel()
            writer.close()
            try:
                async with asyncio.timeout(1):
                    await writer.wait_closed()
            except (TimeoutError, OSError):
                writer.transport.abort()  # the other side does not read
        return socket

    async def _from_backend(self, reader: asyncio.StreamReader, socket: web.WebSocketResponse) -> None:
        while data := await reader.read(32 * 1024):
            if self.ping:
                await socket.ping(b"are you there")
            await socket.send_bytes(b"\x00" + data)
        await socket.close(code=WSCloseCode.OK)


@contextlib.contextmanager
def kubernetes_api(directory: Path, authority: Authority | None = None) -> Iterator[tuple[KubernetesApi, Path]]:
    """A server, and a kubeconfig that leads to it; with an authority both sides show certificates."""
    api = KubernetesApi()
    path = directory / "kubeconfig"
    if authority is None:
        path.write_text(kubeconfig(f"http://127.0.0.1:{api.start()}"))
    else:
        server, client = authority.issue("api"), authority.issue("person")
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=server.authority)
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(server.certificate, server.key)
        tree = yaml.safe_load(kubeconfig(f"https://localhost:{api.start(context)}"))
        tree["clusters"][0]["cluster"]["certificate-authority"] = str(client.authority)
        tree["users"][0]["user"] |= {"client-certificate": str(client.certificate), "client-key": str(client.key)}
        path.write_text(yaml.safe_dump(tree))
    try:
        yield api, path
    finally:
        api.stop()


def kubeconfig(server: str, current: str = CONTEXT) -> str:
    tree = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": current,
        "clusters": [{"name": "c", "cluster": {"server": server}}],
        "users": [{"name": "person", "user": {"token": TOKEN}}],
        "contexts": [{"name": CONTEXT, "context": {"cluster": "c", "user": "person"}}],
    }
    return yaml.safe_dump(tree)


def pod(component: str, *, ready: bool = True, **status: Any) -> dict[str, Any]:
    """A Pod of the run, as the API server lists it."""
    conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
    return {
        "metadata": {"labels": {"app.kubernetes.io/name": "honed", "app.kubernetes.io/component": component}},
        "spec": {
            "containers": [{"name": component, "env": [{"name": "HONED_RUN_FILE", "value": "/etc/honed/run.yaml"}]}],
            "volumes": [{"name": "run", "configMap": {"name": "honed-run-5f7c"}}],
        },
        "status": {"phase": "Running", "podIP": "10.0.0.7", "conditions": conditions, **status},
    }


def _selected(request: web.Request, objects: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    wanted = dict(pair.split("=") for pair in request.query.get("labelSelector", "").split(",") if pair)
    fields = dict(pair.split("=") for pair in request.query.get("fieldSelector", "").split(",") if pair)
    for tree in objects:
        labels = tree["metadata"].get("labels", {})
        if any(labels.get(key) != value for key, value in wanted.items()):
            continue
        if all(_field(tree, key) == value for key, value in fields.items()):
            yield tree


def _field(tree: Any, path: str) -> Any:
    for part in path.split("."):
        tree = tree.get(part, {})
    return tree


def _merge(tree: dict[str, Any], change: Mapping[str, Any]) -> None:
    for key, value in change.items():
        if isinstance(value, dict):
            _merge(tree.setdefault(key, {}), value)
        else:
            tree[key] = value


def _status(code: int, message: str, headers: Mapping[str, str] | None = None) -> web.Response:
    tree = {"kind": "Status", "status": "Failure", "message": message, "code": code}
    return web.json_response(tree, status=code, headers=headers)
