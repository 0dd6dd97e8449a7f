"""The command line against real servers: what it prints, and with which status it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.integration.client import served
from tests.integration.client.conftest import Run


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_generate_prints_the_text_and_the_version_that_sampled_it(run: Run) -> None:
    done = run.honed("generate", "the film was", "--max-tokens", "2")
    assert (done.exit_code, done.stdout) == (0, "a fine \n")
    assert "version 1.4, 2 tokens" in done.stderr


def test_generate_reads_stdin_and_speaks_json(run: Run) -> None:
    done = run.honed("generate", "-", "--n", "2", "--json", stdin="the film was")
    assert run.generation.requests[0].prompt.text == "the film was"
    one, two = lines(done.stdout)
    assert (one["text"], two["index"], one["logprobs"]) == ("a fine film", 1, [-0.5, -0.5, -0.5])
    assert one["versions"][1] == {"version": "1.5", "run": "demo", "start": 2, "end": 3}


def test_generate_streams(run: Run) -> None:
    done = run.honed("generate", "the film was", "--stream")
    assert done.stdout == "a fine film\n"
    assert "1.4 (tokens 0 to 2), 1.5 (tokens 2 to 3)" in done.stderr


def test_a_refused_request_is_one_line_on_stderr(run: Run) -> None:
    done = run.honed("generate", "x", "--max-tokens", "1000")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("honed: INVALID_ARGUMENT: sampling.max_tokens: is over this server's cap of 128")
    assert "Traceback" not in done.output


def test_an_address_and_its_token_replace_a_run(run: Run) -> None:
    from typer.testing import CliRunner

    from honed.cli.main import app

    where = ["--address", run.addresses["generation"], "--token-file", str(run.application_token)]
    assert CliRunner().invoke(app, ["generate", "x", *where]).stdout == "a fine film\n"


def test_score_prints_each_scorers_value_and_version(run: Run) -> None:
    done = run.honed("score", "--prompt", "the film was", "fine", "dull and long")
    assert "+26.0000" in done.stdout
    assert "length version v1 weight 2" in done.stderr


def test_score_reads_json_lines_beyond_one_request_and_names_a_bad_line(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "responses.jsonl"
    rows = [{"response": "x" * (1 + n % 5), "prompt": "p"} for n in range(300)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run.honed("score", "--file", str(file), "--json")
    assert [row["reward"] for row in lines(done.stdout)] == [2.0 * (1 + n % 5) for n in range(300)]
    rows[290]["response"] = "broken"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    failed = run.honed("score", "--file", str(file))
    assert failed.exit_code == 1
    assert f"{file}, line 291: " in failed.stderr


def test_a_reference_is_sent_with_its_response(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "responses.jsonl"
    file.write_text('{"response": "x", "reference": 42}\n{"response": "xy", "prompt": "p"}\n')
    done = run.honed("score", "--file", str(file), "--reference", "seven", "--json")
    assert [row["reward"] for row in lines(done.stdout)] == [2.0 * (1 + 2), 2.0 * (2 + 5)]
    file.write_text(json.dumps({"response": "x", "reference": "x" * 65_537}) + "\n")
    assert "line 1: reference: has 65537 bytes" in run.honed("score", "--file", str(file)).stderr


def test_status_shows_phase_processes_learner_and_what_serves(run: Run) -> None:
    found = run.honed("status").stdout
    for part in ("ppo, 12%", "7 scored", "killed by SIGKILL", "1280 trained, dropped: 3 stale", "version 1.5 by recorded 1"):
        assert part in found
    assert "the end of the log of reward-model:\nreading [pairs]\nthe loss is NaN\n" in found
    tree = json.loads(run.honed("status", "--json").stdout)
    assert (tree["learner"]["state"], tree["run"]["processes"][0]["restarts"]) == ("training", 1)


def test_status_shows_the_rest_when_one_service_does_not_answer(run: Run) -> None:
    served.announce(run.directory, **{**run.addresses, "learner": "127.0.0.1:1"})
    done = run.honed("status")
    assert done.exit_code == 0
    assert "learner service at 127.0.0.1:1 did not answer" in done.stdout
    assert "version 1.5 by recorded 1" in done.stdout


def test_status_of_a_run_that_is_gone_fails(run: Run) -> None:
    served.announce(run.directory, **dict.fromkeys(run.addresses, "127.0.0.1:1"))
    done = run.honed("status")
    assert done.exit_code == 1
    assert "conductor service at 127.0.0.1:1 did not answer" in done.stderr


def test_versions_are_listed_newest_first_over_all_pages(run: Run) -> None:
    assert "1.250" in run.honed("versions").stdout.splitlines()[1]
    assert len(run.honed("versions", "--limit", "3").stdout.splitlines()) == 4
    listed = lines(run.honed("versions", "--limit", "0", "--json").stdout)
    assert [row["version"] for row in listed] == [f"1.{n}" for n in range(served.VERSIONS, 0, -1)]
    assert listed[0]["parent"] == "1.249"
    assert [row["mark"] for row in listed[:2]] == ["average of 249", ""]
    assert listed[0]["figures"] == {"average_decay": 0.992, "average_updates": 249.0}


def test_generate_shows_the_best_with_its_scores(run: Run) -> None:
    done = run.honed("generate", "the film was", "--best-of", "8", "--scorer", "length")
    assert (done.exit_code, done.stdout) == (0, "a fine film\n")
    assert "candidate 7, reward +3.5000 (length +1.7500)" in done.stderr
    [row] = lines(run.honed("generate", "x", "--best-of", "3", "--json").stdout)
    assert (row["index"], row["reward"], row["scores"][0]["scorer"]) == (2, 1.0, "length")
    assert "reward" not in lines(run.honed("generate", "x", "--json").stdout)[0]


@pytest.mark.parametrize(
    "options", [["--scorer", "length"], ["--best-of", "2", "--stream"], ["--best-of", "2", "--n", "3"]], ids=" ".join
)
def test_options_that_contradict_a_choice_are_wrong_usage(run: Run, options: list[str]) -> None:
    done = run.honed("generate", "x", *options)
    assert done.exit_code == 2
    assert run.generation.requests == []
