"""The policy as a complete Hugging Face directory, for publishing: configuration, weights, tokenizer, no value head."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Literal

import torch

from honed.kit.errors import InvalidArgument
from honed.learner.models.policy import TokenModel
from honed.models.tokenizer import copy_tokenizer


def export_policy(model: TokenModel, base: Path, target: Path, *, dtype: Literal["float32", "bfloat16"] = "float32") -> None:
    """Writes the language model to `target`, with the tokenizer files of `base` as they are.

    Args:
        model: the policy; it is not changed.
        base: the Hugging Face directory that training started from.
        target: made if it is missing; must be empty.
        dtype: of the weights on disk.

    Raises:
        InvalidArgument: when `target` holds files, or `base` has no tokenizer.
    """
    if target.exists() and any(target.iterdir()):
        raise InvalidArgument("target", f"{target} is not empty; a version needs a directory of its own")
    target.mkdir(parents=True, exist_ok=True)
    copy_tokenizer(base, target)
    stored = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    language_model = model.language_model
    # Parameters by name, tied ones once: in another dtype their copies would no longer be known as one.
    kept = {name for name, _ in language_model.named_parameters()} | {name for name, _ in language_model.named_buffers()}
    weights = {
        name: value.to(stored) if value.is_floating_point() else value
        for name, value in language_model.state_dict().items()
        if name in kept
    }
    language_model.save_pretrained(target, state_dict=weights)
    _set_dtype(target / "config.json", dtype)
    _keep_generation_config(base, target)


def _set_dtype(path: Path, dtype: str) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = dtype
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _keep_generation_config(base: Path, target: Path) -> None:
    """Where responses end is said by the base's own file, not by what transformers makes of it."""
    name = "generation_config.json"
    if (base / name).is_file():
        shutil.copyfile(base / name, target / name)
