r"""Numbers as people and models write them.

- `1,234,567.8`: commas separate thousands, in groups of three. Any other comma separates two
  numbers: `3,14` is 3 and 14.
- `3/4`, `-\frac{3}{4}`, and `\dfrac`, `\tfrac`: fractions, exactly.
- `12%` and `12\%`: a share, see `same_number`.
- `-5`, `−5`, `+5`, `$5`, `-$5`, `.5`, `5.`, `1e-3`. A minus behind a letter or digit is none:
  `10-5` is 10 and 5.

A number of more than 40 digits on a side, or with an exponent of more than 3 digits, is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

import regex

_DIGITS: Final = r"(?:\d{1,3}(?:,\d{3})+(?![\d])|\d{1,40}+)(?:\.\d{0,40}+)?|\.\d{1,40}+"
_NUMBER: Final = regex.compile(
    rf"""(?<![\w.])(?P<sign>[-−+])?\s?(?:\\?[$€£])?(?:
        \\[dt]?frac\s?\{{(?P<over>\s?[-−]?\d{{1,40}}\s?)\}}\{{(?P<under>\s?[-−]?\d{{1,40}}\s?)\}}
        |(?P<value>{_DIGITS})(?:[eE](?P<exponent>[-+]?\d{{1,3}})(?!\d)|(?![eE][-+]?\d))(?:\s?/\s?(?P<divisor>\d{{1,40}}+)(?![\d.,]*\d))?
    )(?P<percent>\s?\\?%)?(?!\d)""",
    regex.VERBOSE | regex.ASCII,  # digits of other scripts are not read: Python knows fewer of them than regex does
)


@dataclass(frozen=True, slots=True)
class Number:
    """A number that stood in a text.

    Attributes:
        value: As it is written, without regard to a percent sign.
        percent: Whether a percent sign follows.
    """

    value: Fraction
    percent: bool = False


def numbers_in(text: str, limit_s: float) -> list[Number]:
    """The numbers of a text, in their order.

    Raises:
        TimeoutError: The search took longer than `limit_s` seconds.
    """
    return [number for match in _NUMBER.finditer(text, timeout=limit_s) if (number := _number(match)) is not None]


def boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}`, whose braces may be nested; None if there is none that is closed."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for at in range(start, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if not depth:
            return text[start:at]
    return None


def same_number(one: Number, other: Number, absolute: float, relative: float) -> bool:
    """Whether two numbers are the same, up to the larger of both tolerances.

    Where only one has a percent sign the other may mean either: 50% is the same as 0.5, and the
    same as 50.

    Args:
        one: A number.
        other: The one that `relative` is relative to.
        absolute: The difference that is allowed.
        relative: The same as a share of `other`.
    """
    if one.percent == other.percent:
        return _near(one.value, other.value, absolute, relative)
    hundredth = Fraction(1, 100)
    return _near(one.value, other.value, absolute, relative) or _near(
        one.value * (hundredth if one.percent else 1), other.value * (hundredth if other.percent else 1), absolute, relative
    )


def _near(one: Fraction, other: Fraction, absolute: float, relative: float) -> bool:
    return abs(one - other) <= max(Fraction(absolute), Fraction(relative) * abs(other))


def _number(match: Any) -> Number | None:
    sign = -1 if match["sign"] in ("-", "−") else 1
    if match["over"] is not None:
        over, under = (int(match[side].replace("−", "-")) for side in ("over", "under"))
    else:
        over, under = 1, int(match["divisor"] or 1)
    if not under:
        return None
    value = Fraction(over, under)
    if match["value"] is not None:
        digits = match["value"].replace(",", "")
        value *= Fraction(("0" + digits) if digits.startswith(".") else digits.rstrip("."))
        value *= Fraction(10) ** int(match["exponent"] or 0)
    return Number(sign * value, match["percent"] is not None)
