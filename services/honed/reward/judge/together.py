"""Calls that wait, several at once, in threads that no process waits for.

A thread pool of `concurrent.futures` is joined at the interpreter's end, so that a service which is told to stop would first
wait for an API that does not answer. These threads are daemons.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def together(call: Callable[[T], None], items: Iterable[T], at_once: int) -> None:
    """Calls `call`, which raises nothing, with each item; returns when all have returned.

    Args:
        call: From several threads.
        items: What to call it with, begun in this order.
        at_once: Threads at most.
    """
    waiting: queue.SimpleQueue[T] = queue.SimpleQueue()
    for item in items:
        waiting.put(item)

    def work() -> None:
        while True:
            try:
                item = waiting.get_nowait()
            except queue.Empty:
                return
            call(item)

    threads = [threading.Thread(target=work, name="judge", daemon=True) for _ in range(min(at_once, waiting.qsize()))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
