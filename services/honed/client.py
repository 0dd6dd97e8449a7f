"""`honed.Client`: what an application imports to sample from the live policy, score responses, and send feedback.

Synchronous and safe to share between threads. Needs grpcio and protobuf, nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Self, Unpack

from honed._client.endpoints import Endpoints
from honed._client.errors import RequestError
from honed._client.judgements import FeedbackOptions, Response, judgement
from honed._client.peer import Environment, Peer
from honed._client.stream import SampleStream
from honed._client.values import (
    ChatMessage,
    Delta,
    Origin,
    PromptContent,
    Sample,
    SamplingOptions,
    Scorable,
    Scored,
    ScorerValue,
    Span,
    Version,
    best_of_message,
    prompt_message,
    sampling_params,
    score_item,
    scored,
)
from honed.kit.tls import TlsFiles
from honed.kit.tokens import read_token
from honed.v1 import (
    generation_pb2,
    generation_pb2_grpc,
    preference_pb2,
    preference_pb2_grpc,
    reward_pb2,
    reward_pb2_grpc,
)

__all__ = [
    "ChatMessage",
    "Client",
    "Delta",
    "FeedbackOptions",
    "RequestError",
    "Sample",
    "SampleStream",
    "SamplingOptions",
    "Scored",
    "ScorerValue",
    "Span",
    "TlsFiles",
    "Version",
]


class Client:
    """Calls the services of a run.

    Every call has a deadline, repeats what is safe to repeat, waits when a service is full and says when to come back, and
    raises `RequestError` when it failed for good.

    Example:
        with honed.Client.from_run("out/demo") as client:
            sample = client.generate("the film was", max_tokens=24)[0]
            client.thumbs(sample, up=True, annotator="u-17")
    """

    def __init__(
        self,
        generation: str | None = None,
        reward: str | None = None,
        preference: str | None = None,
        *,
        token: str | None = None,
        token_file: str | os.PathLike[str] | None = None,
        tls: TlsFiles | None = None,
        timeout: float = 60.0,
        environment: Environment | None = None,
    ) -> None:
        """Opens channels to the services that are named; the first call connects.

        Args:
            generation: `host:port` of the generation service, or any gRPC target.
            reward: the same of the reward service.
            preference: the same of the preference service.
            token: bearer token.
            token_file: file with the token.
            tls: certificate files for mutual TLS; None for plain text.
            timeout: the longest that a call may take, seconds, pauses and repeats included.
            environment: time, ids and jitter; tests bring their own.

        Raises:
            ValueError: token and token_file are both given, or a file cannot be read.
        """
        if token is not None and token_file is not None:
            raise ValueError("token and token_file are both given: give one")
        if token_file is not None:
            token = read_token(Path(token_file))
        self._timeout = timeout
        self._environment = environment or Environment()
        addresses = {"generation": generation, "reward": reward, "preference": preference}
        self._peers = {name: Peer(name, at, token, tls, self._environment) for name, at in addresses.items() if at is not None}

    @classmethod
    def from_run(cls, directory: str | os.PathLike[str], *, timeout: float = 60.0) -> Client:
        """A client of the run that is up in a directory of this machine, with the token that it made for applications.

        Raises:
            ValueError: no run is up there.
        """
        run = Endpoints.read(Path(directory))
        at = run.addresses
        return cls(
            at.get("generation"),
            at.get("reward"),
            at.get("preference"),
            token_file=run.token_file,
            tls=run.tls,
            timeout=timeout,
        )

    @classmethod
    def over(cls, *peers: Peer, timeout: float = 60.0) -> Client:
        """A client of peers that are open already; it closes them."""
        client = cls(timeout=timeout)
        client._peers.update((peer.service, peer) for peer in peers)
        return client

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the channels; calls under way are cancelled."""
        for peer in self._peers.values():
            peer.close()

    def generate(
        self,
        prompt: PromptContent,
        *,
        n: int = 1,
        logprobs: bool = False,
        best_of: int | None = None,
        scorer: str = "",
        reference: str = "",
        timeout: float | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> list[Sample]:
        """Samples n responses; or samples `best_of`, and returns the n best by the run's reward, the best first.

        Args:
            prompt: text; or token ids, which are used as they are; or the messages of a conversation, each with `role` and
                `content`.
            n: how many.
            logprobs: return the log-probability of each sampled token.
            best_of: how many candidates to sample; each sample that comes back has its `reward` and `scores`.
            scorer: name of the scorer that decides among them; empty for the whole reward.
            reference: what scorers compare responses with, such as the right answer.
            timeout: seconds; None takes the client's.
            **sampling: how to draw tokens, see `SamplingOptions`.

        Raises:
            ValueError: `scorer` is given without `best_of`.
            RequestError: the call failed.
        """
        params = sampling_params(sampling)
        request = generation_pb2.GenerateRequest(
            prompt=prompt_message(prompt, reference),
            sampling=params,
            n=n,
            logprobs=logprobs,
            best_of=best_of_message(best_of, scorer),
        )
        peer = self._peer("generation")
        method = generation_pb2_grpc.GenerationServiceStub(peer.channel).Generate
        response = peer.unary(method, request, self._seconds(timeout))
        origin = Origin(prompt, params)
        return [origin.sample(message, response.prompt_token_ids) for message in response.samples]

    def stream(
        self,
        prompt: PromptContent,
        *,
        n: int = 1,
        logprobs: bool = False,
        best_of: int | None = None,
        scorer: str = "",
        reference: str = "",
        timeout: float | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> SampleStream:
        """Samples n responses and yields each token as soon as it is sampled.

        Takes what `generate` takes; `timeout` is for the whole stream. Iterate over the result, in a `with` block if you may
        leave early; its `samples` are the responses as a whole. With `best_of` nothing comes before all candidates are scored;
        then each of the n best comes whole, the best first.

        Raises:
            ValueError: `scorer` is given without `best_of`.
            RequestError: while iterating: the call failed.
        """
        params = sampling_params(sampling)
        request = generation_pb2.StreamGenerateRequest(
            prompt=prompt_message(prompt, reference),
            sampling=params,
            n=n,
            logprobs=logprobs,
            best_of=best_of_message(best_of, scorer),
        )
        peer = self._peer("generation")
        method = generation_pb2_grpc.GenerationServiceStub(peer.channel).StreamGenerate
        return SampleStream(peer.stream(method, request, self._seconds(timeout)), Origin(prompt, params))

    def score(
        self, items: Iterable[Scorable], *, references: Iterable[str] | None = None, timeout: float | None = None
    ) -> list[Scored]:
        """Scores responses, 4096 at most, in their order.

        Args:
            items: samples; or texts that stand alone; or pairs of prompt and response, each text or token ids, the prompt
                also messages.
            references: for each item what scorers compare it with, such as the right answer; empty where there is nothing.
            timeout: seconds; None takes the client's.

        Raises:
            ValueError: there are more or fewer references than items.
            RequestError: the call failed; `field` names the item, counted from 0.
        """
        peer = self._peer("reward")
        scored_items = list(items)
        given = [""] * len(scored_items) if references is None else list(references)
        messages = [score_item(item, reference) for item, reference in zip(scored_items, given, strict=True)]
        request = reward_pb2.ScoreRequest(items=messages)
        response = peer.unary(reward_pb2_grpc.RewardServiceStub(peer.channel).Score, request, self._seconds(timeout))
        return [scored(result) for result in response.results]

    def thumbs(self, response: Response, *, up: bool, annotator: str, **about: Unpack[FeedbackOptions]) -> int:
        """Records that a person liked a response, or did not; returns the judgement's id.

        Args:
            response: a sample, or a text from elsewhere.
            up: whether it was liked.
            annotator: who said so, as a pseudonym.
            **about: see `FeedbackOptions`.

        Raises:
            RequestError: the judgement is not stored for sure.
        """
        said = judgement([response], annotator, about)
        said.thumbs.CopyFrom(preference_pb2.ThumbsJudgement(response=0, up=up))
        return self.record(said, key=about.get("key"))

    def compare(
        self,
        first: Response,
        second: Response,
        *,
        preferred: Response | None,
        annotator: str,
        strength: int = 0,
        **about: Unpack[FeedbackOptions],
    ) -> int:
        """Records which of two responses a person found better; returns the judgement's id.

        Args:
            first: the response that was shown first.
            second: the other one.
            preferred: the better one of the two; None for a tie.
            annotator: who said so, as a pseudonym.
            strength: 1 slightly, 2 better, 3 much better; 0 when not asked.
            **about: see `FeedbackOptions`.

        Raises:
            ValueError: `preferred` is neither, or the two are the same.
            RequestError: the judgement is not stored for sure.
        """
        if first == second or (preferred is not None and preferred not in (first, second)):
            raise ValueError("`preferred` must be one of two different responses, or None for a tie")
        better = 1 if preferred == second else 0
        said = judgement([first, second], annotator, about)
        verdict = preference_pb2.PairwiseJudgement(preferred=better, other=1 - better, tie=preferred is None, strength=strength)
        said.pairwise.CopyFrom(verdict)
        return self.record(said, key=about.get("key"))

    def edit(self, response: Response | None, text: str, *, annotator: str, **about: Unpack[FeedbackOptions]) -> int:
        """Records what a response should have been; returns the judgement's id.

        Args:
            response: what was edited; None for a demonstration from nothing.
            text: as it should be.
            annotator: who wrote it, as a pseudonym.
            **about: see `FeedbackOptions`.

        Raises:
            RequestError: the judgement is not stored for sure.
        """
        said = judgement([] if response is None else [response], annotator, about)
        said.edit.CopyFrom(preference_pb2.EditJudgement(response=0, text=text))
        return self.record(said, key=about.get("key"))

    def record(self, judgement: preference_pb2.Judgement, *, key: str | None = None, timeout: float | None = None) -> int:
        """Records a judgement of any kind; returns its id. It is committed to the database when this returns.

        Args:
            judgement: as the contract states it.
            key: see `FeedbackOptions`.
            timeout: seconds; None takes the client's.

        Raises:
            RequestError: it is not stored for sure.
        """
        peer = self._peer("preference")
        request = preference_pb2.RecordJudgementRequest(
            judgement=judgement, idempotency_key=self._environment.new_id() if key is None else key
        )
        method = preference_pb2_grpc.PreferenceServiceStub(peer.channel).RecordJudgement
        return peer.unary(method, request, self._seconds(timeout)).id

    def _peer(self, service: str) -> Peer:
        try:
            return self._peers[service]
        except KeyError:
            raise ValueError(f"this client knows no {service} service: Client({service}='host:port')") from None

    def _seconds(self, timeout: float | None) -> float:
        return self._timeout if timeout is None else timeout
