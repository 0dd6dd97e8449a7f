"""What `make images` prints and installs, as far as that needs no container tool."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
from scripts import images, locks
from tests.deploy.manifests import DEPLOY

# As docker with BuildKit: it knows an image that it built, and a base once that was pulled.
DOCKER = """#!/bin/sh
echo "$*" >> "$0.calls"
case "$1 $2 $3" in
"info  ") ;;
build*) touch "$0.built" ;;
"pull base:1 ") touch "$0.pulled" ;;
"image inspect base:1") [ -e "$0.pulled" ] && echo '[{"Size": 1000000}]' ;;
"image inspect honed:1") [ -e "$0.built" ] && echo '[{"Size": 201000000}]' ;;
*) exit 1 ;;
esac
"""


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "docker"
    program.write_text(DOCKER)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return program


def printed(base: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", ["images.py", "honed", "--tag", "1", "--base", base, "--tool", "docker"])
    assert images.main() == 0
    return capfd.readouterr().out.strip()


def test_a_base_that_the_tool_does_not_list_is_pulled_once(
    docker: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert printed("base:1", monkeypatch, capfd) == "honed:1  201 MB, 200 MB over its base"
    assert Path(f"{docker}.calls").read_text().count("pull base:1") == 1


@pytest.mark.usefixtures("docker")
def test_a_base_that_is_not_to_be_had_is_said(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert printed("nowhere:1", monkeypatch, capfd) == "honed:1  201 MB, size over its base unknown"


def test_what_a_build_installs_is_pinned_to_one_version_each() -> None:
    assert locks.check() == 0
    build = locks.LOCKS / "build.lock"
    assert set(locks.BUILD_TOOLS) < locks.pins(build).keys()
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][^<>=~*, ]*", line) for line in build.read_text().splitlines())
    script = (locks.ROOT / "scripts" / "image_environment.sh").read_text().replace("\\\n", " ")
    installs = [line for line in script.splitlines() if re.search(r"/pip\".* install ", line)]
    assert len(installs) == 3
    assert all("--no-deps" in line and (" -r " in line or "--no-index" in line) for line in installs), installs
    for file in (DEPLOY / "images").glob("*.Dockerfile"):
        text = file.read_text()
        assert ("image_environment.sh packages" in text) == ("COPY requirements/images/build.lock " in text), file.name


def test_the_page_names_each_image_that_is_pulled() -> None:
    """checkov's check for digests is left out for them, with that page as the reason."""
    page = (DEPLOY / "README.md").read_text()
    names = {
        image.partition(":")[0]
        for file in DEPLOY.rglob("*.yaml")
        for image in re.findall(r"^\s*(?:- )?image: (\S+)", file.read_text(), re.MULTILINE)
        if "/" in image
    }
    assert names
    assert [name for name in sorted(names) if f"`{name}`" not in page] == []
