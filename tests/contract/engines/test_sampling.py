"""What each engine promises of a response."""

from __future__ import annotations

import asyncio
import math

import pytest
from tests.contract.engines.conftest import MAX_BATCH, MAX_IN_FLIGHT, Lab, together

from honed.generation.engine import GenerationEngine
from honed.generation.requests import Chunk, FinishReason, Sampling
from honed.kit.errors import InvalidArgument, Overloaded

pytestmark = pytest.mark.asyncio(loop_scope="session")

PROMPT = [10, 20, 30, 40, 50]


def expected_logprobs(lab: Lab, chunk: Chunk, prompt: list[int], sampling: Sampling) -> list[float]:
    """The processed log-probabilities of the response under transformers, written down naively."""
    import torch

    ids = [*prompt, *chunk.token_ids]
    with torch.inference_mode():
        logits = lab.model(lab.engine.version)(torch.tensor([ids])).logits[0].float()
    result = []
    for at, token in enumerate(chunk.token_ids):
        row = logits[len(prompt) - 1 + at] / (sampling.temperature or 1.0)
        kept = torch.argsort(row, descending=True)[: sampling.top_k or None]
        probabilities = torch.softmax(row[kept], -1)
        count = int((probabilities.cumsum(-1) - probabilities < sampling.top_p).sum())
        survivors = row[kept[:count]]
        result.append(float(row[token] - torch.logsumexp(survivors, -1)))
    return result


async def complete(lab: Lab, sampling: Sampling, prompt: list[int] | None = None) -> Chunk:
    async with asyncio.timeout(60):
        return await lab.engine.complete(lab.request(prompt or PROMPT, sampling))


async def stream(lab: Lab, sampling: Sampling, prompt: list[int] | None = None) -> list[Chunk]:
    async with asyncio.timeout(60):
        return [chunk async for chunk in lab.engine.generate(lab.request(prompt or PROMPT, sampling))]


async def test_a_seed_repeats_its_response_and_another_does_not(lab: Lab) -> None:
    sampling = Sampling(24, seed=7, fixed_length=True)
    first, second = await asyncio.gather(complete(lab, sampling), complete(lab, sampling))
    alone = await complete(lab, sampling)
    assert first.token_ids == second.token_ids == alone.token_ids
    assert (await complete(lab, Sampling(24, seed=8, fixed_length=True))).token_ids != first.token_ids


async def test_without_a_seed_two_responses_differ(lab: Lab) -> None:
    sampling = Sampling(24, fixed_length=True)
    first, second = await asyncio.gather(complete(lab, sampling), complete(lab, sampling))
    assert first.token_ids != second.token_ids


async def test_a_stream_brings_the_same_response_in_parts(lab: Lab) -> None:
    sampling = Sampling(24, seed=7, fixed_length=True)
    chunks = await stream(lab, sampling)
    assert len(chunks) > 1
    assert all(chunk.finish_reason is None for chunk in chunks[:-1])
    for chunk in chunks:
        assert len(chunk.logprobs) == len(chunk.token_ids) == sum(span.end - span.start for span in chunk.spans)
    whole, parts = await complete(lab, sampling), together(chunks)
    assert (parts.token_ids, parts.text, parts.finish_reason) == (whole.token_ids, whole.text, whole.finish_reason)
    assert parts.logprobs == pytest.approx(whole.logprobs, abs=1e-4)
    assert parts.spans[0].start == 0
    assert parts.spans[-1].end == 24
    assert all(one.end == two.start for one, two in zip(parts.spans, parts.spans[1:], strict=False))


