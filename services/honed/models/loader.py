"""The one loader of Hugging Face models: safetensors only, no code, no network, nothing filled in.

transformers fills weights that a checkpoint lacks with random numbers, skips those that it does not
know, and warns. Here either is an error that names the weight.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from honed.models import lean  # noqa: F401  before transformers

# isort: split
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from honed.artifacts.tensors import read_tensor_entries
from honed.kit.errors import DataLoss, FailedPrecondition
from honed.models.activations import fuse_activations
from honed.models.facts import read_json

_CPU = torch.device("cpu")
_HEAD = "score.weight"


def load_language_model(directory: Path, *, device: torch.device = _CPU, dtype: torch.dtype | str = torch.float32) -> Any:
    """Loads a causal language model of transformers in evaluation mode.

    Args:
        directory: A Hugging Face model directory.
        device: Where the weights go.
        dtype: Of the weights; also by name, or `auto` for the checkpoint's own.

    Raises:
        DataLoss: Files are missing or damaged, or weights are missing, unknown, of another shape or
            not finite.
        FailedPrecondition: It is no causal language model of text that transformers knows.
    """
    return _load(AutoModelForCausalLM, directory, device, dtype)


def load_classifier(
    directory: Path,
    *,
    device: torch.device = _CPU,
    new_head: bool = False,
    head_width: Callable[[int], int] = lambda hidden: hidden,
) -> Any:
    """Loads a sequence classifier with one label and a linear head `score`, in float32.

    Args:
        directory: A Hugging Face model directory: a classifier, or with `new_head` a causal
            language model.
        device: Where the weights go.
        new_head: Take the body of a language model and leave its output layer out. The head has
            random weights then.
        head_width: How many numbers the head reads, by the size of a hidden state; None for that size.

    Raises:
        DataLoss: See `load_language_model`.
        FailedPrecondition: The model has no such head.
    """
    missing, unexpected = ((_HEAD,), ("lm_head.",)) if new_head else ((), ())
    model = _load(
        AutoModelForSequenceClassification,
        directory,
        device,
        torch.float32,
        may_lack=missing,
        may_hold=unexpected,
        may_differ=(_HEAD,),
        num_labels=1,
    )
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise FailedPrecondition(
            f"{directory}: {type(model).__name__} has no linear head named `score` that reads the last token; encoders are not "
            "supported"
        )
    width = model.score.in_features if head_width is None else head_width(model.score.in_features)
    if width != model.score.in_features:
        model.score = torch.nn.Linear(width, 1, bias=False, device=device)
    if not new_head:
        # transformers knows one width, and would have left a head of another one random.
        with torch.no_grad():
            model.score.weight.copy_(_head(directory, (1, width)))
    return model


def _head(directory: Path, shape: tuple[int, ...]) -> torch.Tensor:
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if _HEAD in file.keys():  # noqa: SIM118  # not a mapping
                weight: torch.Tensor = file.get_tensor(_HEAD)
                if tuple(weight.shape) != shape:
                    raise DataLoss(f"{directory}: weight {_HEAD!r} has shape {tuple(weight.shape)}, its head reads {shape}")
                if not bool(torch.isfinite(weight).all()):
                    raise DataLoss(f"{directory}: weight {_HEAD!r} holds values that are not finite")
                return weight
    raise DataLoss(f"{directory} lacks the weight {_HEAD!r}")


def _load(
    kind: Any,
    directory: Path,
    device: torch.device,
    dtype: torch.dtype | str,
    may_lack: Sequence[str] = (),
    may_hold: Sequence[str] = (),
    may_differ: Sequence[str] = (),
    **options: Any,
) -> Any:
    """`may_lack` has names, `may_hold` beginnings of names, of weights that need not fit; `may_differ` is looked at later."""
    _check_files(directory)
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
            _check_config(config, directory)
            if getattr(config, "attn_logit_softcapping", None):
                # SDPA has no soft-capping: transformers would leave it out without a word.
                options["attn_implementation"] = "eager"
            model, report = kind.from_pretrained(
                directory,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                output_loading_info=True,
                **options,
            )
    except (FailedPrecondition, DataLoss):
        raise
    except (ValueError, KeyError) as error:
        raise FailedPrecondition(f"{directory} holds no model that can be used here: {error}") from error
    except (OSError, RuntimeError) as error:
        raise DataLoss(f"{directory} cannot be loaded: {error}") from error
    _check_report(report, directory, may_lack, may_hold, may_differ)
    for name, parameter in model.named_parameters():
        if name not in (*may_lack, *may_differ) and not bool(torch.isfinite(parameter).all()):
            raise DataLoss(f"{directory}: weight {name!r} holds values that are not finite")
    fuse_activations(model)
    return model.to(device).eval()


def _check_files(directory: Path) -> None:
    if not directory.is_dir():
        raise DataLoss(f"there is no model directory {directory}")
    read_json(directory / "config.json")
    weights = sorted(directory.glob("*.safetensors"))
    if not weights:
        raise DataLoss(f"{directory} holds no safetensors file; pickled weights are not read")
    for path in weights:
        read_tensor_entries(path, str(path))


def _check_config(config: Any, directory: Path) -> None:
    if config.get_text_config() is not config:
        raise FailedPrecondition(
            f"{directory} holds a {config.model_type} model of more than text; text models alone are supported"
        )
    if getattr(config, "quantization_config", None):
        raise FailedPrecondition(f"{directory} holds quantized weights; training needs them in float32, bfloat16 or float16")


def _check_report(
    report: dict[str, Any], directory: Path, may_lack: Sequence[str], may_hold: Sequence[str], may_differ: Sequence[str]
) -> None:
    missing = sorted(set(report["missing_keys"]) - set(may_lack))
    misshapen = sorted({name for name, *_ in report["mismatched_keys"]} - set(may_differ))
    unexpected = sorted(key for key in report["unexpected_keys"] if not key.startswith(tuple(may_hold)))
    for names, complaint in (
        (missing, "lacks weights of the model"),
        (misshapen, "holds weights of another shape"),
        (unexpected, "holds weights that the model does not have"),
    ):
        if names:
            raise DataLoss(f"{directory} {complaint} ({len(names)}, the first is {names[0]!r})")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' report of the load out of the logs: it is an error here, or expected."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
