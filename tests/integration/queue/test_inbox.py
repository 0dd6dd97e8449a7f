"""Prompts that wait beside the file: submitted once, bounded, and taken in the step that admits them."""

import asyncio
import random
from collections import Counter

import pytest

from honed.kit.errors import Conflict, InvalidArgument, Overloaded, Unavailable
from honed.queue import application as module
from honed.queue.admission import Cursor, CursorMoved, PromptAdmitter
from honed.queue.application import ApplicationPrompts
from honed.queue.connection import RedisLink, RetryPolicy
from honed.queue.inbox import PromptInbox
from honed.queue.keys import APPLICATION, SUBMITTED
from honed.queue.lease import Leases
from honed.queue.messages import Message
from honed.queue.settings import ApplicationPromptsSettings
from honed.v1 import generation_pb2

pytestmark = pytest.mark.redis


def prompts(*texts: str) -> list[generation_pb2.Prompt]:
    return [generation_pb2.Prompt(text=text) for text in texts]


@pytest.fixture
def inbox(link, keys):
    return PromptInbox(link, keys)


async def texts(inbox, source=SUBMITTED, count=100) -> list[str]:
    return [one.prompt.text for one in await inbox.peek(source, count)]


async def test_submitted_prompts_wait_in_order(inbox):
    assert await inbox.submit(prompts("a", "b"), limit=10) == 2
    assert await inbox.submit(prompts("c"), limit=10) == 3
    assert await texts(inbox) == ["a", "b", "c"]
    assert await texts(inbox, count=2) == ["a", "b"]


async def test_the_same_key_again_adds_nothing_and_answers_as_before(inbox, wire, keys):
    async with wire as url, RedisLink(url, retry=RetryPolicy(deadline_s=5)) as link:
        wire.lose_reply_to(b"first")
        assert await PromptInbox(link, keys).submit(prompts("first"), limit=10, key="k") == 1
    assert wire.lost == 1
    assert await inbox.submit(prompts("other"), limit=10, key="k2") == 2
    assert await inbox.submit(prompts("first"), limit=10, key="k") == 1
    assert await texts(inbox) == ["first", "other"]
    with pytest.raises(Conflict, match="key"):
        await inbox.submit(prompts("second"), limit=10, key="k")


async def test_beyond_the_limit_none_is_added_and_the_caller_is_told_when_to_come_back(inbox):
    await inbox.submit(prompts("a", "b"), limit=3)
    with pytest.raises(Overloaded, match="2 submitted prompts wait and 3 may") as caught:
        await inbox.submit(prompts("c", "d"), limit=3, key="k")
    assert caught.value.retry_after_s > 0
    assert await inbox.submit(prompts("c"), limit=3, key="k") == 3, "a refusal is no answer to keep"


async def test_prompts_leave_in_the_step_that_admits_them_or_not_at_all(inbox, link, keys, queue):
    await inbox.submit(prompts("a", "b", "c"), limit=10)
    await inbox.offer(generation_pb2.Prompt(text="asked"), limit=10)
    claim = await Leases(link, keys).acquire("conductor", "me", 60_000)
    admitter = PromptAdmitter(link, keys)
    submitted = [one.entry for one in await inbox.peek(SUBMITTED, 2)]
    asked = [one.entry for one in await inbox.peek(APPLICATION, 2)]
    step = (claim, 0, [Message("r-0", b""), Message("r-1", b""), Message("r-2", b"")], Cursor(3))
    taken = {SUBMITTED: submitted, APPLICATION: asked}
    with pytest.raises(CursorMoved):
        await admitter.admit(claim, 7, step[2], Cursor(10), taken)
    assert await texts(inbox) == ["a", "b", "c"]
    for _ in range(2):  # the second is a repeat
        await admitter.admit(*step, taken)
    assert (await texts(inbox), await texts(inbox, APPLICATION)) == (["c"], [])
    assert await queue("reader", "prompts").depth() == 3


async def test_of_what_applications_ask_the_oldest_goes_beyond_the_limit(inbox):
    for number in range(5):
        await inbox.offer(generation_pb2.Prompt(text=str(number)), limit=3)
    assert await texts(inbox, APPLICATION) == ["2", "3", "4"]


def offering(link, keys, redactor=None, share=1.0, **more) -> ApplicationPrompts:
    settings = ApplicationPromptsSettings(share=share, limit=1000)
    return ApplicationPrompts(link, keys, settings, redactor=redactor, rng=random.Random(1), **more)


