"""Marks a version for everybody that this process refused, where the version itself is certain to be at fault.

* Damage: a fetch met bytes that are not what their digest says, and a second reading in the store meets them too. A copy on
  this host that is damaged says nothing of the version.
* Canaries at a start: another version has passed in the same process, so the engine reads weights right, and no generator
  has committed this one.

Canaries at a push are the learner's to judge, which hears every generator. A version that others serve, and that this process
caught up with, is never marked for its canaries: they have passed elsewhere.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from honed.artifacts.marks import Mark
from honed.artifacts.store import PolicyStore
from honed.artifacts.version import VersionId
from honed.kit.errors import DataLoss, NotFound

logger = logging.getLogger(__name__)


def fetch_or_mark(store: PolicyStore, version: VersionId, into: Path, manifest_sha256: str | None = None) -> Path:
    """See `ArtifactStore.fetch`. A version that is damaged in the store is marked as quarantined. Blocks.

    One that only this build cannot read is not: generators of a newer build serve it.

    Raises:
        NotFound: The version is not in the store, or was removed while it was read.
        DataLoss: It is damaged, or not the one that the caller expects.
        FailedPrecondition: This build cannot read its manifest.
    """
    try:
        return store.fetch(version, into, manifest_sha256)
    except DataLoss as error:
        try:
            store.check(version)
        except NotFound:
            raise
        except DataLoss as damage:
            _mark(store, version, f"damaged in the store: {damage}")
        except Exception as other:
            logger.warning("damage not confirmed", extra={"version": version.label, "reason": str(other)})
        raise error from None


def mark_disagreeing(store: PolicyStore, reasons: Mapping[VersionId, str], committed: VersionId | None) -> None:
    """Marks the versions whose canaries did not agree in a process that another version has passed in. Blocks.

    Args:
        store: Where they stand.
        reasons: The versions.
        committed: What generators have committed last. None, for unknown, marks nothing.
    """
    for version, reason in reasons.items():
        if committed is not None and version > committed:
            _mark(store, version, f"refused at the start of a generator: {reason}")


def _mark(store: PolicyStore, version: VersionId, reason: str) -> None:
    logger.warning("version quarantined", extra={"version": version.label, "reason": reason})
    try:
        store.marks.add(version, "quarantined", Mark(reason[:2000], datetime.now(UTC).isoformat()))
    except Exception as error:  # a store that cannot be written costs the next start another try
        logger.warning("the mark was not written", extra={"version": version.label, "reason": str(error)})
