"""What stands around an engine: checks before a prompt is tokenised, catching up, the watch for a stall, back-off, the lock."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.engine import FakeEngine

from honed.artifacts.store import PolicyStore
from honed.artifacts.version import VersionId
from honed.generation.backoff import Backoff
from honed.generation.catch_up import CatchUp
from honed.generation.control import GenerationControlService
from honed.generation.frontend import RequestLimits, SamplingFrontend
from honed.generation.gate import RequestGate, RequestKind
from honed.generation.home import own_directory
from honed.generation.stall import StallWatch
from honed.kit.errors import Aborted, FailedPrecondition, InvalidArgument, Overloaded, Unavailable
from honed.queue.progress import LearnerProgress
from honed.v1 import common_pb2, generation_pb2

LIMITS = RequestLimits(max_samples=4, max_tokens=64, default_max_tokens=8, max_prompt_tokens=2000)


class Clock:
    """Time that a test moves; sleepers wake when it has come."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)


def frontend(gate: RequestGate | None = None, **options: Any) -> SamplingFrontend:
    gate = gate or RequestGate(8, 20, application_share=0.75)
    gate.open()
    return SamplingFrontend(FakeEngine(gate), gate, LIMITS, "r", **options)


async def ask(of: SamplingFrontend, prompt: generation_pb2.Prompt, n: int = 1, **sampling: Any) -> list[Any]:
    return await of.requests(prompt, common_pb2.SamplingParams(**sampling), n, text=True, logprobs=False)


def forbidden(_: str) -> list[int]:
    raise AssertionError("tokenised")


@pytest.mark.parametrize(
    ("n", "sampling", "size", "error"),
    [
        (5, {}, 10, InvalidArgument),
        (1, {"max_tokens": 65}, 10, InvalidArgument),
        (1, {"top_p": 2.0}, 10, InvalidArgument),
        (1, {}, 2000 * 4 + 1, InvalidArgument),
        (1, {}, 4 << 20, InvalidArgument),
    ],
)
async def test_what_is_refused_is_not_tokenised(n: int, sampling: dict[str, Any], size: int, error: type[Exception]) -> None:
    served = frontend()
    served.engine.tokenise = forbidden
    with pytest.raises(error):
        await ask(served, generation_pb2.Prompt(text="a" * size), n, **sampling)


async def test_a_request_that_can_never_fit_is_refused_for_good_and_one_that_may_is_told_to_come_back() -> None:
    served = frontend(RequestGate(2, 4, 0.5))  # room for 3 of applications
    with pytest.raises(InvalidArgument, match="n: 4 is over this server's cap of 3"):
        await ask(served, generation_pb2.Prompt(text="a"), 4)
    served.gate.open()
    async with served.gate.enter():
        with pytest.raises(Overloaded):
            await ask(served, generation_pb2.Prompt(text="a"), 3)


async def test_overload_is_told_before_a_prompt_is_tokenised() -> None:
    served = frontend(RequestGate(2, 3, 0.5))
    served.engine.tokenise = forbidden
    async with served.gate.enter(), served.gate.enter():
        with pytest.raises(Overloaded):
            await ask(served, generation_pb2.Prompt(text="a" * 5000))


