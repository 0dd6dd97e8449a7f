"""The two kinds of storage under a store: a local directory, durable against power loss, and any fsspec file system."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import fsspec

from honed.artifacts.calls import StoreCalls
from honed.kit.errors import DataLoss, HonedError, InvalidArgument, Overloaded, Unavailable

CHUNK_BYTES = 8 << 20

T = TypeVar("T")


class StoreFull(Overloaded):
    """There is no room for a version."""

    def __init__(self, path: str, needed: int) -> None:
        """`needed` counts the bytes of the whole version."""
        super().__init__(f"{path}: no space left; the version needs {needed} bytes. Free space or keep fewer versions", 30.0)
        self.path = path
        self.needed = needed

    @staticmethod
    def matches(error: OSError) -> bool:
        """Whether `error` says that a disk or a quota is full."""
        return error.errno in {errno.ENOSPC, errno.EDQUOT}


class Backend(Protocol):
    """The file operations that a store needs. Paths are absolute in the backend's own form."""

    def join(self, *parts: str) -> str:
        """`parts` under the store's location, or under the first part if that is already a path of this backend."""

    def upload(self, source: Path, target: str) -> tuple[int, str]:
        """Copies a local file; returns its size and sha256. The target appears complete or not at all."""

    def write(self, path: str, data: bytes) -> None:
        """Writes a small file; it appears complete or not at all."""

    def read(self, path: str, limit: int) -> bytes | None:
        """The content of a small file, None if there is none. Raises DataLoss past `limit` bytes."""

    def chunks(self, path: str, size: int) -> Iterator[bytes]:
        """The content in pieces. Raises DataLoss if there is no such file."""

    def exists(self, path: str) -> bool:
        """Whether a file stands at `path`."""

    def list_names(self, path: str) -> list[str]:
        """Names of the entries of a directory; none if it does not exist."""

    def remove(self, path: str) -> None:
        """Removes a file; nothing happens if there is none."""

    def remove_tree(self, path: str) -> None:
        """Removes a directory with everything in it; nothing happens if there is none."""


def open_backend(location: str, io_timeout_s: float) -> Backend:
    """The backend of a path, a `file://` URL or another fsspec URL.

    Raises:
        InvalidArgument: If fsspec does not know the protocol or its package is not installed.
    """
    protocol, separator, rest = location.partition("://")
    if not separator:
        return LocalBackend(Path(location))
    if protocol in {"file", "local"}:
        return LocalBackend(Path(rest))
    try:
        file_system, root = fsspec.core.url_to_fs(location)
    except (ValueError, ImportError) as error:
        raise InvalidArgument("policy.url", f"{location!r} cannot be opened: {error}") from error
    return RemoteBackend(file_system, root, io_timeout_s)


