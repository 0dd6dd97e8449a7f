"""The judgements of the preference service as pairs of the policy's tokens."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

import grpc

from honed.learner.data.judged import encode_pairs, read_pairs
from honed.learner.data.pair import Pair
from honed.models.tokenizer import TextTokenizer
from honed.v1 import preference_pb2, preference_pb2_grpc

logger = logging.getLogger(__name__)

_FREEZE_S: Final = 60.0
_EXPORT_S: Final = 600.0


class RecordedJudgements:
    """Implements `Judgements`. Calls end in `AioRpcError`."""

    def __init__(self, channel: grpc.aio.Channel, tokenizer: TextTokenizer, *, longest: int, append_end: bool) -> None:
        """Asks nothing yet.

        Args:
            channel: To the preference service.
            tokenizer: Of the policy; nobody else may use it.
            longest: Tokens that prompt and response may have together.
            append_end: Whether a response ends with the end-of-text token.
        """
        self._stub, self._tokenizer = preference_pb2_grpc.PreferenceServiceStub(channel), tokenizer
        self._longest, self._append_end = longest, append_end

    async def freeze(self, key: str) -> str:
        """See `Judgements`."""
        return (await self._frozen(key)).content_sha256

    async def pairs(self, key: str) -> list[Pair]:
        """See `Judgements`.

        Raises:
            InvalidArgument: They cannot be made into tokens.
        """
        request = preference_pb2.ExportJudgementsRequest(snapshot_id=(await self._frozen(key)).snapshot_id)
        stream = self._stub.ExportJudgements(request, timeout=_EXPORT_S)
        rows = [pair async for message in stream for pair in read_pairs(message.judgement)]
        pairs, left = await asyncio.to_thread(
            encode_pairs, self._tokenizer, rows, longest=self._longest, append_end=self._append_end
        )
        for reason, count in left.items():
            logger.warning("pairs left out", extra={"reason": reason, "pairs": count})
        return pairs

    async def _frozen(self, key: str) -> preference_pb2.CreateSnapshotResponse:
        return await self._stub.CreateSnapshot(preference_pb2.CreateSnapshotRequest(idempotency_key=key), timeout=_FREEZE_S)
