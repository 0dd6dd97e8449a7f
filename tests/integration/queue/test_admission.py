"""Each turn of the prompt sequence is admitted once, in order, whoever races or crashes."""

import asyncio

import pytest

from honed.kit.errors import InvalidArgument
from honed.queue.admission import Cursor, CursorMoved, PromptAdmitter
from honed.queue.connection import RedisLink, RetryPolicy
from honed.queue.lease import LeaseLost, Leases
from honed.queue.messages import Message

pytestmark = pytest.mark.redis


def turn(*numbers: int) -> list[Message]:
    return [Message(f"prompt-{n}", b"") for n in numbers]


class Admission:
    """The admitter, with the position alone."""

    def __init__(self, link, keys):
        self.admitter = PromptAdmitter(link, keys)

    async def position(self) -> int:
        return (await self.admitter.cursor()).position

    async def admit(self, claim, position, prompts, skipped=0) -> int:
        target = position + len(prompts) + skipped
        await self.admitter.admit(claim, position, prompts, Cursor(target, skipped, target))
        return target


@pytest.fixture
def admission(link, keys):
    return Admission(link, keys)


@pytest.fixture
async def claim(link, keys):
    return await Leases(link, keys).acquire("conductor", "me", 60_000)


async def admitted(queue) -> list[str]:
    return [d.message.id for d in await queue("reader", "prompts").take(1000)]


async def test_prompts_and_cursor_move_together(admission, claim, queue):
    assert await admission.position() == 0
    assert await admission.admit(claim, 0, turn(0, 1)) == 2
    assert await admission.admit(claim, 2, turn(2), skipped=1) == 4
    assert await admission.position() == 4
    assert await admitted(queue) == ["prompt-0", "prompt-1", "prompt-2"]
    assert (await queue("reader", "prompts").stats()).balance == 0


async def test_a_repeat_of_the_same_step_admits_nothing_more(admission, claim, queue):
    assert await admission.admit(claim, 0, turn(0)) == 1
    assert await admission.admit(claim, 0, turn(0)) == 1
    assert await admitted(queue) == ["prompt-0"]


async def test_a_step_whose_reply_was_lost_happens_once(wire, keys, claim, queue):
    async with wire as url, RedisLink(url, retry=RetryPolicy(deadline_s=5)) as link:
        wire.lose_reply_to(b"prompt-0")
        assert await Admission(link, keys).admit(claim, 0, turn(0)) == 1
    assert wire.lost == 1
    assert await admitted(queue) == ["prompt-0"]


async def test_a_step_from_an_old_position_is_refused_and_told_the_new_one(admission, claim):
    await admission.admit(claim, 0, turn(0, 1, 2))
    with pytest.raises(CursorMoved, match="is at 3, not at 0") as caught:
        await admission.admit(claim, 0, turn(0))
    assert caught.value.position == 3


async def test_a_conductor_that_lost_its_lease_admits_nothing(admission, claim, link, keys, queue):
    await link.command("DEL", keys.lease("conductor"))
    successor = await Leases(link, keys).acquire("conductor", "other", 60_000)
    with pytest.raises(LeaseLost) as caught:
        await admission.admit(claim, 0, turn(0))
    assert caught.value.fence == successor.fence
    assert await admitted(queue) == []
    assert await admission.admit(successor, 0, turn(0)) == 1


async def test_two_conductors_that_race_and_take_over_admit_each_turn_once(admission, link, keys, queue):
    leases = Leases(link, keys)
    total = 60

    async def conduct(owner: str) -> None:
        """Takes the lease by force again and again, and admits from wherever it believes the cursor to be."""
        while (position := await admission.position()) < total:
            await link.command("DEL", keys.lease("conductor"))
            try:
                claim = await leases.acquire("conductor", owner, 60_000)
                for step in range(3):
                    await admission.admit(claim, position + step, turn(position + step))
            except (LeaseLost, CursorMoved):
                continue
            except Exception as error:
                assert "held by" in str(error)  # noqa: PT017

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        for owner in ("a", "b", "c"):
            group.create_task(conduct(owner))
    got = await admitted(queue)
    assert got == [f"prompt-{n}" for n in range(len(got))]
    assert len(got) == await admission.position() >= total


async def test_the_cursor_is_read_as_it_was_set(admission, claim):
    cursor = Cursor(position=9, skipped=2, file=5, carried={"scored/acked": 4})
    await admission.admitter.admit(claim, 0, turn(7, 8), cursor)
    assert await admission.admitter.cursor() == cursor


async def test_a_cursor_that_would_go_back_is_refused(admission, claim):
    with pytest.raises(InvalidArgument, match="position"):
        await admission.admitter.admit(claim, 5, turn(5, 6), Cursor(6))