async def test_the_text_is_what_the_tokens_decode_to(lab: Lab) -> None:
    chunk = await complete(lab, Sampling(40, seed=3, fixed_length=True))
    assert chunk.text == lab.engine.decode(chunk.token_ids)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(16, seed=1, fixed_length=True),
        Sampling(16, seed=1, temperature=0.7, fixed_length=True),
        Sampling(16, temperature=0.0, fixed_length=True),
        Sampling(16, seed=1, top_k=20, fixed_length=True),
        Sampling(16, seed=1, top_p=0.8, fixed_length=True),
        Sampling(16, seed=1, temperature=1.3, top_k=50, top_p=0.9, fixed_length=True),
    ],
    ids=["plain", "cool", "greedy", "top-k", "top-p", "all"],
)
async def test_logprobs_are_those_of_the_distribution_that_was_sampled(lab: Lab, sampling: Sampling) -> None:
    chunk = await complete(lab, sampling)
    assert chunk.logprobs == pytest.approx(expected_logprobs(lab, chunk, PROMPT, sampling), abs=1e-4)


async def test_greedy_and_random_requests_in_one_batch_keep_their_own_logprobs(lab: Lab) -> None:
    settings = [Sampling(16, temperature=t, seed=i, fixed_length=True) for i, t in enumerate([0.0, 1.0, 0.5, 0.0, 2.0])]
    prompts = [[60 + i] * (3 + 5 * i) for i in range(5)]
    chunks = await asyncio.gather(*(complete(lab, s, p) for s, p in zip(settings, prompts, strict=True)))
    for chunk, sampling, prompt in zip(chunks, settings, prompts, strict=True):
        assert chunk.logprobs == pytest.approx(expected_logprobs(lab, chunk, prompt, sampling), abs=1e-4)


async def test_fixed_length_goes_past_the_end_of_sequence(lab: Lab) -> None:
    free = await asyncio.gather(*(complete(lab, Sampling(400, seed=seed)) for seed in range(12)))
    ended = [chunk for chunk in free if chunk.finish_reason is FinishReason.STOP]
    assert ended, "no response ended early: the test needs other seeds"
    assert all(chunk.token_ids[-1] == 0 and 0 not in chunk.token_ids[:-1] for chunk in ended)
    seed = free.index(ended[0])
    fixed = await complete(lab, Sampling(400, seed=seed, fixed_length=True))
    assert len(fixed.token_ids) == 400
    assert fixed.finish_reason is FinishReason.LENGTH


async def test_a_stop_token_ends_the_response_and_is_its_last_token(lab: Lab) -> None:
    whole = await complete(lab, Sampling(24, seed=7, fixed_length=True))
    stop = whole.token_ids[10]
    chunk = await complete(lab, Sampling(24, seed=7, stop_token_ids=(stop,)))
    assert chunk.token_ids == whole.token_ids[: whole.token_ids.index(stop) + 1]
    assert chunk.finish_reason is FinishReason.STOP


async def test_a_stop_text_is_cut_off_streamed_or_not(lab: Lab) -> None:
    plain = await complete(lab, Sampling(48, seed=7, fixed_length=True))
    stop = next(piece for i in range(8, len(plain.text) - 2) if "\ufffd" not in (piece := plain.text[i : i + 2]))
    sampling = Sampling(48, seed=7, stop=(stop, "never to be seen"))
    chunk = await complete(lab, sampling)
    assert chunk.text == plain.text[: plain.text.index(stop)]
    assert chunk.finish_reason is FinishReason.STOP
    parts = together(await stream(lab, sampling))
    assert (parts.text, parts.token_ids) == (chunk.text, chunk.token_ids)


async def test_text_and_logprobs_are_left_out_unless_asked_for(lab: Lab) -> None:
    request = lab.request(PROMPT, Sampling(8, seed=1, fixed_length=True), want_text=False, want_logprobs=False)
    chunk = await lab.engine.complete(request)
    assert (len(chunk.token_ids), chunk.logprobs, chunk.text) == (8, (), "")
    assert chunk.spans[0].version == lab.engine.version


async def test_a_cancelled_request_frees_the_engine(lab: Lab) -> None:
    long = Sampling(500, fixed_length=True)
    tasks = [asyncio.create_task(complete(lab, long)) for _ in range(2 * MAX_BATCH)]
    streams = [lab.engine.generate(lab.request(PROMPT, long)) for _ in range(2)]
    for one in streams:
        await anext(one)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for one in streams:
        await one.aclose()
    assert lab.engine.in_flight == 0
    async with asyncio.timeout(10):
        await complete(lab, Sampling(2, fixed_length=True))