async def test_a_long_text_is_tokenised_beside_the_event_loop_and_a_short_one_on_it() -> None:
    served, threads = frontend(), []

    def tokenise(text: str) -> list[int]:
        threads.append(threading.current_thread())
        return [5] * (len(text) // 4)

    served.engine.tokenise = tokenise
    await ask(served, generation_pb2.Prompt(text="a" * 100))
    requests = await ask(served, generation_pb2.Prompt(text="a" * 8000))
    assert len(requests[0].prompt_token_ids) == 2000, "as many tokens as there may be are taken"
    assert [thread is threading.main_thread() for thread in threads] == [True, False]


async def test_a_conversation_goes_through_the_chat_template() -> None:
    messages = [generation_pb2.ChatMessage(role="user", content="hi")]
    prompt = generation_pb2.Prompt(messages=generation_pb2.ChatMessages(messages=messages))
    served = frontend(render_chat=lambda said: [len(said), *map(ord, said[0].content)])
    assert (await ask(served, prompt))[0].prompt_token_ids == [1, 104, 105]
    with pytest.raises(InvalidArgument) as error:
        await ask(frontend(), prompt)
    assert error.value.field == "prompt.messages"


async def test_sample_i_is_drawn_with_the_seed_plus_i() -> None:
    requests = await ask(frontend(), generation_pb2.Prompt(text="a" * 20), 3, seed=4)
    assert [request.sampling.seed for request in requests] == [4, 5, 6]
    assert {request.kind for request in requests} == {RequestKind.APPLICATION}
    assert len({request.request_id for request in requests}) == 3


class Control:
    """What CatchUp needs of the control service."""

    def __init__(self) -> None:
        self.version = VersionId(1, 3)
        self.changing = False
        self.error: Exception | None = None
        self.asked: list[VersionId] = []

    async def change(self, version: VersionId, _: str) -> None:
        self.asked.append(version)
        if self.error is not None:
            raise self.error
        self.version = version


class Board:
    def __init__(self, version: str = "") -> None:
        self.version, self.error = version, None

    async def read(self) -> LearnerProgress | None:
        if self.error is not None:
            raise self.error
        return LearnerProgress(version=self.version)


class Follower:
    def __init__(self, served: str) -> None:
        self.control, self.board, self.clock, self.allowed = Control(), Board(served), Clock(), asyncio.Event()
        self.allowed.set()
        self.catch_up = CatchUp(
            self.control, self.board, self.allowed, patience_s=2.0, clock=self.clock, sleep=self.clock.sleep
        )

    async def beats(self, count: int) -> None:
        for _ in range(count):
            await self.catch_up.compare()
            self.clock.now += 2.0


async def test_a_newcomer_is_at_the_served_version_before_it_is_ready() -> None:
    follower = Follower("1.7")
    await follower.catch_up.join()
    assert follower.control.version == VersionId(1, 7)
    assert follower.allowed.is_set()


async def test_a_newcomer_waits_until_the_store_answers() -> None:
    follower = Follower("1.7")
    follower.control.error = Unavailable("the store is away")
    joining = asyncio.create_task(follower.catch_up.join())
    for _ in range(10):
        await asyncio.sleep(0)
    assert not joining.done()
    assert not follower.allowed.is_set(), "what it samples meanwhile would be stale"
    follower.control.error = None
    await joining


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), RuntimeError("what a store's library raises")])
async def test_nothing_that_catching_up_meets_ends_serving(error: Exception) -> None:
    follower = Follower("1.7")
    follower.control.error = error
    await follower.beats(100)
    assert follower.control.version == VersionId(1, 3)
    assert 4 < len(follower.control.asked) < 12, "tried again, with growing pauses"
    follower.control.error = None
    await follower.beats(32)
    assert follower.control.version == VersionId(1, 7)
    assert follower.catch_up.refused == {}
    follower.board.error = ValueError("no JSON")
    await follower.beats(1)


@pytest.mark.parametrize("served", ["", "1.3", "1.2", "0.9"])
async def test_one_that_is_not_behind_changes_nothing(served: str) -> None:
    follower = Follower(served)
    await follower.catch_up.join()
    assert follower.control.asked == []


async def test_a_redis_that_does_not_answer_is_no_reason_to_wait() -> None:
    follower = Follower("1.9")
    follower.board.error = Unavailable("gone")
    await follower.catch_up.join()
    assert follower.control.asked == []


async def test_a_missed_push_is_caught_up_after_the_time_that_a_push_takes() -> None:
    follower = Follower("1.4")
    await follower.beats(1)
    assert (follower.control.asked, follower.allowed.is_set()) == ([], True), "a push may be under way"
    await follower.beats(1)
    assert follower.control.version == VersionId(1, 4)
    assert follower.allowed.is_set()


async def test_a_push_under_way_is_left_alone_and_training_waits_for_it() -> None:
    follower = Follower("1.4")
    follower.control.changing = True
    await follower.beats(3)
    assert (follower.control.asked, follower.allowed.is_set()) == ([], False)
    follower.control.changing, follower.control.version = False, VersionId(1, 4)
    await follower.beats(1)
    assert follower.allowed.is_set()


async def test_a_version_that_is_refused_here_is_asked_for_once_and_told_and_holds_nothing_up() -> None:
    follower = Follower("1.4")
    follower.control.error = Aborted("canaries are off")
    await follower.beats(5)
    assert follower.control.asked == [VersionId(1, 4)]
    assert follower.catch_up.refused == {VersionId(1, 4): "canaries are off"}
    assert follower.allowed.is_set(), "its rollouts may be old, and are counted if they are too old"
    follower.control.error, follower.board.version = None, "1.5"
    await follower.beats(2)
    assert follower.control.version == VersionId(1, 5)


