"""The tokenizer of a run, for those who need no weights: all versions of a policy share one."""

from __future__ import annotations

from pathlib import Path

from honed.artifacts.store import PolicyStore
from honed.artifacts.version import VersionId
from honed.kit.errors import NotFound


def fetch_tokenizer(store: PolicyStore, into: Path) -> Path:
    """Copies everything but the weights of the base version into `into`: tokenizer, chat template, configuration. Blocks.

    Where the base version is no longer kept, the newest one stands in for it.

    Returns:
        `into`, which transformers and tokenizers can load from.

    Raises:
        NotFound: The store holds no version yet.
        DataLoss: A file is damaged.
    """
    base, latest = VersionId(0, 0), store.latest()
    if latest is None:
        raise NotFound(f"run {store.run} has no version in the store yet: `honed job pretrain` publishes the first")
    version = base if base in store.versions() else latest
    store.fetch_files(version, lambda path: not path.endswith((".safetensors", ".safetensors.index.json")), into)
    return into
