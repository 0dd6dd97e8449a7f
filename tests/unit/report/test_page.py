"""The reports' pages: whole, of one style, and safe with what a model says."""

from __future__ import annotations

from pathlib import Path

import pytest

from honed.conductor.sampling import Continuation
from honed.demo.measures import Figures
from honed.demo.report import write_report as write_demo_report
from honed.report.page import RunReport, SampleRow, write_report
from honed.v1 import learner_pb2

UPDATES = [learner_pb2.StepMetrics(step=step, values={"score_mean": step / 3, "kl": 0.1}) for step in (1, 2)]


def run_page(directory: Path) -> str:
    report = RunReport(run="shop", outcome="finished", samples=[SampleRow("a <b>", "</td>", "fine", 0.5, 1.25)])
    write_report(directory / "report.json", directory / "report.html", report, UPDATES, [12.0])
    return (directory / "report.html").read_text(encoding="utf-8")


def demo_page(directory: Path) -> str:
    figures = Figures(
        rm_agreement=0.74, judge_before=0.1, judge_after=1.5, kl_mean_nats=7.0, distinct2_ratio=0.7, versions_pushed=40,
        push_pause_p95_ms=95.0, requests_failed=0, learner_busy=0.9, generator_busy=0.6, staleness_mean=1.0, staleness_max=2,
        rollouts_produced=10, rollouts_trained=8, rollouts_dropped={"stale": 2}, seconds_total=700.0,
    )  # fmt: skip
    before, after = (Continuation("a <b>", text, (1,), (2,), (-0.5,), "1.0") for text in ("</td>", "fine"))
    write_demo_report(directory, figures, UPDATES, [learner_pb2.Push(pauses_seconds=[0.012])], [before], [after])
    return (directory / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("page", "title"), [(run_page, "honed: the run shop"), (demo_page, "honed: what the run changed")])
def test_a_report_is_one_whole_page_with_the_common_style(page, title: str, tmp_path: Path) -> None:
    text = page(tmp_path)
    assert text.startswith("<!doctype html>")
    assert text.rstrip().endswith("</html>")
    assert f"<title>{title}</title>" in text
    assert ".verdict.bad" in text
    assert text.count("<svg") >= 2
    assert "a &lt;b&gt;" in text
    assert "&lt;/td&gt;" in text


def test_both_reports_have_the_same_head(tmp_path: Path) -> None:
    heads = [page(tmp_path).partition("</head>")[0].partition("<style>")[2] for page in (run_page, demo_page)]
    assert heads[0] == heads[1] != ""


@pytest.mark.parametrize("kl", [None, 3.5])
def test_a_run_without_a_price_on_the_kl_shows_none(kl: float | None, tmp_path: Path) -> None:
    report = RunReport(run="shop", outcome="finished", kl=kl)
    write_report(tmp_path / "report.json", tmp_path / "report.html", report, [], [])
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert ("KL to the base" in text) is ("3.5 nats" in text) is (kl is not None)
