"""The report of a run, from what the run knows and what its learner answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import TypeVar

import grpc

from honed.conductor.run import Run
from honed.conductor.sampling import Continuation
from honed.conductor.state import PHASE_NAMES
from honed.report.measures import best_of_kl, distinct_n, mean, pauses_ms, percentile
from honed.report.page import RunReport, SampleRow, write_report
from honed.runtime import internal_channel
from honed.v1 import learner_pb2, learner_pb2_grpc

logger = logging.getLogger(__name__)

WATCH_TIMEOUT_S = 60.0
_Row = TypeVar("_Row")


async def updates_of(run: Run, *, with_rollouts: bool = False) -> list[learner_pb2.StepMetrics]:
    """Metrics of each update that the learner keeps.

    Raises:
        AioRpcError: the learner does not answer.
    """
    request = learner_pb2.WatchMetricsRequest(no_follow=True, with_rollouts=with_rollouts)
    async with internal_channel(run.settings, run.fleet.target("learner")) as channel:
        stub = learner_pb2_grpc.LearnerServiceStub(channel)
        return [answer.metrics async for answer in stub.WatchMetrics(request, timeout=WATCH_TIMEOUT_S)]


async def pushes_of(run: Run) -> list[learner_pb2.Push]:
    """Each push that the learner keeps.

    Raises:
        AioRpcError: the learner does not answer.
    """
    request = learner_pb2.WatchPushesRequest(no_follow=True)
    async with internal_channel(run.settings, run.fleet.target("learner")) as channel:
        stub = learner_pb2_grpc.LearnerServiceStub(channel)
        return [answer.push async for answer in stub.WatchPushes(request, timeout=WATCH_TIMEOUT_S)]


async def write_summary(run: Run) -> None:
    """Writes `report.json` and `report.html`. What cannot be found out is left out; nothing is raised."""
    try:
        await _write(run)
    except Exception as error:  # whatever it is, it must not end what serves
        logger.exception("the report could not be written", extra={"reason": str(error)})


async def _write(run: Run) -> None:
    # Each by itself: a learner of the release before may know but one of the two calls.
    updates = await _known("updates", updates_of(run))
    pushes = await _known("pushes", pushes_of(run))
    pauses = pauses_ms(pushes)
    report = _report(run, updates, pushes, pauses)
    workspace = run.workspace
    await asyncio.to_thread(write_report, workspace.report_json, workspace.report_html, report, updates, pauses)


async def _known(what: str, asked: Awaitable[list[_Row]]) -> list[_Row]:
    try:
        return await asked
    except grpc.aio.AioRpcError as error:
        logger.warning("the report lacks some of the learner's figures", extra={"figures": what, "reason": error.details()})
        return []


def _report(run: Run, updates: list[learner_pb2.StepMetrics], pushes: list[learner_pb2.Push], pauses: list[float]) -> RunReport:
    state, evaluation = run.state, run.evaluation
    before, after = evaluation.base, evaluation.trained
    agreement, best_of = evaluation.agreement, run.settings.data.evaluation.best_of
    return RunReport(
        run=run.settings.run,
        outcome=PHASE_NAMES[state.phase],
        error=state.error,
        updates=updates[-1].step if updates else 0,
        phase_seconds=state.phase_seconds,
        judgements_imported=state.imported,
        agreement=agreement.share if agreement else None,
        agreement_pairs=agreement.pairs if agreement else 0,
        agreement_by_scorer=agreement.by_scorer if agreement else {},
        reward_before=mean(evaluation.rewards_before) if evaluation.rewards_before else None,
        reward_after=mean(evaluation.rewards_after) if evaluation.rewards_after else None,
        tokens_before=mean([len(row.token_ids) for row in before]) if before else None,
        tokens_after=mean([len(row.token_ids) for row in after]) if after else None,
        distinct2_ratio=_distinct2_ratio(before, after),
        best_of=best_of,
        kl=updates[-1].values.get("kl") if updates else best_of_kl(best_of) if best_of and after else None,
        versions_pushed=sum(push.committed > 0 for push in pushes),
        push_pause_p95_ms=percentile(pauses, 0.95) if pauses else None,
        accounts=state.accounts,
        alarms=[*run.alarms(), *([evaluation.problem] if evaluation.problem else [])],
        samples=_samples(run),
    )


def _samples(run: Run) -> list[SampleRow]:
    evaluation = run.evaluation
    rows = zip(evaluation.base, evaluation.trained, strict=False)
    scored = len(evaluation.rewards_before) == len(evaluation.base) and len(evaluation.rewards_after) == len(evaluation.trained)
    return [
        SampleRow(
            before.prompt,
            before.text,
            after.text,
            evaluation.rewards_before[i] if scored else None,
            evaluation.rewards_after[i] if scored else None,
        )
        for i, (before, after) in enumerate(rows)
    ]


def _distinct2_ratio(before: list[Continuation], after: list[Continuation]) -> float | None:
    base = distinct_n([row.text.split() for row in before])
    return distinct_n([row.text.split() for row in after]) / base if base and after else None
