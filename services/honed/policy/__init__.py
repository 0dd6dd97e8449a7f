"""What a policy version is: its name, its manifest, its store."""

from honed.policy.manifest import MANIFEST_NAME, Canary, FileEntry, Lineage, Manifest, TensorEntry
from honed.policy.store import PolicyStore, StoreFull, VersionDraft, verify_directory
from honed.policy.version import VersionId

__all__ = [
    "MANIFEST_NAME",
    "Canary",
    "FileEntry",
    "Lineage",
    "Manifest",
    "PolicyStore",
    "StoreFull",
    "TensorEntry",
    "VersionDraft",
    "VersionId",
    "verify_directory",
]
