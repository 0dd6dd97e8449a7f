"""Who gets in: before anything is read, by tokens that can be replaced at any time, and with a record of control calls."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import multiprocessing
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.support.calls import failure
from tests.support.listening import local_table, open_channel, serving

from honed.kit.channel import connect
from honed.kit.log import JsonFormatter
from honed.kit.scopes import LOCAL_TOKENS, SCOPES, allows
from honed.kit.server import Listener, Server, ServerOptions, Servicer
from honed.kit.tokens import TokenTable, digest, ensure_local_tokens, read_token, token_source
from honed.v1 import preference_pb2 as pb
from honed.v1 import preference_pb2_grpc

NAME = "honed.v1.PreferenceService"
STATS = f"/{NAME}/GetStats"


class Preference(preference_pb2_grpc.PreferenceServiceServicer):
    async def GetStats(self, request: Any, context: Any) -> Any:
        return pb.GetStatsResponse(judgements=3)

    async def EraseAnnotator(self, request: Any, context: Any) -> Any:
        return pb.EraseAnnotatorResponse(judgements=2)


def preference() -> Servicer:
    return Servicer(NAME, preference_pb2_grpc.add_PreferenceServiceServicer_to_server, Preference())


@pytest.fixture
def audit_log() -> Iterator[io.StringIO]:
    logger, written = logging.getLogger("honed.audit"), io.StringIO()
    handler, level = logging.StreamHandler(written), logger.level
    handler.setFormatter(JsonFormatter("preference"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield written
    logger.removeHandler(handler)
    logger.setLevel(level)


async def test_a_caller_without_a_token_is_refused_before_its_message_is_read(tmp_path: Path) -> None:
    async def never() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    async with serving([preference()], tokens=local_table(tmp_path)) as server, open_channel(server) as channel:
        # The call's headers arrive, its message never does: a server that reads first answers nothing.
        call = channel.stream_unary(STATS)(never(), timeout=5)
        error, details = await failure(call)
        assert error.code() == grpc.StatusCode.UNAUTHENTICATED
        assert details["ErrorInfo"].reason == "Unauthenticated"


async def test_a_refused_call_keeps_its_request_id(tmp_path: Path) -> None:
    async with serving([preference()], tokens=local_table(tmp_path)) as server, open_channel(server) as channel:
        stub = preference_pb2_grpc.PreferenceServiceStub(channel)
        _, details = await failure(stub.GetStats(pb.GetStatsRequest(), timeout=5, metadata=(("x-request-id", "r-3"),)))
        assert details["RequestInfo"].request_id == "r-3"


async def test_above_the_limit_of_calls_a_caller_is_told_to_come_back() -> None:
    entered, release = asyncio.Event(), asyncio.Event()

    class Slow(Preference):
        async def GetStats(self, request: Any, context: Any) -> Any:
            entered.set()
            await release.wait()
            return pb.GetStatsResponse()

    slow = Servicer(NAME, preference_pb2_grpc.add_PreferenceServiceServicer_to_server, Slow())
    async with serving([slow], max_calls=1) as server, open_channel(server) as channel:
        stub = preference_pb2_grpc.PreferenceServiceStub(channel)
        first = asyncio.ensure_future(stub.GetStats(pb.GetStatsRequest(), timeout=5))
        await asyncio.wait_for(entered.wait(), 30)
        error, _ = await failure(stub.GetStats(pb.GetStatsRequest(), timeout=5))
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        release.set()
        await first


async def test_one_connection_has_no_more_calls_in_flight_than_its_limit() -> None:
    entered, release, inside = asyncio.Event(), asyncio.Event(), 0

    class Slow(Preference):
        async def GetStats(self, request: Any, context: Any) -> Any:
            nonlocal inside
            inside += 1
            entered.set()
            await release.wait()
            return pb.GetStatsResponse()

    slow = Servicer(NAME, preference_pb2_grpc.add_PreferenceServiceServicer_to_server, Slow())
    async with serving([slow], max_streams=1) as server, open_channel(server) as channel:
        stub = preference_pb2_grpc.PreferenceServiceStub(channel)
        first = asyncio.ensure_future(stub.GetStats(pb.GetStatsRequest(), timeout=10))
        await asyncio.wait_for(entered.wait(), 30)
        error, _ = await failure(stub.GetStats(pb.GetStatsRequest(), timeout=0.5))
        assert (error.code(), inside) == (grpc.StatusCode.DEADLINE_EXCEEDED, 1), "the second one never arrived"
        release.set()
        await first


async def test_a_revoked_token_is_refused_and_a_new_one_served_without_a_restart(tmp_path: Path) -> None:
    async with serving([preference()], tokens=local_table(tmp_path)) as server:
        source = token_source(tmp_path / "operator.token")
        async with connect(f"127.0.0.1:{server.ports[0]}", source) as channel:
            stub = preference_pb2_grpc.PreferenceServiceStub(channel)
            await stub.GetStats(pb.GetStatsRequest(), timeout=5)
            rows = [{"name": "operator", "sha256": digest("honed_second"), "scopes": ["*"]}]
            (tmp_path / "table.json").write_text(json.dumps({"tokens": rows}))
            error, _ = await failure(stub.GetStats(pb.GetStatsRequest(), timeout=5))
            assert error.code() == grpc.StatusCode.UNAUTHENTICATED
            (tmp_path / "operator.token").write_text("honed_second\n")  # the open channel reads it anew
            assert (await stub.GetStats(pb.GetStatsRequest(), timeout=5)).judgements == 3


async def test_a_table_that_breaks_leaves_the_one_before_in_force(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = local_table(tmp_path)
    token = f"Bearer {read_token(tmp_path / 'operator.token')}"
    (tmp_path / "table.json").write_text('{"tokens": [')
    for _ in range(3):
        assert table.authorize(token, STATS).name == "operator"
    assert len([r for r in caplog.records if "cannot be used" in r.getMessage()]) == 1


async def test_control_calls_are_in_the_audit_log_with_their_caller(tmp_path: Path, audit_log: io.StringIO) -> None:
    async with serving([preference()], tokens=local_table(tmp_path)) as server:
        async with open_channel(server, tmp_path, "operator") as channel:
            stub = preference_pb2_grpc.PreferenceServiceStub(channel)
            await stub.GetStats(pb.GetStatsRequest(), timeout=5)
            await stub.EraseAnnotator(pb.EraseAnnotatorRequest(annotator="ann-17", idempotency_key="ann-17-out"), timeout=5)
            await failure(stub.EraseAnnotator(pb.EraseAnnotatorRequest(), timeout=5))
        async with open_channel(server, tmp_path, "application") as channel:
            stub = preference_pb2_grpc.PreferenceServiceStub(channel)
            await failure(stub.EraseAnnotator(pb.EraseAnnotatorRequest(annotator="ann-17"), timeout=5))
    lines = [json.loads(line) for line in audit_log.getvalue().splitlines()]
    assert [(line["caller"], line["method"], line["code"]) for line in lines] == [
        ("operator", f"/{NAME}/EraseAnnotator", "OK"),
        ("operator", f"/{NAME}/EraseAnnotator", "INVALID_ARGUMENT"),
        ("application", f"/{NAME}/EraseAnnotator", "PERMISSION_DENIED"),
    ]
    assert all(line["request_id"] for line in lines)
    assert "ann-17" not in audit_log.getvalue()  # who is to be forgotten is not written down again


@pytest.mark.parametrize(
    ("service", "may", "may_not"),
    [
        ("learner", "GenerationControlService/CommitVersion", "RewardService/PromoteScorer"),
        ("learner", "PreferenceService/ExportJudgements", "PreferenceService/EraseAnnotator"),
        ("conductor", "LearnerService/Pause", "ConductorService/StartRun"),
        ("conductor", "RewardService/Score", "GenerationControlService/CommitVersion"),
        ("conductor", "PreferenceService/ImportJudgements", "PreferenceService/EraseAnnotator"),
        ("application", "PreferenceService/RecordJudgement", "PreferenceService/ExportJudgements"),
        ("operator", "ConductorService/StartRun", None),
        ("generation", None, "GenerationControlService/CommitVersion"),
    ],
)
def test_each_service_may_call_what_it_calls_and_no_more(service: str, may: str | None, may_not: str | None) -> None:
    scopes = frozenset(LOCAL_TOKENS[service])
    assert may is None or allows(scopes, SCOPES[f"/honed.v1.{may}"])
    assert may_not is None or not allows(scopes, SCOPES[f"/honed.v1.{may_not}"])


def test_processes_that_start_together_share_one_set_of_tokens(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    gate = context.Barrier(4)
    starters = [context.Process(target=_start_together, args=(gate, tmp_path / "tokens")) for _ in range(4)]
    for starter in starters:
        starter.start()
    for starter in starters:
        starter.join(60)
        assert starter.exitcode == 0
    table = TokenTable.load(tmp_path / "tokens" / "table.json")
    for name in LOCAL_TOKENS:
        row = json.loads((tmp_path / "tokens" / "table.json").read_text())["tokens"]
        token = read_token(tmp_path / "tokens" / f"{name}.token")
        assert digest(token) in {r["sha256"] for r in row if r["name"] == name}
    assert table.authorize(f"Bearer {read_token(tmp_path / 'tokens' / 'operator.token')}", STATS).name == "operator"


def _start_together(gate: Any, directory: Path) -> None:
    import time

    from honed.kit import tokens

    # Wide open where it matters: between the look for the table and its end.
    write = tokens._write_private
    tokens._write_private = lambda path, text: (time.sleep(0.01), write(path, text))  # type: ignore[assignment]
    gate.wait(30)
    ensure_local_tokens(directory)


async def test_tokens_in_plain_text_beyond_this_machine_are_warned_of(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    for host, warned in (("127.0.0.1", False), ("0.0.0.0", True)):
        caplog.clear()
        server = Server([Listener(host, 0, [preference()])], ServerOptions(tokens=local_table(tmp_path)))
        await server.start()
        await server.stop()
        assert any("plain text" in record.getMessage() for record in caplog.records) is warned
