"""Checks a local copy of a version against its manifest."""

from __future__ import annotations

from pathlib import Path

from honed.artifacts.files import hash_file
from honed.artifacts.manifest import FileEntry, Manifest
from honed.artifacts.names import MANIFEST_NAME
from honed.artifacts.tensors import read_tensor_entries
from honed.kit.errors import DataLoss


def verify_directory(directory: Path) -> Manifest:
    """Checks each byte of a fetched version against its manifest.

    Raises:
        DataLoss: If anything is missing, damaged, or not listed.
        FailedPrecondition: If this build cannot read the manifest.
    """
    try:
        manifest = Manifest.from_bytes((directory / MANIFEST_NAME).read_bytes())
        for entry in manifest.files:
            compare(f"{directory.name}/{entry.path}", entry, *hash_file(directory / entry.path))
    except FileNotFoundError as error:
        raise DataLoss(f"{error.filename} is missing") from error
    listed = {entry.path for entry in manifest.files} | {MANIFEST_NAME}
    extra = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()} - listed
    if extra:
        raise DataLoss(f"{directory / min(extra)} is not in the manifest")
    check_tensors(directory, manifest)
    return manifest


def compare(what: str, entry: FileEntry, size: int, sha256: str) -> None:
    """Compares a file's size and digest with its entry; raises DataLoss that begins with `what`."""
    if size != entry.bytes:
        raise DataLoss(f"{what}: {size} bytes, the manifest says {entry.bytes}")
    if sha256 != entry.sha256:
        raise DataLoss(f"{what}: sha256 {sha256}, the manifest says {entry.sha256}")


def check_tensors(directory: Path, manifest: Manifest) -> None:
    """Compares the tensors that the safetensors files of a directory hold with the manifest; raises DataLoss."""
    found = [
        tensor
        for entry in manifest.files
        if entry.path.endswith(".safetensors")
        for tensor in read_tensor_entries(directory / entry.path, entry.path)
    ]
    if tuple(found) != manifest.tensors:
        raise DataLoss(f"version {manifest.version}: the safetensors files hold other tensors than the manifest lists")
