"""Renders the page of a report from its template, which extends `base.html`: the head and the style sheet of all reports."""

from __future__ import annotations

from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader

_HERE = "honed.report"


def render(package: str, name: str, **values: Any) -> str:
    """The template `name` of a package, with these values; text among them is escaped."""
    loader = ChoiceLoader([PackageLoader(module, "") for module in (package, _HERE)])
    return Environment(autoescape=True, loader=loader).get_template(name).render(values)
