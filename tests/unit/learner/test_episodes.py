"""Claims about what may become a training sample."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from honed.artifacts.version import VersionId
from honed.kit.errors import InvalidArgument
from honed.learner.data.episode import EmitsPadding, Episode, TokenSpan, Vocabulary
from honed.v1 import common_pb2

VOCABULARY = Vocabulary(size=50, pad_token_id=49)


def scored() -> common_pb2.ScoredRollout:
    def span(step: int, start: int, end: int) -> common_pb2.VersionSpan:
        return common_pb2.VersionSpan(version=common_pb2.PolicyVersion(run="r", fence=2, step=step), start=start, end=end)

    rollout = common_pb2.Rollout(
        rollout_id="g7/0",
        group_id="g7",
        run="r",
        prompt_token_ids=[1, 2, 3],
        response_token_ids=[4, 5, 6],
        logprobs=[-1.0, -2.0, -0.5],
        version_spans=[span(8, 0, 2), span(9, 2, 3)],
        sampling=common_pb2.SamplingParams(temperature=0.5, max_tokens=3),
        finish_reason=common_pb2.FINISH_REASON_LENGTH,
    )
    return common_pb2.ScoredRollout(rollout=rollout, reward=1.25)


def test_a_scored_rollout_becomes_an_episode_with_nothing_lost() -> None:
    episode = Episode.from_scored("17-0", scored(), VOCABULARY)
    assert episode == Episode(
        rollout_id="g7/0",
        group_id="g7",
        finish_reason="length",
        entry_id="17-0",
        prompt=(1, 2, 3),
        response=(4, 5, 6),
        logprobs=(-1.0, -2.0, -0.5),
        spans=(TokenSpan(VersionId(2, 8), 0, 2), TokenSpan(VersionId(2, 9), 2, 3)),
        reward=1.25,
        temperature=0.5,
    )
    assert episode.oldest == VersionId(2, 8)


def score(name: str, value: float, weight: float, *tokens: float) -> common_pb2.Score:
    return common_pb2.Score(scorer=name, value=value, weight=weight, token_values=tokens)


def test_scores_and_rewards_of_tokens_come_with_it() -> None:
    message = scored()
    message.scores.extend([score("a", 3.0, 2.0, 1, 0, 2), score("b", 0.5, 1.0), score("c", 1.0, -1.0, 0, 1, 0)])
    episode = Episode.from_scored("1-0", message, VOCABULARY)
    assert episode.scores == (("a", 3.0), ("b", 0.5), ("c", 1.0))
    assert episode.token_rewards == (2.0, -1.0, 4.0)
    message.missing = True
    assert Episode.from_scored("1-0", message, VOCABULARY).token_rewards == (), "the price stands for all of them"


@pytest.mark.parametrize(
    ("wrong", "field", "reason"),
    [
        (score("a", 3.0, 1.0, 1, 2), "scores[1].token_values", "scorer 'a' gave 2 rewards for a response of 3 tokens"),
        (score("a", 3.0, 1.0, 1, 2, float("nan")), "scores[1].token_values[2]", "scorer 'a' gave nan"),
        (score("a", float("inf"), 1.0), "scores[1].value", "scorer 'a' gave inf"),
    ],
)
def test_scores_of_a_wrong_shape_are_refused_with_the_scorer(wrong: common_pb2.Score, field: str, reason: str) -> None:
    message = scored()
    message.scores.extend([score("b", 0.5, 1.0), wrong])
    with pytest.raises(InvalidArgument) as caught:
        Episode.from_scored("1-0", message, VOCABULARY)
    assert caught.value.field == field
    assert reason in str(caught.value)


@pytest.mark.parametrize(("reason", "name"), [(0, ""), (1, "stop"), (2, "length"), (3, "aborted")])
def test_why_it_ended_is_told(reason: Any, name: str) -> None:
    message = scored()
    message.rollout.finish_reason = reason
    episode = Episode.from_scored("1-0", message, Vocabulary(size=50))
    assert (episode.finish_reason, episode.cut) == (name, name == "length")


def test_an_unset_temperature_is_1() -> None:
    message = scored()
    message.rollout.sampling.ClearField("temperature")
    assert Episode.from_scored("1-0", message, VOCABULARY).temperature == 1.0


def test_a_response_with_padding_says_what_a_user_can_do() -> None:
    message = scored()
    message.rollout.response_token_ids[1] = 49
    with pytest.raises(EmitsPadding, match=r"padding token 49, .* set pad_token_id in its generation_config\.json"):
        Episode.from_scored("1-0", message, VOCABULARY)


def cleared(field: str) -> Callable[[common_pb2.ScoredRollout], None]:
    return lambda m: m.rollout.ClearField(field)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "spoil"),
    [
        ("rollout.rollout_id", cleared("rollout_id")),
        ("rollout.prompt_token_ids", cleared("prompt_token_ids")),
        ("rollout.response_token_ids", cleared("response_token_ids")),
        ("rollout.response_token_ids[2]", lambda m: m.rollout.response_token_ids.__setitem__(2, 50)),
        ("rollout.prompt_token_ids[0]", lambda m: m.rollout.prompt_token_ids.__setitem__(0, 4_000_000_000)),
        ("rollout.response_token_ids[1]", lambda m: m.rollout.response_token_ids.__setitem__(1, 49)),
        ("rollout.response_token_ids", lambda m: m.rollout.prompt_token_ids.extend([1] * 10)),
        ("rollout.logprobs", lambda m: m.rollout.logprobs.pop()),
        ("rollout.logprobs[1]", lambda m: m.rollout.logprobs.__setitem__(1, float("nan"))),
        ("rollout.logprobs[0]", lambda m: m.rollout.logprobs.__setitem__(0, float("-inf"))),
        ("rollout.logprobs[0]", lambda m: m.rollout.logprobs.__setitem__(0, 0.5)),
        ("rollout.version_spans", lambda m: m.rollout.version_spans.pop()),
        ("rollout.version_spans[1]", lambda m: setattr(m.rollout.version_spans[1], "start", 1)),
        ("rollout.version_spans[0]", lambda m: setattr(m.rollout.version_spans[0], "end", 0)),
        ("rollout.sampling.temperature", lambda m: setattr(m.rollout.sampling, "temperature", 0.0)),
        ("rollout.sampling.top_p", lambda m: setattr(m.rollout.sampling, "top_p", 0.8)),
        ("rollout.sampling.top_k", lambda m: setattr(m.rollout.sampling, "top_k", 5)),
        ("reward", lambda m: setattr(m, "reward", float("inf"))),
    ],
)
def test_a_bad_rollout_is_refused_and_the_field_is_named(
    field: str, spoil: Callable[[common_pb2.ScoredRollout], object]
) -> None:
    message = scored()
    spoil(message)
    with pytest.raises(InvalidArgument, match=f"^{re.escape(field)}: ") as caught:
        Episode.from_scored("1-0", message, VOCABULARY, max_tokens=10)
    assert caught.value.field == field


def stopped(last: int, **sampling: Any) -> common_pb2.ScoredRollout:
    message = scored()
    message.rollout.finish_reason = common_pb2.FINISH_REASON_STOP
    message.rollout.response_token_ids[-1] = last
    message.rollout.sampling.MergeFrom(common_pb2.SamplingParams(**sampling))
    return message


def test_a_response_that_stopped_by_itself_holds_the_token_that_ended_it() -> None:
    vocabulary = Vocabulary(size=50, end_token_ids=frozenset({7, 8}))
    assert Episode.from_scored("1-0", stopped(8), vocabulary).response[-1] == 8
    with pytest.raises(InvalidArgument, match="last token 6 is none that ends one"):
        Episode.from_scored("1-0", stopped(6), vocabulary)
    # It ended for another reason, or nobody knows what ends a response.
    assert Episode.from_scored("1-0", stopped(6, stop_token_ids=[6]), vocabulary).response[-1] == 6
    assert Episode.from_scored("1-0", stopped(6, stop=["."]), vocabulary).response[-1] == 6
    assert Episode.from_scored("1-0", stopped(6), Vocabulary(size=50)).response[-1] == 6
    assert Episode.from_scored("1-0", scored(), vocabulary).response[-1] == 6


def test_a_missing_truncation_token_is_kept_with_its_price() -> None:
    message = scored()
    assert not Episode.from_scored("1-0", message, VOCABULARY).missing
    message.missing, message.reward = True, -1.0
    episode = Episode.from_scored("1-0", message, VOCABULARY)
    assert (episode.missing, episode.reward) == (True, -1.0)
