"""Claims about the port's values, the text of responses, and drawing from a distribution."""

from __future__ import annotations

import importlib.metadata
import math
from collections import Counter

import pytest
import torch

from honed.artifacts.version import VersionId
from honed.generation.hf.sampling import sample
from honed.generation.requests import EngineLimits, EngineRequest, Sampling, Span, check_request
from honed.generation.vllm.outputs import _spans
from honed.generation.vllm.settings import vllm_version
from honed.kit.errors import InvalidArgument, Unavailable
from honed.models.text_stream import TextStream


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"max_tokens": 0}, "sampling.max_tokens"),
        ({"temperature": -0.1}, "sampling.temperature"),
        ({"temperature": math.nan}, "sampling.temperature"),
        ({"top_p": 0.0}, "sampling.top_p"),
        ({"top_p": 1.1}, "sampling.top_p"),
        ({"top_k": -1}, "sampling.top_k"),
        ({"seed": -1}, "sampling.seed"),
        ({"seed": 1 << 63}, "sampling.seed"),
        ({"stop": ("",)}, "sampling.stop"),
        ({"stop": ("a",), "fixed_length": True}, "sampling.fixed_length"),
        ({"stop_token_ids": (1,), "fixed_length": True}, "sampling.fixed_length"),
    ],
)
def test_a_value_that_no_engine_can_honour_is_refused_by_name(arguments: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        Sampling(**({"max_tokens": 4} | arguments))  # type: ignore[arg-type]
    assert error.value.field == field


def test_a_request_fits_up_to_the_limit() -> None:
    limits = EngineLimits(max_model_len=10, vocab_size=5)
    check_request(EngineRequest("r", [0, 4], Sampling(8)), limits)
    for prompt, max_tokens in (([0, 4], 9), ([], 1), ([5], 1), ([-1], 1)):
        with pytest.raises(InvalidArgument):
            check_request(EngineRequest("r", prompt, Sampling(max_tokens)), limits)


def text_of(data: str, stops: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    """Streams `data` byte by byte; token ids are bytes."""
    stream = TextStream(lambda ids: bytes(ids).decode(errors="replace"), list(b"a prompt"), stops)
    pieces = []
    for token in data.encode():
        stream.push(token)
        if stream.stopped:
            break
        pieces.append(stream.take())
    stream.finish()
    return [*pieces, stream.take()], stream


def test_half_a_character_is_never_shown() -> None:
    pieces, _ = text_of("schön €")
    assert "".join(pieces) == "schön €"
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_that_never_ends_is_shown_at_the_end() -> None:
    stream = TextStream(lambda ids: bytes(ids).decode(errors="replace"), [], ())
    for token in "x€".encode()[:-1]:
        stream.push(token)
    assert stream.take() == "x"
    stream.finish()
    assert stream.take() == "\ufffd"


@pytest.mark.parametrize(
    ("data", "stops", "shown"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("three", "ne t"), "o"),
        ("one two three", ("four", "e\n"), "one two three"),
        ("aab", ("aab",), ""),
        ("aaab", ("aab",), "a"),
    ],
)
def test_a_stop_text_is_never_shown_not_even_its_beginning(data: str, stops: tuple[str, ...], shown: str) -> None:
    pieces, stream = text_of(data, stops)
    assert "".join(pieces) == shown
    assert stream.stopped is (shown != data)


def draw(logits: list[float], sampling: Sampling, times: int = 4000) -> tuple[Counter[int], dict[int, float]]:
    generator = torch.Generator().manual_seed(0)
    tokens, logprobs = sample(torch.tensor([logits] * times), [sampling] * times, [generator] * times)
    return Counter(tokens), dict(zip(tokens, logprobs, strict=True))


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1), Sampling(1, temperature=0.5), Sampling(1, top_k=2), Sampling(1, top_p=0.7), Sampling(1, top_p=0.01)],
    ids=["plain", "cool", "top-k", "top-p", "tiny top-p"],
)
def test_the_recorded_logprob_is_the_frequency(sampling: Sampling) -> None:
    counts, logprobs = draw([1.0, 0.2, -1.0, 2.0], sampling)
    assert sum(math.exp(value) for value in logprobs.values()) == pytest.approx(1.0, abs=1e-5)
    for token, count in counts.items():
        assert count / 4000 == pytest.approx(math.exp(logprobs[token]), abs=0.03)


def test_greedy_takes_the_largest_and_records_the_models_own_logprob() -> None:
    [token], [logprob] = sample(torch.tensor([[0.0, 3.0, 1.0]]), [Sampling(1, temperature=0.0)], [torch.Generator()])
    assert token == 1
    assert logprob == pytest.approx(3.0 - math.log(1 + math.exp(3) + math.exp(1)), abs=1e-6)


def test_what_is_drawn_together_is_what_is_drawn_alone() -> None:
    """Greedy beside top-k beside top-p, each with its own source of randomness."""
    logits = torch.randn(60, 50, generator=torch.Generator().manual_seed(2)) * 3
    kinds = [
        Sampling(1),
        Sampling(1, temperature=0, top_k=3),
        Sampling(1, top_k=4),
        Sampling(1, top_p=0.6),
        Sampling(1, 0.7, 0.9, 99),
    ]
    samplings = [kinds[i % len(kinds)] for i in range(60)]

    def sources() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(i) for i in range(60)]

    together = sample(logits, samplings, sources())
    alone = [sample(logits[i : i + 1], samplings[i : i + 1], sources()[i : i + 1]) for i in range(60)]
    assert together[0] == [tokens[0] for tokens, _ in alone]
    assert together[1] == pytest.approx([logprobs[0] for _, logprobs in alone], abs=1e-6)


def test_a_token_without_probability_is_never_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]] * 2000)
    tokens, _ = sample(logits, [Sampling(1)] * 2000, [generator] * 2000)
    assert set(tokens) == {1, 3}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_told_and_not_sampled(bad: float) -> None:
    logits = torch.tensor([[0.0, 1.0], [bad, 0.0]])
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        sample(logits, [Sampling(1)] * 2, [torch.Generator()] * 2)


def test_spans_of_a_part_are_cut_from_the_whole() -> None:
    starts = [("1.1", 0), ("1.2", 4), ("1.3", 4), ("2.0", 9)]
    one, two, four = VersionId(1, 1), VersionId(1, 2), VersionId(2, 0)
    assert _spans(starts, 0, 3) == (Span(one, 0, 3),)
    assert _spans(starts, 2, 9) == (Span(one, 2, 4), Span(VersionId(1, 3), 4, 9))
    assert _spans(starts, 8, 12) == (Span(VersionId(1, 3), 8, 9), Span(four, 9, 12))
    assert _spans(starts, 12, 12) == ()
    assert two not in {span.version for span in _spans(starts, 0, 12)}


@pytest.mark.parametrize("version", ["0.21.4", "0.33.0", "1.0.0"])
def test_an_unknown_vllm_is_refused_with_what_would_do(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    with pytest.raises(Unavailable, match=r"0\.22 and later, before 0\.33"):
        vllm_version()


def test_a_missing_vllm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(Unavailable, match="not installed"):
        vllm_version()
