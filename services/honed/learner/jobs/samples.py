"""Samples of the reference policy, on which a reward model's gain and bias are set.

The generation service samples them as it samples the run's rollouts; where it does not serve the reference policy, or does
not answer, this process does.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Collection, Sequence
from itertools import groupby
from pathlib import Path
from typing import Final

import grpc
import torch

from honed.artifacts.version import VersionId
from honed.config import RunSettings
from honed.kit.errors import FailedPrecondition, InvalidArgument
from honed.kit.jsonl import read_lines
from honed.models.facts import ModelFacts
from honed.models.loader import load_language_model
from honed.models.prompt_rows import at_line
from honed.models.prompts import PromptEncoder
from honed.models.tokenizer import TextTokenizer
from honed.runtime import internal_channel
from honed.v1 import common_pb2, generation_pb2, generation_pb2_grpc

logger = logging.getLogger(__name__)

_AT_ONCE: Final = 32
_CALL_TIMEOUT_S: Final = 600.0
_FULL: Final = (0.2, 5.0)  # pauses after RESOURCE_EXHAUSTED, seconds

Sampled = list[tuple[list[int], list[int]]]
"""(prompt, response) token ids."""


BASE: Final = VersionId(0, 0)
"""The reference policy: the version that the run starts from."""


class OtherPolicy(Exception):
    """The generation service does not serve the reference policy."""


async def reference_samples(
    settings: RunSettings,
    base: Path,
    tokenizer: TextTokenizer,
    *,
    rng: torch.Generator,
    report: Callable[[str], None],
) -> Sampled:
    """Samples of the reference policy, truncated as the run truncates.

    Args:
        settings: The run's.
        base: Model directory of the reference policy.
        tokenizer: Its own.
        rng: Draws what this process samples.
        report: Is told what the work waits for.

    Raises:
        FailedPrecondition: The run has too few prompts.
        InvalidArgument: The text to truncate at is not one token.
        ValueError: A prompt cannot be used; names file and line.
    """
    prompts = await asyncio.to_thread(_prompts, settings, base)
    pairs = await _sampled(settings, base, prompts, rng, report)
    truncate = settings.reward.truncate
    if truncate is not None:
        token = _single_token(tokenizer, truncate.token_text)
        pairs = [(prompt, _cut(response, token, truncate.not_before)) for prompt, response in pairs]
    return pairs


def as_scored(samples: Sampled, policy: TextTokenizer, scorer: TextTokenizer, *, sees_prompt: bool) -> list[list[int]]:
    """Token ids of samples as a scorer will see those of the policy (`honed.reward.model_scorer`).

    Args:
        samples: Of the policy.
        policy: Its tokenizer.
        scorer: The scorer's; where it is another one, the text is tokenised again.
        sees_prompt: Whether the scorer sees the prompt, and not the response alone.
    """
    if scorer.digest == policy.digest:
        return [[*(prompt if sees_prompt else scorer.prefix), *response] for prompt, response in samples]
    found = []
    for prompt, response in samples:
        head = scorer.encode(policy.decode(prompt), special_tokens=True) if sees_prompt else []
        found.append([*(head or scorer.prefix), *scorer.encode(policy.decode(response), special_tokens=False)])
    return [ids for ids in found if ids]


async def _sampled(
    settings: RunSettings, base: Path, prompts: list[list[int]], rng: torch.Generator, report: Callable[[str], None]
) -> Sampled:
    section = settings.conductor
    if settings.generation.address is not None or settings.generation.port:
        try:
            async with internal_channel(settings, settings.generation.target) as channel:
                report("waiting for the generation service")
                return await served_samples(channel, BASE, prompts, settings)
        except (OtherPolicy, grpc.aio.AioRpcError, TimeoutError) as error:
            reason = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
            logger.warning("the reference policy is sampled in this process", extra={"reason": reason})
    report("sampling the reference policy")
    ends = frozenset() if section.fixed_length else ModelFacts.read(base).end_token_ids
    return await asyncio.to_thread(
        sample_reference, base, prompts, section.response_tokens, temperature=section.temperature, rng=rng, ends=ends
    )


def _prompts(settings: RunSettings, base: Path) -> list[list[int]]:
    """The first prompts, as the run reads them."""
    if settings.data.prompts is None:
        raise FailedPrecondition("data.prompts is not set: the reward's gain and bias are set on samples of the policy")
    encode = PromptEncoder.of_model(base, longest=settings.longest_prompt)
    prompts: list[list[int]] = []
    for number, row in itertools.islice(read_lines(settings.data.prompts), settings.reward_training.normalising_samples):
        try:
            prompts.append(encode(row))
        except InvalidArgument as error:
            raise at_line(settings.data.prompts, number, error) from error
    if len(prompts) < 2:
        raise FailedPrecondition(
            f"{settings.data.prompts} holds {len(prompts)} prompts: the reward's gain and bias need at least 2"
        )
    return prompts


def _single_token(tokenizer: TextTokenizer, text: str) -> int:
    ids = tokenizer.encode(text, special_tokens=False)
    if len(ids) != 1:
        raise InvalidArgument("reward.truncate.token_text", f"{text!r} is {len(ids)} tokens of the policy; it must be one")
    return ids[0]


def _cut(response: list[int], token: int, not_before: int) -> list[int]:
    """The response as truncation leaves it (`honed.reward.reward.Truncation`)."""
    try:
        return response[: response.index(token, not_before) + 1]
    except ValueError:
        return response


async def served_samples(
    channel: grpc.aio.Channel,
    reference: VersionId,
    prompts: Sequence[Sequence[int]],
    settings: RunSettings,
) -> Sampled:
    """Samples the reference policy through the generation service, by the run's sampling settings.

    Args:
        channel: To the generation service; it may still be starting.
        reference: The version that must serve.
        prompts: Token ids.
        settings: How the run samples. Each prompt has the next seed, and the service has the start
            time-out to answer.

    Raises:
        OtherPolicy: It serves another version, as in a run that has trained already.
        AioRpcError: It does not answer in time, or refuses.
    """
    stub, section = generation_pb2_grpc.GenerationServiceStub(channel), settings.conductor
    await _await_version(stub, reference, section.start_timeout_s)
    room = asyncio.Semaphore(_AT_ONCE)

    async def sample(number: int, prompt: Sequence[int]) -> tuple[list[int], list[int]]:
        sampling = common_pb2.SamplingParams(
            max_tokens=section.response_tokens,
            temperature=section.temperature,
            seed=settings.seed + number,
            fixed_length=section.fixed_length,
        )
        asked = generation_pb2.Prompt(token_ids=generation_pb2.TokenIds(ids=prompt))
        request = generation_pb2.GenerateRequest(prompt=asked, sampling=sampling, n=1)
        async with room:
            [answer] = (await _patiently(stub, request)).samples
        versions = {(span.version.fence, span.version.step) for span in answer.version_spans}
        if versions - {(reference.fence, reference.step)}:
            raise OtherPolicy(f"the generation service changed to {max(versions)} meanwhile")
        return list(prompt), list(answer.token_ids)

    tasks = [asyncio.ensure_future(sample(number, prompt)) for number, prompt in enumerate(prompts)]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


async def _await_version(stub: generation_pb2_grpc.GenerationServiceAsyncStub, reference: VersionId, timeout_s: float) -> None:
    """Waits until the service answers; `wait_for_ready` covers a port that is not open yet, the loop one that loads."""
    end = asyncio.get_running_loop().time() + timeout_s
    while True:
        left_s = end - asyncio.get_running_loop().time()
        try:
            answer = await stub.GetPolicy(generation_pb2.GetPolicyRequest(), timeout=max(left_s, 0.001), wait_for_ready=True)
            break
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.UNAVAILABLE or left_s <= 1.0:
                raise
        await asyncio.sleep(0.5)
    if (answer.version.fence, answer.version.step) != (reference.fence, reference.step):
        raise OtherPolicy(f"the generation service serves {answer.version.fence}.{answer.version.step}, not {reference}")


async def _patiently(
    stub: generation_pb2_grpc.GenerationServiceAsyncStub, request: generation_pb2.GenerateRequest
) -> generation_pb2.GenerateResponse:
    """Calls Generate until there is room, within the deadline of one call."""
    pause_s = _FULL[0]
    async with asyncio.timeout(_CALL_TIMEOUT_S):
        while True:
            try:
                return await stub.Generate(request, timeout=_CALL_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                if error.code() not in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE):
                    raise
            await asyncio.sleep(pause_s)
            pause_s = min(_FULL[1], 2 * pause_s)


@torch.no_grad()
def sample_reference(
    directory: Path,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    *,
    temperature: float,
    rng: torch.Generator,
    ends: Collection[int] = (),
) -> Sampled:
    """Continues each prompt by at most `tokens` sampled tokens in this process; the pairs come ordered by prompt length.

    A response ends with the first of the tokens `ends`, as a rollout does: what the model would say after it is no part of one.

    For when the generation service does not serve the reference policy. Prompts of one length go through
    the model together, so there is no padding.
    """
    model = load_language_model(directory)
    samples: Sampled = []
    for _, group in groupby(sorted(prompts, key=len), key=len):
        rows = torch.tensor(list(group))
        step, cache = rows, None
        for _ in range(tokens):
            output = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            step = torch.multinomial((output.logits[:, -1].float() / temperature).softmax(-1), 1, generator=rng)
            rows = torch.cat([rows, step], dim=1)
        samples += [(row[:-tokens], _ended(row[-tokens:], ends)) for row in rows.tolist()]
    return samples


def _ended(response: list[int], ends: Collection[int]) -> list[int]:
    length = next((at for at, token in enumerate(response, start=1) if token in ends), len(response))
    return response[:length]
