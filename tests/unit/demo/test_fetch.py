import os
import sys
import time
from pathlib import Path

import pytest
from tests.unit.demo.conftest import source_of

from honed.demo.data.fetch import HUMAN_RATINGS, SourceDistribution, fetch, verify
from honed.kit.errors import DataLoss, DeadlineExceeded, FailedPrecondition, NotFound, Unavailable


def fake_pip(tmp_path: Path, body: str) -> tuple[str, str]:
    """A program that takes pip's place; `dest` is its --dest directory."""
    script = tmp_path / "fake_pip.py"
    script.write_text(f"import sys, pathlib\ndest = pathlib.Path(sys.argv[sys.argv.index('--dest') + 1])\n{body}\n")
    return (sys.executable, str(script))


def test_the_archive_is_brought_once_and_reused(tmp_path, make_archive):
    archive = make_archive()
    source = source_of(archive)
    data = tmp_path / "data"
    pip = fake_pip(tmp_path, f"import shutil; shutil.copy({str(archive)!r}, dest)")
    path = fetch(data, source, pip=pip)
    assert path.read_bytes() == archive.read_bytes()
    assert fetch(data, source, pip=("/nonexistent/pip",)) == path
    assert [p.name for p in data.iterdir()] == [source.filename]  # nothing half-done is left


def test_pip_is_told_the_digest_before_it_runs_anything(tmp_path, make_archive):
    archive = make_archive()
    source = source_of(archive)
    body = (
        "assert '--require-hashes' in sys.argv and '--no-deps' in sys.argv\n"
        f"assert {source.sha256!r} in pathlib.Path(sys.argv[sys.argv.index('--requirement') + 1]).read_text()\n"
        f"import shutil; shutil.copy({str(archive)!r}, dest)"
    )
    fetch(tmp_path / "data", source, pip=fake_pip(tmp_path, body))


def test_a_truncated_file_names_file_both_digests_and_the_remedy(tmp_path, make_archive):
    archive = make_archive()
    source = source_of(archive)
    archive.write_bytes(archive.read_bytes()[:-10])
    with pytest.raises(DataLoss) as caught:
        fetch(tmp_path, source)
    for part in (str(archive), source.sha256, source_of(archive).sha256, "delete the file"):
        assert part in str(caught.value)
    assert archive.exists()


def test_a_missing_file_says_how_to_get_it(tmp_path):
    with pytest.raises(NotFound, match="honed data fetch"):
        verify(tmp_path / HUMAN_RATINGS.filename)


def test_a_corrupt_download_never_gets_the_name(tmp_path, make_archive):
    source = source_of(make_archive())
    pip = fake_pip(tmp_path, f"(dest / {source.filename!r}).write_bytes(b'rubbish')")
    with pytest.raises(DataLoss, match="expected"):
        fetch(tmp_path / "data", source, pip=pip)
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize(
    ("body", "error", "words"),
    [
        ("sys.exit('No module named pip')", Unavailable, "No module named pip"),
        ("sys.exit('THESE PACKAGES DO NOT MATCH THE HASHES')", DataLoss, "pinned sha256"),
        ("pass", Unavailable, "left no made-1.0.tar.gz"),
    ],
)
def test_what_pip_said_is_passed_on(tmp_path, body, error, words):
    source = SourceDistribution("made==1.0", "made-1.0.tar.gz", "0" * 64)
    with pytest.raises(error, match=words):
        fetch(tmp_path / "data", source, pip=fake_pip(tmp_path, body))


def test_pip_that_cannot_be_started_is_a_clear_error(tmp_path):
    with pytest.raises(Unavailable, match="pip cannot be started"):
        fetch(tmp_path / "data", pip=("/nonexistent/pip",))


def test_a_slow_pip_and_its_children_end_at_the_time_limit(tmp_path):
    pid_file = tmp_path / "pid"
    body = (
        "import subprocess\nchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(pid_file)!r}).write_text(str(child.pid))\nchild.wait()"
    )
    with pytest.raises(DeadlineExceeded, match="within 3 s"):
        fetch(tmp_path / "data", pip=fake_pip(tmp_path, body), timeout_s=3)
    pid = int(pid_file.read_text())
    for _ in range(100):
        if not _runs(pid):
            return
        time.sleep(0.05)
    pytest.fail("pip's child outlived the time limit")


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_data_directory_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FailedPrecondition, match="cannot be written"):
        fetch(Path(os.fspath(tmp_path)) / "file" / "data")