def hash_file(path: Path) -> tuple[int, str]:
    """Size and sha256 of a local file."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


class LocalBackend:
    """A directory. Files are written under another name, synced, and renamed; directories are synced after each rename."""

    def __init__(self, root: Path) -> None:
        """`root` need not exist yet."""
        self._root = root.absolute()

    def join(self, *parts: str) -> str:
        """See `Backend`."""
        return str(self._root.joinpath(*parts))

    def upload(self, source: Path, target: str) -> tuple[int, str]:
        """See `Backend`."""
        with source.open("rb") as file:
            return self._write(Path(target), iter(lambda: file.read(CHUNK_BYTES), b""))

    def write(self, path: str, data: bytes) -> None:
        """See `Backend`."""
        self._write(Path(path), iter([data]))

    def read(self, path: str, limit: int) -> bytes | None:
        """See `Backend`."""
        try:
            with Path(path).open("rb") as file:
                data = file.read(limit + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return _bounded(path, data, limit)

    def chunks(self, path: str, size: int) -> Iterator[bytes]:
        """See `Backend`."""
        try:
            with Path(path).open("rb") as file:
                while chunk := file.read(size):
                    yield chunk
        except FileNotFoundError as error:
            raise DataLoss(f"{path} is missing") from error

    def exists(self, path: str) -> bool:
        """See `Backend`."""
        return Path(path).is_file()

    def list_names(self, path: str) -> list[str]:
        """See `Backend`."""
        try:
            return [entry.name for entry in Path(path).iterdir()]
        except FileNotFoundError:
            return []

    def remove(self, path: str) -> None:
        """See `Backend`."""
        target = Path(path)
        if target.exists():
            target.unlink(missing_ok=True)
            _sync_directory(target.parent)

    def remove_tree(self, path: str) -> None:
        """See `Backend`."""
        shutil.rmtree(path, ignore_errors=True)

    def _write(self, target: Path, pieces: Iterator[bytes]) -> tuple[int, str]:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        digest, size = hashlib.sha256(), 0
        try:
            with temporary.open("wb") as output:
                for piece in pieces:
                    digest.update(piece)
                    size += len(piece)
                    output.write(piece)
                output.flush()
                os.fsync(output.fileno())
            temporary.rename(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_directory(target.parent)
        _sync_directory(target.parent.parent)  # the version's own directory may be new
        return size, digest.hexdigest()


class RemoteBackend:
    """An fsspec file system. Each operation has a deadline; object stores show a file only when it is complete.

    Each implementation of fsspec raises errors of its own. They leave as Unavailable: credentials that ran out, a name that
    is not resolved and a broken connection all pass, and whoever uses a store waits for that. A full quota leaves as the
    OSError that `StoreFull` knows.
    """

    def __init__(self, file_system: Any, root: str, io_timeout_s: float) -> None:
        """`root` is a path inside `file_system`."""
        self._fs = file_system
        self._root = root.rstrip("/")
        self._calls = StoreCalls(io_timeout_s)  # fsspec has no deadline of its own

    def join(self, *parts: str) -> str:
        """See `Backend`."""
        first, *rest = parts
        under = first if first.startswith(f"{self._root}/") else f"{self._root}/{first}"
        return "/".join([under, *rest])

    def upload(self, source: Path, target: str) -> tuple[int, str]:
        """See `Backend`."""
        digest, size = hashlib.sha256(), 0
        self._call(target, lambda: self._fs.makedirs(target.rpartition("/")[0], exist_ok=True))
        output = self._call(target, lambda: self._fs.open(target, "wb"))
        try:
            with source.open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    digest.update(chunk)
                    size += len(chunk)
                    self._call(target, partial(output.write, chunk))
        except BaseException:
            if hasattr(output, "discard"):
                with contextlib.suppress(Unavailable):
                    self._call(target, output.discard)
            raise
        self._call(target, output.close)
        return size, digest.hexdigest()

    def write(self, path: str, data: bytes) -> None:
        """See `Backend`."""
        self._call(path, lambda: self._fs.pipe_file(path, data))

    def read(self, path: str, limit: int) -> bytes | None:
        """See `Backend`."""
        try:
            data = self._find(path, lambda: self._fs.cat_file(path, 0, limit + 1))
        except FileNotFoundError:
            return None
        return _bounded(path, bytes(data), limit)

    def chunks(self, path: str, size: int) -> Iterator[bytes]:
        """See `Backend`."""
        try:
            file = self._find(path, lambda: self._fs.open(path, "rb"))
        except FileNotFoundError as error:
            raise DataLoss(f"{path} is missing") from error
        try:
            while chunk := self._call(path, lambda: file.read(size)):
                yield bytes(chunk)
        finally:
            with contextlib.suppress(Unavailable):
                self._call(path, file.close)

    def exists(self, path: str) -> bool:
        """See `Backend`."""
        return bool(self._call(path, lambda: self._fs.exists(path)))

    def list_names(self, path: str) -> list[str]:
        """See `Backend`."""
        try:
            self._fs.invalidate_cache(path)
            entries = self._find(path, lambda: self._fs.ls(path, detail=False))
        except FileNotFoundError:
            return []
        return [str(entry).rstrip("/").rpartition("/")[2] for entry in entries]

    def remove(self, path: str) -> None:
        """See `Backend`."""
        try:
            self._find(path, lambda: self._fs.rm_file(path))
        except FileNotFoundError:
            return

    def remove_tree(self, path: str) -> None:
        """See `Backend`."""
        try:
            self._find(path, lambda: self._fs.rm(path, recursive=True))
        except FileNotFoundError:
            return

    def _find(self, path: str, operation: Callable[[], T]) -> T:
        """As `_call`, for what may not be there: FileNotFoundError passes."""
        return self._call(path, operation, FileNotFoundError)

    def _call(self, path: str, operation: Callable[[], T], *passing: type[Exception]) -> T:
        try:
            return self._calls(path, operation)
        except Exception as error:
            full = isinstance(error, OSError) and StoreFull.matches(error)
            if full or isinstance(error, (HonedError, *passing)):
                raise
            raise Unavailable(f"the store failed for {path}: {type(error).__name__}: {error}") from error


def _bounded(path: str, data: bytes, limit: int) -> bytes:
    if len(data) > limit:
        raise DataLoss(f"{path} is larger than the {limit} bytes that such a file may have")
    return data


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
