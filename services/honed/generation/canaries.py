"""What canaries prove: that the weights which an engine has loaded are a version's, and not those that served before.

A version's manifest has the log-probabilities that the learner read with it. The engine reads the
same texts with what it has loaded. Every value must agree within a tolerance; that alone does not
tell two versions apart whose values differ by less, as one small step does in bfloat16. So the
values are also held against those of the version before, as recorded (do they fit it better?) and
as this engine measured them (are they the same to the last bit, as after a load that did nothing?).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from honed.artifacts.manifest import Canary, Manifest
from honed.kit.errors import Aborted

_TOLERANCE = {"float32": 1e-3, "float16": 0.03, "bfloat16": 0.1}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SAME = 1e-4
"""Recorded values that differ by more, nats (root mean square), come from weights that no engine gives equal values for."""
_SURE = 8.0
"""How many standard deviations of the noise two versions must lie apart to be told apart: an error of 1 in 30,000."""
_LEAST_NOISE = 1e-5


@dataclass(frozen=True, slots=True)
class Measured:
    """What an engine said of a version's canaries: `logprobs[i]` for the continuation of `manifest.canaries[i]`."""

    manifest: Manifest
    logprobs: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, manifest: Manifest, prompts: Sequence[Sequence[float]]) -> Measured:
        """Cuts out of each whole text's values (its tokens but the first) those of the continuation."""
        pairs = zip(prompts, manifest.canaries, strict=True)
        return cls(manifest, tuple(tuple(values[canary.start - 1 :]) for values, canary in pairs))

    @property
    def max_error(self) -> float:
        """The largest difference from what the learner recorded, nats; infinite if a value is no number."""
        pairs = zip(self.logprobs, self.manifest.canaries, strict=True)
        errors = [abs(a - b) for values, canary in pairs for a, b in zip(values, canary.logprobs, strict=True)]
        return math.inf if any(math.isnan(error) for error in errors) else max(errors)


def default_tolerance(dtype: str, manifest: Manifest) -> float:
    """The tolerance in nats where none is set: that of the coarser of the engine's type and the types of the files."""
    kinds = {_DTYPES.get(tensor.dtype, dtype) for tensor in manifest.tensors} | {dtype}
    return max(_TOLERANCE.get(kind, _TOLERANCE["float32"]) for kind in kinds)


def check_tolerance(measured: Measured, tolerance: float) -> None:
    """Raises Aborted if a value is farther off than `tolerance` nats."""
    error = measured.max_error
    if not error <= tolerance:
        raise Aborted(
            f"the canaries of version {measured.manifest.version} are off by {error:.3g} nats; at most {tolerance:g} is "
            "allowed: the loaded weights are not the learner's"
        )


def tell_apart(now: Measured, before: Measured) -> bool | None:
    """Checks that `now` was measured on its own version's weights and not on those of `before`.

    Returns:
        Whether the canaries can tell the two versions apart; None if they have no text in common.

    Raises:
        Aborted: If they can, and what was measured is the version before.
    """
    pairs = _common(now, before)
    if not pairs:
        return None
    apart = _rms(new - old for new, old, _, _ in pairs)
    if apart > _SAME and all(value == earlier for _, _, value, earlier in pairs):
        raise Aborted(
            f"every canary of version {now.manifest.version} reads as it did with {before.manifest.version}, to the last bit, "
            f"though the learner's values differ by {apart:.3g} nats: the load changed nothing"
        )
    own = _rms(value - new for new, _, value, _ in pairs)
    other = _rms(value - old for _, old, value, _ in pairs)
    # Whichever version the weights are, the better fit is off by noise alone. A shift of `apart` in each of n values is
    # taken for the other version with the probability that noise along it exceeds half its length.
    distance = apart * math.sqrt(len(pairs)) / 2
    if distance < _SURE / 2 * max(min(own, other), _LEAST_NOISE):
        return False
    if other < own:
        raise Aborted(
            f"the canaries of version {now.manifest.version} fit {before.manifest.version} better (off by {other:.3g} nats, "
            f"its own by {own:.3g}): the loaded weights are those of the version before"
        )
    return True


def _common(now: Measured, before: Measured) -> list[tuple[float, float, float, float]]:
    """For each token of the common texts: recorded of the new and of the old version, measured now and before."""
    earlier: dict[tuple[tuple[int, ...], int], tuple[Canary, tuple[float, ...]]] = {
        (canary.token_ids, canary.start): (canary, values)
        for canary, values in zip(before.manifest.canaries, before.logprobs, strict=True)
    }
    rows: list[tuple[float, float, float, float]] = []
    for canary, values in zip(now.manifest.canaries, now.logprobs, strict=True):
        found = earlier.get((canary.token_ids, canary.start))
        if found is not None:
            rows.extend(zip(canary.logprobs, found[0].logprobs, values, found[1], strict=True))
    return rows


def _rms(values: Iterable[float]) -> float:
    squares = [value * value for value in values]
    return math.sqrt(math.fsum(squares) / len(squares))
