"""A RewardService elsewhere as a scorer: honed's own of another run, or anybody's that speaks the contract.

- A batch goes in calls that any gRPC server takes: `options.batch` items at most, and below gRPC's usual 4 MiB.
- What may pass (nobody answers, no room) is tried again with growing pauses until `options.deadline_s`, and is an outage then:
  rollouts wait for it and lose no delivery. So is what the service refuses to everybody: a wrong token, another contract.
- An answer is checked: as many results as items, under their ids, in their order, finite.
- The version of a score is of what gave it: each answer names the remote's scorers, their versions and weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, NoReturn

from honed._client.errors import RequestError
from honed._client.peer import Peer
from honed.kit.errors import FailedPrecondition, Unavailable
from honed.kit.from_files import FromFiles
from honed.kit.tls import TlsFiles
from honed.kit.tokens import read_token
from honed.reward.scorer import BadSample, Kind, ScorerFailed, ScorerInput, ScorerOutput
from honed.reward.settings import RemoteOptions
from honed.v1 import generation_pb2, reward_pb2, reward_pb2_grpc

_CALL_BYTES: Final = 3 << 20
_PAUSES_S: Final = (0.2, 5.0)
_PASSING: Final = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED", "CANCELLED")
_REFUSED: Final = {
    "UNAUTHENTICATED": "give it the token of that service by options.token_file",
    "PERMISSION_DENIED": "its token needs the scope `reward` there",
    "UNIMPLEMENTED": "what listens there serves no honed.v1.RewardService, or another version of it",
}


class RemoteScorer:
    """The reward of another service, or one of its scorers. Used by one thread."""

    kind: Kind = "remote"
    max_tokens = 0

    def __init__(
        self,
        name: str,
        target: str,
        options: RemoteOptions,
        *,
        sees_prompt: bool = True,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Opens a channel and calls nobody: the service need not be there yet.

        Args:
            name: The scorer's name in the settings.
            target: `host:port`, or any gRPC target.
            options: See there.
            sees_prompt: Whether the prompt is sent too.
            clock: Seconds, monotonic.
            sleep: How to wait between two tries.

        Raises:
            FailedPrecondition: The token or a TLS file cannot be read.
        """
        self.name, self.version, self.longest_s = name, f"remote {target}", options.deadline_s
        self._target, self._options, self._sees_prompt = target, options, sees_prompt
        self._clock, self._sleep = clock, sleep
        tls = options.tls
        files = [] if tls is None else [tls.authority, tls.certificate, tls.key]
        try:
            self._peer = FromFiles([*files, *([options.token_file] if options.token_file else [])], self._connect)
        except ValueError as error:
            raise FailedPrecondition(f"scorer '{name}': {error}") from error

    def score(self, batch: Sequence[ScorerInput]) -> list[ScorerOutput]:
        """See `Scorer`.

        Raises:
            BadSample: The service says that a sample is at fault, and it was sent alone.
            ScorerFailed: It refuses the call, or its answer is none; caused by Unavailable where it does not answer in time.
        """
        end = self._clock() + self._options.deadline_s
        outputs: list[ScorerOutput] = []
        items = [self._item(sample, index) for index, sample in enumerate(batch)]
        for first, chunk in _chunks(items, self._options.batch):
            results = self._call(chunk, first, end)
            self._check(results, chunk)
            outputs += [self._output(result, first + index) for index, result in enumerate(results)]
        return outputs

    def scorers(self, timeout_s: float) -> list[str]:
        """The names of the service's scorers.

        Raises:
            RequestError: It does not answer within `timeout_s` seconds, or does not tell.
        """
        peer = self._peer.get()
        stub = reward_pb2_grpc.RewardServiceStub(peer.channel)
        listed = peer.unary(stub.ListScorers, reward_pb2.ListScorersRequest(), timeout_s)
        return sorted({info.name for info in listed.scorers})

    def _connect(self) -> Peer:
        options, tls = self._options, self._options.tls
        files = None if tls is None else TlsFiles(tls.authority, tls.certificate, tls.key, tls.server_name or "")
        token = None if options.token_file is None else read_token(Path(options.token_file))
        return Peer("remote reward", self._target, token, files)

    def _item(self, sample: ScorerInput, index: int) -> reward_pb2.ScoreItem:
        item = reward_pb2.ScoreItem(id=str(index))
        as_tokens = self._options.send == "token_ids"
        if as_tokens:
            item.token_ids.ids.extend(sample.response_ids)
        else:
            item.text = sample.response_text
        if self._sees_prompt:
            if as_tokens and sample.prompt_ids:
                item.prompt.token_ids.ids.extend(sample.prompt_ids)
            elif not as_tokens and sample.messages is not None:
                said = [generation_pb2.ChatMessage(role=m.role, content=m.content) for m in sample.messages]
                item.prompt.messages.messages.extend(said)
            elif not as_tokens and sample.prompt_text:
                item.prompt.text = sample.prompt_text
        if sample.reference:
            if item.prompt.WhichOneof("content") is None:
                item.prompt.text = ""  # a reference stands with a prompt
            item.prompt.reference = sample.reference
        return item

    def _call(self, items: Sequence[reward_pb2.ScoreItem], first: int, end: float) -> Sequence[reward_pb2.ScoreResult]:
        request, pause_s = reward_pb2.ScoreRequest(items=items), _PAUSES_S[0]
        while True:
            left = end - self._clock()
            failure: RequestError | None = None
            if left > 0:
                peer = self._peer.get()
                try:
                    response = peer.unary(reward_pb2_grpc.RewardServiceStub(peer.channel).Score, request, left)
                    return list(response.results)
                except RequestError as error:
                    failure = error
                    if error.code not in _PASSING:
                        self._refuse(error, items, first)
                left = end - self._clock()
            if left <= pause_s:
                reason = "the calls before took its time" if failure is None else f"{failure.code}: {failure.message}"
                away = Unavailable(f"{self._target} did not score within {self._options.deadline_s:g} s: {reason}")
                raise ScorerFailed(self.name, self.version, str(away)) from away
            self._sleep(pause_s * random.uniform(0.75, 1.0))
            pause_s = min(_PAUSES_S[1], 2 * pause_s)

    def _refuse(self, error: RequestError, items: Sequence[reward_pb2.ScoreItem], first: int) -> NoReturn:
        reason = f"{self._target} answered {error.code}: {error.message}"
        if error.code == "INVALID_ARGUMENT" and len(items) == 1:
            raise BadSample(self.name, self.version, reason, first) from error
        if error.code in _REFUSED:  # to everybody, until somebody changes something: no sample is at fault
            away = Unavailable(f"{reason}; {_REFUSED[error.code]}")
            raise ScorerFailed(self.name, self.version, str(away)) from away
        raise ScorerFailed(self.name, self.version, reason) from error

    def _check(self, results: Sequence[reward_pb2.ScoreResult], items: Sequence[reward_pb2.ScoreItem]) -> None:
        given, wanted = [result.id for result in results], [item.id for item in items]
        if len(given) != len(wanted):
            reason = f"{self._target} gave {len(given)} results for {len(wanted)} items"
        elif given != wanted:
            at = next(index for index, pair in enumerate(zip(given, wanted, strict=True)) if pair[0] != pair[1])
            reason = f"{self._target} gave the id {given[at]!r} for item {wanted[at]!r}: results come in the order of the items"
        else:
            return
        raise ScorerFailed(self.name, self.version, f"{reason}; does it speak another version of the contract?")

    def _output(self, result: reward_pb2.ScoreResult, index: int) -> ScorerOutput:
        wanted = self._options.scorer
        if wanted is None:
            value, version = result.reward, self._version(result)
            cut = max((score.truncated_tokens for score in result.scores), default=0)
        else:
            found = next((score for score in result.scores if score.scorer == wanted), None)
            if found is None:
                there = ", ".join(score.scorer for score in result.scores) or "none"
                raise ScorerFailed(
                    self.name, self.version, f"{self._target} has no scorer {wanted!r} (options.scorer): {there}"
                )
            value, version, cut = found.value, found.scorer_version, found.truncated_tokens
        if not math.isfinite(value):
            raise ScorerFailed(self.name, version, f"{self._target} gave {value}, which is not finite", index)
        return ScorerOutput(value, cut, version=version)

    def _version(self, result: reward_pb2.ScoreResult) -> str:
        """A digest of what the reward is made of; without scores nobody can tell."""
        made_of = sorted((score.scorer, score.scorer_version, score.weight) for score in result.scores)
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest() if made_of else self.version


def _chunks(items: Sequence[reward_pb2.ScoreItem], count: int) -> Iterator[tuple[int, list[reward_pb2.ScoreItem]]]:
    """The items of each call, with the index of the first; one that is larger than a call should be goes alone."""
    chunk: list[reward_pb2.ScoreItem] = []
    first = size = 0
    for index, item in enumerate(items):
        bytes_ = item.ByteSize() + 8
        if chunk and (len(chunk) == count or size + bytes_ > _CALL_BYTES):
            yield first, chunk
            chunk, first, size = [], index, 0
        chunk.append(item)
        size += bytes_
    if chunk:
        yield first, chunk
