"""The run file's section on the reward service and its scorers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from honed.settings import Positive, ReplicatedSettings, Section


class TruncateSettings(Section):
    """Cut the scored text at a token of the policy; training still sees the whole response."""

    token_text: str = Field(min_length=1, description="Text of the single token to cut after, for example '.'.")
    not_before: int = Field(16, ge=0, description="Position from which on the token counts.")
    missing_score: float = Field(-1.0, description="Reward when the token never comes there.")


class ScorerSettings(Section):
    """One term of the reward."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]*$")
    kind: Literal["reward_model", "function"]
    source: str = Field(
        description="Model directory, `trained` for the newest reward model of this run, `artifact:NAME/VERSION`, or a "
        "function of the group honed.scorers."
    )
    weight: float = 1.0
    sees_prompt: bool = Field(True, description="Score prompt and response; otherwise the response alone.")
    options: dict[str, Any] = Field({}, description="What a function has of its own, by the names of its arguments.")


class RewardSettings(ReplicatedSettings):
    """The reward service."""

    scorers: tuple[ScorerSettings, ...] = ()
    truncate: TruncateSettings | None = None
    batch_tokens: Positive = Field(8192, description="Tokens of a dynamic batch at most.")
    batch_wait_ms: Annotated[float, Field(ge=0)] = Field(4.0, description="How long a batch waits for company.")
    max_queued: Positive = Field(4096, description="Items waiting at most; beyond is RESOURCE_EXHAUSTED.")
    threads: Positive = 1
    allowed_roots: tuple[str, ...] = Field((), description="Where LoadScorer may load from. Unset: <directory>.")
    on_promotion: Literal["rescore", "drop", "keep"] = Field(
        "rescore", description="What becomes of rollouts that the reward model before has scored."
    )
