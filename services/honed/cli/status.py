"""`honed status`: where the run stands, its processes, its learner and its generator, on one page."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from honed.cli import output
from honed.cli.connection import RunOption, TokenFileOption, find_cluster, find_run, open_peer
from honed.cli.live import show_live

if TYPE_CHECKING:
    from rich.console import RenderableType

    from honed._client.peer import Peer
    from honed.cluster.run import ClusterRun
    from honed.kit.errors import HonedError
    from honed.v1 import common_pb2

    Peers = dict[str, Peer | HonedError]

_TIMEOUT_S = 5.0


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(epilog="Example: honed status --run out/demo --watch")(status)


def status(
    watch: Annotated[bool, typer.Option("--watch", help="Show it again and again, until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks of --watch.")] = 1.0,
    json: output.JsonOption = False,
    run: RunOption = None,
    token_file: TokenFileOption = None,
) -> None:
    """Show the run's phase and progress, its processes with their restarts, the learner, what serves, and the queues."""
    cluster = find_cluster(run)
    run = find_run(run) if cluster is None else None
    where = {"directory": str(run)} if cluster is None else {"cluster": cluster.cluster.name}
    with ExitStack() as stack:
        peers: Peers = {}

        def found() -> dict[str, Any]:
            if cluster is None:
                connect(stack, peers, run, token_file)
                return {**where, **look(peers)}
            cluster.look_again()
            connect(stack, peers, run, token_file)
            return {**where, **look(peers), "pods": _pods(cluster)}

        if not watch:
            output.show_json(found()) if json else output.show(render(found()))
            return
        show_live(found, render, every, json=json)


def connect(stack: ExitStack, peers: Peers, run: Path | None, token_file: Path | None) -> None:
    """Connects to each service that there is no connection to yet; where a cluster has no ready Pod, leaves the reason.

    A connection whose token was refused is made anew, with the token of now. `stack` closes those that `peers` has at its end.
    """
    from honed._client.peer import Peer
    from honed.kit.errors import Unavailable

    if not peers:
        stack.callback(_close, peers)
    for name in ("conductor", "learner", "generation"):
        if isinstance(peer := peers.get(name), Peer) and peer.refused:
            del peers[name]
            peer.close()
        if not isinstance(peers.get(name), Peer):
            try:
                peers[name] = open_peer(name, run, None, token_file)
            except Unavailable as error:
                peers[name] = error


def _close(peers: Peers) -> None:
    from honed._client.peer import Peer

    for peer in peers.values():
        if isinstance(peer, Peer):
            peer.close()


def look(peers: Peers) -> dict[str, Any]:
    """Asks all services at once. One that does not answer leaves its reason in place of its figures.

    Raises:
        RequestError: the conductor's, when nobody answers.
        HonedError: why there is no connection to it, when nobody answers.
    """
    from honed.client import RequestError
    from honed.kit.errors import HonedError

    asked: dict[str, Callable[[Peer], dict[str, Any]]] = {
        "conductor": _run,
        "learner": _learner,
        "generation": _generation,
    }

    def ask(name: str) -> dict[str, Any]:
        peer = peers[name]
        if isinstance(peer, HonedError):
            raise peer
        return asked[name](peer)

    found: dict[str, Any] = {}
    failures: list[RequestError | HonedError] = []
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = {name: pool.submit(ask, name) for name in asked}
    for name, answer in answers.items():
        try:
            found["run" if name == "conductor" else name] = answer.result()
        except (RequestError, HonedError) as error:
            failures.append(error)
            found["run" if name == "conductor" else name] = {"error": str(error)}
    if len(failures) == len(asked):
        raise failures[0]
    return found


def _pods(cluster: ClusterRun) -> list[dict[str, Any]]:
    """The run's Pods, with why one is not ready."""
    from honed.cluster.pods import trouble_of

    return [
        {
            "name": pod.name,
            "ready": pod.ready,
            "restarts": pod.restarts,
            "trouble": "" if pod.ready else trouble_of(cluster.cluster, pod),
        }
        for pod in cluster.pods
    ]