async def watched(change: Callable[[FakeEngine, RequestGate], None]) -> str:
    """Runs the watch over an engine with one sample in work for ten times its patience; how it ended."""
    clock, gate = Clock(), RequestGate(4, 10, application_share=0.75)
    engine = FakeEngine(gate)
    gate.open()

    async def sleep(seconds: float) -> None:
        await clock.sleep(seconds)
        change(engine, gate)
        if clock.now > 100:
            raise TimeoutError

    async with gate.enter():
        try:
            await StallWatch(engine, gate, 10.0, clock=clock, sleep=sleep).run()
        except Unavailable as error:
            return str(error)
        except TimeoutError:
            return "never"
    raise AssertionError


async def test_an_engine_with_work_and_no_token_ends_the_process() -> None:
    assert "gave no token for 10 s" in await watched(lambda engine, gate: None)


async def test_an_engine_that_gives_tokens_or_stands_still_on_purpose_goes_on() -> None:
    def sample(engine: FakeEngine, gate: RequestGate) -> None:
        engine.progress += 1

    assert await watched(sample) == "never"
    assert await watched(lambda engine, gate: gate.shut()) == "never"


async def test_an_idle_engine_is_no_stall() -> None:
    clock, gate = Clock(), RequestGate(4, 10, application_share=0.75)
    gate.open()
    watching = asyncio.create_task(StallWatch(FakeEngine(gate), gate, 10.0, clock=clock, sleep=clock.sleep).run())
    while clock.now < 100:
        await asyncio.sleep(0)
    watching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watching


def test_pauses_double_up_to_the_cap_and_a_success_ends_them() -> None:
    clock = Clock()
    backoff = Backoff(0.2, 5.0, clock)
    pauses = []
    for _ in range(7):
        pauses.append(backoff.failed())
        assert backoff.failed() == pauses[-1], "a second failure in one pause has the same cause"
        clock.now += pauses[-1] + 1e-6
    assert pauses == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0])
    backoff.failed()
    backoff.succeeded()
    assert backoff.left_s == 0
    assert backoff.failed() == pytest.approx(0.2)


def test_a_second_process_of_one_replica_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    with own_directory(tmp_path, 0) as versions:
        (versions / "1.3").mkdir()
        with pytest.raises(FailedPrecondition, match="HONED_GENERATION__REPLICA"), own_directory(tmp_path, 0):
            pass
        with own_directory(tmp_path, 1):
            assert (versions / "1.3").is_dir()
    with own_directory(tmp_path, 0) as versions:
        assert list(versions.iterdir()) == [], "what a process before fetched is not trusted"


async def test_before_a_version_serves_a_push_is_told_to_come_again(tmp_path: Path) -> None:
    """M4: a commit was acknowledged by an engine that had loaded nothing."""
    from honed.generation.hf.engine import TransformersEngine

    gate = RequestGate(4, 10, application_share=0.75)
    engine = TransformersEngine([], gate=gate)
    store = PolicyStore(tmp_path / "store", "r")
    control = GenerationControlService(SamplingFrontend(engine, gate, LIMITS, "r"), store, tmp_path / "versions")
    version = common_pb2.PolicyVersion(run="r", fence=1, step=3)
    with pytest.raises(Unavailable):
        await control.PrepareVersion(generation_pb2.PrepareVersionRequest(version=version, manifest_sha256="0" * 64), None)
    with pytest.raises(Unavailable):
        await control.CommitVersion(generation_pb2.CommitVersionRequest(version=version), None)


async def test_prompts_of_requests_that_were_taken_are_seen_and_no_others() -> None:
    seen: list[generation_pb2.Prompt] = []
    served = frontend(on_prompt=seen.append)
    prompt = generation_pb2.Prompt(text="a" * 20)
    await ask(served, prompt)
    with pytest.raises(InvalidArgument):
        await ask(served, prompt, n=5)
    with pytest.raises(InvalidArgument):
        await ask(served, generation_pb2.Prompt(text="a" * 9000))
    served.training_requests(common_pb2.PromptTask(prompt_token_ids=[1], samples=1), "w")
    assert seen == [prompt]


def test_a_cap_below_the_default_length_bounds_the_default() -> None:
    from honed.generation.main import limits
    from honed.generation.settings import GenerationSettings

    assert limits(GenerationSettings(max_tokens=96)).default_max_tokens == 96
