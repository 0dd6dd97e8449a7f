"""Makes a directory that can be published out of the weights as they are now, with the canaries that prove them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import torch

from honed.artifacts.manifest import Canary
from honed.artifacts.version import VersionId
from honed.learner.loop.canary import canary_logprobs
from honed.learner.loop.export import export_policy
from honed.learner.models.policy import TokenModel

CANARIES = 2
CANARY_TOKENS = 24
CANARY_SEED = 20_221_204


class Exporter:
    """Exports one policy again and again."""

    def __init__(
        self, policy: TokenModel, base: Path, scratch: Path, *, dtype: Literal["float32", "bfloat16"] = "float32"
    ) -> None:
        """Writes under `scratch`; the tokenizer comes from `base`."""
        self._policy, self._base, self._scratch, self._dtype = policy, base, scratch, dtype
        self._texts = canary_texts(policy.vocabulary_size)

    def clean(self) -> None:
        """Removes what learners left that were killed between export and publication."""
        shutil.rmtree(self._scratch, ignore_errors=True)

    def export(self, version: VersionId) -> tuple[Path, tuple[Canary, ...]]:
        """Writes the policy to a fresh directory and reads the canaries. Not while the weights change."""
        directory = self._scratch / version.label
        shutil.rmtree(directory, ignore_errors=True)
        export_policy(self._policy, self._base, directory, dtype=self._dtype)
        records = canary_logprobs(self._policy, self._texts)
        return directory, tuple(Canary(r.token_ids, r.start, r.logprobs) for r in records)


def canary_texts(vocabulary_size: int) -> list[list[int]]:
    """Token ids to check weights by. Drawn at random: every part of the embedding is as likely to be seen as another."""
    random = torch.Generator().manual_seed(CANARY_SEED)
    return torch.randint(vocabulary_size, (CANARIES, CANARY_TOKENS), generator=random).tolist()
