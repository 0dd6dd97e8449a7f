"""How the number is found in a judge's answer. What is outside of the range is no rating."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, Final

_RATING: Final = re.compile(r"(?<![\w.])([-−]?\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*\d+(?:\.\d+)?)?(?!\w)")
"""A number; of `8/10` and `8 out of 10` the 8."""


class Unparsable(ValueError):
    """The answer holds no rating."""


def last_number(text: str, low: float, high: float) -> float:
    """The last number in a text that is in the range.

    Raises:
        Unparsable: There is none.
    """
    found = [value for match in _RATING.finditer(text) if low <= (value := float(match[1].replace("−", "-"))) <= high]
    if not found:
        raise Unparsable(f"no number from {low:g} to {high:g}")
    return found[-1]


def json_field(text: str, field: str, low: float, high: float) -> float:
    """A field of the last JSON object in a text that has it, as a number or as the text of one.

    Raises:
        Unparsable: There is none in the range.
    """
    decoder, at = json.JSONDecoder(), len(text)
    while (at := text.rfind("{", 0, at)) >= 0:
        try:
            found, _ = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            continue
        if field in found:
            return _in_range(found[field], field, low, high)
    raise Unparsable(f"no JSON object with the field {field!r}")


def expected_value(choice: Mapping[str, Any], low: int, high: int) -> float:
    """The mean of the ratings that the judge could have given, by their probabilities (Liu et al. 2023, "G-Eval").

    Read at the first token that is a rating, over the alternatives there that are one; each is a single digit. Their
    probabilities are divided by their sum.

    Args:
        choice: With `logprobs.content`, each with `top_logprobs`.
        low: The least rating.
        high: The highest.

    Raises:
        Unparsable: No token is a rating.
        LookupError: There are no log-probabilities of tokens.
        TypeError: The same.
    """
    ratings = {str(value): value for value in range(low, high + 1)}
    for position in choice["logprobs"]["content"]:
        if position["token"].strip() not in ratings:
            continue
        mass = total = 0.0
        for other in position["top_logprobs"] or [position]:
            if (text := other["token"].strip()) in ratings:
                share = math.exp(other["logprob"])
                mass += share
                total += share * ratings[text]
        if mass > 0 and math.isfinite(total / mass):
            return total / mass
    raise Unparsable(f"no token that is a number from {low} to {high}")


def _in_range(value: Any, field: str, low: float, high: float) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not low <= number <= high:
        raise Unparsable(f"{field} is {value!r}, no number from {low:g} to {high:g}")
    return number
