"""What the tests of the stores share."""

from __future__ import annotations

from pathlib import Path

import fsspec
import numpy
from safetensors.numpy import save_file


def make_source(directory: Path, value: float = 0.0) -> Path:
    """A model directory as far as a store looks at it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text("{}")
    (directory / "tokenizer.json").write_text('{"t": 1}')
    save_file(
        {"a": numpy.full((3, 4), value, numpy.float32), "b": numpy.zeros(5, numpy.float16)}, directory / "model.safetensors"
    )
    return directory


def damage(location: str, path: str, data: bytes | None) -> None:
    """Overwrites (or removes) a stored file of run `demo` behind the store's back."""
    file_system, root = fsspec.core.url_to_fs(location)
    if data is None:
        file_system.rm_file(f"{root}/demo/{path}")
    else:
        file_system.pipe_file(f"{root}/demo/{path}", data)
