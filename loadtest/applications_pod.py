"""What runs in a Pod of an application: steady requests by `honed.Client`, and what became of them.

    python applications_pod.py dns:///honed-generation.honed.svc:50051 /token/application.token

It needs the package alone, without extras. Each second it prints one line of JSON; at SIGTERM it asks no more, waits for its
last answers, and ends.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from honed.client import Client, RequestError

REQUESTS_PER_S = 5.0
TIMEOUT_S = 60.0
PROMPTS = ("the film is", "i think that", "my dog was", "this place has", "what a day")


class Application:
    """Asks, and counts the answers."""

    def __init__(self, client: Client) -> None:
        self._client, self._lock = client, threading.Lock()
        self.asked = self.answered = 0
        self.failed: Counter[str] = Counter()
        self.slowest_s = 0.0

    def ask(self, number: int) -> None:
        """One request, of which every other is streamed."""
        prompt, started, why = PROMPTS[number % len(PROMPTS)], time.monotonic(), ""
        try:
            if number % 2:
                with self._client.stream(prompt, max_tokens=16, timeout=TIMEOUT_S) as deltas:
                    got = sum(1 for _ in deltas)
            else:
                got = len(self._client.generate(prompt, max_tokens=16, timeout=TIMEOUT_S))
            why = "" if got else "an empty answer"
        except RequestError as error:
            why = f"{error.code}: {error}"
        with self._lock:
            self.answered += not why
            self.slowest_s = max(self.slowest_s, time.monotonic() - started)
            if why:
                self.failed[why[:200]] += 1

    def report(self) -> str:
        """One line."""
        with self._lock:
            figures = {
                "asked": self.asked,
                "answered": self.answered,
                "failed": dict(self.failed.most_common(10)),
                "failures": self.failed.total(),
                "slowest_s": round(self.slowest_s, 3),
            }
        return json.dumps(figures)


def main(target: str, token_file: str) -> None:
    """Asks until SIGTERM."""
    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    with Client(target, token_file=token_file, timeout=TIMEOUT_S) as client, ThreadPoolExecutor(64) as threads:
        application, said, due = Application(client), 0.0, time.monotonic()
        while not over.wait(max(0.0, due - time.monotonic())):
            due += 1 / REQUESTS_PER_S
            threads.submit(application.ask, application.asked)
            application.asked += 1
            if time.monotonic() - said >= 1:
                said = time.monotonic()
                print(application.report(), flush=True)
        threads.shutdown()
        print(application.report(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
