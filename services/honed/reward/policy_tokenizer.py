"""The policy's tokenizer, out of the policy store: its few small files, never the weights."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Final

from honed.artifacts.store import PolicyStore
from honed.artifacts.tokenizer import fetch_tokenizer
from honed.kit.errors import FailedPrecondition
from honed.models.tokenizer import TextTokenizer, load_tokenizer

_POLL_S: Final = 0.5


async def policy_tokenizer(store: PolicyStore, timeout_s: float) -> TextTokenizer:
    """Loads it from the base version: all versions of a run share one tokenizer.

    Nothing stays on the local disk. Waits for the first version of a run that begins with
    pretraining.

    Args:
        store: Of the run.
        timeout_s: How long to wait for a version.

    Raises:
        FailedPrecondition: No version appeared in time.
        DataLoss: The files are damaged.
    """
    try:
        async with asyncio.timeout(timeout_s):
            # A store tells nobody that something was published.
            while await asyncio.to_thread(store.latest) is None:  # noqa: ASYNC110
                await asyncio.sleep(_POLL_S)
    except TimeoutError as error:
        raise FailedPrecondition(
            f"the policy store holds no version of run {store.run!r}, whose tokenizer scoring needs: `honed up` publishes the "
            "first; for services that are started one by one, `honed job pretrain` does"
        ) from error
    return await asyncio.to_thread(_load, store)


def _load(store: PolicyStore) -> TextTokenizer:
    with tempfile.TemporaryDirectory(prefix="honed-tokenizer-") as directory:
        return load_tokenizer(fetch_tokenizer(store, Path(directory)))
