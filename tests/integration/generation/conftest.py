"""Both generation services on real sockets, over the transformers engine and a store of versions."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from tests.support.tiny import make_canaries, make_tiny_model, publish_version

from honed.artifacts.manifest import Canary, Manifest
from honed.artifacts.store import PolicyStore
from honed.artifacts.version import VersionId
from honed.config import RunSettings
from honed.generation.best_of import BestOf
from honed.generation.control import GenerationControlService
from honed.generation.engine import InitialVersion
from honed.generation.frontend import RequestLimits, SamplingFrontend
from honed.generation.gate import RequestGate
from honed.generation.hf.engine import TransformersEngine, TransformersSettings
from honed.generation.main import CONTROL, PUBLIC
from honed.generation.scoring import CandidateScoring
from honed.generation.service import GenerationService
from honed.kit.channel import connect
from honed.kit.server import Listener, Server, ServerOptions, Servicer
from honed.kit.tokens import TokenTable, ensure_local_tokens, read_token
from honed.v1 import common_pb2, generation_pb2, generation_pb2_grpc

LIMITS = RequestLimits(max_samples=4, max_tokens=64, default_max_tokens=8, max_prompt_tokens=20)
FENCE = 3


@dataclass
class Service:
    """The services with an internal token's stubs."""

    frontend: SamplingFrontend
    store: PolicyStore
    models: list[Path]
    canaries: list[tuple[Canary, ...]]
    directory: Path
    public_address: str
    control_address: str
    tokens: Path
    public: Any = None
    control: Any = None
    weights: dict[VersionId, Path] = field(default_factory=dict)
    steps: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def publish(self, model: int, *, fence: int = FENCE, canaries_of: int | None = None) -> Manifest:
        version = VersionId(fence, next(self.steps))
        self.weights[version] = self.models[model]
        canaries = self.canaries[model if canaries_of is None else canaries_of]
        return publish_version(self.store, self.models[model], version, canaries=canaries)

    async def prepare(self, manifest: Manifest, key: str = "", sha256: str | None = None) -> Any:
        return await self.control.PrepareVersion(
            generation_pb2.PrepareVersionRequest(
                version=message(manifest.version),
                manifest_sha256=manifest.digest if sha256 is None else sha256,
                idempotency_key=key,
            ),
            timeout=30,
        )

    async def commit(self, manifest: Manifest, key: str = "") -> Any:
        request = generation_pb2.CommitVersionRequest(version=message(manifest.version), idempotency_key=key)
        return await self.control.CommitVersion(request, timeout=30)

    async def serving(self) -> VersionId:
        answer = await self.public.GetPolicy(generation_pb2.GetPolicyRequest(), timeout=10)
        return VersionId(answer.version.fence, answer.version.step)


def message(version: VersionId, run: str = "test") -> common_pb2.PolicyVersion:
    return common_pb2.PolicyVersion(run=run, fence=version.fence, step=version.step)


async def refused(call: Any) -> tuple[grpc.StatusCode, str, list[Any]]:
    """Code, message and rich details of a call that fails."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = caught.value

    class View:  # grpc_status speaks to synchronous calls
        code = staticmethod(error.code)
        details = staticmethod(error.details)
        trailing_metadata = staticmethod(lambda: [(k, v) for k, v in error.trailing_metadata() or ()])

    status = rpc_status.from_call(View())
    details = []
    for packed in status.details if status else ():
        detail = getattr(error_details_pb2, packed.type_url.rpartition(".")[2])()
        packed.Unpack(detail)
        details.append(detail)
    return error.code(), str(error.details()), details


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    root = tmp_path_factory.mktemp("generation")
    models = [make_tiny_model(root / f"model-{seed}", seed) for seed in (1, 2)]
    store = PolicyStore(root / "store", "test")
    first = VersionId(FENCE, 0)
    canaries = [make_canaries(model) for model in models]
    publish_version(store, models[0], first, canaries=canaries[0])
    versions = root / "versions"
    gate = RequestGate(window=10, queue_limit=8, application_share=0.75)
    engine = TransformersEngine(
        InitialVersion(first, store.fetch(first, versions)), TransformersSettings(max_batch=8), gate=gate
    )
    frontend = SamplingFrontend(engine, gate, LIMITS, "test")
    control = GenerationControlService(frontend, store, versions)
    ensure_local_tokens(root / "tokens")
    public_service = GenerationService(frontend, BestOf(frontend, CandidateScoring(RunSettings())))
    listeners = [
        Listener("127.0.0.1", 0, [Servicer(name, add, servicer)])
        for name, add, servicer in (
            (PUBLIC, generation_pb2_grpc.add_GenerationServiceServicer_to_server, public_service),
            (CONTROL, generation_pb2_grpc.add_GenerationControlServiceServicer_to_server, control),
        )
    ]
    server = Server(listeners, ServerOptions(tokens=TokenTable.load(root / "tokens" / "table.json"), drain_s=5))
    await server.start()
    await engine.start()
    await server.ready()
    public, private = (f"127.0.0.1:{port}" for port in server.ports[:2])
    service = Service(frontend, store, models, canaries, versions, public, private, root / "tokens")
    service.weights[first] = models[0]
    token = read_token(root / "tokens" / "operator.token")
    async with connect(public, token) as channel, connect(private, token) as control_channel:
        service.public = generation_pb2_grpc.GenerationServiceStub(channel)
        service.control = generation_pb2_grpc.GenerationControlServiceStub(control_channel)
        yield service
    await server.stop()
    await engine.close()


@pytest_asyncio.fixture(loop_scope="session")
async def service(running: Service) -> AsyncIterator[Service]:
    """The services; each test leaves them idle and serving."""
    yield running
    async with asyncio.timeout(10):
        while running.frontend.engine.in_flight:
            await asyncio.sleep(0.01)
