"""What the safety of a hop costs: hops/s of `honed.queue` against bare, pipelined XADD and XACK on the same server, as a ratio.

Method. One embedded redis-server with its append-only file (`everysec`, as in a run). A round moves `--messages` entries of
`--bytes` from one stream to the next, `--batch` at a time, after they were put there off the clock:

* bare: XREADGROUP of a batch, then one pipeline, without MULTI, of an XADD to the next stream and an XACK of the source for
  each entry. Not atomic, not safe to repeat, keeps finished entries, knows no leases: what a plain consumer loop does.
* hop: `WorkQueue.take`, then `WorkQueue.hand_on_each`: one script that checks ownership, adds, acknowledges, deletes, counts.

Rounds alternate: bare, hop, bare, hop ... A pair's ratio is hop / bare; the result is the median over the pairs.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Annotated, Any

import typer

from honed.queue.connection import RedisLink
from honed.queue.embedded import EmbeddedRedis
from honed.queue.keys import ROLLOUTS, SCORED, RunKeys
from honed.queue.messages import Message
from honed.queue.stream import WorkQueue
from loadtest import report
from loadtest.scratch import scratch_directory

ROUND_TIMEOUT_S = 120.0
_GROUP = "workers"


async def bare_round(link: RedisLink, name: str, messages: list[Message], batch: int) -> float:
    """Hops a second of the plain loop."""
    source, target = f"bare:{{{name}}}:in", f"bare:{{{name}}}:out"
    redis: Any = link.redis  # its types know every version of the protocol at once
    await redis.xgroup_create(source, _GROUP, id="0", mkstream=True)
    for start in range(0, len(messages), batch):
        async with redis.pipeline(transaction=False) as pipe:
            for message in messages[start : start + batch]:
                pipe.xadd(source, {"id": message.id, "body": message.body, "traceparent": ""})
            await pipe.execute()
    done, start_s = 0, time.perf_counter()
    while done < len(messages):
        [[_, entries]] = await redis.xreadgroup(_GROUP, "a", {source: ">"}, count=batch)
        async with redis.pipeline(transaction=False) as pipe:
            for entry, fields in entries:
                pipe.xadd(target, fields)
                pipe.xack(source, _GROUP, entry)
            await pipe.execute()
        done += len(entries)
    seconds = time.perf_counter() - start_s
    await redis.delete(source, target)
    return done / seconds


async def hop_round(link: RedisLink, name: str, messages: list[Message], batch: int) -> float:
    """Hops a second of the queue."""
    keys = RunKeys(name)
    queue = WorkQueue(link, keys, ROLLOUTS, "a")
    for start in range(0, len(messages), batch):
        await queue.put(messages[start : start + batch])
    done, start_s = 0, time.perf_counter()
    while done < len(messages):
        deliveries = await queue.take(batch)
        handed = await queue.hand_on_each([(delivery, [delivery.message]) for delivery in deliveries], SCORED)
        if not all(handed):
            raise RuntimeError("an entry was not handed on, though nobody else was there to take it over")
        done += len(deliveries)
    seconds = time.perf_counter() - start_s
    stream = keys.stream(SCORED)
    moved = await link.redis.xlen(stream)
    if moved != len(messages):
        raise RuntimeError(f"{moved} of {len(messages)} entries arrived")
    await link.redis.delete(stream)
    return done / seconds


async def measure(pairs: int, count: int, size: int, batch: int) -> list[tuple[float, float]]:
    """Pairs (bare, hop) of hops a second, after a warm-up of each."""
    messages = [Message(f"m{number}", bytes([number % 256]) * size) for number in range(count)]
    measured = []
    with scratch_directory() as directory, report.progress() as bar:
        task = bar.add_task("pairs", total=pairs)
        async with EmbeddedRedis(directory) as url, RedisLink(url) as link:
            for number in range(pairs + 1):
                chosen = messages if number else messages[: 4 * batch]
                async with asyncio.timeout(ROUND_TIMEOUT_S):
                    limit = await bare_round(link, f"bare-{number}", chosen, batch)
                    ours = await hop_round(link, f"hop-{number}", chosen, batch)
                if number:
                    measured.append((limit, ours))
                    bar.advance(task)
    return measured


def main(
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of rounds (bare, hop).")] = 5,
    messages: Annotated[int, typer.Option(min=1, help="Entries of a round.")] = 8192,
    size: Annotated[int, typer.Option("--bytes", min=0, help="Size of a body; a rollout of 24 tokens has about 500.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Entries of one read and one write.")] = 64,
) -> None:
    """Compares hops/s of the queue and of plain commands, and prints the ratio."""
    measured = asyncio.run(measure(pairs, messages, size, batch))
    report.show(report.pairs_table(f"batches of {batch}", "bare", "honed.queue", "hops/s", measured))
    bare, ours = zip(*measured, strict=True)
    report.finish(
        {
            "ratio": report.rounded(report.median_ratio(measured)),
            "ratios": [report.rounded(b / a) for a, b in measured],
            "hops_per_second": report.rounded(statistics.median(ours)),
            "bare_hops_per_second": report.rounded(statistics.median(bare)),
            "messages": messages,
            "bytes": size,
            "batch": batch,
        }
    )


if __name__ == "__main__":
    report.run(lambda: typer.run(main))
