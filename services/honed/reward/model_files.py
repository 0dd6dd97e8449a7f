"""What makes a directory a reward model: its files are whole, its head is there, and no code or pickle comes with it."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForSequenceClassification

from honed.artifacts.files import hash_file
from honed.artifacts.tensors import read_tensor_entries
from honed.kit.errors import DataLoss, FailedPrecondition

# What decides a score. A README or a training log beside them changes no version.
_DECIDING: Final = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json")


def model_version(directory: Path) -> str:
    """A sha256 over the digests of the files that decide a score: config, tokenizer and weights."""
    paths = sorted({*(directory / name for name in _DECIDING), *directory.glob("*.safetensors")})
    listing = "".join(f"{hash_file(path)[1]}  {path.name}\n" for path in paths if path.is_file())
    return hashlib.sha256(listing.encode()).hexdigest()


def check_model(directory: Path) -> None:
    """Checks what can be checked without loading the weights.

    Raises:
        DataLoss: A file is missing, cut short or damaged; names it.
        FailedPrecondition: The model is of another kind.
    """
    if not directory.is_dir():
        raise DataLoss(f"there is no model directory {directory}")
    config = _config(directory)
    labels = len(config["id2label"]) if "id2label" in config else config.get("num_labels", 2)
    if labels != 1:
        raise FailedPrecondition(f"{directory}/config.json: a reward model has one label, this one has {labels}")
    weights = sorted(directory.glob("*.safetensors"))
    if not weights:
        raise DataLoss(f"{directory} holds no safetensors file; pickled weights are not read")
    for path in weights:
        read_tensor_entries(path, str(path))


def load_model(directory: Path) -> Any:
    """Loads a checked model in evaluation mode, in float32 on a CPU as everywhere.

    Raises:
        DataLoss: The weights are damaged, incomplete or not finite.
        FailedPrecondition: transformers does not know the model, or it has no linear head `score`.
    """
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            directory,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (ValueError, KeyError) as error:
        raise FailedPrecondition(f"{directory} is no model that can be served here: {error}") from error
    except (OSError, RuntimeError) as error:
        raise DataLoss(f"{directory} cannot be loaded: {error}") from error
    # transformers fills what is missing with random numbers and warns; a random reward head must not serve.
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if missing:
        raise DataLoss(f"{directory} lacks {len(missing)} of its weights, the first is {missing[0]!r}")
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise FailedPrecondition(
            f"{type(model).__name__} has no linear head named `score` that reads the last token; encoders are not supported"
        )
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise DataLoss(f"{directory}: weight {name!r} holds values that are not finite")
    return model.eval().requires_grad_(False)


def reward_bias(config: Any, directory: Path) -> float:
    """The constant that a model's configuration adds to each of its rewards; 0 where it says nothing.

    Raises:
        DataLoss: It is no finite number.
    """
    bias = getattr(config, "reward_bias", 0.0)
    if isinstance(bias, bool) or not isinstance(bias, int | float) or not math.isfinite(bias):
        raise DataLoss(f"{directory}/config.json: reward_bias is {bias!r}, it must be a finite number")
    return float(bias)


def _config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataLoss(f"{path} is missing") from error
    except ValueError as error:
        raise DataLoss(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise DataLoss(f"{path} must hold an object, not a {type(config).__name__}")
    return config