async def test_a_stream_that_nobody_reads_leaves_the_engine_when_it_has_ended_and_loses_nothing(lab: Lab) -> None:
    """Held places of streams that were not read blocked everybody else, and looked like an engine that stands still."""
    sampling = Sampling(24, fixed_length=True)
    streams = [lab.engine.generate(lab.request(PROMPT, sampling)) for _ in range(MAX_IN_FLIGHT)]
    version = lab.engine.version
    async with asyncio.timeout(60):
        begun = await asyncio.gather(*map(anext, streams))
        while lab.engine.in_flight:
            await asyncio.sleep(0.01)
    await complete(lab, Sampling(2, fixed_length=True))
    await lab.push(1)
    for first, one in zip(begun, streams, strict=True):
        chunks = [first, *[chunk async for chunk in one]]
        assert len(together(chunks).token_ids) == len(together(chunks).logprobs) == 24
        assert {span.version for chunk in chunks for span in chunk.spans} == {version}
    left = lab.engine.generate(lab.request(PROMPT, sampling))
    await anext(left)
    async with asyncio.timeout(60):
        while lab.engine.in_flight:
            await asyncio.sleep(0.01)
    await left.aclose()
    assert lab.engine.in_flight == 0


async def test_beyond_the_limit_a_request_is_refused_at_once_and_the_others_go_on(lab: Lab) -> None:
    tasks = [asyncio.create_task(complete(lab, Sampling(4, fixed_length=True))) for _ in range(MAX_IN_FLIGHT)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded) as error:
        await complete(lab, Sampling(4))
    assert error.value.retry_after_s > 0
    assert all(len(chunk.token_ids) == 4 for chunk in await asyncio.gather(*tasks))


@pytest.mark.parametrize(
    ("prompt", "sampling", "field"),
    [
        ([], Sampling(4), "prompt"),
        ([5] * 510, Sampling(4), "prompt"),
        ([5, 258], Sampling(4), "prompt.token_ids"),
        ([5], Sampling(4, stop_token_ids=(258,)), "sampling.stop_token_ids"),
    ],
)
async def test_what_does_not_fit_is_refused_by_name(lab: Lab, prompt: list[int], sampling: Sampling, field: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        await lab.engine.complete(lab.request(prompt, sampling))
    assert error.value.field == field
    with pytest.raises(InvalidArgument):
        await anext(lab.engine.generate(lab.request(prompt, sampling)))


async def test_seeded_requests_whose_prompts_do_not_fit_into_one_step_together_are_served(lab: Lab) -> None:
    """vLLM read some of them in pieces, and died: torch's generators on CPUs cannot take a draw back."""
    prompts = [[5 + number] + [6, 7, 8] * 100 for number in range(12)]
    sampling = Sampling(4, seed=7, fixed_length=True)
    chunks = await asyncio.gather(*(complete(lab, sampling, prompt) for prompt in prompts))
    assert [len(chunk.token_ids) for chunk in chunks] == [4] * len(prompts)
    assert (await complete(lab, sampling, prompts[3])).token_ids == chunks[3].token_ids


async def test_a_prompt_that_just_fits_is_served(lab: Lab) -> None:
    chunk = await complete(lab, Sampling(4, fixed_length=True), [5] * 508)
    assert len(chunk.token_ids) == 4
    assert all(math.isfinite(value) for value in chunk.logprobs)


async def test_the_tokenizer_is_the_policys(lab: Lab) -> None:
    engine: GenerationEngine = lab.engine
    assert engine.decode(engine.encode("schön: 3 €")) == "schön: 3 €"
    assert (engine.limits.max_model_len, engine.limits.vocab_size) == (512, 258)
    assert engine.description.split()[0] in {"vllm", "transformers"}
