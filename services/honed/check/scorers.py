"""Checks what rewards a response: scorers, their models and services, and where responses are cut."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from honed.check.findings import Report
from honed.check.model import BaseModel
from honed.config import RunSettings
from honed.kit.errors import DataLoss, FailedPrecondition, HonedError, InvalidArgument
from honed.models.prompts import read_tokenizer
from honed.reward.settings import ScorerSettings

_REMOTE_S: Final = 5.0


def check_scorers(settings: RunSettings, report: Report) -> None:
    """Finds each scorer, its model or service, and how long it may take."""
    from honed.reward.function_scorer import find_function
    from honed.reward.scorer import check_longest

    if not settings.reward.scorers and settings.samples_rollouts and settings.goes_through("online"):
        report.error(
            "reward.scorers", "names none: training needs a reward; write {name: ..., kind: reward_model, source: trained}"
        )
    longest: dict[str, float] = {}
    for number, scorer in enumerate(settings.reward.scorers):
        where = f"reward.scorers.{number}"
        if scorer.kind == "function":
            try:
                longest[scorer.name] = find_function(scorer.name, scorer.source, scorer.options).longest_s
            except InvalidArgument as error:
                report.error(error.field, error.reason)
            except HonedError as error:
                report.error(f"{where}.source", str(error))
        if scorer.kind == "remote":
            longest[scorer.name] = scorer.remote().deadline_s
            _check_remote(scorer, where, report)
        for key, source in scorer.models:
            if not (_is_artifact(source) or (Path(source) / "config.json").is_file()):
                report.error(
                    f"{where}.{key}", f"{source} is no model directory: name one, or `trained`, or artifact:NAME/VERSION"
                )

    try:
        check_longest(longest.items())
    except InvalidArgument as error:
        report.error(error.field, error.reason)


def _check_remote(scorer: ScorerSettings, where: str, report: Report) -> None:
    """Files are read here; a service that is not there yet may come later."""
    from honed._client.errors import RequestError
    from honed.reward.remote_scorer import RemoteScorer

    options = scorer.remote()
    try:
        there = RemoteScorer(scorer.name, scorer.source, options).scorers(_REMOTE_S)
    except FailedPrecondition as error:
        report.error(scorer.options_field, str(error))
    except RequestError as error:
        report.warning(f"{where}.source", f"{scorer.source} does not list its scorers: {error}")
    else:
        if options.scorer is not None and options.scorer not in there:
            report.error(
                f"{scorer.options_field}.scorer", f"{scorer.source} has no {options.scorer!r}, only {', '.join(there)}"
            )


def check_truncation(settings: RunSettings, report: Report, model: BaseModel | None) -> None:
    """Whether the text is one token. Also in the fast check: the reward service would fail for ever, long after the start."""
    truncate = settings.reward.truncate
    if truncate is None or model is None or model.directory is None:
        return
    try:
        tokenizer = model.tokenizer or read_tokenizer(model.directory)
    except DataLoss:
        return  # a finding of the model's
    ids = tokenizer.encode(truncate.token_text, add_special_tokens=False).ids
    if len(ids) != 1:
        report.error(
            "reward.truncate.token_text",
            f"{truncate.token_text!r} is {len(ids)} tokens of the model; name a text that is a single one",
        )


def _is_artifact(source: str) -> bool:
    return source == "trained" or source.startswith("artifact:")
