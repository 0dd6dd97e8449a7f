"""The gRPC face of the record: checks, stores, streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc

from honed.judgements import Entry
from honed.kit.errors import Conflict, HonedError, InvalidArgument, Unimplemented
from honed.preference.checks import check_filter, check_judgement, check_word
from honed.preference.selection import only_after_id
from honed.preference.store import PreferenceStore
from honed.preference.writing import Recorded
from honed.v1 import preference_pb2 as pb
from honed.v1 import preference_pb2_grpc

if TYPE_CHECKING:  # grpcio's classes are generic in its types only
    Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True)
class ImportBatch:
    """Where an import commits: after so many judgements or so many bytes, whichever comes first."""

    judgements: int = 1000
    content_bytes: int = 4 * 1024 * 1024


class PreferenceService(preference_pb2_grpc.PreferenceServiceServicer):
    """Serves an open store. Requests have passed the contract's rules in the server's interceptor."""

    def __init__(self, store: PreferenceStore, batch: ImportBatch | None = None) -> None:
        """Serves `store`, which the caller opens and closes."""
        self._store = store
        self._batch = batch or ImportBatch()

    async def health(self) -> None:
        """Asks the database.

        Raises:
            Unavailable: the service is not ready; says why.
        """
        await self._store.check()

    async def RecordJudgement(self, request: pb.RecordJudgementRequest, context: Context) -> pb.RecordJudgementResponse:
        """Stores one judgement; it is committed when this returns."""
        check_judgement(request.judgement)
        check_word(request.idempotency_key, "idempotency_key")
        (outcome,) = await self._store.record([Entry(request.idempotency_key, request.judgement)])
        if isinstance(outcome, Conflict):
            raise outcome
        return pb.RecordJudgementResponse(id=outcome.id, duplicate=outcome.duplicate)

    async def ImportJudgements(
        self, request_iterator: AsyncIterator[pb.ImportJudgementsRequest], context: Context
    ) -> pb.ImportJudgementsResponse:
        """Stores a stream in batches. While one is committed, the next is read."""
        response = pb.ImportJudgementsResponse()
        committing: asyncio.Task[None] | None = None
        try:
            async for first, entries in self._batches(request_iterator):
                if committing is not None:
                    await committing
                committing = asyncio.create_task(self._import(first, entries, response))
            if committing is not None:
                await committing
        finally:
            if committing is not None and not committing.done():
                committing.cancel()
                await asyncio.gather(committing, return_exceptions=True)
        return response

    async def ExportJudgements(
        self, request: pb.ExportJudgementsRequest, context: Context
    ) -> AsyncIterator[pb.ExportJudgementsResponse]:
        """Streams judgements by rising id."""
        check_filter(request.filter)
        check_word(request.snapshot_id, "snapshot_id")
        if request.snapshot_id and not only_after_id(request.filter):
            raise InvalidArgument("filter", "a snapshot has its own selection; with snapshot_id set only filter.after_id")
        async for page in self._store.export(request.filter, request.snapshot_id):
            for judgement in page:
                yield pb.ExportJudgementsResponse(judgement=judgement)

    async def CreateSnapshot(self, request: pb.CreateSnapshotRequest, context: Context) -> pb.CreateSnapshotResponse:
        """Freezes a selection."""
        check_filter(request.filter)
        check_word(request.idempotency_key, "idempotency_key")
        made = await self._store.create_snapshot(request.filter, request.idempotency_key)
        return pb.CreateSnapshotResponse(
            snapshot_id=made.snapshot_id, content_sha256=made.content_sha256, judgements=made.judgements
        )

    async def GetStats(self, request: pb.GetStatsRequest, context: Context) -> pb.GetStatsResponse:
        """Counts."""
        check_filter(request.filter)
        stats = await self._store.stats(request.filter)
        return pb.GetStatsResponse(
            judgements=stats.judgements,
            by_kind=stats.by_kind,
            by_source=stats.by_source,
            annotators=stats.annotators,
            last_id=stats.last_id,
        )

    async def EraseAnnotator(self, request: pb.EraseAnnotatorRequest, context: Context) -> pb.EraseAnnotatorResponse:
        """Forgets who somebody was."""
        check_word(request.annotator, "annotator")
        check_word(request.idempotency_key, "idempotency_key")
        erased = await self._store.erase_annotator(request.annotator, request.idempotency_key)
        return pb.EraseAnnotatorResponse(judgements=erased.judgements, remaining=erased.remaining)

    async def NextTask(self, request: pb.NextTaskRequest, context: Context) -> pb.NextTaskResponse:
        """Belongs to the console."""
        raise Unimplemented("NextTask: this build hands out no tasks; record judgements by RecordJudgement")

    async def SubmitTask(self, request: pb.SubmitTaskRequest, context: Context) -> pb.SubmitTaskResponse:
        """Belongs to the console."""
        raise Unimplemented("SubmitTask: this build hands out no tasks; record judgements by RecordJudgement")

    async def _batches(self, requests: AsyncIterator[pb.ImportJudgementsRequest]) -> AsyncIterator[tuple[int, list[Entry]]]:
        """Groups checked messages: the number of a batch's first message in the stream, from 1, and its entries."""
        entries: list[Entry] = []
        first, size = 1, 0
        async for request in requests:
            try:
                check_judgement(request.judgement)
                check_word(request.idempotency_key, "idempotency_key")
            except InvalidArgument as error:
                number = first + len(entries)
                raise InvalidArgument(error.field, f"message {number} of the stream: {error.reason}") from error
            entries.append(Entry(request.idempotency_key, request.judgement))
            size += request.ByteSize()
            if len(entries) >= self._batch.judgements or size >= self._batch.content_bytes:
                yield first, entries
                first, entries, size = first + len(entries), [], 0
        if entries:
            yield first, entries

    async def _import(self, first: int, entries: list[Entry], response: pb.ImportJudgementsResponse) -> None:
        outcomes = await self._store.record(entries, wait_for_room=True)
        refused: HonedError | None = None
        for number, outcome in enumerate(outcomes, start=first):
            if isinstance(outcome, Recorded):
                response.duplicates += outcome.duplicate
                response.stored += not outcome.duplicate
            elif refused is None:
                refused = Conflict(f"message {number} of the stream: {outcome}")
        if refused is not None:
            raise refused
