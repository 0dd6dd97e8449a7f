"""`unit_tests`: code that nobody has looked at."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.reward.support import item

from honed.kit.errors import InvalidArgument
from honed.reward.function_scorer import Sample, find_function
from honed.reward.scorer import ScorerFailed, is_outage
from honed.reward.verifiable.sandbox import Limits, Outcome, run_tests
from honed.reward.verifiable.unit_tests import UnitTests

TESTS = "assert add(1, 2) == 3\nassert add(0, 0) == 0\ndef test_more():\n    assert add(2, 2) == 4"
GOOD = "def add(a, b):\n    return a + b"
LIMITS = Limits(timeout_s=5.0)
PRETENDS = """
import os
said = b'{"passed": 1, "total": 1}'
print(said.decode())
for descriptor in range(3, 20):
    try:
        os.write(descriptor, said)
    except OSError:
        pass
os._exit(0)
"""


def score(response: str, tests: str = TESTS, **options: Any) -> float:
    return UnitTests(**options)([Sample("", response, tests)])[0]


def run(program: str, timeout_s: float = 5.0) -> Outcome:
    return run_tests(program, "assert True", Limits(timeout_s=timeout_s))


@pytest.mark.parametrize(
    ("response", "whole", "partial"),
    [
        (GOOD, 1, 1),
        (f"I would write\n```python\n{GOOD}\n```\nand be done.", 1, 1),
        ("```python\nX = 1\n```\n```python\ndef add(a, b):\n    return a + b if X else None\n```", 1, 1),
        (f"```python\n{GOOD}", 1, 1),
        ("def add(a, b):\n    return a * b", 0, 2 / 3),
        ("def add(a, b):\n    return 7", 0, 0),
        ("def add(a, b):\n    raise SystemExit", 0, 0),
        ("I do not know.", 0, 0),
        ("", 0, 0),
        ("\x00", 0, 0),
        ("\ud800", 0, 0),
    ],
)
def test_a_response_is_scored_by_the_tests_it_passes(response: str, whole: float, partial: float) -> None:
    assert score(response) == whole
    assert score(response, partial=True) == pytest.approx(partial)


def test_a_setup_that_fails_is_a_check_that_failed() -> None:
    assert score("x = 1", "y = missing\nassert x == 1", partial=True) == 0.5
    assert score("x = 1", "import math\ny = x + math.floor(1.5)\nassert y == 2") == 1.0


@pytest.mark.parametrize("tests", ["assert (", "y = 1", '"""Says nothing."""', "def check(f): assert f"])
def test_a_reference_without_tests_is_the_samples_fault(tests: str) -> None:
    with pytest.raises(InvalidArgument, match="reference: cannot be run as tests: "):
        score("x = 1", tests)


@pytest.mark.parametrize(
    "program",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "quit()",
        PRETENDS,
        "import ctypes; ctypes.string_at(0)",
        "raise KeyboardInterrupt",
        "x = " + "(" * 100_000,
        "x = bytearray(10 ** 10)",
        "def f(): f()\nf()",
    ],
)
def test_a_program_that_ends_breaks_or_pretends_passes_nothing(program: str) -> None:
    assert run(program).passed == 0


@pytest.mark.parametrize(
    "program", ["while True: pass", "import time; time.sleep(60)", "import os, time\nos.fork()\ntime.sleep(60)"]
)
def test_a_program_that_does_not_end_is_ended(program: str) -> None:
    start = time.monotonic()
    assert run(program, timeout_s=0.5).passed == 0
    assert time.monotonic() - start < 4


def test_a_program_sees_no_environment_and_an_empty_directory_that_is_gone_afterwards(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SECRET", "1")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    program = """
import os
assert set(os.environ) <= {"LC_CTYPE"}, "Python itself sets it"
assert not os.listdir(".")
open("left", "w").write("x")
"""
    assert run(program).passed == 1
    assert list(tmp_path.iterdir()) == []


def test_a_program_cannot_import_what_is_installed() -> None:
    assert run("import json, math").passed == 1
    assert run("import pydantic").passed == 0


def test_a_program_is_limited() -> None:
    wanted = f"""
