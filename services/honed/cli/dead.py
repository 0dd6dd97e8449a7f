"""`honed dead list|show|replay|delete`: entries that were given up after too many tries, straight from Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from honed.cli import output
from honed.cli.connection import RunOption, find_cluster, find_run

if TYPE_CHECKING:
    from honed.queue.dead import DeadLetter, DeadLetters

T = TypeVar("T")

_PATIENCE_S = 5.0
_PAGE = 200


class Stage(StrEnum):
    """The streams of a run."""

    prompts = "prompts"
    rollouts = "rollouts"
    scored = "scored"


StageOption = Annotated[Stage | None, typer.Option("--stage", help="Only this stage. Unset: all of them.")]
RunFileOption = Annotated[
    Path | None, typer.Option("--run-file", "-f", help="Settings that name the run and its Redis, in place of a run directory.")
]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    group = typer.Typer(no_args_is_help=True, help="Work that was given up: look at it, send it back, or delete it.")
    group.command("list", epilog="Example: honed dead list --stage rollouts")(list_)
    group.command(epilog="Example: honed dead show 1718000000000-0")(show)
    group.command(epilog="Example: honed dead replay 1718000000000-0, or honed dead replay --all --stage scored")(replay)
    group.command(epilog="Example: honed dead delete 1718000000000-0, or honed dead delete --all --stage prompts --yes")(delete)
    app.add_typer(group, name="dead")


def list_(
    stage: StageOption = None,
    limit: Annotated[int, typer.Option(min=1, help="The oldest so many of each stage.")] = 50,
    json: output.JsonOption = False,
    run: RunOption = None,
    run_file: RunFileOption = None,
) -> None:
    """List dead letters, oldest first: what was given up, why, and after how many deliveries."""

    async def read(stages: dict[str, DeadLetters]) -> tuple[list[DeadLetter], dict[str, int]]:
        letters = [letter for dead in stages.values() for letter in await _letters(dead, limit)]
        return letters, {name: await dead.count() for name, dead in stages.items()}

    letters, counts = _on_redis(read, stage, run, run_file)
    if json:
        for letter in letters:
            output.show_json(_as_json(letter))
        return
    rows = [
        (each.letter, each.stage, each.message.id, str(each.death.deliveries), _when(each), each.death.reason)
        for each in letters
    ]
    output.show(output.table(["letter", "stage", "id", "deliveries", "died", "reason"], rows, numbers=["deliveries"]))
    output.note("  " + ", ".join(f"{count} in {name}" for name, count in counts.items()))


def show(
    letter: Annotated[str, typer.Argument(help="Id of a dead letter, from `honed dead list`.")],
    stage: StageOption = None,
    run: RunOption = None,
    run_file: RunFileOption = None,
) -> None:
    """Show one dead letter whole, as JSON: its deaths, and the message that nobody could work on."""
    import json

    async def read(stages: dict[str, DeadLetters]) -> DeadLetter:
        return (await _found(stages, letter))[1]

    found = _on_redis(read, stage, run, run_file)
    typer.echo(
        json.dumps({**_as_json(found), "message": decoded(found.stage, found.message.body)}, indent=2, ensure_ascii=False)
    )


def replay(
    letter: Annotated[str | None, typer.Argument(help="Id of a dead letter, from `honed dead list`.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All dead letters of the stage, or of all stages.")] = False,
    stage: StageOption = None,
    run: RunOption = None,
    run_file: RunFileOption = None,
) -> None:
    """Send dead letters back to work, when their cause is gone. Safe to repeat: a letter goes back once."""
    if (letter is None) != every:
        raise typer.BadParameter("name a letter, or give --all, one of the two")

    async def send(stages: dict[str, DeadLetters]) -> list[tuple[str, str, str]]:
        if letter is not None:
            return [await _replay(stages, letter)]
        return [
            (name, one.letter, await dead.replay(one.letter)) for name, dead in stages.items() for one in await _letters(dead)
        ]

    sent = _on_redis(send, stage, run, run_file)
    for name, one, entry in sent:
        typer.echo(f"{one} is entry {entry} of stage {name} now")
    output.note(f"{len(sent)} sent back")


def delete(
    letter: Annotated[str | None, typer.Argument(help="Id of a dead letter, from `honed dead list`.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All dead letters of the stage, or of all stages.")] = False,
    stage: StageOption = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    run: RunOption = None,
    run_file: RunFileOption = None,
) -> None:
    """Delete dead letters for good: nobody will do this work. They stay counted as dead."""
    if (letter is None) != every:
        raise typer.BadParameter("name a letter, or give --all, one of the two")

    async def count(stages: dict[str, DeadLetters]) -> dict[str, int]:
        return {name: await dead.count() for name, dead in stages.items()}

    async def remove(stages: dict[str, DeadLetters]) -> int:
        if letter is None:
            return sum([await dead.delete_all() for dead in stages.values()])
        await _first(stages, letter, lambda dead: dead.delete(letter))
        return 1

    if not yes:
        what = (
            f"dead letter {letter}"
            if letter
            else ", ".join(f"{n} of {name}" for name, n in _on_redis(count, stage, run, run_file).items())
        )
        typer.confirm(f"Delete {what} for good?", abort=True, err=True)
    output.note(f"{_on_redis(remove, stage, run, run_file)} deleted")


def decoded(stage: str, body: bytes) -> Any:
    """The message of a stage's entry as JSON, or its first bytes when it is none."""
    from google.protobuf.json_format import MessageToDict
    from google.protobuf.message import DecodeError, Message

    from honed.v1 import common_pb2

    kinds: dict[str, type[Message]] = {
        "prompts": common_pb2.PromptTask,
        "rollouts": common_pb2.Rollout,
        "scored": common_pb2.ScoredRollout,
    }
    try:
        return MessageToDict(kinds[stage].FromString(body), preserving_proto_field_name=True)
    except DecodeError as error:
        return {"undecodable": str(error), "bytes": len(body), "begins": body[:64].hex()}


