"""Versions of models: their names, their manifests, the store of a run's policy and of its reward models.

| module | what it holds |
|---|---|
| `version` | the name of a version |
| `manifest`, `names` | what a version consists of, digested; what may be called how |
| `store`, `draft` | publish, list, fetch, retain; what is to be published |
| `verify` | checks a local copy against its manifest |
| `reward_models` | reward models in the same store, `artifact:NAME/VERSION` |
| `promotions` | the record of which reward models serve |
| `marks` | quarantined and promoted versions |
| `tokenizer` | a run's tokenizer without its weights |
| `files`, `calls` | local directories and object stores, with deadlines |
| `tensors`, `fields` | strict reading of safetensors headers and of JSON |
"""

from honed.artifacts.draft import VersionDraft
from honed.artifacts.manifest import Canary, FileEntry, Lineage, Manifest, TensorEntry
from honed.artifacts.marks import Mark
from honed.artifacts.names import MANIFEST_NAME
from honed.artifacts.promotions import PromotionRecord
from honed.artifacts.reward_models import ArtifactRef, RewardModelStore
from honed.artifacts.store import ArtifactStore, PolicyStore, StoreFull, verify_directory
from honed.artifacts.tokenizer import fetch_tokenizer
from honed.artifacts.version import VersionId

__all__ = [
    "MANIFEST_NAME",
    "ArtifactRef",
    "ArtifactStore",
    "Canary",
    "FileEntry",
    "Lineage",
    "Manifest",
    "Mark",
    "PolicyStore",
    "PromotionRecord",
    "RewardModelStore",
    "StoreFull",
    "TensorEntry",
    "VersionDraft",
    "VersionId",
    "fetch_tokenizer",
    "verify_directory",
]
