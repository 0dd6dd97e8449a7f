"""Finds the policy's tokenizer: in the model that the run starts from, or in a version of the policy store."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

from honed.artifacts.store import PolicyStore
from honed.config import RunSettings
from honed.kit.errors import FailedPrecondition

_POLL_S: Final = 0.5


async def policy_tokenizer(settings: RunSettings) -> Path:
    """A directory that holds it. All versions of a run share one tokenizer.

    Waits for the first version of a run that begins with pretraining.

    Raises:
        FailedPrecondition: `conductor.start_from` is not set, and no version appeared in time.
    """
    if settings.conductor.start_from is not None:
        return Path(settings.conductor.start_from)
    store = PolicyStore(settings.policy_url, settings.run)
    into = settings.directory / "reward" / "tokenizer"
    try:
        async with asyncio.timeout(settings.conductor.start_timeout_s):
            # A store tells nobody that something was published.
            while (version := await asyncio.to_thread(store.latest)) is None:  # noqa: ASYNC110
                await asyncio.sleep(_POLL_S)
            return await asyncio.to_thread(store.fetch, version, into)
    except TimeoutError as error:
        raise FailedPrecondition(
            f"the policy store {settings.policy_url} holds no version of run {settings.run!r}, whose tokenizer scoring needs: "
            "run the pretraining phase, or set conductor.start_from to a model"
        ) from error
