"""A store that hangs costs no thread but the call's own, and is not asked at once again."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from honed.artifacts.calls import StoreCalls
from honed.kit.errors import Unavailable


class Store:
    """Answers, or hangs until it is let go."""

    def __init__(self) -> None:
        self.now = 0.0
        self.away = threading.Event()
        self.back = threading.Event()
        self.asked = 0
        self.calls = StoreCalls(0.01, clock=lambda: self.now)

    def read(self) -> str:
        self.asked += 1
        if self.away.is_set():
            self.back.wait(20)
        return "content"

    def get(self) -> str:
        # A slow machine must not make a call that answers look like one that hangs.
        self.calls._timeout_s = 0.01 if self.away.is_set() else 20.0
        return self.calls("bucket/x", self.read)

    def hang(self, times: int) -> None:
        self.away.set()
        for _ in range(times):
            with pytest.raises(Unavailable, match=r"did not answer within 0\.01 s for bucket/x"):
                self.get()


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store()
    yield store
    store.back.set()


def test_calls_that_hang_do_not_use_up_what_others_need(store: Store) -> None:
    for _ in range(20):
        store.hang(2)
        store.away.clear()
        assert store.get() == "content"
    assert store.calls.hanging == 40


def test_a_store_that_does_not_answer_is_left_alone_for_growing_pauses(store: Store) -> None:
    store.hang(3)
    for pause in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0):
        asked = store.asked
        store.now += pause - 0.01
        with pytest.raises(Unavailable, match="has not answered lately"):
            store.get()
        assert store.asked == asked
        store.now += 0.01
        store.hang(1)
    store.away.clear()
    store.now += 60.0
    assert store.get() == "content"
    store.hang(1)
    store.away.clear()
    assert store.get() == "content", "one answer forgives all"


def test_only_one_call_tries_whether_the_store_is_back(store: Store) -> None:
    store.hang(3)
    store.now += 1.0
    asked = store.asked
    trying = threading.Thread(target=lambda: store.hang(1))
    trying.start()
    while store.asked == asked:
        pass
    with pytest.raises(Unavailable, match="has not answered lately"):
        store.get()
    trying.join()


def test_threads_that_hang_are_bounded(store: Store) -> None:
    for _ in range(80):
        try:
            store.away.set()
            store.get()
        except Unavailable as error:
            said = str(error)
        store.now += 61.0
    assert store.calls.hanging == 64
    assert "64 calls to the store hang" in said
    store.back.set()
    store.away.clear()
    while store.calls.hanging:
        pass
    store.now += 61.0
    assert store.get() == "content"


def test_an_error_of_the_store_is_the_callers_error_and_no_timeout(store: Store) -> None:
    def missing() -> str:
        raise FileNotFoundError("x")

    def late() -> str:
        raise TimeoutError("the store's own")

    for _ in range(5):
        with pytest.raises(FileNotFoundError):
            store.calls("x", missing)
        with pytest.raises(TimeoutError, match="own"):
            store.calls("x", late)
    assert store.get() == "content"
