"""Builds the container images of deploy/images with whichever of docker, podman and buildah is there, and prints their sizes.

Examples:
    make images
    make images IMAGES='honed reward' REGISTRY=registry.example.com/team TAG=1.2
    make images BASE=localhost/base TOOL=buildah BUILD_OPTIONS='--isolation chroot --network host'
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "deploy" / "images"
TOOLS = ("docker", "podman", "buildah")


@dataclass(frozen=True)
class Image:
    """One image.

    Attributes:
        file: its Dockerfile under deploy/images, without the suffix.
        arguments: build arguments.
        default: whether it is built when nobody names images: those for GPUs take gigabytes.
    """

    file: str
    arguments: dict[str, str] = field(default_factory=dict)
    default: bool = True


KNOWN = {
    "honed": Image("honed"),
    "honed-reward": Image("reward"),
    "honed-learner-cpu": Image("learner", {"DEVICE": "cpu"}),
    "honed-generation-cpu": Image("generation", {"DEVICE": "cpu"}),
    "honed-demo-data": Image("demo-data"),
    "honed-redis": Image("redis"),
    "honed-learner-cuda": Image("learner", {"DEVICE": "cuda"}, default=False),
    "honed-generation-cuda": Image("generation", {"DEVICE": "cuda"}, default=False),
}


def find_tool(wanted: str | None) -> str:
    """The tool to build with: the first that is installed and answers. docker is a client only until its daemon does.

    Raises:
        SystemExit: there is none.
    """
    for tool in [wanted] if wanted else TOOLS:
        if shutil.which(tool) is None:
            continue
        probe = [tool, "info"] if tool != "buildah" else [tool, "--version"]
        if subprocess.run(probe, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60).returncode == 0:
            return tool
    raise SystemExit(
        f"{wanted + ' cannot' if wanted else 'none of ' + ', '.join(TOOLS) + ' can'} build here: install one "
        "(Debian: apt-get install buildah), or start docker's daemon"
    )


def build(tool: str, name: str, reference: str, options: argparse.Namespace) -> None:
    """Builds one image; ends the program when that fails."""
    image = KNOWN[name]
    arguments = {**image.arguments, **({"BASE": options.base} if options.base else {})}
    # Not in the Dockerfile: buildah takes a layer with a label for cached, whatever the arguments in it were.
    labels = {"version": version(), "revision": revision(), "base.name": options.base or pinned_base(name)}
    command = [tool, *options.tool_options, "bud" if tool == "buildah" else "build", "-t", reference]
    command += ["-f", str(IMAGES / f"{image.file}.Dockerfile")]
    for key, value in arguments.items():
        command += ["--build-arg", f"{key}={value}"]
    for key, value in labels.items():
        command += ["--label", f"org.opencontainers.image.{key}={value}"]
    command += [*options.build_options, str(ROOT)]
    print(f"building {reference}: {shlex.join(command)}", file=sys.stderr, flush=True)
    started = time.monotonic()
    if subprocess.run(command, stdout=sys.stderr).returncode != 0:
        raise SystemExit(f"{reference} was not built; the reason is above")
    print(f"{reference}: built in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def pinned_base(name: str) -> str:
    """What an image stands on when nobody names another base."""
    lines = (IMAGES / f"{KNOWN[name].file}.Dockerfile").read_text().splitlines()
    return next(line.removeprefix("ARG BASE=") for line in lines if line.startswith("ARG BASE="))


def base_size(tool: str, reference: str, tool_options: Sequence[str] = ()) -> int | None:
    """Bytes of a base image; None if it is not to be had.

    BuildKit keeps the bases of what it builds in its own cache, where docker does not list them: such a base is pulled.
    """
    found = size(tool, reference, tool_options)
    if found is None and subprocess.run([tool, *tool_options, "pull", reference], stdout=sys.stderr).returncode == 0:
        found = size(tool, reference, tool_options)
    return found


def size(tool: str, reference: str, tool_options: Sequence[str] = ()) -> int | None:
    """Bytes of an image with its base; None if the tool does not know it."""
    if tool == "buildah":
        command = [tool, *tool_options, "images", "--json", reference]
    else:
        command = [tool, *tool_options, "image", "inspect", reference]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode != 0 or not (images := json.loads(found.stdout or "[]")):
        return None
    value = images[0].get("Size", images[0].get("size"))
    return value if isinstance(value, int) else _bytes(str(value))


def _bytes(text: str) -> int:
    """`123 MB` as a number: buildah prints sizes for people."""
    number, _, unit = text.partition(" ")
    return int(float(number) * {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9}[unit.strip().upper()])


def version() -> str:
    """The version in pyproject.toml."""
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    return next(line.split('"')[1] for line in lines if line.startswith("version = "))


def revision() -> str:
    """The commit, marked where files differ from it."""
    found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def main() -> int:
    """Builds, and prints one line an image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", help=f"Which: {', '.join(KNOWN)}. Default: those that need no GPU.")
    parser.add_argument("--registry", default="", help="What stands before the names, for example registry.example.com/team.")
    parser.add_argument("--tag", default=version())
    parser.add_argument("--base", default="", help="Base image in place of the pinned Python one.")
    parser.add_argument("--tool", choices=TOOLS, help="Default: the first that works.")
    parser.add_argument("--tool-options", default=[], type=shlex.split, help="For the tool, before its command.")
    parser.add_argument("--build-options", default=[], type=shlex.split, help="For its build command.")
    options = parser.parse_args()
    names = options.images or [name for name, image in KNOWN.items() if image.default]
    if unknown := [name for name in names if name not in KNOWN]:
        parser.error(f"no image {unknown[0]!r}: there are {', '.join(KNOWN)}")
    tool = find_tool(options.tool)
    prefix = f"{options.registry.rstrip('/')}/" if options.registry else ""
    references = [f"{prefix}{name}:{options.tag}" for name in names]
    for name, reference in zip(names, references, strict=True):
        build(tool, name, reference, options)
    for name, reference in zip(names, references, strict=True):
        base = base_size(tool, options.base or pinned_base(name), options.tool_options)
        found = size(tool, reference, options.tool_options)
        over = "size over its base unknown" if found is None or base is None else f"{(found - base) / 1e6:.0f} MB over its base"
        print(f"{reference}  {'size unknown' if found is None else f'{found / 1e6:.0f} MB'}, {over}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
