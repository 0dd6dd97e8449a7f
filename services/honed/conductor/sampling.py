"""Samples the served policy as an application does: continuations of prompts with fixed seeds."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc

from honed.config import RunSettings
from honed.kit.errors import InvalidArgument
from honed.kit.jsonl import read_lines, write_lines
from honed.models.prompt_rows import at_line, row_prompt
from honed.v1 import common_pb2, generation_pb2, generation_pb2_grpc

CONCURRENCY = 48
CALL_TIMEOUT_S = 120.0
TRIES = 20
FULL_PAUSE_S = 1.0


@dataclass(frozen=True)
class Continuation:
    """What the policy made of a prompt."""

    prompt: str
    text: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    version: str
    reference: str = ""


def prompts_of(path: Path, limit: int) -> list[generation_pb2.Prompt]:
    """The first `limit` prompts of a file of `text`, `token_ids` or `messages`.

    Raises:
        ValueError: a line holds none; names file and line.
    """
    prompts: list[generation_pb2.Prompt] = []
    for number, row in read_lines(path):
        if len(prompts) == limit:
            break
        try:
            prompts.append(row_prompt(row))
        except InvalidArgument as error:
            raise at_line(path, number, error) from error
    return prompts


def training_sampling(settings: RunSettings) -> common_pb2.SamplingParams:
    """How the run samples what it trains on."""
    section = settings.conductor
    return common_pb2.SamplingParams(
        max_tokens=section.response_tokens, temperature=section.temperature, fixed_length=section.fixed_length
    )


async def continuations(
    stub: generation_pb2_grpc.GenerationServiceAsyncStub,
    prompts: Sequence[generation_pb2.Prompt],
    sampling: common_pb2.SamplingParams,
    best_of: int | None = None,
) -> list[Continuation]:
    """One continuation of each prompt; the same seeds at each call, so that only the policy differs.

    A service that is full is asked again.

    Args:
        stub: of the service.
        prompts: what to continue.
        sampling: how; without a seed.
        best_of: each continuation is the best of so many, by the run's reward; None for the only one.

    Raises:
        AioRpcError: a call failed.
    """
    candidates = best_of or 1
    room = asyncio.Semaphore(max(1, CONCURRENCY // candidates))

    async def one(number: int, prompt: generation_pb2.Prompt) -> Continuation:
        request = generation_pb2.GenerateRequest(prompt=prompt, sampling=sampling, logprobs=True)
        request.sampling.seed = number * candidates  # candidate i has seed + i
        if best_of is not None:
            request.best_of.candidates = best_of
        async with room:
            for left in reversed(range(TRIES)):
                try:
                    answer = await stub.Generate(request, timeout=CALL_TIMEOUT_S)
                    break
                except grpc.aio.AioRpcError as error:
                    if error.code() != grpc.StatusCode.RESOURCE_EXHAUSTED or not left:
                        raise
                    await asyncio.sleep(FULL_PAUSE_S)
        sample = answer.samples[0]
        version = sample.version_spans[-1].version if sample.version_spans else common_pb2.PolicyVersion()
        return Continuation(
            shown(prompt),
            sample.text,
            tuple(answer.prompt_token_ids),
            tuple(sample.token_ids),
            tuple(sample.logprobs),
            f"{version.fence}.{version.step}",
            prompt.reference,
        )

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(i, prompt)) for i, prompt in enumerate(prompts)]
    return [task.result() for task in tasks]


def shown(prompt: generation_pb2.Prompt) -> str:
    """A prompt for people."""
    match prompt.WhichOneof("content"):
        case "text":
            return prompt.text
        case "messages":
            return "\n".join(f"{message.role}: {message.content}" for message in prompt.messages.messages)
        case _:
            return " ".join(map(str, prompt.token_ids.ids))


def write_continuations(path: Path, rows: Iterable[Continuation]) -> None:
    """Keeps continuations as JSON lines."""
    write_lines(path, (asdict(row) for row in rows))


def read_continuations(path: Path) -> list[Continuation]:
    """Reads what `write_continuations` wrote."""
    return [
        Continuation(
            row["prompt"],
            row["text"],
            tuple(row["prompt_token_ids"]),
            tuple(row["token_ids"]),
            tuple(row["logprobs"]),
            row["version"],
            row.get("reference", ""),  # a file of an older honed has none
        )
        for _, row in read_lines(path)
    ]
