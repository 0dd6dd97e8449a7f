"""A generator whose model takes its time to arrive."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.support.run import run_tree, settings_of
from tests.support.tiny import make_canaries, publish_version

from honed.artifacts.store import PolicyStore
from honed.artifacts.version import VersionId
from honed.conductor.probes import check
from honed.generation import main
from honed.queue.embedded import free_port
from honed.v1 import common_pb2, generation_pb2, generation_pb2_grpc


async def test_while_the_model_is_fetched_the_process_is_alive_and_asks_a_push_to_come_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """L13: with no port open before the model is there, a liveness probe would need to know how long a fetch takes."""
    ports = {name: free_port() for name in ("port", "control_port", "health_port")}
    tree = run_tree(tmp_path, generation=ports, queue={"url": "redis://127.0.0.1:1/0"})
    settings = settings_of({**tree, "security": {"authentication": False}})
    store, model = PolicyStore(settings.policy_url, settings.run), tmp_path / "model"
    manifest = publish_version(store, model, VersionId(0, 0), canaries=make_canaries(model))
    fetching, arrived, fetch = threading.Event(), threading.Event(), PolicyStore.fetch

    def slow(self: PolicyStore, *arguments: Any, **options: Any) -> Path:
        fetching.set()
        arrived.wait(60)
        return fetch(self, *arguments, **options)

    monkeypatch.setattr(PolicyStore, "fetch", slow)
    generator = asyncio.ensure_future(main.run(settings))
    try:
        assert await asyncio.to_thread(fetching.wait, 30)
        assert await check(settings.generation, "", 5), "alive"
        assert not await check(settings.generation, main.PUBLIC, 5), "not ready"
        async with grpc.aio.insecure_channel(f"127.0.0.1:{ports['control_port']}") as channel:
            stub = generation_pb2_grpc.GenerationControlServiceStub(channel)
            version = common_pb2.PolicyVersion(run=settings.run, fence=0, step=0)
            request = generation_pb2.PrepareVersionRequest(version=version, manifest_sha256=manifest.digest)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.PrepareVersion(request, timeout=5)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    finally:
        generator.cancel()
        arrived.set()
        await asyncio.gather(generator, return_exceptions=True)
