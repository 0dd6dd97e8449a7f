"""What a frozen body says of texts, computed once: each text is read a single time, and what was read is kept on disk.

Texts go through the body in chunks of similar length, each a file that appears when it is whole. A job that was killed reads
the chunks that are missing.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from honed.models.packing import pack
from honed.models.reward_model import RewardModel

logger = logging.getLogger(__name__)

_CHUNK: Final = 256
_NAME: Final = "features"


@torch.no_grad()
def features_of(
    model: RewardModel,
    texts: Sequence[Sequence[int]],
    directory: Path,
    *,
    pass_tokens: int,
    report: Callable[[float], None] = lambda _: None,
) -> Tensor:
    """What the head would read of each text, `[n, width]`, on the host.

    Args:
        model: Its head is not used.
        texts: Token ids, none longer than the model can read. The same ones in the same order, where the directory is not new.
        directory: Where chunks are kept; made if it is not there.
        pass_tokens: Tokens of one pass at most, padding included; a longer text is read alone.
        report: Called with the share that is done; raising from it ends the work.
    """
    order = sorted(range(len(texts)), key=lambda place: (len(texts[place]), place))
    found: Tensor | None = None
    for start in range(0, len(order), _CHUNK):
        places = order[start : start + _CHUNK]
        path = directory / f"{_NAME}-{start:08}.safetensors"
        chunk = _kept(path, len(places))
        if chunk is None:
            chunk = _read(model, [texts[place] for place in places], pass_tokens)
            _keep(path, chunk)
        if found is None:
            found = torch.empty(len(texts), chunk.shape[1])
        found[places] = chunk
        report((start + len(places)) / len(order))
    assert found is not None, "there are texts"
    return found


def _read(model: RewardModel, texts: Sequence[Sequence[int]], pass_tokens: int) -> Tensor:
    parts: dict[int, Tensor] = {}
    for group in pack([len(text) for text in texts], pass_tokens):
        rows = model.features([texts[place] for place in group]).cpu()
        parts |= dict(zip(group, rows, strict=True))
    return torch.stack([parts[place] for place in range(len(texts))])


def _keep(path: Path, chunk: Tensor) -> None:
    """Another try need not read these texts again; where there is no room for that, it does."""
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({_NAME: chunk}, partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        logger.warning("a chunk of features is not kept", extra={"file": str(path), "reason": str(error)})


def _kept(path: Path, rows: int) -> Tensor | None:
    try:
        chunk = load_file(path)[_NAME]
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, KeyError) as error:
        logger.warning("a chunk of features is damaged and is read again", extra={"file": str(path), "reason": str(error)})
        return None
    return chunk if len(chunk) == rows else None
