"""GenerationService as an application meets it: over gRPC, with a token, against the server's caps."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from tests.integration.generation.conftest import FENCE, LIMITS, Service, refused
from tests.support.run import until
from tests.support.tiny import load, token_logprobs

from honed.kit.channel import connect
from honed.kit.tokens import read_token
from honed.v1 import common_pb2, generation_pb2, generation_pb2_grpc

pytestmark = pytest.mark.asyncio(loop_scope="session")

IDS = [10, 20, 30, 40]


def ask(kind: Any = generation_pb2.GenerateRequest, *, n: int = 1, logprobs: bool = False, **sampling: Any) -> Any:
    prompt = generation_pb2.Prompt(token_ids=generation_pb2.TokenIds(ids=IDS))
    return kind(prompt=prompt, sampling=common_pb2.SamplingParams(**sampling), n=n, logprobs=logprobs)


def texts(answer: Any) -> list[str]:
    return [sample.text for sample in answer.samples]


async def test_n_samples_come_in_order_each_with_its_own_seed(service: Service) -> None:
    answer = await service.public.Generate(ask(n=3, seed=5, max_tokens=10, fixed_length=True), timeout=30)
    assert [sample.index for sample in answer.samples] == [0, 1, 2]
    assert [len(sample.token_ids) for sample in answer.samples] == [10] * 3
    assert list(answer.prompt_token_ids) == IDS
    alone = [
        (await service.public.Generate(ask(seed=5 + i, max_tokens=10, fixed_length=True), timeout=30)).samples[0].token_ids
        for i in range(3)
    ]
    assert [list(sample.token_ids) for sample in answer.samples] == [list(ids) for ids in alone]
    assert len({tuple(ids) for ids in alone}) == 3


async def test_recorded_log_probabilities_are_the_serving_versions_own(service: Service) -> None:
    answer = await service.public.Generate(ask(seed=1, max_tokens=12, temperature=0.7, logprobs=True), timeout=30)
    sample = answer.samples[0]
    own = token_logprobs(load(service.weights[await service.serving()]), [*IDS, *sample.token_ids], 0.7)[len(IDS) - 1 :]
    assert list(sample.logprobs) == pytest.approx(own, abs=1e-4)
    spans = [(span.version.run, span.version.fence, span.start, span.end) for span in sample.version_spans]
    assert spans == [("test", FENCE, 0, len(sample.token_ids))]


async def test_without_asking_there_are_no_log_probabilities_and_the_default_length_holds(service: Service) -> None:
    sample = (await service.public.Generate(ask(seed=1, fixed_length=True), timeout=30)).samples[0]
    assert list(sample.logprobs) == []
    assert len(sample.token_ids) == LIMITS.default_max_tokens
    assert sample.finish_reason == common_pb2.FINISH_REASON_LENGTH


async def test_stops_end_a_response_and_say_so(service: Service) -> None:
    whole = (await service.public.Generate(ask(seed=2, max_tokens=32), timeout=30)).samples[0]
    token = whole.token_ids[5]
    at = list(whole.token_ids).index(token)
    stopped = (await service.public.Generate(ask(seed=2, max_tokens=32, stop_token_ids=[token]), timeout=30)).samples[0]
    assert list(stopped.token_ids) == list(whole.token_ids)[: at + 1]
    assert stopped.finish_reason == common_pb2.FINISH_REASON_STOP
    letter = next(c for c in whole.text[2:] if c.isascii() and c.isprintable())
    stopped = (await service.public.Generate(ask(seed=2, max_tokens=32, stop=[letter]), timeout=30)).samples[0]
    assert stopped.text == whole.text[: whole.text.index(letter)]


async def test_a_stream_concatenates_to_the_answer_of_the_same_seed(service: Service) -> None:
    options = {"n": 2, "seed": 9, "max_tokens": 16, "logprobs": True}
    whole = await service.public.Generate(ask(**options), timeout=30)
    parts: dict[int, list[Any]] = {0: [], 1: []}
    async for answer in service.public.StreamGenerate(ask(generation_pb2.StreamGenerateRequest, **options), timeout=30):
        parts[answer.delta.index].append(answer.delta)
    for index, sample in enumerate(whole.samples):
        mine = parts[index]
        assert len(mine) > 1, "it came in pieces"
        assert "".join(part.text for part in mine) == sample.text
        assert [token for part in mine for token in part.token_ids] == list(sample.token_ids)
        assert [p for part in mine for p in part.logprobs] == pytest.approx(list(sample.logprobs), abs=1e-5)
        assert [part.finish_reason for part in mine][-1] == sample.finish_reason


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (ask(n=LIMITS.max_samples + 1), "n"),
        (ask(n=257), "n"),
        (ask(max_tokens=LIMITS.max_tokens + 1), "sampling.max_tokens"),
        (ask(temperature=11.0), "sampling.temperature"),
        (ask(top_p=0.0), "sampling.top_p"),
        (ask(stop=[""]), "sampling.stop"),
        (ask(fixed_length=True, stop=["a"]), "sampling.fixed_length"),
        (generation_pb2.GenerateRequest(), "prompt"),
        (generation_pb2.GenerateRequest(prompt=generation_pb2.Prompt(text="")), "prompt.text"),
        (generation_pb2.GenerateRequest(prompt=generation_pb2.Prompt(text="a" * 21)), "prompt.text"),
        (
            generation_pb2.GenerateRequest(prompt=generation_pb2.Prompt(token_ids=generation_pb2.TokenIds(ids=[5] * 21))),
            "prompt.token_ids",
        ),
        (
            generation_pb2.GenerateRequest(prompt=generation_pb2.Prompt(token_ids=generation_pb2.TokenIds(ids=[999]))),
            "prompt.token_ids",
        ),
    ],
)
async def test_a_bad_field_is_named(service: Service, request_: Any, field: str) -> None:
    code, text, details = await refused(service.public.Generate(request_, timeout=30))
    assert code == grpc.StatusCode.INVALID_ARGUMENT, text
    fields = [v.field for d in details if isinstance(d, error_details_pb2.BadRequest) for v in d.field_violations]
    assert any(found == field or found.startswith(f"{field}[") for found in fields), (fields, text)


async def test_overload_is_told_with_the_time_to_come_back_and_harms_nobody_in_flight(service: Service) -> None:
    await service.control.Pause(generation_pb2.PauseRequest(), timeout=10)
    waiting = asyncio.ensure_future(service.public.Generate(ask(n=4, max_tokens=4), timeout=30))
    await until(lambda: service.frontend.engine.in_flight == 4, 60, "four are in flight")
    code, _, details = await refused(service.public.Generate(ask(n=3, max_tokens=4), timeout=10))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    retry = [d for d in details if isinstance(d, error_details_pb2.RetryInfo)]
    assert retry[0].retry_delay.ToTimedelta().total_seconds() > 0
    await service.control.Resume(generation_pb2.ResumeRequest(), timeout=10)
    assert len((await waiting).samples) == 4


async def test_a_caller_that_leaves_frees_the_engine(service: Service) -> None:
    call = service.public.Generate(ask(n=2, max_tokens=64, fixed_length=True), timeout=30)
    sending = asyncio.ensure_future(call.code())
    await until(lambda: service.frontend.engine.in_flight == 2, 60, "two are in flight", every_s=0.001)
    failed = service.frontend.failed
    call.cancel()
    await sending
    await until(lambda: service.frontend.engine.in_flight == 0, 60, "nothing is in flight")
    assert service.frontend.failed == failed, "a cancellation is no failure"


async def test_a_stream_that_is_left_frees_the_engine(service: Service) -> None:
    stream = service.public.StreamGenerate(
        ask(generation_pb2.StreamGenerateRequest, n=2, max_tokens=64, fixed_length=True), timeout=30
    )
    await stream.read()
    assert service.frontend.engine.in_flight == 2
    stream.cancel()
    await until(lambda: service.frontend.engine.in_flight == 0, 60, "nothing is in flight")


async def test_a_deadline_frees_the_engine(service: Service) -> None:
    await service.control.Pause(generation_pb2.PauseRequest(), timeout=10)
    code, _, _ = await refused(service.public.Generate(ask(max_tokens=8), timeout=0.3))
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: service.frontend.engine.in_flight == 0, 60, "nothing is in flight")
    await service.control.Resume(generation_pb2.ResumeRequest(), timeout=10)


@pytest.mark.parametrize("token", [None, "honed_wrong"])
async def test_who_has_no_token_gets_nothing(service: Service, token: str | None) -> None:
    async with connect(service.public_address, token) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        code, text, _ = await refused(stub.Generate(ask(), timeout=10))
    assert code == grpc.StatusCode.UNAUTHENTICATED
    assert "bearer token" in text


async def test_an_applications_token_does_not_reach_the_controls(service: Service) -> None:
    token = read_token(service.tokens / "application.token")
    async with connect(service.control_address, token) as channel:
        stub = generation_pb2_grpc.GenerationControlServiceStub(channel)
        code, text, _ = await refused(stub.Pause(generation_pb2.PauseRequest(), timeout=10))
    assert code == grpc.StatusCode.PERMISSION_DENIED
    assert "generation.control" in text
