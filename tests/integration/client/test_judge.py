"""`honed judge` against the real preference service on SQLite."""

from __future__ import annotations

import json
import time
from pathlib import Path
from unittest import mock

import pytest
from google.protobuf import json_format
from tests.integration.client import served
from tests.integration.client.conftest import Run
from tests.support.judgements import VERDICTS, full

from honed._client.peer import Environment, Peer
from honed.cli import transfer
from honed.client import RequestError
from honed.kit.tokens import read_token
from honed.preference.content import Entry
from honed.queue.embedded import free_port
from honed.v1 import preference_pb2


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a test take several calls, as large files do."""
    monkeypatch.setattr(transfer, "BATCH", 10)


def pairs(path: Path, count: int) -> Path:
    rows = [{"prompt": f"p{n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def count(run: Run) -> int:
    return json.loads(run.honed("judge", "stats", "--json").stdout)["judgements"]


def test_every_kind_survives_an_import_and_an_export(run: Run, tmp_path: Path) -> None:
    before, after = tmp_path / "before.jsonl", tmp_path / "after.jsonl"
    judgements = [full(kind) for kind in VERDICTS]
    requests = [preference_pb2.ImportJudgementsRequest(judgement=j, idempotency_key=f"k{n}") for n, j in enumerate(judgements)]
    before.write_text("".join(json.dumps(json_format.MessageToDict(r)) + "\n" for r in requests))
    assert "6 stored, 0 there already" in run.honed("judge", "import", str(before)).stdout
    assert run.honed("judge", "export", "--out", str(after)).exit_code == 0
    found = [
        json_format.ParseDict(json.loads(line)["judgement"], preference_pb2.Judgement())
        for line in after.read_text().splitlines()
    ]
    assert found == judgements
    assert [path.name for path in tmp_path.glob("after*")] == ["after.jsonl"]


def test_the_same_file_again_stores_nothing_twice(run: Run, tmp_path: Path) -> None:
    file = pairs(tmp_path / "pairs.jsonl", 25)
    arguments = ("judge", "import", str(file), "--format", "trl", "--json")
    assert json.loads(run.honed(*arguments).stdout) == {"stored": 25, "duplicates": 0}
    assert json.loads(run.honed(*arguments).stdout) == {"stored": 0, "duplicates": 25}
    assert count(run) == 25


def test_an_import_that_broke_at_a_bad_line_goes_on_where_it_was(run: Run, tmp_path: Path) -> None:
    file = pairs(tmp_path / "pairs.jsonl", 25)
    whole = file.read_text().splitlines()
    file.write_text("\n".join([*whole[:17], whole[17][:20], *whole[18:]]))
    broken = run.honed("judge", "import", str(file), "--format", "trl")
    assert broken.exit_code == 1
    assert f"{file}, line 18" in broken.stderr
    assert "10 stored" in broken.stderr
    file.write_text("\n".join(whole))
    assert "15 stored, 10 there already" in run.honed("judge", "import", str(file), "--format", "trl").stdout
    assert count(run) == 25


def test_stats_and_exports_select_by_kind_and_source(run: Run, tmp_path: Path) -> None:
    file = pairs(tmp_path / "pairs.jsonl", 12)
    run.honed("judge", "import", str(file), "--format", "trl", "--source", "one")
    assert json.loads(run.honed("judge", "stats", "--source", "two", "--json").stdout)["judgements"] == 0
    stats = run.honed("judge", "stats", "--kind", "pairwise").stdout
    assert "one" in stats
    assert "12" in stats
    assert run.honed("judge", "export", "--kind", "thumbs").stdout == ""
    rows = [json.loads(line) for line in run.honed("judge", "export", "--format", "trl").stdout.splitlines()]
    assert rows[3] == {"prompt": "p3", "chosen": "good 3", "rejected": "bad 3"}


def test_a_snapshot_tells_its_hash_and_is_what_is_exported(run: Run, tmp_path: Path) -> None:
    run.honed("judge", "import", str(pairs(tmp_path / "pairs.jsonl", 12)), "--format", "trl")
    first, second = (run.honed("judge", "export", "--snapshot", "--kind", "pairwise") for _ in range(2))
    assert "12 judgements, sha256 " in first.stderr
    assert first.stderr.split("sha256 ")[1].split()[0] == second.stderr.split("sha256 ")[1].split()[0]
    assert len(first.stdout.splitlines()) == 12


def test_other_content_under_a_known_key_is_refused_with_its_place(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "one.jsonl"

    def write(text: str) -> None:
        judgement = {"annotator": "a", "source": "s", "responses": [{"text": text}], "thumbs": {"up": True}}
        file.write_text(json.dumps({"judgement": judgement, "idempotency_key": "k"}))

    write("first")
    assert run.honed("judge", "import", str(file)).exit_code == 0
    write("second")
    refused = run.honed("judge", "import", str(file))
    assert refused.exit_code == 1
    assert "ALREADY_EXISTS: judgements 1 to 1 of the file" in refused.stderr


def test_a_missing_file_is_one_line(run: Run) -> None:
    done = run.honed("judge", "import", "nowhere.jsonl")
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "no file nowhere.jsonl" in done.stderr


def test_an_export_whose_stream_breaks_goes_on_after_the_last() -> None:
    asked = []

    class Breaking:
        """A peer whose stream breaks after two judgements, once."""

        channel = None

        def stream(self, method, request, timeout_s):
            asked.append(request.filter.after_id)
            for number in range(request.filter.after_id + 1, 6):
                if len(asked) == 1 and number == 3:
                    raise RequestError("UNAVAILABLE", "gone")
                yield preference_pb2.ExportJudgementsResponse(judgement=preference_pb2.Judgement(id=number))

    peer = Breaking()
    with mock.patch("honed.v1.preference_pb2_grpc.PreferenceServiceStub"):
        found = list(transfer.download(peer, preference_pb2.JudgementFilter(), "", 5))  # type: ignore[arg-type]
    assert [judgement.id for judgement in found] == [1, 2, 3, 4, 5]
    assert asked == [0, 2]


def test_an_import_rides_out_a_service_that_starts_again(tmp_path: Path) -> None:
    tokens, loop, port = served.make_tokens(tmp_path), served.Loop(), free_port()
    judgement = full("thumbs")
    entries = [Entry(f"k{n}", judgement) for n in range(25)]
    pauses = []

    def start_while_it_waits(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 1:
            loop.serve(served.preference(loop, tmp_path), tokens, port)
        else:
            time.sleep(0.1)  # the channel has not tried to connect again yet

    try:
        token = read_token(tokens / "operator.token")
        with Peer("preference", f"127.0.0.1:{port}", token, environment=Environment(sleep=start_while_it_waits)) as peer:
            answers = [answer.stored for answer, _ in transfer.upload(peer, entries, 60)]
    finally:
        loop.close()
    assert answers == [10, 10, 5]
    assert pauses
