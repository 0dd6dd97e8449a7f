"""Samples of the reference policy, on which a reward model's gain and bias are set."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Final

import grpc
import torch

from honed.artifacts.version import VersionId
from honed.config import RunSettings
from honed.models.loader import load_language_model
from honed.v1 import common_pb2, generation_pb2, generation_pb2_grpc

logger = logging.getLogger(__name__)

_AT_ONCE: Final = 32
_CALL_TIMEOUT_S: Final = 600.0
_FULL: Final = (0.2, 5.0)  # pauses after RESOURCE_EXHAUSTED, seconds

Sampled = list[tuple[list[int], list[int]]]
"""(prompt, response) token ids."""


class OtherPolicy(Exception):
    """The generation service does not serve the reference policy."""


async def served_samples(
    channel: grpc.aio.Channel,
    reference: VersionId,
    prompts: Sequence[Sequence[int]],
    settings: RunSettings,
    waiting: Callable[[], None] = lambda: None,
) -> Sampled:
    """Samples the reference policy through the generation service, by the run's sampling settings.

    Args:
        channel: To the generation service; it may still be starting.
        reference: The version that must serve.
        prompts: Token ids.
        settings: How the run samples. Each prompt has the next seed, and the service has the start
            time-out to answer.
        waiting: Called before the wait for the service.

    Raises:
        OtherPolicy: It serves another version, as in a run that has trained already.
        AioRpcError: It does not answer in time, or refuses.
    """
    stub, section = generation_pb2_grpc.GenerationServiceStub(channel), settings.conductor
    waiting()
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
    directory: Path, prompts: Sequence[Sequence[int]], tokens: int, *, temperature: float, rng: torch.Generator
) -> Sampled:
    """Continues each prompt by `tokens` sampled tokens in this process; the pairs come ordered by prompt length.

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
        samples += [(row[:-tokens], row[-tokens:]) for row in rows.tolist()]
    return samples
