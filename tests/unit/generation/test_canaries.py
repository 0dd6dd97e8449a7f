"""Claims about what canaries prove."""

from __future__ import annotations

import math
import random

import pytest

from honed.artifacts.manifest import Canary, Manifest, TensorEntry
from honed.artifacts.version import VersionId
from honed.generation.canaries import Measured, check_tolerance, default_tolerance, tell_apart
from honed.kit.errors import Aborted

OLD, NEW = VersionId(1, 1), VersionId(1, 2)
LENGTH = 24
TEXTS = [tuple(range(at, at + LENGTH)) for at in (0, 100)]


def recorded(version: VersionId, shift: float, dtype: str = "F32") -> Manifest:
    """What the learner says: every value moves by `shift` nats from one version to the next, up or down."""
    chance = random.Random(3)
    values = [-5.0 + chance.choice((-shift, shift)) * (version == NEW) for _ in range(2 * (LENGTH - 1))]
    halves = values[: LENGTH - 1], values[LENGTH - 1 :]
    canaries = tuple(Canary(text, 1, tuple(half)) for text, half in zip(TEXTS, halves, strict=True))
    return Manifest("test", version, (), (TensorEntry("w", dtype, (1,), "m.safetensors"),), canaries, "0" * 64)


def measure(manifest: Manifest, loaded: Manifest, noise: float, seed: int) -> Measured:
    """What an engine says that has loaded `loaded`, when asked for the canaries of `manifest`."""
    chance = random.Random(seed)
    values = [[value + chance.gauss(0.0, noise) for value in canary.logprobs] for canary in loaded.canaries]
    return Measured.of(manifest, values)


@pytest.mark.parametrize(("shift", "noise"), [(0.05, 1e-5), (1e-3, 1e-5), (0.06, 0.03), (0.03, 0.01)])
def test_the_right_weights_pass_and_those_of_the_version_before_do_not(shift: float, noise: float) -> None:
    old, new = recorded(OLD, shift), recorded(NEW, shift)
    before = measure(old, old, noise, 1)
    assert tell_apart(measure(new, new, noise, 2), before) is True
    stale = measure(new, old, noise, 2)
    check_tolerance(stale, 0.2)  # alone it would pass
    with pytest.raises(Aborted, match=r"fit 1\.1 better"):
        tell_apart(stale, before)


def test_a_load_that_changed_nothing_is_refused_however_small_the_step() -> None:
    old, new = recorded(OLD, 2e-4), recorded(NEW, 2e-4)
    before = measure(old, old, 0.03, 1)
    with pytest.raises(Aborted, match="changed nothing"):
        tell_apart(Measured(new, before.logprobs), before)


def test_a_step_too_small_for_the_canaries_is_reported_and_not_refused() -> None:
    old, new = recorded(OLD, 2e-3), recorded(NEW, 2e-3)
    before = measure(old, old, 0.03, 1)
    for loaded in (old, new):
        assert tell_apart(measure(new, loaded, 0.03, 2), before) is False


def test_the_same_weights_under_a_new_name_pass() -> None:
    old, new = recorded(OLD, 0.0), recorded(NEW, 0.0)
    before = measure(old, old, 0.01, 1)
    assert tell_apart(Measured(new, before.logprobs), before) is False


def test_the_right_weights_are_hardly_ever_refused() -> None:
    refused = 0
    for seed in range(2000):
        shift = 0.03 * random.Random(seed).random()
        old, new = recorded(OLD, shift), recorded(NEW, shift)
        try:
            tell_apart(measure(new, new, 0.03, 2 * seed), measure(old, old, 0.03, 2 * seed + 1))
        except Aborted:
            refused += 1
    assert refused == 0


def test_versions_without_a_common_text_are_not_compared() -> None:
    old, new = recorded(OLD, 0.1), recorded(NEW, 0.1)
    moved = tuple(Canary(tuple(t + 1 for t in c.token_ids), c.start, c.logprobs) for c in old.canaries)
    elsewhere = Manifest("test", OLD, (), (), moved, "0" * 64)
    assert tell_apart(measure(new, new, 0.0, 1), measure(elsewhere, elsewhere, 0.0, 1)) is None


def test_only_the_continuation_counts() -> None:
    canary = Canary((1, 2, 3, 4), 3, (-1.0,))
    manifest = Manifest("test", NEW, (), (), (canary,), "0" * 64)
    assert Measured.of(manifest, [[-9.0, -9.0, -1.25]]).max_error == 0.25


@pytest.mark.parametrize("value", [math.nan, -math.inf, -1.2])
def test_a_value_that_is_off_or_no_number_is_refused(value: float) -> None:
    manifest = Manifest("test", NEW, (), (), (Canary((1, 2), 1, (-1.0,)),), "0" * 64)
    with pytest.raises(Aborted, match=r"version 1\.2 are off by"):
        check_tolerance(Measured(manifest, ((value,),)), 0.1)


def test_the_default_tolerance_is_that_of_the_coarser_type() -> None:
    assert default_tolerance("float32", recorded(NEW, 0.1)) == 1e-3
    assert default_tolerance("bfloat16", recorded(NEW, 0.1)) == 0.1
    assert default_tolerance("float32", recorded(NEW, 0.1, "BF16")) == 0.1
    assert default_tolerance("auto", recorded(NEW, 0.1, "F16")) == 0.03
