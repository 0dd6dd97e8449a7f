"""The judgements of the preference service as examples of the policy's tokens."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Generic

import grpc

from honed.learner.data.judged import Judged, encode_labelled, encode_pairs, read_labels, read_pairs
from honed.learner.data.labelled import Labelled
from honed.learner.data.pair import Pair
from honed.learner.settings import DirectPreferenceSettings
from honed.learner.sources.preferences import E
from honed.models.tokenizer import TextTokenizer
from honed.v1 import preference_pb2, preference_pb2_grpc

logger = logging.getLogger(__name__)

_FREEZE_S: Final = 60.0
_EXPORT_S: Final = 600.0


@dataclass(frozen=True)
class Reading(Generic[E]):
    """How examples are made of judgements.

    Attributes:
        wanted: Which judgements have any, in words.
        read: What a judgement says.
        encode: What they all say as examples, in an order that does not change, and how many are left out, by reason.
    """

    wanted: str
    read: Callable[[preference_pb2.Judgement], list[Judged]]
    encode: Callable[[Sequence[Judged]], tuple[list[E], dict[str, int]]]


def as_pairs(tokenizer: TextTokenizer, section: DirectPreferenceSettings, *, longest: int) -> Reading[Pair]:
    """Two responses of which one was preferred; `longest` tokens at most. Nobody else may use the tokenizer."""
    encode = partial(encode_pairs, tokenizer, longest=longest, append_end=section.append_end)
    return Reading("comparison and no ranking", read_pairs, encode)


def as_labelled(tokenizer: TextTokenizer, section: DirectPreferenceSettings, *, longest: int) -> Reading[Labelled]:
    """Single responses that were called good or bad; see `as_pairs`."""
    encode = partial(
        encode_labelled, tokenizer, threshold=section.rating_threshold, longest=longest, append_end=section.append_end
    )
    return Reading("thumb, rating, comparison or ranking", read_labels, encode)


class RecordedJudgements(Generic[E]):
    """Implements `Judgements`. Calls end in `AioRpcError`."""

    def __init__(self, channel: grpc.aio.Channel, reading: Reading[E]) -> None:
        """Asks nothing yet; `channel` leads to the preference service."""
        self._stub, self._reading = preference_pb2_grpc.PreferenceServiceStub(channel), reading
        self.wanted = reading.wanted

    async def newest(self) -> int:
        """See `Judgements`."""
        return (await self._stub.GetStats(preference_pb2.GetStatsRequest(), timeout=_FREEZE_S)).last_id

    async def freeze(self, key: str) -> str:
        """See `Judgements`."""
        return (await self._frozen(key)).content_sha256

    async def examples(self, key: str) -> Sequence[E]:
        """See `Judgements`.

        Raises:
            InvalidArgument: They cannot be made into tokens.
        """
        request = preference_pb2.ExportJudgementsRequest(snapshot_id=(await self._frozen(key)).snapshot_id)
        stream = self._stub.ExportJudgements(request, timeout=_EXPORT_S)
        rows = [row async for message in stream for row in self._reading.read(message.judgement)]
        examples, left = await asyncio.to_thread(self._reading.encode, rows)
        for reason, count in left.items():
            logger.warning("judgements left out", extra={"reason": reason, "examples": count})
        return examples

    async def _frozen(self, key: str) -> preference_pb2.CreateSnapshotResponse:
        return await self._stub.CreateSnapshot(preference_pb2.CreateSnapshotRequest(idempotency_key=key), timeout=_FREEZE_S)
