"""The run file's section on the reward service and its scorers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from honed.artifacts.settings import TRAINED
from honed.settings import Positive, ReplicatedSettings, Section, TlsSettings


class TruncateSettings(Section):
    """Cut the scored text at a token of the policy; training still sees the whole response."""

    token_text: str = Field(min_length=1, description="Text of the single token to cut after, for example '.'.")
    not_before: int = Field(16, ge=0, description="Position from which on the token counts.")
    missing_score: float = Field(-1.0, description="Reward when the token never comes there.")


class EnsembleOptions(Section):
    """What a scorer of the kind `ensemble` has of its own."""

    members: tuple[str, ...] = Field(
        min_length=2, description="Reward models: directories, or artifact:NAME/VERSION. Each must be another model."
    )
    combine: Literal["mean", "minimum", "mean_minus_std"] = Field(
        "mean", description="The mean of the members, the least of them, or their mean less `k` times their deviation."
    )
    k: Annotated[float, Field(ge=0)] | None = Field(
        None, description="For mean_minus_std: what a unit of the members' population deviation costs. Unset: 1."
    )

    @model_validator(mode="after")
    def _consistent(self) -> EnsembleOptions:
        if TRAINED in self.members:
            raise ValueError("members: `trained` becomes another version, and members stay the same: name artifact:trained/0.1")
        for member, count in Counter(self.members).items():
            if count > 1:
                raise ValueError(f"members: {member} stands there {count} times: name each model once")
        if self.k is not None and self.combine != "mean_minus_std":
            raise ValueError(f"k: says nothing where combine is {self.combine}: remove it, or take mean_minus_std")
        return self

    @property
    def price(self) -> float:
        """`k`, or what it is when it is unset."""
        return 1.0 if self.k is None else self.k


class RemoteOptions(Section):
    """What a scorer of the kind `remote` has of its own."""

    scorer: str | None = Field(None, description="Whose value is the score, of the scorers there. Unset: their weighted sum.")
    send: Literal["text", "token_ids"] = Field(
        "text", description="token_ids: the policy's, for a service with the same tokenizer; text leaves special tokens out."
    )
    batch: Annotated[int, Field(ge=1, le=4096)] = Field(256, description="Responses of one call at most.")
    deadline_s: Annotated[float, Field(gt=0, le=100)] = Field(
        30.0, description="Seconds for all calls of a batch, with their repetitions; past it there is an outage."
    )
    token_file: Path | None = Field(None, description="File with the bearer token that the service asks for. Unset: none.")
    tls: TlsSettings | None = Field(None, description="PEM files for mutual TLS. Unset: plain text.")


class ScorerSettings(Section):
    """One term of the reward."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]*$")
    kind: Literal["reward_model", "function", "ensemble", "remote"]
    source: str = Field(
        "",
        description="Model directory, `trained` for the newest reward model of this run, `artifact:NAME/VERSION`; a function "
        "of the group honed.scorers; host:port of a remote service. Not for an ensemble, whose members are options.",
    )
    weight: float = 1.0
    sees_prompt: bool = Field(True, description="Score prompt and response; otherwise the response alone.")
    options: dict[str, Any] = Field(
        {},
        description="What a function has of its own, by the names of its arguments; of an ensemble: members, combine, k; "
        "of a remote scorer: scorer, send, batch, deadline_s, token_file, tls.",
    )

    def ensemble(self) -> EnsembleOptions:
        """The options of a scorer of the kind `ensemble`.

        Raises:
            InvalidArgument: They cannot be; names the option.
        """
        from honed.options import read_options  # here, because errors import grpc, which a run file does not need

        return read_options(EnsembleOptions, self.options, field=self.options_field, owner="an ensemble")

    def remote(self) -> RemoteOptions:
        """The options of a scorer of the kind `remote`.

        Raises:
            InvalidArgument: They cannot be; names the option.
        """
        from honed.options import read_options

        return read_options(RemoteOptions, self.options, field=self.options_field, owner="a remote scorer")

    @property
    def models(self) -> tuple[tuple[str, str], ...]:
        """The reward models that it loads: where the run file names each, and its source."""
        match self.kind:
            case "reward_model":
                return (("source", self.source),)
            case "ensemble":
                return tuple((f"options.members.{number}", source) for number, source in enumerate(self.ensemble().members))
        return ()

    @property
    def options_field(self) -> str:
        """What errors call its options."""
        return f"reward.scorers.{self.name}.options"


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
