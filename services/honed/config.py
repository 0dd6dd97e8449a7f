"""The run file: one typed tree, put together from the rooms' own sections, and what must hold between them.

`HONED_<SECTION>__<KEY>` overrides a key, for example `HONED_LEARNER__BATCH=512`. Secrets come by file or environment only. An
unknown key is an error that names the nearest known one (`honed.settings_file` reads and explains; this module only declares).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from honed.artifacts.settings import PolicyStoreSettings
from honed.conductor.settings import ConductorSettings, DataSettings
from honed.contradictions import contradictions
from honed.generation.settings import GenerationSettings
from honed.learner.settings import FineTuningSettings, LearnerSettings, PretrainSettings, RewardTrainingSettings
from honed.phases import Phase, implied_phases, with_algorithm
from honed.preference.settings import PreferenceSettings
from honed.queue.settings import QueueSettings
from honed.reward.settings import RewardSettings
from honed.settings import Section, SecuritySettings, TelemetrySettings
from honed.tracking.settings import TrackingSettings


class RunSettings(Section):
    """A run file."""

    run: str = Field("local", pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")
    directory: Path = Field(Path("out/local"), description="Everything that the run writes.")
    reuse: Path | None = Field(
        None,
        description="Directory in which base models and reward models are kept by all that they are made of; a run whose own "
        "would be made of the same takes them from there. Unset: none are kept.",
    )
    seed: int = Field(1, ge=0)
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    security: SecuritySettings = SecuritySettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    tracking: TrackingSettings = TrackingSettings()
    queue: QueueSettings = QueueSettings()
    policy: PolicyStoreSettings = PolicyStoreSettings()
    generation: GenerationSettings = GenerationSettings()
    reward: RewardSettings = RewardSettings()
    preference: PreferenceSettings = PreferenceSettings()
    learner: LearnerSettings = LearnerSettings()
    pretrain: PretrainSettings = PretrainSettings()
    sft: FineTuningSettings = FineTuningSettings()
    reward_training: RewardTrainingSettings = RewardTrainingSettings()
    conductor: ConductorSettings = ConductorSettings()
    data: DataSettings = DataSettings()
    phases: tuple[Phase, ...] | None = Field(
        None,
        description="What the run does, in this order, of pretrain, sft, reward_model and online; `{online: NAME}` sets "
        "learner.algorithm too. Unset: whatever the data and scorers call for.",
    )

    @model_validator(mode="before")
    @classmethod
    def _online_names_the_algorithm(cls, tree: Any) -> Any:
        return with_algorithm(tree) if isinstance(tree, dict) else tree

    @model_validator(mode="before")
    @classmethod
    def _made_data_names_its_files(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        from honed.recipes.made.base import with_made_files  # which reads the section of the tree

        return with_made_files(tree, Path(tree.get("directory") or cls.model_fields["directory"].default))

    @model_validator(mode="after")
    def _consistent(self) -> RunSettings:
        if self.learner.batch % self.conductor.samples_per_prompt:
            raise ValueError("learner.batch must be a multiple of conductor.samples_per_prompt")
        if self.conductor.max_in_flight < self.conductor.samples_per_prompt:
            raise ValueError("conductor.max_in_flight must be at least conductor.samples_per_prompt, or no prompt is admitted")
        if self.learner.schedule == "linear" and self.learner.steps is None:
            raise ValueError("learner.schedule: linear falls to 0 at learner.steps, which is null: set steps, or take constant")
        if self.conductor.top_p != 1:
            raise ValueError(
                f"conductor.top_p: {self.conductor.top_p:g} cuts the support of the policy and biases the importance ratios: "
                "training samples need 1"
            )
        if self.generation.max_prompt_tokens >= self.generation.max_model_tokens:
            raise ValueError("generation.max_prompt_tokens must leave room for a response in generation.max_model_tokens")
        most = min(self.generation.max_tokens, self.generation.max_model_tokens - 1)
        if self.conductor.response_tokens > most:
            raise ValueError(
                f"conductor.response_tokens must be at most {most}, what generation.max_tokens and max_model_tokens leave: "
                "the generator would refuse every prompt"
            )
        if found := contradictions(self):
            raise ValueError("; ".join(found))
        return self

    @property
    def longest_prompt(self) -> int:
        """Tokens that a prompt to train on may have: what the limits of the engine leave beside a whole response."""
        limits = self.generation
        return min(limits.max_prompt_tokens, limits.max_model_tokens - self.conductor.response_tokens)

    def goes_through(self, phase: Phase) -> bool:
        """Whether the run has a phase."""
        return phase in (implied_phases(self) if self.phases is None else self.phases)

    @property
    def samples_rollouts(self) -> bool:
        """Whether the run learns from responses that it samples, and not from what people have judged alone."""
        from honed.learner.algorithms.base import find_algorithm  # with what it imports, when it is asked

        return find_algorithm(self.learner.algorithm).learns_from == "rollouts"

    @property
    def tokens_directory(self) -> Path:
        """Where the tokens are."""
        return self.security.tokens or self.directory / "tokens"

    @property
    def policy_url(self) -> str:
        """Where the policy store is."""
        return self.policy.url or str(self.directory / "policy")

    @property
    def database_url(self) -> str:
        """The preference database."""
        if self.preference.database_url is not None:
            return self.preference.database_url.get_secret_value()
        return f"sqlite+aiosqlite:///{self.directory / 'preference.sqlite'}"
