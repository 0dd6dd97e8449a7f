"""How many cores a process may use: what it is bound to, its container's quota, and OMP_NUM_THREADS."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from honed.kit.cores import available_cores


@pytest.fixture(autouse=True)
def _eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),
        ("50000 100000\n", 1),
        ("max 100000\n", 8),
        ("9900000 100000\n", 8),
        ("", 8),
        ("1 0\n", 8),
        ("nonsense", 8),
    ],
)
def test_the_quota_of_a_container_counts_part_cores_as_whole_ones(quota: str, cores: int, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text(quota)

    assert available_cores(tmp_path / "cpu.max") == cores


@pytest.mark.parametrize(("asked", "cores"), [("3", 3), ("64", 8), ("0", 1), ("", 8), ("4,2", 8)])
def test_omp_num_threads_is_an_upper_limit(asked: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", asked)

    assert available_cores(tmp_path / "none") == cores
