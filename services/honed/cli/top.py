"""`honed top`: a live table of a run and its replicas. What it shows comes by RPC, and from the replicas' `/metrics`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from honed.cli import output
from honed.cli.connection import RunOption, TokenFileOption, find_cluster, find_run
from honed.cli.live import show_live
from honed.cli.replicas import AnnouncedReplicas, PodReplicas, Replicas, figures
from honed.cli.status import connect, look

if TYPE_CHECKING:
    from rich.console import RenderableType

    from honed._client.peer import Peer
    from honed.cli.status import Peers
    from honed.cluster.run import ClusterRun

_TIMEOUT_S: Final = 5.0
_UPDATES: Final = 20
"""The last updates, over which the pace is measured."""
_BETWEEN_S: Final = 1.0
"""Between the two looks of --once: a rate needs two."""


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(epilog="Example: honed --cluster kind-honed/honed top")(top)


def top(
    once: Annotated[bool, typer.Option("--once", help="Look once, print and end.")] = False,
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 2.0,
    json: output.JsonOption = False,
    run: RunOption = None,
    token_file: TokenFileOption = None,
) -> None:
    """Show a run and each replica, live: versions, load, speed and pauses of generators, the learner's pace, what is wrong.

    With --json one object a look. Rates are over the time since the look before; the pace of the learner is over its last 20
    updates, and the 95th percentile of pauses over the last 64 changes of weights of each generator.
    """
    with ExitStack() as stack:
        cluster = find_cluster(run)
        watch = Watch(stack, cluster, None if cluster else find_run(run), token_file)
        if once:
            watch.look()
            time.sleep(_BETWEEN_S)
            found = watch.look()
            output.show_json(found) if json else output.show(render(found))
            return
        show_live(watch.look, render, every, json=json)


class Watch:
    """Looks at one run again and again."""

    def __init__(
        self,
        stack: ExitStack,
        cluster: ClusterRun | None,
        run: Path | None,
        token_file: Path | None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Connects to nothing yet.

        Args:
            stack: closes the connections.
            cluster: where the run is; None for a run in a directory.
            run: that directory.
            token_file: bearer token, in place of the run's own.
            clock: seconds since 1970, as the learner's times are.
        """
        self._stack, self._cluster, self._run, self._token_file, self._clock = stack, cluster, run, token_file, clock
        self._peers: Peers = {}
        self._replicas: Replicas = (
            AnnouncedReplicas(stack, run, token_file) if cluster is None else PodReplicas(stack, cluster, token_file)
        )
        self._before: tuple[float, dict[str, int]] = (0.0, {})

    def look(self) -> dict[str, Any]:
        """Everything as it is now. What does not answer leaves its reason.

        Raises:
            RequestError: nobody answers.
            HonedError: a cluster has no Pod that does.
        """
        where = {"directory": str(self._run)}
        if self._cluster is not None:
            self._cluster.look_again()
            where = {"cluster": self._cluster.cluster.name}
        connect(self._stack, self._peers, self._run, self._token_file)
        found = look(self._peers)
        replicas = figures(self._replicas, self._replicas.list(found["run"].get("processes", ())))
        self._add_rates(replicas)
        learner = found["learner"]
        if "error" not in learner:
            learner |= self._pace(self._peers["learner"], learner["version"])
        run = {key: value for key, value in found["run"].items() if key != "processes"}
        return {**where, "run": run, "learner": learner, "replicas": replicas}

    def _add_rates(self, replicas: Iterable[dict[str, Any]]) -> None:
        """Adds the tokens a second of each generator since the look before."""
        now, (then, before) = self._clock(), self._before
        counts: dict[str, int] = {}
        for row in replicas:
            if "tokens_sampled" not in row:
                continue
            name, count = row["name"], row.pop("tokens_sampled")
            counts[name] = count
            known = name in before and count >= before[name] and now > then
            row["tokens_per_second"] = (count - before[name]) / (now - then) if known else None
        self._before = (now, counts)

    def _pace(self, peer: Any, version: str) -> dict[str, Any]:
        from honed.client import RequestError

        try:
            return pace(peer, int(version.partition(".")[2]), self._clock())
        except RequestError as error:
            return {"pace_error": str(error)}


def pace(peer: Peer, step: int, now: float) -> dict[str, Any]:
    """What the learner's last updates were like, and how fast they came.

    Args:
        peer: the learner.
        step: its update.
        now: seconds since 1970.

    Raises:
        RequestError: it does not answer.
    """
    from honed.learner.loop.records import scores_of
    from honed.v1 import learner_pb2, learner_pb2_grpc

    stub = learner_pb2_grpc.LearnerServiceStub(peer.channel)
    request = learner_pb2.WatchMetricsRequest(from_step=max(1, step - _UPDATES), no_follow=True)
    updates = [answer.metrics for answer in peer.stream(stub.WatchMetrics, request, _TIMEOUT_S)]
    ended = [update.ended_at.ToNanoseconds() / 1e9 for update in updates]
    last = dict(updates[-1].values) if updates else {}
    names = ("staleness_mean", "staleness_max", "score_mean", "kl", "entropy")
    return {
        "updates_per_minute": per_minute(ended, now),
        **{name: last[name] if name in last and math.isfinite(last[name]) else None for name in names},
        "scores": {name: value for name, value in scores_of(last).items() if math.isfinite(value)},
    }