import resource as r
assert r.getrlimit(r.RLIMIT_CPU) == (5, 5)
assert r.getrlimit(r.RLIMIT_AS)[0] == {512 << 20}
assert r.getrlimit(r.RLIMIT_FSIZE)[0] == {16 << 20}
assert r.getrlimit(r.RLIMIT_NPROC)[0] == 0
assert r.getrlimit(r.RLIMIT_CORE) == (0, 0)
"""
    assert run(wanted).passed == 1
    assert run("open('f', 'wb').write(b'x' * (17 << 20))").passed == 0


needs_namespaces = pytest.mark.skipif(
    not run_tests("", "assert True", LIMITS).isolated, reason="the kernel allows no namespaces"
)


@needs_namespaces
def test_a_program_has_no_network_and_sees_no_other_process() -> None:
    assert run("import os\nassert os.getpid() == 1").passed == 1
    assert run("import os\nos.kill(-1, 9)").passed in (0, 1), "it reaches nobody but itself"
    assert run("import socket\nassert [name for _, name in socket.if_nameindex()] == ['lo']").passed == 1
    assert run("import os\nassert os.statvfs('.').f_blocks * os.statvfs('.').f_frsize <= 16 << 20").passed == 1


needs_landlock = pytest.mark.skipif(not run_tests("", "assert True", LIMITS).confined, reason="the kernel has no Landlock")


@needs_landlock
def test_a_program_reads_the_standard_library_and_no_other_file(tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("secret")
    for action in (f"open({str(secret)!r})", f"open({str(secret)!r}, 'w')", "open('/etc/passwd')", "os.listdir('/')"):
        program = f"import os\ntry:\n    {action}\nexcept PermissionError:\n    pass\nelse:\n    raise SystemExit"
        assert run(program).passed == 1, action
    assert secret.read_text() == "secret"
    allowed = """
import decimal, hashlib, json, sqlite3, ssl, zoneinfo, random, tempfile, os
os.makedirs("a/b")
open("a/b/c", "w").write("x")
os.rename("a/b/c", "a/d")
assert open("a/d").read() == "x"
random.SystemRandom().random()
with tempfile.NamedTemporaryFile() as file:
    file.write(b"x")
"""
    assert run(allowed).passed == 1


def test_nothing_that_a_program_starts_outlives_it() -> None:
    name = f"left-by-{uuid.uuid4().hex}"
    program = f"""
import ctypes, os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        ctypes.CDLL(None).prctl(15, b"{name[:15]}", 0, 0, 0)
        time.sleep(60)
    os._exit(0)
os.wait()
time.sleep(0.2)
"""
    outcome = run(program)
    names = [path.read_text().strip() for path in Path("/proc").glob("[0-9]*/comm") if path.exists()]
    assert name[:15] not in names
    if os.geteuid() == 0:
        assert outcome.passed == 1, "root forks past the limit, so that this test proves something"


def test_a_batch_is_tested_in_a_few_processes_and_the_same_code_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def counted(program: str, tests: str, limits: Limits, *, partial: bool) -> Outcome:
        ran.append(program)
        return Outcome(1, 1, isolated=True)

    monkeypatch.setattr("honed.reward.verifiable.unit_tests.run_tests", counted)
    scorer = UnitTests(workers=2)
    batch = [Sample("", f"x = {number % 3}", "assert x == 1") for number in range(9)]
    assert scorer(batch) == [1.0] * 9
    assert scorer(batch) == [1.0] * 9
    assert sorted(ran) == ["x = 0", "x = 1", "x = 1", "x = 2"], "one of them is the test at the start"


def test_what_a_batch_has_no_time_for_fails_as_an_outage_and_each_try_gets_further(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def slow(program: str, tests: str, limits: Limits, *, partial: bool) -> Outcome:
        nonlocal now
        now += 1.0
        return Outcome(1, 1, isolated=True)

    monkeypatch.setattr("honed.reward.verifiable.unit_tests.run_tests", slow)
    monkeypatch.setattr("honed.reward.verifiable.unit_tests.time.monotonic", lambda: now)
    scorer = find_function("code", "unit_tests", {"workers": 1, "deadline_s": 3.0})
    batch = [item(f"x = {number}") for number in range(8)]
    batch = [type(one)(one.tokenizer, response=one.response, reference="assert x") for one in batch]
    for left in (5, 2):
        with pytest.raises(ScorerFailed, match=rf"{left} of 8 responses were not tested within 3 s") as caught:
            scorer.score(batch)
        assert is_outage(caught.value)
    assert [output.value for output in scorer.score(batch)] == [1.0] * 8


def test_a_machine_where_tests_cannot_run_is_told_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    from honed.kit.errors import FailedPrecondition

    monkeypatch.setattr("honed.reward.verifiable.unit_tests.run_tests", lambda *_, **__: Outcome())
    with pytest.raises(FailedPrecondition, match="scorer 'code': unit_tests cannot be made: a test that must pass does not"):
        find_function("code", "unit_tests")


@settings(max_examples=25, deadline=None)
@given(st.text() | st.text(alphabet="```python\n x=1;()raise", max_size=80))
def test_any_text_can_be_scored(response: str) -> None:
    assert run_tests(response, "assert add", LIMITS).passed == 0
