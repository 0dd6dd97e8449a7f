"""Between the contract's messages and what scoring works with."""

from __future__ import annotations

from honed.kit.errors import InvalidArgument, Unavailable
from honed.models.chat import ChatMessage
from honed.queue.messages import Message
from honed.reward.batching import Result
from honed.reward.registry import LoadedScorer
from honed.reward.reward import Reward
from honed.reward.scorer import BadSample, ScorerFailed, ScorerInput, ScoringTokenizer, is_outage
from honed.v1 import common_pb2, generation_pb2, reward_pb2


def item_input(item: reward_pb2.ScoreItem, tokenizer: ScoringTokenizer) -> ScorerInput:
    """An item of a call as a scorer's input; `tokenizer` is the policy's."""
    prompt, response = item.prompt.WhichOneof("content"), item.WhichOneof("response")
    return ScorerInput(
        tokenizer,
        prompt_tokens=tuple(item.prompt.token_ids.ids) if prompt == "token_ids" else None,
        prompt=item.prompt.text if prompt == "text" else None,
        messages=_messages(item.prompt.messages) if prompt == "messages" else None,
        response_tokens=tuple(item.token_ids.ids) if response == "token_ids" else None,
        response=item.text if response == "text" else None,
        reference=item.prompt.reference,
    )


def rollout_input(rollout: common_pb2.Rollout, tokenizer: ScoringTokenizer) -> ScorerInput:
    """A rollout as a scorer's input; `tokenizer` is the policy's."""
    return ScorerInput(
        tokenizer,
        tuple(rollout.prompt_token_ids),
        response_tokens=tuple(rollout.response_token_ids),
        reference=rollout.reference,
    )


def score_messages(reward: Reward) -> list[common_pb2.Score]:
    """The scores behind a reward, as the contract states them."""
    return [
        common_pb2.Score(
            scorer=score.scorer,
            scorer_version=score.version,
            value=score.value,
            weight=score.weight,
            truncated_tokens=score.truncated_tokens,
            members=score.members,
            deviation=score.deviation,
            token_values=score.token_values,
        )
        for score in reward.scores
    ]


def scored_message(rollout: common_pb2.Rollout, reward: Reward, trace_parent: str) -> Message:
    """The entry of the next stage; `trace_parent` is of the span that it was scored in."""
    scored = common_pb2.ScoredRollout(
        rollout=rollout, scores=score_messages(reward), reward=reward.value, missing=reward.missing
    )
    return Message(rollout.rollout_id, scored.SerializeToString(), trace_parent)


def result_message(item_id: str, reward: Reward) -> reward_pb2.ScoreResult:
    """The answer to one item."""
    return reward_pb2.ScoreResult(id=item_id, reward=reward.value, scores=score_messages(reward))


def reward_of(result: Result, index: int, item: str) -> Reward:
    """The reward of an item, or its error in the caller's terms.

    Args:
        result: What the batcher said.
        index: The item's place in the call.
        item: What to call the item in an error.

    Raises:
        InvalidArgument: The item is at fault.
        Unavailable: A scorer is out of order for now.
        HonedError: What else went wrong.
    """
    if isinstance(result, Reward):
        return result
    if isinstance(result, BadSample):
        raise InvalidArgument(item, result.reason) from result
    if isinstance(result, ScorerFailed):
        if is_outage(result):
            raise Unavailable(str(result.at(index))) from result
        raise result.at(index) from result
    if isinstance(result, InvalidArgument):
        raise InvalidArgument(f"{item}.{result.field}", result.reason) from result
    raise result


def _messages(messages: generation_pb2.ChatMessages) -> tuple[ChatMessage, ...]:
    return tuple(ChatMessage(message.role, message.content) for message in messages.messages)


def scorer_message(loaded: LoadedScorer) -> reward_pb2.ScorerInfo:
    """What the contract says of a loaded scorer."""
    scorer = loaded.scorer
    return reward_pb2.ScorerInfo(
        name=scorer.name,
        version=scorer.version,
        kind=scorer.kind,
        weight=loaded.weight,
        state=reward_pb2.SCORER_STATE_SERVING if loaded.serving else reward_pb2.SCORER_STATE_LOADED,
        max_tokens=scorer.max_tokens,
    )