async def offered(offers: ApplicationPrompts, *given: generation_pb2.Prompt) -> None:
    async with offers.running(), asyncio.timeout(30):
        for prompt in given:
            offers.offer(prompt)
        while sum(offers.outcomes.values()) < len(given):
            await asyncio.sleep(0.005)


async def test_a_share_of_what_applications_ask_is_offered(link, keys, inbox):
    offers = offering(link, keys, share=0.25)
    async with offers.running(), asyncio.timeout(30):
        for number in range(800):
            offers.offer(generation_pb2.Prompt(text=str(number)))
            await asyncio.sleep(0)
        while offers._backlog.qsize():
            await asyncio.sleep(0.005)
    assert 150 <= len(await inbox.peek(APPLICATION, 1000)) <= 250
    none = offering(link, keys, share=0.0)
    none.offer(generation_pb2.Prompt(text="a"))
    assert none._backlog.empty()


def without_names(text: str) -> str | None:
    if "secret" in text:
        return None
    if "crash" in text:
        raise RuntimeError(f"cannot read {text}")
    return text.replace("Ada", "[name]")


async def test_the_redactor_sees_every_text_before_it_is_kept(link, keys, inbox, caplog):
    talk = generation_pb2.ChatMessages(
        messages=[generation_pb2.ChatMessage(role="user", content=text) for text in ("Ada asks", "and asks")]
    )
    tainted = generation_pb2.ChatMessages(messages=[generation_pb2.ChatMessage(role="user", content="a secret")])
    told: list[str] = []
    offers = offering(
        link, keys, without_names, decode=lambda ids: "Ada wrote " + "".join(map(chr, ids)), on_outcome=told.append
    )
    await offered(
        offers,
        generation_pb2.Prompt(text="Ada was here"),
        generation_pb2.Prompt(text="a secret"),
        generation_pb2.Prompt(text="crash on this"),
        generation_pb2.Prompt(messages=talk, reference="Ada, as nobody has redacted"),
        generation_pb2.Prompt(messages=tainted),
        generation_pb2.Prompt(token_ids=generation_pb2.TokenIds(ids=[72, 105])),
    )
    kept = [one.prompt for one in await inbox.peek(APPLICATION, 10)]
    assert [kept[0].text, kept[2].text] == ["[name] was here", "[name] wrote Hi"]
    assert [message.content for message in kept[1].messages.messages] == ["[name] asks", "and asks"]
    assert {prompt.reference for prompt in kept} == {""}
    assert offers.outcomes == Counter(told) == {"offered": 3, "redacted_away": 2, "redactor_failed": 1}
    assert "crash" not in caplog.text, "the error of a redactor may quote the prompt"


async def test_token_ids_that_nobody_can_read_are_not_offered_past_a_redactor(link, keys, inbox):
    ids = generation_pb2.Prompt(token_ids=generation_pb2.TokenIds(ids=[72]))
    hidden, plain = offering(link, keys, without_names), offering(link, keys)
    await offered(hidden, ids)
    assert hidden.outcomes == {"no_text": 1}
    await offered(plain, ids)
    assert [list(one.prompt.token_ids.ids) for one in await inbox.peek(APPLICATION, 10)] == [[72]]


async def test_a_redis_that_is_away_and_a_burst_delay_and_fail_nothing(link, keys, monkeypatch, inbox):
    offers = offering(link, keys)
    for _ in range(1000):
        offers.offer(generation_pb2.Prompt(text="a"))
    assert offers.outcomes == {"overflow": 1000 - module._BACKLOG}
    answers = iter([Unavailable("away")])
    offer = offers._inbox.offer

    async def fail_once(prompt, limit):
        for error in answers:
            raise error
        await offer(prompt, limit=limit)

    monkeypatch.setattr(offers._inbox, "offer", fail_once)
    async with offers.running(), asyncio.timeout(30):
        while offers.outcomes["offered"] < module._BACKLOG - 1:
            await asyncio.sleep(0.005)
    assert offers.outcomes["redis"] == 1


async def test_a_redactor_that_nobody_offers_is_an_error_at_the_start(link, keys):
    with pytest.raises(InvalidArgument, match=r"redact: no installed package offers 'scrub' in the group honed\.redactors"):
        ApplicationPrompts(link, keys, ApplicationPromptsSettings(share=1, redact="scrub"))
