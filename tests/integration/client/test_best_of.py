"""`honed data best-of` against real servers: what it writes, how it goes on, and when it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.integration.client.conftest import Run

from honed.kit.errors import FailedPrecondition, InvalidArgument
from honed.models.prompt_rows import check_row, row_response

FEW = [{"text": "the film is", "id": 7}, {"text": "the end", "reference": "sad"}, {"text": "the film is"}]
CONVERSATION = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write(tmp_path / "prompts.jsonl", FEW)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def make(run: Run, prompts: Path, *options: str, scorer: str = "length") -> Any:
    out = str(prompts.with_name("answers.jsonl"))
    named = ["--scorer", scorer] if scorer else []
    return run.honed("data", "best-of", str(prompts), "--out", out, "--candidates", "4", *named, *options)


def test_the_best_becomes_a_demonstration_and_goes_against_the_worst(run: Run, prompts: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    done = make(run, prompts, "--comparisons", str(pairs), "--seed", "100", "--temperature", "0.7")
    assert done.exit_code == 0, done.output
    assert done.stdout == "3 written, 3 comparisons, 0 there already, 0 failed, mean score +0.7500\n"
    rows = read(tmp_path / "answers.jsonl")
    assert sorted(row["text"] for row in rows) == ["the end", "the film is", "the film is"]
    assert {row.get("id") for row in rows} == {7, None}, "what else a line says is kept"
    for row in rows:
        assert (check_row(row), row_response(row)) == ("text", "a fine film"), "it is what data.demonstrations reads"
        assert (row["score"], row["reward"], row["candidates"], row["scorer"]) == (0.75, 1.5, 4, "length")
        assert (row["candidate"], row["versions"]) == (3, ["1.4", "1.5"])
    asked = {(r.prompt.text, r.prompt.reference, r.sampling.seed, r.best_of.candidates) for r in run.generation.requests}
    assert asked == {("the film is", "", 100, 4), ("the end", "sad", 104, 4), ("the film is", "", 108, 4)}
    judged = read(pairs)[0]["judgement"]
    assert (judged["annotator"], judged["source"], judged["labels"]["scores"]) == ("length", "best-of-n", "0.75 > 0")
    assert run.honed("judge", "import", str(pairs)).stdout.startswith("3 stored")
    stats = json.loads(run.honed("judge", "stats", "--source", "best-of-n", "--json").stdout)
    assert stats["by_kind"] == {"pairwise": 3}


def test_what_is_there_is_not_asked_for_again(run: Run, prompts: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    assert make(run, prompts, "--comparisons", str(pairs)).exit_code == 0
    answers = tmp_path / "answers.jsonl"
    # The end of a process that was killed: one demonstration is cut, and its comparison is there.
    whole = answers.read_bytes()
    answers.write_bytes(whole[:-20])
    before = len(run.generation.requests)
    done = make(run, prompts, "--comparisons", str(pairs))
    assert done.stdout.startswith("1 written"), done.output
    assert "2 there already" in done.stdout
    assert len(run.generation.requests) == before + 1
    assert sorted(row["text"] for row in read(answers)) == ["the end", "the film is", "the film is"]
    assert len(read(pairs)) == 3


def test_of_equal_prompts_the_one_that_failed_is_asked_again(run: Run, tmp_path: Path) -> None:
    prompts = write(tmp_path / "prompts.jsonl", [{"text": "the film is"}] * 3)
    options = ("--concurrency", "1", "--seed", "0", "--comparisons", str(tmp_path / "pairs.jsonl"))
    run.generation.failures = [InvalidArgument("prompt", "not now")]
    assert make(run, prompts, *options).exit_code == 1
    assert make(run, prompts, *options).exit_code == 0
    assert [request.sampling.seed for request in run.generation.requests] == [0, 4, 8, 0]
    assert len(read(tmp_path / "pairs.jsonl")) == 3


def test_other_candidates_or_another_scorer_do_not_go_into_the_same_file(run: Run, prompts: Path) -> None:
    assert make(run, prompts).exit_code == 0
    done = make(run, prompts, scorer="")
    assert done.exit_code == 1
    assert "answers.jsonl, line 1: made by the best of 4 by length: ask for the same, or name another file" in done.stderr
    done = run.honed("data", "best-of", str(prompts), "--out", str(prompts))
    assert (done.exit_code, "line 1: no line of this command: name another file" in done.stderr) == (1, True), done.stderr


def test_a_prompt_that_fails_is_told_of_counted_and_asked_again(run: Run, prompts: Path) -> None:
    run.generation.failures = [InvalidArgument("prompt", "is too long")]
    done = make(run, prompts, "--concurrency", "1", "--json")
    assert done.exit_code == 1
    assert "prompts.jsonl, line 1: INVALID_ARGUMENT: prompt: is too long" in done.stderr
    assert json.loads(done.stdout) == {"written": 2, "there": 0, "failed": 1, "comparisons": 0, "mean_score": 0.75}
    done = make(run, prompts)
    assert (done.exit_code, done.stdout) == (0, "1 written, 2 there already, 0 failed, mean score +0.7500\n")


def test_too_many_failures_in_a_row_end_the_job(run: Run, prompts: Path) -> None:
    run.generation.failures = [InvalidArgument("prompt", "is too long") for _ in range(3)]
    done = make(run, prompts, "--concurrency", "1", "--give-up-after", "2")
    assert done.exit_code == 1
    assert "2 prompts failed one after another, the last at" in done.stderr
    assert len(run.generation.requests) == 2


@pytest.mark.parametrize(
    "error", [FailedPrecondition("this run has no scorers"), InvalidArgument("best_of.scorer", "there is no scorer 'x'")]
)
def test_what_every_prompt_would_meet_ends_the_job_at_once(run: Run, prompts: Path, error: Exception) -> None:
    run.generation.failures = [error]
    done = make(run, prompts, "--concurrency", "1")
    assert done.exit_code == 1
    assert str(error) in done.stderr
    assert len(run.generation.requests) == 1


def test_a_broken_line_is_named_before_anything_is_asked(run: Run, tmp_path: Path) -> None:
    done = make(run, write(tmp_path / "prompts.jsonl", [*FEW, {"prompt": "no"}]))
    assert done.exit_code == 1
    assert "prompts.jsonl, line 4" in done.stderr
    assert run.generation.requests == []


def test_a_conversation_makes_a_demonstration_and_no_comparison(run: Run, tmp_path: Path) -> None:
    prompts = write(tmp_path / "prompts.jsonl", [CONVERSATION])
    assert make(run, prompts).exit_code == 0
    assert run.generation.requests[0].prompt.messages.messages[0].content == "hello"
    assert read(tmp_path / "answers.jsonl")[0]["messages"] == CONVERSATION["messages"]
    done = make(run, prompts, "--comparisons", str(tmp_path / "pairs.jsonl"))
    assert done.exit_code == 1
    assert "line 1: messages: comparisons keep their prompt as text" in done.stderr


def test_a_cluster_may_be_asked_and_the_other_data_commands_talk_to_none() -> None:
    from typer.testing import CliRunner

    from honed.cli.main import app

    refused = CliRunner().invoke(app, ["--cluster=here/there", "data", "fetch"])
    assert (refused.exit_code, "talks to no cluster" in refused.output) == (2, True)