def _on_redis(
    work: Callable[[dict[str, DeadLetters]], Awaitable[T]], stage: Stage | None, run: Path | None, run_file: Path | None
) -> T:
    """Opens the dead letters of the stages that are asked for and does the work on them."""
    from honed.queue.connection import RedisLink, RetryPolicy
    from honed.queue.dead import DeadLetters
    from honed.queue.keys import STAGES, RunKeys

    async def connected(url: str, keys: RunKeys) -> T:
        async with RedisLink(url, retry=RetryPolicy(deadline_s=_PATIENCE_S)) as link:
            return await work({name: DeadLetters(link, keys, name) for name in STAGES if stage is None or stage.value == name})

    with _redis(run, run_file) as (url, name):
        return asyncio.run(connected(url, RunKeys(name)))


@contextmanager
def _redis(run: Path | None, run_file: Path | None) -> Iterator[tuple[str, str]]:
    """The URL of the run's Redis and the run's name."""
    from honed.queue.embedded import embedded_redis_url
    from honed.runtime import redis_url
    from honed.settings_file import load_settings
    from honed.workspace import Workspace

    if cluster := find_cluster(run or run_file):
        with cluster.redis() as url:
            yield url, cluster.facts.run
        return
    place = Workspace(find_run(run)) if run_file is None else None
    settings = load_settings(run_file if place is None else place.effective_settings)
    place = place or Workspace(settings.directory)
    yield (embedded_redis_url(place.redis) if settings.queue.url is None else redis_url(settings)), settings.run


async def _letters(dead: DeadLetters, limit: int | None = None) -> list[DeadLetter]:
    """All letters of a stage, or the oldest so many."""
    found: list[DeadLetter] = []
    while limit is None or len(found) < limit:
        size = _PAGE if limit is None else min(_PAGE, limit - len(found))
        page = await dead.list(size, found[-1].letter if found else None)
        found += page
        if len(page) < size:
            break
    return found


async def _found(stages: dict[str, DeadLetters], letter: str) -> tuple[str, DeadLetter]:
    """The stage that has a letter, and the letter."""
    return await _first(stages, letter, lambda dead: dead.show(letter))


async def _replay(stages: dict[str, DeadLetters], letter: str) -> tuple[str, str, str]:
    """Sends a letter back, or finds the entry that it went back as."""
    name, entry = await _first(stages, letter, lambda dead: dead.replay(letter))
    return name, letter, entry


async def _first(stages: dict[str, DeadLetters], letter: str, ask: Callable[[DeadLetters], Awaitable[T]]) -> tuple[str, T]:
    """Asks one stage after the other; the answer of the first that has the letter, with the stage's name."""
    from honed.kit.errors import NotFound

    for name, dead in stages.items():
        try:
            return name, await ask(dead)
        except NotFound:
            continue
    raise NotFound(
        f"no dead letter {letter} in {', '.join(stages)}: `honed dead list` shows them; it may have been replayed or deleted"
    )


def _as_json(letter: DeadLetter) -> dict[str, Any]:
    deaths = [
        {"reason": d.reason, "deliveries": d.deliveries, "consumer": d.consumer, "at": d.at.isoformat()}
        for d in (*letter.history, letter.death)
    ]
    return {"letter": letter.letter, "stage": letter.stage, "entry": letter.entry, "id": letter.message.id, "deaths": deaths}


def _when(letter: DeadLetter) -> str:
    return letter.death.at.isoformat(sep=" ", timespec="seconds")
