"""The Job that a suspended CronJob describes, as `kubectl create job --from=cronjob/…` would make it.

A Job's name is made of the run, the digest of the template and the number of the attempt, so whoever creates it twice, another
conductor for example, is told that it exists. Every change of the template makes another digest, such as that of the hash in
its ConfigMap's name.
"""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass
from typing import Final

from honed.conductor.cluster.api import Object

JOB: Final = "honed.dev/job"
TEMPLATE: Final = "honed.dev/template"
ATTEMPT: Final = "honed.dev/attempt"
RUN: Final = "honed.dev/run"
GENERATION: Final = "honed.dev/generation"
"""Annotation of a Job: the generation of the CronJob that it was made from."""
RELEASED: Final = "honed.dev/released"
"""Annotation of a Job that was let run: if it is suspended all the same, a person did that."""
TTL_S: Final = 86_400
_LONGEST: Final = 63  # the name is the value of a label of the Job's pods
_DIGITS: Final = 10


@dataclass(frozen=True)
class JobTemplate:
    """One template of one job of one run.

    Attributes:
        run: The run.
        job: `pretrain` or `reward-model`.
        cron_job: The CronJob that holds it.
    """

    run: str
    job: str
    cron_job: Object

    @property
    def generation(self) -> int:
        """How often the template was changed, counted by the API server."""
        return int(self.cron_job["metadata"]["generation"])

    @property
    def digest(self) -> str:
        """Tells this template, for this run, from every other.

        The API server counts the changes that are made to a CronJob; what it fills in by itself, a newer one more than one
        before, is none of them.
        """
        metadata = self.cron_job["metadata"]
        content = json.dumps([self.run, self.job, metadata["uid"], self.generation])
        return hashlib.sha256(content.encode()).hexdigest()[:_DIGITS]

    def name(self, attempt: int) -> str:
        """The name of the Job of an attempt. What is cut off of a long one is in the digest."""
        end = f"-{self.digest}-{attempt}"
        return f"{self.cron_job['metadata']['name']}-{self.run}"[: _LONGEST - len(end)].rstrip("-") + end

    def made(self, attempt: int, deadline_s: int) -> Object:
        """The Job of an attempt, suspended; see `released`.

        Args:
            attempt: From 1 on.
            deadline_s: How long it may run if the template does not say.
        """
        template: Object = copy.deepcopy(self.cron_job["spec"]["jobTemplate"])
        metadata, spec = template.get("metadata") or {}, template["spec"]
        pods = spec["template"].setdefault("metadata", {})
        labels = {JOB: self.job, TEMPLATE: self.digest, ATTEMPT: str(attempt)}
        pods["labels"] = {**(pods.get("labels") or {}), **labels}
        spec["suspend"] = True
        spec.setdefault("activeDeadlineSeconds", deadline_s)
        spec.setdefault("ttlSecondsAfterFinished", TTL_S)
        owner = self.cron_job["metadata"]
        return {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {
                "name": self.name(attempt),
                "labels": {**(metadata.get("labels") or {}), **labels},
                "annotations": {
                    **(metadata.get("annotations") or {}),
                    RUN: self.run,
                    GENERATION: str(self.generation),
                    "cronjob.kubernetes.io/instantiate": "manual",
                },
                # Not its controller: that would count it against the CronJob's history limits, and remove it early.
                "ownerReferences": [{"apiVersion": "batch/v1", "kind": "CronJob", "name": owner["name"], "uid": owner["uid"]}],
            },
            "spec": spec,
        }


def released(job: Object) -> Object:
    """The same Job, to be let run."""
    metadata = {**job["metadata"], "annotations": {**(job["metadata"].get("annotations") or {}), RELEASED: "true"}}
    return {**job, "metadata": metadata, "spec": {**job["spec"], "suspend": False}}


def attempt_of(job: Object) -> int:
    """Which attempt a Job is; 0 if it does not say."""
    text = labels_of(job).get(ATTEMPT, "")
    return int(text) if text.isdecimal() else 0


def generation_of(job: Object, template: JobTemplate) -> int | None:
    """Which generation of the template's CronJob a Job was made from.

    None for one that a person has made, and for one of a CronJob that was deleted: its successor of the same name counts anew.
    """
    text = (job["metadata"].get("annotations") or {}).get(GENERATION, "")
    owners = {owner.get("uid") for owner in job["metadata"].get("ownerReferences") or ()}
    return int(text) if text.isdecimal() and template.cron_job["metadata"]["uid"] in owners else None


def labels_of(thing: Object) -> dict[str, str]:
    """The labels of an object."""
    return dict(thing["metadata"].get("labels") or {})
