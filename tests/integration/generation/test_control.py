"""GenerationControlService over gRPC: a push as the learner makes it, and the brakes."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from tests.integration.generation.conftest import FENCE, Service, message, refused
from tests.integration.generation.test_generate import IDS, ask
from tests.support.collector import collecting
from tests.support.run import until
from tests.support.tiny import load, token_logprobs

from honed.artifacts.version import VersionId
from honed.kit.otlp import Collector as Destination
from honed.kit.otlp import exporting
from honed.v1 import generation_pb2

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def generate(service: Service, **sampling: Any) -> Any:
    return await service.public.Generate(ask(**sampling), timeout=30)


async def test_a_version_is_prepared_while_the_old_one_serves_and_then_committed(service: Service) -> None:
    before, manifest = await service.serving(), service.publish(1)
    prepared = await service.prepare(manifest)
    assert prepared.bytes_fetched >= manifest.total_bytes
    assert await service.serving() == before
    committed = await service.commit(manifest)
    assert committed.pause.ToNanoseconds() > 0
    assert committed.canary_max_error < 1e-4
    assert await service.serving() == manifest.version


async def test_requests_in_flight_at_a_push_go_on_and_every_token_tells_the_truth(service: Service) -> None:
    base, manifest = await service.serving(), service.publish(0)
    await service.prepare(manifest)
    running = asyncio.ensure_future(generate(service, n=3, seed=4, max_tokens=64, fixed_length=True, logprobs=True))
    await until(lambda: service.frontend.engine.in_flight == 3, 60, "three are in flight", every_s=0.001)
    committed = await service.commit(manifest)
    answer = await running
    assert committed.requests_carried == 3
    by_version = {base: load(service.models[1]), manifest.version: load(service.models[0])}
    for sample in answer.samples:
        assert [VersionId(s.version.fence, s.version.step) for s in sample.version_spans][-1] == manifest.version
        for span in sample.version_spans:
            model = by_version[VersionId(span.version.fence, span.version.step)]
            own = token_logprobs(model, [*IDS, *sample.token_ids])[len(IDS) - 1 :]
            assert list(sample.logprobs)[span.start : span.end] == pytest.approx(own[span.start : span.end], abs=1e-4)


async def test_the_same_key_again_gets_the_first_answer(service: Service) -> None:
    manifest = service.publish(1)
    first = await service.prepare(manifest, "prepare-it")
    assert first.bytes_fetched > 0
    assert await service.prepare(manifest, "prepare-it") == first
    assert (await service.prepare(manifest)).bytes_fetched == 0, "without the key it looks again, and finds it here"
    answers = await asyncio.gather(*(service.commit(manifest, "commit-it") for _ in range(3)))
    assert answers[0] == answers[1] == answers[2] == await service.commit(manifest, "commit-it")
    assert not (await service.commit(manifest)).HasField("pause"), "another key: it serves already, nobody is paused"


async def test_an_older_fence_is_refused(service: Service) -> None:
    serving = await service.serving()
    stale = service.publish(1, fence=FENCE - 1)
    await service.prepare(stale)
    code, text, _ = await refused(service.commit(stale))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "a newer learner has taken over" in text
    assert await service.serving() == serving


async def test_what_was_not_prepared_cannot_be_committed_and_neither_can_what_was_aborted(service: Service) -> None:
    manifest = service.publish(1)
    code, text, _ = await refused(service.commit(manifest))
    assert (code, "was not prepared" in text) == (grpc.StatusCode.FAILED_PRECONDITION, True)
    await service.prepare(manifest)
    request = generation_pb2.AbortVersionRequest(version=message(manifest.version))
    await service.control.AbortVersion(request, timeout=10)
    assert not (service.directory / manifest.version.label).exists()
    code, _, _ = await refused(service.commit(manifest))
    assert code == grpc.StatusCode.FAILED_PRECONDITION


async def test_weights_that_are_not_the_learners_are_rolled_back(service: Service) -> None:
    serving, before = await service.serving(), await generate(service, seed=3, max_tokens=8)
    lie = service.publish(0, canaries_of=1)
    await service.prepare(lie)
    code, text, _ = await refused(service.commit(lie, "lie"))
    assert code == grpc.StatusCode.ABORTED
    assert "canaries" in text
    assert await service.serving() == serving
    assert (await generate(service, seed=3, max_tokens=8)).samples == before.samples
    truth = service.publish(0)
    await service.prepare(truth)
    await service.commit(truth)
    there = {path.name for path in service.directory.iterdir()}
    assert there == {serving.label, truth.version.label}, "what is neither served nor gone back to is removed"


async def test_a_wrong_digest_an_unknown_version_and_another_run_are_refused(service: Service) -> None:
    manifest = service.publish(1)
    code, text, _ = await refused(service.prepare(manifest, sha256="0" * 64))
    assert (code, "sha256" in text) == (grpc.StatusCode.DATA_LOSS, True)
    request = generation_pb2.PrepareVersionRequest(version=message(VersionId(9, 9)), manifest_sha256="0" * 64)
    code, _, _ = await refused(service.control.PrepareVersion(request, timeout=10))
    assert code == grpc.StatusCode.NOT_FOUND
    request = generation_pb2.PrepareVersionRequest(version=message(manifest.version, "other"), manifest_sha256=manifest.digest)
    code, text, _ = await refused(service.control.PrepareVersion(request, timeout=10))
    assert (code, text.startswith("version.run")) == (grpc.StatusCode.INVALID_ARGUMENT, True)


async def test_a_damaged_version_is_refused_and_the_old_one_serves(service: Service) -> None:
    serving, manifest = await service.serving(), service.publish(1)
    weights = next(service.directory.parent.glob(f"store/test/{manifest.version.label}/*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, text, _ = await refused(service.prepare(manifest))
    assert (code, weights.name in text) == (grpc.StatusCode.DATA_LOSS, True)
    assert await service.serving() == serving
    assert not list(service.directory.glob(f"*{manifest.version.label}*")), "nothing partial stays"


async def test_a_pause_freezes_and_a_resume_lets_go_on(service: Service) -> None:
    await service.control.Pause(generation_pb2.PauseRequest(), timeout=10)
    running = asyncio.ensure_future(generate(service, seed=1, max_tokens=4))
    done, _ = await asyncio.wait([running], timeout=0.3)
    assert not done
    await service.control.Resume(generation_pb2.ResumeRequest(), timeout=10)
    assert len((await running).samples) == 1


async def test_a_drain_takes_nothing_new_and_waits_for_what_runs(service: Service) -> None:
    await service.control.Pause(generation_pb2.PauseRequest(), timeout=10)
    running = asyncio.ensure_future(generate(service, seed=1, max_tokens=8))
    await until(lambda: service.frontend.engine.in_flight == 1, 60, "one is in flight")
    drain = generation_pb2.DrainRequest(timeout=Duration(nanos=200_000_000))
    assert (await service.control.Drain(drain, timeout=10)).remaining == 1
    request = ask(max_tokens=4)
    code, text, _ = await refused(service.public.Generate(request, timeout=2))
    assert (code, "draining" in text) == (grpc.StatusCode.UNAVAILABLE, True)
    await service.control.Resume(generation_pb2.ResumeRequest(), timeout=10)
    await running
    assert (await service.control.Drain(generation_pb2.DrainRequest(), timeout=10)).remaining == 0
    await service.control.Resume(generation_pb2.ResumeRequest(), timeout=10)
    assert len((await generate(service, max_tokens=2)).samples) == 1


async def test_the_parts_of_a_push_are_spans_of_its_calls(service: Service) -> None:
    with collecting() as collector, exporting(Destination(collector.endpoint), 1.0, {"service.name": "generation"}):
        manifest = service.publish(1)
        await service.prepare(manifest)
        await service.commit(manifest)
    expected = {"PrepareVersion": ["fetch", "stage"], "CommitVersion": ["freeze", "load", "canary", "unstage", "thaw"]}
    for method, parts in expected.items():
        call = collector.one(f"honed.v1.GenerationControlService/{method}")
        below = sorted((span for span in collector.spans if span.parent == call.id), key=lambda span: span.start_ns)
        assert [span.name for span in below] == parts
        assert all(call.start_ns <= span.start_ns <= span.end_ns <= call.end_ns for span in below)
