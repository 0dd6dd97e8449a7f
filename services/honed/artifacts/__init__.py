"""What a policy version is: its name, its manifest, its store."""

from honed.artifacts.manifest import MANIFEST_NAME, Canary, FileEntry, Lineage, Manifest, TensorEntry
from honed.artifacts.marks import Mark
from honed.artifacts.store import PolicyStore, StoreFull, VersionDraft, verify_directory
from honed.artifacts.version import VersionId

__all__ = [
    "MANIFEST_NAME",
    "Canary",
    "FileEntry",
    "Lineage",
    "Manifest",
    "Mark",
    "PolicyStore",
    "StoreFull",
    "TensorEntry",
    "VersionDraft",
    "VersionId",
    "verify_directory",
]
