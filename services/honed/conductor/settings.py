"""The run file's sections on the run as a whole: how it is conducted, and what it learns from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from honed.queue.settings import ApplicationPromptsSettings
from honed.settings import Positive, Rate, Seconds, Section, ServerSettings


class PromptMixSettings(Section):
    """How often each source is drawn from while it has prompts, relative to the others."""

    file: Annotated[float, Field(ge=0)] = 1.0
    submitted: Annotated[float, Field(ge=0)] = 1.0
    application: Annotated[float, Field(ge=0)] = 1.0
    submitted_limit: Positive = Field(10_000, description="Submitted prompts that wait at most; beyond is RESOURCE_EXHAUSTED.")


class KubernetesSettings(Section):
    """The cluster whose Jobs train, with `conductor.launcher: kubernetes`."""

    namespace: str | None = Field(None, description="Unset: the pod's own; with a kubeconfig, that of its context.")
    kubeconfig: Path | None = Field(None, description="For a conductor outside of the cluster. Unset: the pod's account.")
    context: str | None = Field(None, description="Of the kubeconfig. Unset: its current one.")
    identity: str | None = Field(
        None, description="Holder of the Lease: the pod's name and uid. Unset: the host's name and a random part."
    )
    lease_s: Annotated[float, Field(ge=1)] = Field(15.0, description="A conductor silent for longer may lose its Lease.")
    request_timeout_s: Seconds = Field(10.0, description="How long one call of the API may take.")
    job_deadline_s: Positive = Field(86_400, description="activeDeadlineSeconds of a job whose template names none.")


class ConductorSettings(ServerSettings):
    """The run."""

    launcher: Literal["process", "kubernetes", "none"] = Field(
        "process",
        description="process: services and jobs are child processes. none: they run elsewhere; services register themselves. "
        "kubernetes: as none, and jobs are started as Jobs.",
    )
    kubernetes: KubernetesSettings = KubernetesSettings()
    start_from: str | None = Field(None, description="Hugging Face model directory; unset: pretrain one on data.texts.")
    max_in_flight: Positive = Field(1024, description="Rollouts between admission and scoring at most.")
    samples_per_prompt: Positive = 1
    temperature: Rate = 1.0
    top_p: Rate = Field(1.0, description="Only 1: training needs the full support, or its importance ratios are biased.")
    response_tokens: Positive = Field(256, description="The most tokens of a training response.")
    fixed_length: bool = Field(False, description="Sample exactly response_tokens, past any end-of-sequence token.")
    prompt_mix: PromptMixSettings = PromptMixSettings()
    application_prompts: ApplicationPromptsSettings = ApplicationPromptsSettings()
    restart_limit: Positive = Field(10, description="Restarts of one service within restart_window_s before an alarm.")
    restart_window_s: Seconds = 600.0
    dead_letter_limit: Positive = Field(1000, description="Dead letters within dead_letter_window_s before an alarm.")
    dead_letter_window_s: Seconds = 600.0
    start_timeout_s: Seconds = 180.0
    drain_timeout_s: Seconds = Field(300.0, description="How long the streams may take to empty after the last update.")
    log_mb: Positive = Field(64, description="Size of one log file before it is rotated; one older one is kept.")

    @property
    def services_elsewhere(self) -> bool:
        """Whether others start the services, so that they are found by their addresses and in Redis."""
        return self.launcher != "process"


class JudgementsFile(Section):
    """A file of judgements."""

    file: Path
    format: Literal["honed", "trl", "hh", "summarize"] = "honed"
    source: str = Field("file", min_length=1, max_length=128, description="Where they come from; part of their keys.")
    annotator: str = Field("unknown", min_length=1, max_length=128, description="Who judged, where the format does not say.")


class EvaluationSettings(Section):
    """What nothing trains on."""

    judgements: JudgementsFile | None = Field(None, description="Held-out judgements, to measure the reward model's agreement.")
    prompts: Path | None = Field(None, description="Held-out prompts, continued before and after training.")
    samples: Positive = Field(64, description="How many of the prompts are continued.")
    best_of: Positive | None = Field(
        None, description="After training, each continuation is the best of so many, by the whole reward. Unset: the only one."
    )


class DataSettings(Section):
    """What a run learns from. JSON lines; `honed check` reads them line by line before anything starts."""

    made: str | None = Field(
        None,
        description="Data that honed makes itself, and that names every file below which is not named here: a file of "
        "honed/recipes/made.",
    )
    texts: tuple[Path, ...] = Field((), description="`text`: for pretraining, when there is no conductor.start_from.")
    demonstrations: tuple[Path, ...] = Field(
        (), description="A prompt as in `prompts`, and `response`: what to fine-tune on before anything else. None: not done."
    )
    prompts: Path | None = Field(None, description="`text`, `token_ids` or `messages`: what is trained on.")
    judgements: tuple[JudgementsFile, ...] = Field(
        (), description="Imported at the start; what is stored already is not doubled."
    )
    evaluation: EvaluationSettings = EvaluationSettings()
