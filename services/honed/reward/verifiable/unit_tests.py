"""`unit_tests`: 1 where the response's Python code passes the tests that are its prompt's reference, otherwise 0.

Read in `sandbox` what keeps such code from harm, and what does not, before you use it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from pydantic import Field, PrivateAttr

from honed.kit.errors import FailedPrecondition, InvalidArgument
from honed.reward.verifiable.base import AgainstReference
from honed.reward.verifiable.fences import fenced_blocks
from honed.reward.verifiable.sandbox import GRACE_S, Limits, Outcome, run_tests

logger = logging.getLogger(__name__)

_KEPT: Final = 4096
_LANGUAGES: Final = ("python", "py", "python3")


class UnitTests(AgainstReference):
    """Runs code against tests, a few processes at once.

    The code is what stands in the response's fenced blocks of Python, one after the other, or in
    those without a language, or the whole response. The tests are Python source: each top-level
    statement that is no definition, import or assignment is a check, and each function `test*`
    without arguments is one.

    A batch ends after `deadline_s` and the time of what runs then. What was not tested by then
    fails as an outage, which is tried again later; what was tested is remembered, so that each try
    gets further.
    """

    partial: bool = Field(False, description="Score the share of checks that pass. Otherwise all must.")
    timeout_s: float = Field(5.0, gt=0, le=30, description="Wall-clock seconds of one response.")
    memory_mb: int = Field(512, ge=64, le=65_536, description="Address space of one response.")
    disk_mb: int = Field(16, ge=1, le=1024, description="Size of a file, and of all where the kernel lets them be in memory.")
    workers: int = Field(0, ge=0, le=64, description="Responses tested at once. 0: one for each processor, at most 8.")
    deadline_s: float = Field(60.0, gt=0, le=60, description="Seconds after which no further response of a batch is begun.")

    _known: OrderedDict[bytes, float] = PrivateAttr(default_factory=OrderedDict)

    @property
    def longest_s(self) -> float:
        """Seconds after which a batch is given up, with what has begun by then."""
        return self.deadline_s + self.timeout_s + GRACE_S

    def model_post_init(self, context: Any, /) -> None:
        """Tests that tests can be run here.

        Raises:
            FailedPrecondition: They cannot.
        """
        outcome = self._run("x = 1", "assert x == 1")
        if outcome.passed != 1:
            raise FailedPrecondition(f"a test that must pass does not ({outcome}): more memory_mb, or timeout_s, may be needed")
        if not outcome.isolated:
            logger.warning("the kernel allows no namespaces: code under test sees this machine's network and processes")
        if not outcome.confined:
            logger.warning("the kernel has no Landlock: code under test reads what this service's user can read")

    def score(self, response: str, reference: str) -> float:
        """See `AgainstReference`."""
        return self.score_all([(response, reference)])[0]

    def score_all(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Scores a batch.

        Raises:
            InvalidArgument: A reference holds no tests.
            TimeoutError: There was no time for some of them.
        """
        wanted = {_key(program, tests): (program, tests) for program, tests in ((_code(one), other) for one, other in pairs)}
        fresh = {key: pair for key, pair in wanted.items() if key not in self._known}
        end = time.monotonic() + self.deadline_s

        def tested(pair: tuple[str, str]) -> Outcome | None:
            return None if time.monotonic() >= end else self._run(*pair)

        if fresh:
            with ThreadPoolExecutor(min(len(fresh), self.workers or min(8, os.cpu_count() or 1)), "unit-tests") as pool:
                outcomes = dict(zip(fresh, pool.map(tested, fresh.values()), strict=True))
            for key, outcome in outcomes.items():
                if outcome is not None and not outcome.refused:
                    self._known[key] = self._value(outcome)
            refused = [outcome.refused for outcome in outcomes.values() if outcome is not None and outcome.refused]
            if refused:
                raise InvalidArgument("reference", f"cannot be run as tests: {refused[0]}")
            if late := sum(outcome is None for outcome in outcomes.values()):
                raise TimeoutError(
                    f"{late} of {len(pairs)} responses were not tested within {self.deadline_s:g} s (deadline_s)"
                )
        scores = [self._known[_key(_code(response), reference)] for response, reference in pairs]
        while len(self._known) > _KEPT:
            self._known.popitem(last=False)
        return scores

    def _run(self, program: str, tests: str) -> Outcome:
        return run_tests(program, tests, Limits(self.timeout_s, self.memory_mb, self.disk_mb), partial=self.partial)

    def _value(self, outcome: Outcome) -> float:
        if not outcome.total:
            return 0.0
        return outcome.passed / outcome.total if self.partial else float(outcome.passed == outcome.total)


def _code(response: str) -> str:
    blocks = fenced_blocks(response, _LANGUAGES)
    return "\n\n".join(blocks) if blocks else response


def _key(program: str, tests: str) -> bytes:
    digest = hashlib.sha256()
    for text in (program, tests):
        body = text.encode(errors="surrogatepass")
        digest.update(len(body).to_bytes(8, "big") + body)
    return digest.digest()
