"""What the jobs of a run leave behind in the policy store."""

from __future__ import annotations

import asyncio
from typing import Final

from honed.artifacts.reward_models import TRAINED, RewardModelStore
from honed.artifacts.store import PolicyStore
from honed.artifacts.version import VersionId
from honed.config import RunSettings

PRETRAIN: Final = "pretrain"
REWARD_MODEL: Final = "reward-model"
_BASE: Final = VersionId(0, 0)


class Results:
    """The results of the jobs of one run."""

    def __init__(self, settings: RunSettings, store: PolicyStore) -> None:
        """Reads nothing yet."""
        self.url, self._run = settings.policy_url, settings.run
        self._policies, self._reward_models = store, RewardModelStore(self.url, self._run, TRAINED)

    async def lacking(self, job: str) -> str:
        """What the store lacks of the job's result; empty when it is there.

        Raises:
            HonedError: The store cannot be read.
        """
        if job == PRETRAIN:
            there = _BASE in await asyncio.to_thread(self._policies.versions)
        else:
            there = await asyncio.to_thread(self._reward_models.latest) is not None
        return "" if there else f"the policy store {self.url} holds no {_NAMES[job]} of run {self._run!r}"


_NAMES: Final = {PRETRAIN: f"version {_BASE}", REWARD_MODEL: "reward model"}
