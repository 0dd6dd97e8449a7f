"""All checks of a run file, in one report."""

from __future__ import annotations

from collections.abc import Callable

from honed.check.data import DataCheck
from honed.check.findings import Report
from honed.check.machine import check_machine
from honed.check.model import check_body, check_model
from honed.check.scorers import check_scorers, check_truncation
from honed.check.surroundings import check_surroundings
from honed.config import RunSettings


def check_run(settings: RunSettings, advance: Callable[[int], None] = lambda _: None, *, fast: bool = False) -> Report:
    """Checks model, data, machine and surroundings, and collects everything that is wrong.

    Args:
        settings: the run's.
        advance: called with the bytes of data that were read.
        fast: what takes a second or two: the first lines of each file, no tokenisation, no import of transformers.
    """
    report = Report()
    model = check_model(settings, report, fast=fast)
    body = check_body(settings, report, fast=fast)
    DataCheck(settings, report, model, advance, fast=fast).run()
    check_machine(settings, report, model, body)
    check_surroundings(settings, report)
    check_scorers(settings, report)
    check_truncation(settings, report, model)
    return report