def per_minute(ended: list[float], now: float) -> float | None:
    """Updates a minute, of the times at which the last ones ended; None of fewer than two.

    A learner that has stopped gets slower with each look.
    """
    if len(ended) < 2:
        return None
    spent = ended[-1] - ended[0]
    usual = spent / (len(ended) - 1)
    if now - ended[-1] > 2 * usual:  # it is late
        spent = now - ended[0]
    return 60 * (len(ended) - 1) / spent if spent > 0 else None


def render(found: Mapping[str, Any]) -> RenderableType:
    """The figures for a person."""
    from rich.console import Group
    from rich.text import Text

    run, learner = found["run"], found["learner"]
    shown = {"run": f"{run.get('run', '?')} in {found.get('cluster') or found.get('directory')}"}
    if "error" in run:
        shown["conductor"] = run["error"]
    else:
        error = f": {run['error_text']}" if run["error_text"] else f": {run['doing']}" if run["doing"] else ""
        shown["phase"] = f"{run['phase']}, {run['progress']:.0%}{error}"
        depths = ", ".join(f"{count} {stage}" for stage, count in run["queue_depth"].items())
        shown["streams"] = f"{depths or 'empty'}; {run['prompts_admitted']} prompts admitted"
    shown |= {"learner": learner["error"]} if "error" in learner else _learner(learner)
    alarms = [Text(f"! {output.printable(alarm)}", style="bold red") for alarm in _alarms(run, learner)]
    generators = [_generator(row) for row in found["replicas"] if row["service"] == "generation"]
    scorers = [_scorer(row) for row in found["replicas"] if row["service"] == "reward"]
    tables: list[RenderableType] = []
    if generators:
        numbers = ["in flight", "training", "waiting", "tokens/s", "pause p95"]
        tables.append(output.table(["generator", "ready", "version", *numbers, ""], generators, numbers=numbers))
    if scorers:
        numbers = ["in flight", "waiting", "tokens/s"]
        tables.append(output.table(["scorer", "ready", "reward", *numbers, ""], scorers, numbers=numbers))
    return Group(output.pairs(shown), *alarms, *tables)


def _learner(learner: Mapping[str, Any]) -> dict[str, str]:
    steps = f"version {learner['version']} of {learner['target_steps'] or 'endless'} updates"
    trained = f"{learner['rollouts_trained']} trained, {sum(learner['rollouts_dropped'].values())} dropped"
    pushed = f"{learner['versions_pushed']} pushed, {learner['pushes_failed']} failed"
    shown = {
        "learner": f"{learner['state']}, {steps}; {trained}",
        "serving": f"{learner['served_version'] or '-'}; {pushed}",
    }
    if "pace_error" in learner:
        return {**shown, "pace": learner["pace_error"]}
    mean, most = _number(learner["staleness_mean"], ".2f"), _number(learner["staleness_max"], ".0f")
    quality = [("score", "score_mean", "+.3f"), ("KL", "kl", ".2f"), ("entropy", "entropy", ".2f")]
    # What an algorithm does not have is not there: a KL without a price on it, an entropy of pairs.
    values = ", ".join(f"{title} {learner[name]:{form}}" for title, name, form in quality if learner[name] is not None)
    per = _number(learner["updates_per_minute"], ".2f")
    pace = f"{per} updates a minute; staleness {mean} in the mean, {most} at most"
    shown["pace"] = f"{pace}; {values}" if values else pace
    if len(scores := learner["scores"]) > 1:  # one alone is the score
        shown["scores"] = ", ".join(f"{output.printable(name)} {_number(value, '+.3f')}" for name, value in scores.items())
    return shown


def _alarms(run: Mapping[str, Any], learner: Mapping[str, Any]) -> list[str]:
    """What needs a person, each once: the conductor tells the learner's alarm, too."""
    alarms = list(run.get("alarms", ()))
    if (alarm := learner.get("alarm")) and not any(alarm in known for known in alarms):
        alarms.append(alarm)
    return alarms


def _generator(row: Mapping[str, Any]) -> list[str]:
    names = ("in_flight", "training_in_flight", "waiting")
    pause = row.get("pause_p95_ms")
    return [
        row["name"],
        "yes" if row["ready"] else "no",
        row.get("version") or "-",
        *(str(row.get(name, "-")) for name in names),
        _number(row.get("tokens_per_second"), ".0f"),
        f"{pause:.0f} ms" if pause else "-",
        row.get("error") or ("draining" if row.get("draining") else ""),
    ]


def _scorer(row: Mapping[str, Any]) -> list[str]:
    return [
        row["name"],
        "yes" if row["ready"] else "no",
        row.get("version") or "-",
        str(row.get("in_flight", "-")),
        str(row.get("waiting", "-")),
        _number(row.get("tokens_per_second"), ".0f"),
        row.get("error", ""),
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
