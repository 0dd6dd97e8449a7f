"""Where things lie in a run's directory. Processes that run on other machines have directories of their own in this form."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Workspace:
    """The directory of one run."""

    root: Path

    @property
    def lock(self) -> Path:
        """Held by the one `honed up` of the directory; its presence says that the directory is a run's."""
        return self.root / "run.lock"

    @property
    def endpoints(self) -> Path:
        """Where the services listen, while the run is up."""
        return self.root / "endpoints.json"

    @property
    def effective_settings(self) -> Path:
        """The run file that the processes of a local run were started with."""
        return self.root / "effective.yaml"

    @property
    def tokens(self) -> Path:
        """Bearer tokens, unless security.tokens names another directory."""
        return self.root / "tokens"

    @property
    def logs(self) -> Path:
        """One file a process, and an older one of each that grew too long."""
        return self.root / "logs"

    @property
    def conductor_log(self) -> Path:
        """What the conductor writes, whose terminal shows the run."""
        return self.logs / "conductor.log"

    @property
    def progress(self) -> Path:
        """One file a job: how far it is."""
        return self.root / "progress"

    @property
    def redis(self) -> Path:
        """The embedded Redis."""
        return self.root / "redis"

    @property
    def policy_store(self) -> Path:
        """Versions and reward models, unless policy.url names another store."""
        return self.root / "policy"

    @property
    def preference_database(self) -> Path:
        """The record of judgements, unless preference.database_url names another."""
        return self.root / "preference.sqlite"

    @property
    def kept(self) -> Path:
        """Preference databases with judgements of people that a fresh run put aside."""
        return self.root / "kept"

    @property
    def models(self) -> Path:
        """What the training phases made."""
        return self.root / "models"

    @property
    def first_model(self) -> Path:
        """What is fine-tuned to make the base model; not there where nothing is."""
        return self.models / "first"

    @property
    def base_model(self) -> Path:
        """The language model that the run starts from."""
        return self.models / "base"

    @property
    def base_made_of(self) -> Path:
        """What decided the base model: settings, and digests of data and of the model that it was made from."""
        return self.models / "base.made_of.json"

    @property
    def jobs(self) -> Path:
        """One directory a job."""
        return self.root / "jobs"

    def unfinished(self, job: str) -> Path:
        """What a job goes on from that was interrupted."""
        return self.jobs / job / "unfinished"

    @property
    def reused(self) -> Path:
        """Which models were taken from `reuse` and not trained."""
        return self.root / "reused.json"

    @property
    def export(self) -> Path:
        """Where the pretraining job writes the base version before it is published."""
        return self.models / "export"

    @property
    def learner(self) -> Path:
        """Checkpoints and journal of the learner."""
        return self.root / "learner"

    @property
    def generators(self) -> Path:
        """A directory for each replica of the generation service."""
        return self.root / "generation"

    @property
    def reward(self) -> Path:
        """What the reward service keeps: reward models and tokenizers that it has fetched."""
        return self.root / "reward"

    @property
    def conductor(self) -> Path:
        """The conductor's own: the tokenizer of the base version, samples of the base policy, comparisons."""
        return self.root / "conductor"

    @property
    def run_record(self) -> Path:
        """When the run began, and where it stands or stood."""
        return self.conductor / "run.json"

    @property
    def phase_curves(self) -> Path:
        """What the phases before the online loop measured, step by step."""
        return self.conductor / "phases.jsonl"

    @property
    def tracking(self) -> Path:
        """How much of the run each tracker has."""
        return self.conductor / "tracking"

    @property
    def report_json(self) -> Path:
        """The report for programs."""
        return self.root / "report.json"

    @property
    def recipe_json(self) -> Path:
        """The figures of `honed recipes run`."""
        return self.root / "recipe.json"

    @property
    def report_html(self) -> Path:
        """The report for people."""
        return self.root / "report.html"
