"""What an alert's expression yields for series that a test makes up: as much of PromQL as the alerts are written in."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

import promql_parser

Labels = frozenset[tuple[str, str]]
Vector = dict[Labels, float]
Samples = Mapping[str, float]
"""Values by series, `name{label="value"}`; for a series that an expression reads over a window, its change in it."""

_OPERATORS: Final[dict[str, Callable[[float, float], float]]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv,
    ">": operator.gt, "<": operator.lt, "==": operator.eq, "!=": operator.ne, ">=": operator.ge, "<=": operator.le,
}  # fmt: skip
_COMPARISONS: Final = {">", "<", "==", "!=", ">=", "<="}
_AGGREGATIONS: Final[dict[str, Callable[[list[float]], float]]] = {"max": max, "min": min, "sum": sum, "count": len}
_MATCHES: Final[dict[str, Callable[[str, str], bool]]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "=~": lambda held, pattern: re.fullmatch(pattern, held) is not None,
    "!~": lambda held, pattern: re.fullmatch(pattern, held) is None,
}


def evaluate(expression: str, samples: Samples, now: float = 0.0) -> Vector:
    """The series that the expression yields; an alert is raised for each.

    Raises:
        NotImplementedError: The expression uses what is not understood here.
    """
    found = _Evaluation({_parsed(series): value for series, value in samples.items()}, now).value(
        promql_parser.parse(expression)
    )
    assert isinstance(found, dict)
    return found


def _parsed(series: str) -> tuple[str, Labels]:
    selector = promql_parser.parse(series)
    assert isinstance(selector, promql_parser.VectorSelector)
    return str(selector.name), frozenset((matcher.name, matcher.value) for matcher in selector.matchers.matchers)


class _Evaluation:
    def __init__(self, samples: Mapping[tuple[str, Labels], float], now: float) -> None:
        self._samples, self._now = samples, now

    def value(self, node: Any) -> Vector | float:
        match type(node).__name__:
            case "NumberLiteral":
                return float(node.val)
            case "ParenExpr":
                return self.value(node.expr)
            case "VectorSelector":
                return self._selected(node)
            case "AggregateExpr":
                return self._aggregated(node)
            case "BinaryExpr":
                return self._combined(node)
            case "Call" if node.func.name == "time":
                return self._now
            case "Call" if node.func.name == "max_over_time":
                return self._selected(node.args[0].vector_selector)
            case "Call" if node.func.name == "min_over_time":  # a test gives the change in the window: it began at 0
                return dict.fromkeys(self._selected(node.args[0].vector_selector), 0.0)
            case "Call" if node.func.name == "absent":
                return {} if self.value(node.args[0]) else {frozenset(): 1.0}
            case other:
                raise NotImplementedError(f"{other}: {node}")

    def _selected(self, node: Any) -> Vector:
        def fits(labels: Labels) -> bool:
            held = dict(labels)
            return all(_MATCHES[_operator(m)](held.get(m.name, ""), m.value) for m in node.matchers.matchers)

        return {labels: value for (name, labels), value in self._samples.items() if name == node.name and fits(labels)}

    def _aggregated(self, node: Any) -> Vector:
        kept, groups = _names("by", node.modifier), dict[Labels, list[float]]()
        inner = self.value(node.expr)
        assert isinstance(inner, dict)
        for labels, value in inner.items():
            groups.setdefault(_only(labels, kept or set()), []).append(value)
        return {labels: _AGGREGATIONS[str(node.op)](values) for labels, values in groups.items()}

    def _combined(self, node: Any) -> Vector | float:
        left, right, kind, on = self.value(node.lhs), self.value(node.rhs), str(node.op), _names("on", node.modifier)
        if isinstance(left, dict) and isinstance(right, dict):
            there = {_only(labels, on): value for labels, value in right.items()}
            match kind:
                case "and":
                    return {labels: value for labels, value in left.items() if _only(labels, on) in there}
                case "unless":
                    return {labels: value for labels, value in left.items() if _only(labels, on) not in there}
                case "or":
                    here = {_only(labels, on) for labels in left}
                    return left | {labels: value for labels, value in right.items() if _only(labels, on) not in here}
            pairs = {labels: (value, there[_only(labels, on)]) for labels, value in left.items() if _only(labels, on) in there}
        elif isinstance(left, dict):
            assert isinstance(right, float)
            pairs = {labels: (value, right) for labels, value in left.items()}
        elif isinstance(right, dict):
            pairs = {labels: (left, value) for labels, value in right.items()}
        else:
            return _OPERATORS[kind](left, right)
        found = {labels: (_OPERATORS[kind](*pair), pair) for labels, pair in pairs.items()}
        if kind in _COMPARISONS:  # they leave out what does not hold, and keep the left value
            side = 0 if isinstance(left, dict) else 1
            return {labels: pair[side] for labels, (holds, pair) in found.items() if holds}
        return {labels: value for labels, (value, _) in found.items()}


def _operator(matcher: Any) -> str:
    found = {"Equal": "=", "NotEqual": "!=", "Re": "=~", "NotRe": "!~"}
    return found[str(matcher.op).rpartition(".")[2]]


def _names(word: str, modifier: object) -> set[str] | None:
    """The labels of `by (...)` or `on (...)`; None without one."""
    found = re.search(rf"\b{word} \(([^)]*)\)", str(modifier))
    return None if found is None else {name.strip() for name in found[1].split(",")}


def _only(labels: Labels, names: set[str] | None) -> Labels:
    return labels if names is None else frozenset((name, value) for name, value in labels if name in names)
