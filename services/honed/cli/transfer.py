"""Judgements to and from the preference service, in calls that each fit a deadline and resume where the last one broke."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from honed._client.peer import Peer
    from honed.judgements import Entry
    from honed.v1 import preference_pb2

BATCH = 2000
BATCH_BYTES = 16 * 1024 * 1024
"""How much one call imports. Each ends acknowledged: the progress is true, and no file is too long for a deadline."""


def upload(
    peer: Peer, entries: Iterable[Entry], timeout_s: float
) -> Iterator[tuple[preference_pb2.ImportJudgementsResponse, int]]:
    """Imports entries in batches; yields each batch's answer and size. A batch meets a service that is gone with patience.

    Raises:
        RequestError: a batch was not stored for sure; those before it were.
    """
    from honed.client import RequestError
    from honed.v1 import preference_pb2, preference_pb2_grpc

    stub = preference_pb2_grpc.PreferenceServiceStub(peer.channel)
    requests = (preference_pb2.ImportJudgementsRequest(judgement=e.judgement, idempotency_key=e.key) for e in entries)
    done = 0
    for batch in _batches(requests):
        try:
            answer = peer.upload(stub.ImportJudgements, batch, timeout_s)
        except RequestError as error:
            raise error.at(f"judgements {done + 1} to {done + len(batch)} of the file") from error
        done += len(batch)
        yield answer, len(batch)


def _batches(
    requests: Iterable[preference_pb2.ImportJudgementsRequest],
) -> Iterator[list[preference_pb2.ImportJudgementsRequest]]:
    batch: list[preference_pb2.ImportJudgementsRequest] = []
    size = 0
    for request in requests:
        batch.append(request)
        size += request.ByteSize()
        if len(batch) >= BATCH or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def download(
    peer: Peer, selection: preference_pb2.JudgementFilter, snapshot_id: str, timeout_s: float
) -> Iterator[preference_pb2.Judgement]:
    """Streams judgements; a stream that broke after it had brought some goes on after the last."""
    from honed.client import RequestError
    from honed.v1 import preference_pb2, preference_pb2_grpc

    stub = preference_pb2_grpc.PreferenceServiceStub(peer.channel)
    while True:
        start = selection.after_id
        request = preference_pb2.ExportJudgementsRequest(snapshot_id=snapshot_id, filter=selection)
        try:
            for answer in peer.stream(stub.ExportJudgements, request, timeout_s):
                selection.after_id = answer.judgement.id
                yield answer.judgement
        except RequestError as error:
            if error.code not in ("UNAVAILABLE", "DEADLINE_EXCEEDED") or selection.after_id == start:
                raise
        else:
            return
