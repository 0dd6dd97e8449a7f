"""A run on a real cluster: from `kubectl apply -k` to ten versions, then deleted pods and rolling restarts under load.

    make test-cluster                          in the context that kubectl has now; the images must be on its nodes
    python -m loadtest.cluster --minutes 2     shorter

What must hold: ten versions without a hand on it; every command of `honed --cluster`; no request of an application inside the
cluster fails, though pods of every service are deleted at random and each workload is restarted; no rollout is lost or trained
twice. Everything that it made is deleted at the end, the files in the run's volumes too. The last line is one JSON object; exit
status 1: something is missing.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from loadtest import report
from loadtest.cluster_application import application, figures_of
from loadtest.cluster_cleanup import cleaned_up
from loadtest.cluster_trial import Trial
from loadtest.kubectl import Kubectl
from loadtest.scratch import scratch_directory

OVERLAY = Path(__file__).parents[1] / "deploy" / "overlays" / "local-cpu"


def main(
    context: Annotated[str | None, typer.Option(help="Context of the kubeconfig. Unset: the current one.")] = None,
    overlay: Annotated[Path, typer.Option(help="What to apply; of the namespace `honed`.")] = OVERLAY,
    minutes: Annotated[float, typer.Option(min=0, help="How long pods are deleted at random.")] = 10.0,
    seed: Annotated[int, typer.Option(help="Of the choice of pods.")] = 1,
    keep: Annotated[bool, typer.Option("--keep", help="Leave everything running at the end.")] = False,
    attach: Annotated[bool, typer.Option("--attach", help="Use the run that is there already, and leave it.")] = False,
) -> None:
    """From an empty namespace to ten versions, and on through deleted pods and rolling restarts."""
    program = shutil.which("kubectl", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin")
    if program is None:
        raise ValueError("there is no kubectl: install the client of your cluster's minor version")
    context = context or subprocess.run([program, "config", "current-context"], capture_output=True, text=True).stdout.strip()
    if not context:
        raise ValueError("kubectl has no current context: name one by --context")
    kubectl = Kubectl(program, context, "honed")
    if kubectl.there("namespace", "honed") and not attach:
        raise ValueError(f"context {context} has a namespace honed already: this test makes and deletes it; --attach uses it")
    trial = Trial(kubectl, random.Random(seed))
    with scratch_directory() as directory, cleaned_up(kubectl, overlay, keep=keep or attach):
        trial.start(overlay)
        trial.commands(directory)
        trial.ready()
        with application(kubectl) as pod:
            trial.delete_at_random(minutes * 60)
            trial.restart_each()
            trial.trains_on()
            answers = figures_of(kubectl, pod)
        trial.account()
    trial.seen |= answers
    if answers["failures"] or not answers["answered"]:
        trial.miss(f"{answers['failures']} of {answers['asked']} requests failed")
    report.finish(trial.seen)
    if trial.seen["missed"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    report.run(lambda: typer.run(main))
