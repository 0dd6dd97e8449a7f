"""`honed versions`: the policy versions of a run: list, compare, promote, roll back."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from honed.cli import output
from honed.cli.connection import AddressOption, RunOption, TokenFileOption, open_peer

if TYPE_CHECKING:
    from honed._client.peer import Peer
    from honed.v1 import common_pb2, conductor_pb2

_PAGE = 100
_TIMEOUT_S = 30.0

VersionArgument = Annotated[str, typer.Argument(help="A version as `honed versions` lists it, for example 1.20.")]
LimitOption = Annotated[int, typer.Option(min=0, help="The newest so many; 0 for all.")]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    group = typer.Typer(help="The policy versions of a run.")
    group.callback(invoke_without_command=True)(default)
    group.command("list", epilog="Example: honed versions list --limit 5")(list_)
    group.command(epilog="Example: honed versions compare 1.10 1.40 --prompts held-out.jsonl")(compare)
    group.command(epilog="Example: honed versions promote 1.40 --reason 'reads well, no loops'")(promote)
    group.command(epilog="Example: honed versions rollback 1.30")(rollback)
    app.add_typer(group, name="versions")


def default(
    context: typer.Context,
    limit: LimitOption = 20,
    json: output.JsonOption = False,
    run: RunOption = None,
    address: AddressOption = None,
    token_file: TokenFileOption = None,
) -> None:
    """List, compare, promote and roll back policy versions. Without a sub-command: list them."""
    if context.invoked_subcommand is None:
        list_(limit, json, run, address, token_file)


def list_(
    limit: LimitOption = 20,
    json: output.JsonOption = False,
    run: RunOption = None,
    address: AddressOption = None,
    token_file: TokenFileOption = None,
) -> None:
    """List the policy versions, newest first: what each was trained from, its digest, and what became of it."""
    with _conductor(run, address, token_file) as conductor:
        found = [_row(info) for info in conductor.listed(limit)]
    if json:
        for row in found:
            output.show_json(row)
        return
    rows = [
        [
            row["version"],
            row["parent"] or "-",
            row["created_at"],
            f"{row['bytes'] / 1e6:.1f}",
            row["manifest_sha256"][:12],
            row["reward_model_version"][:12] or "-",
            row["mark"] or "-",
            output.shortened(row["reason"]),
        ]
        for row in found
    ]
    columns = ["version", "parent", "created", "MB", "digest", "reward model", "mark", "reason"]
    output.show(output.table(columns, rows, numbers=["MB"]))


def compare(
    left: VersionArgument,
    right: VersionArgument,
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines of `text`, `token_ids` or `messages`. Unset: the run's evaluation prompts.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, max=1024, help="How many prompts.")] = 16,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait at most.")] = 590.0,
    json: output.JsonOption = False,
    run: RunOption = None,
    address: AddressOption = None,
    token_file: TokenFileOption = None,
) -> None:
    """Continue the same prompts with two versions, score what they say, and show both side by side."""
    from honed.conductor.sampling import prompts_of
    from honed.v1 import conductor_pb2

    asked = prompts_of(prompts, samples) if prompts else ()
    with _conductor(run, address, token_file) as conductor:
        one, other = conductor.versions(left, right)
        request = conductor_pb2.CompareVersionsRequest(left=one, right=other, prompts=asked, samples=samples)
        answer = conductor.call(conductor.stub.CompareVersions, request, timeout)
    rows = [
        {"prompt": s.prompt, "left": s.left, "right": s.right, "left_reward": s.left_reward, "right_reward": s.right_reward}
        for s in answer.samples
    ]
    if json:
        output.show_json({"left": left, "right": right, "differences": dict(answer.differences), "samples": rows})
        return
    output.show(output.pairs({f"{name}, {right} less {left}": f"{value:+.4g}" for name, value in answer.differences.items()}))
    shown = [
        (output.shortened(s.prompt, 40), f"{s.left_reward:+.2f}", s.left, f"{s.right_reward:+.2f}", s.right)
        for s in answer.samples
    ]
    columns = ["prompt", "reward", left, "reward ", right]
    output.show(output.table(columns, shown, numbers=["reward", "reward "]))


def promote(
    version: VersionArgument,
    reason: Annotated[str, typer.Option(help="Why, for those who look at it later.")] = "",
    json: output.JsonOption = False,
    run: RunOption = None,
    address: AddressOption = None,
    token_file: TokenFileOption = None,
) -> None:
    """Mark a version as one to keep: neither it nor its checkpoint is ever removed."""
    from honed.v1 import conductor_pb2

    with _conductor(run, address, token_file) as conductor:
        [chosen] = conductor.versions(version)
        request = conductor_pb2.PromoteVersionRequest(version=chosen, reason=reason, idempotency_key=uuid.uuid4().hex)
        row = _row(conductor.call(conductor.stub.PromoteVersion, request, _TIMEOUT_S).version)
    output.show_json(row) if json else output.note(f"{row['version']} is promoted and will be kept")


def rollback(
    version: VersionArgument,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait at most.")] = 590.0,
    json: output.JsonOption = False,
    run: RunOption = None,
    address: AddressOption = None,
    token_file: TokenFileOption = None,
) -> None:
    """Serve an earlier version again, and train on from it. Its weights get a new version, which is served at the end."""
    from honed.v1 import conductor_pb2

    with _conductor(run, address, token_file) as conductor:
        [chosen] = conductor.versions(version)
        request = conductor_pb2.RollbackVersionRequest(version=chosen, idempotency_key=uuid.uuid4().hex)
        row = _row(conductor.call(conductor.stub.RollbackVersion, request, timeout).version)
    output.show_json(row) if json else output.note(f"{row['version']} has the weights of {version} and is served")


@contextlib.contextmanager
def _conductor(run: Path | None, address: str | None, token_file: Path | None) -> Iterator[_Conductor]:
    with open_peer("conductor", run, address, token_file) as peer:
        yield _Conductor(peer)


class _Conductor:
    """The conductor's service, as these commands ask it."""

    def __init__(self, peer: Peer) -> None:
        from honed.v1 import conductor_pb2_grpc

        self.stub, self.call = conductor_pb2_grpc.ConductorServiceStub(peer.channel), peer.unary

    def versions(self, *texts: str) -> list[common_pb2.PolicyVersion]:
        """The versions of its run that the texts name.

        Raises:
            ValueError: a text is no version.
        """
        from honed.v1 import common_pb2, conductor_pb2

        found = []
        for text in texts:
            fence, _, step = text.partition(".")
            if not (fence.isdecimal() and step.isdecimal()):
                raise ValueError(
                    f"{text!r} is not a version: write FENCE.UPDATE as `honed versions` lists it, for example 1.20"
                )
            found.append(common_pb2.PolicyVersion(fence=int(fence), step=int(step)))
        name = self.call(self.stub.GetRun, conductor_pb2.GetRunRequest(), _TIMEOUT_S).run.run
        for version in found:
            version.run = name
        return found

    def listed(self, limit: int) -> Iterator[conductor_pb2.VersionInfo]:
        """The newest versions, all of them when `limit` is 0."""
        from honed.v1 import common_pb2, conductor_pb2

        token, left = "", limit
        while True:
            page = common_pb2.PageRequest(page_size=min(left, _PAGE) if limit else _PAGE, page_token=token)
            answer = self.call(self.stub.ListVersions, conductor_pb2.ListVersionsRequest(page=page), _TIMEOUT_S)
            yield from answer.versions
            token, left = answer.next_page_token, left - len(answer.versions)
            if not token or (limit and left <= 0):
                return


def _row(info: conductor_pb2.VersionInfo) -> dict[str, Any]:
    lineage = info.lineage
    return {
        "version": f"{info.version.fence}.{info.version.step}",
        "run": info.version.run,
        "parent": lineage.parent,
        "created_at": lineage.created_at.ToJsonString() if lineage.HasField("created_at") else "",
        "bytes": info.bytes,
        "manifest_sha256": info.manifest_sha256,
        "config_hash": lineage.config_hash,
        "reward_model_version": lineage.reward_model_version,
        "preference_snapshot": lineage.preference_snapshot,
        "promoted": info.promoted,
        "quarantined": info.quarantined,
        "figures": dict(lineage.figures),
        "mark": _mark(info),
        "reason": info.reason,
    }


def _mark(info: conductor_pb2.VersionInfo) -> str:
    """What became of a version, or else what sets it apart."""
    if info.promoted or info.quarantined:
        return "promoted" if info.promoted else "quarantined"
    updates = info.lineage.figures.get("average_updates")
    return f"average of {updates:.0f}" if updates else ""