def render(found: dict[str, Any]) -> RenderableType:
    """The figures for a person."""
    from rich.console import Group
    from rich.text import Text

    run, learner, generation = found["run"], found["learner"], found["generation"]
    shown = {"run": f"{run.get('run', '?')} in {found.get('cluster') or found.get('directory')}"}
    if "error" in run:
        shown["conductor"] = run["error"]
    else:
        shown["phase"] = f"{run['phase']}, {run['progress']:.0%}" + (f": {run['error_text']}" if run["error_text"] else "")
        depths = ", ".join(f"{count} {stage}" for stage, count in run["queue_depth"].items())
        shown["doing"] = run["doing"]
        for number, alarm in enumerate(run["alarms"]):
            shown["ALARM" + " " * number] = alarm
        shown["queue"] = f"{depths or 'empty'}; {run['prompts_admitted']} prompts admitted"
    if "error" in learner:
        shown["learner"] = learner["error"]
    else:
        dropped = ", ".join(f"{count} {reason}" for reason, count in learner["rollouts_dropped"].items()) or "none"
        shown["learner"] = f"{learner['state']}, version {learner['version']} of {learner['target_steps'] or 'endless'} updates"
        shown["rollouts"] = f"{learner['rollouts_trained']} trained, dropped: {dropped}"
        shown["pushes"] = f"{learner['versions_pushed']} versions, {learner['pushes_failed']} failed"
    if "error" in generation:
        shown["generation"] = generation["error"]
    else:
        rate = generation["tokens_sampled"] / max(generation["busy_seconds"], 1e-9)
        shown["serving"] = f"version {generation['version']} by {generation['engine']}"
        counts = {"finished": "samples_finished", "failed": "samples_failed", "in flight": "in_flight"}
        shown["samples"] = ", ".join(f"{generation[name]} {word}" for word, name in counts.items())
        shown["tokens"] = f"{generation['tokens_sampled']} sampled, {rate:.0f} a second while busy"
    rows = [
        (p["name"], "yes" if p["healthy"] else "no", str(p["restarts"]), p["version"] or "-", p["last_exit"])
        for p in run.get("processes", ())
    ]
    columns = ["process", "ready", "restarts", "version", "last exit"]
    tables: list[RenderableType] = [output.table(columns, rows, numbers=["restarts"])] if rows else []
    told = ((p["name"], p["log_tail"]) for p in run.get("processes", ()) if p["log_tail"])
    tables.extend(Text("\n".join((f"the end of the log of {name}:", *lines)), style="dim") for name, lines in told)
    if pods := [(p["name"], "yes" if p["ready"] else "no", str(p["restarts"]), p["trouble"]) for p in found.get("pods", ())]:
        tables.append(output.table(["pod", "ready", "restarts", "why not"], pods, numbers=["restarts"]))
    return Group(output.pairs(shown), *tables)


def _run(peer: Peer) -> dict[str, Any]:
    from honed.v1 import conductor_pb2, conductor_pb2_grpc

    stub = conductor_pb2_grpc.ConductorServiceStub(peer.channel)
    run = peer.unary(stub.GetRun, conductor_pb2.GetRunRequest(), _TIMEOUT_S).run
    return {
        "run": run.run,
        "phase": _word(conductor_pb2.RunPhase.Name(run.phase), "RUN_PHASE_"),
        "progress": run.phase_progress,
        "started_at": run.started_at.ToJsonString() if run.HasField("started_at") else None,
        "ended_at": run.ended_at.ToJsonString() if run.HasField("ended_at") else None,
        "error_text": run.error,
        "doing": run.doing,
        "alarms": list(run.alarms),
        "accounts": dict(sorted(run.accounts.items())),
        "target_steps": run.target_steps,
        "queue_depth": dict(sorted(run.queue_depth.items())),
        "prompts_admitted": run.prompts_admitted,
        "processes": [
            {
                "name": p.name,
                "healthy": p.healthy,
                "restarts": p.restarts,
                "last_exit": p.last_exit,
                "pid": p.pid,
                "address": p.address,
                "version": p.version,
                "metrics_port": p.metrics_port,
                "log_tail": list(p.log_tail),
            }
            for p in run.processes
        ],
    }


def _learner(peer: Peer) -> dict[str, Any]:
    from honed.v1 import learner_pb2, learner_pb2_grpc

    stub = learner_pb2_grpc.LearnerServiceStub(peer.channel)
    status = peer.unary(stub.GetStatus, learner_pb2.GetStatusRequest(), _TIMEOUT_S)
    return {
        "state": _word(learner_pb2.LearnerState.Name(status.state), "LEARNER_STATE_"),
        "version": _label(status.version),
        "served_version": _label(status.served_version) if status.HasField("served_version") else None,
        "target_steps": status.target_steps,
        "rollouts_trained": status.rollouts_trained,
        "rollouts_dropped": dict(sorted(status.rollouts_dropped.items())),
        "versions_pushed": status.versions_pushed,
        "pushes_failed": status.pushes_failed,
        "busy_seconds": status.busy_seconds,
        "checkpoint_step": status.checkpoint_step,
        "alarm": status.alarm,
        "rollouts_undone": status.rollouts_undone,
        "batches_skipped": status.batches_skipped,
        "versions_refused": status.versions_refused,
    }


def _generation(peer: Peer) -> dict[str, Any]:
    from honed.v1 import generation_pb2, generation_pb2_grpc

    stub = generation_pb2_grpc.GenerationServiceStub(peer.channel)
    policy = peer.unary(stub.GetPolicy, generation_pb2.GetPolicyRequest(), _TIMEOUT_S)
    names = ("engine", "in_flight", "samples_finished", "samples_failed", "tokens_sampled", "busy_seconds")
    return {"version": _label(policy.version), **{name: getattr(policy, name) for name in names}}


def _label(version: common_pb2.PolicyVersion) -> str:
    return f"{version.fence}.{version.step}"


def _word(name: str, prefix: str) -> str:
    return name.removeprefix(prefix).lower()
