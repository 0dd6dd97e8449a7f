"""Checks the model that a run starts from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from honed.artifacts.tensors import read_tensor_entries
from honed.check.findings import Report
from honed.config import RunSettings
from honed.kit.errors import DataLoss, FailedPrecondition, HonedError
from honed.learner.settings import PretrainSettings
from honed.models.chat import ChatTemplate
from honed.models.facts import ModelFacts, read_json
from honed.models.prompts import read_tokenizer


@dataclass(frozen=True)
class BaseModel:
    """What is known of the model that the run starts from.

    Attributes:
        parameters: how many numbers its weights are.
        directory: None for a model that the run pretrains itself.
        template: its chat template.
        tokenizer: its tokenizer; None if that is not loaded or cannot be.
    """

    parameters: int
    directory: Path | None = None
    template: ChatTemplate | None = None
    tokenizer: Tokenizer | None = None


def check_model(settings: RunSettings, report: Report, *, fast: bool) -> BaseModel | None:
    """Checks `conductor.start_from`: files, family, lengths; None when it cannot be used. `fast` leaves transformers out."""
    start_from = settings.conductor.start_from
    if start_from is None:
        parameters = _pretrained(settings.pretrain, settings.generation.max_model_tokens)
        report.figures["parameters"] = parameters
        return BaseModel(parameters)
    where, directory = "conductor.start_from", Path(start_from)
    facts = _check_directory(where, directory, report)
    if facts is None:
        return None
    try:
        facts.check_length(settings.generation.max_model_tokens)
    except HonedError as error:
        report.error("generation.max_model_tokens", str(error))
    try:
        if settings.learner.unfrozen_layers is not None:
            facts.check_layers(settings.learner.unfrozen_layers)
    except HonedError as error:
        report.error("learner.unfrozen_layers", str(error))
    if not settings.conductor.fixed_length and not facts.end_token_ids:
        report.warning(
            where, f"{directory} names no end-of-sequence token: every response has conductor.response_tokens tokens"
        )
    template = tokenizer = None
    try:
        template = ChatTemplate.read(directory)
        if not fast and (directory / "tokenizer.json").is_file():
            tokenizer = read_tokenizer(directory)
    except DataLoss as error:
        report.error(where, str(error))
    parameters = _parameters(where, directory, report)
    if not fast and not report.errors:
        _check_family(where, directory, report)
        if settings.learner.gradient_checkpointing and not report.errors:
            _check_recomputing(directory, report)
    report.figures["parameters"] = parameters
    report.figures["model_type"] = facts.model_type
    return BaseModel(parameters, directory, template, tokenizer)


def check_body(settings: RunSettings, report: Report, *, fast: bool) -> int | None:
    """Checks the model whose body a reward model is made of, where it is not the run's own. `fast` leaves transformers out.

    Returns:
        How many numbers its weights are; None where it is the run's own, or cannot be used.
    """
    section, parameters = settings.reward_training, None
    if not settings.goes_through("reward_model"):
        return None
    start_from = section.start_from or settings.conductor.start_from
    depth = settings.pretrain.layers
    if section.start_from is not None:
        where, directory = "reward_training.start_from", Path(section.start_from)
        if _check_directory(where, directory, report) is None:
            return None
        parameters = _parameters(where, directory, report)
        if not fast and not report.errors:
            _check_family(where, directory, report)
    if start_from is not None:
        try:
            config = read_json(Path(start_from) / "config.json")
        except DataLoss:
            return parameters  # a finding of the model's
        depth = int(config.get("num_hidden_layers", config.get("n_layer", 0)))
    for name, wanted in (("layers", section.layers or 0), ("read_layers", max(section.read_layers, default=0))):
        if wanted > depth:
            report.error(f"reward_training.{name}", f"{wanted} is more than the {depth} layers of the model")
    return parameters


def _check_directory(where: str, directory: Path, report: Report) -> ModelFacts | None:
    """What a model directory says of itself; None where nothing can be read of it."""
    if not directory.is_dir():
        report.error(where, f"there is no directory {directory}: name a Hugging Face model directory on this machine")
        return None
    try:
        facts = ModelFacts.read(directory)
    except DataLoss as error:
        report.error(where, f"{error}: download the model again")
        return None
    if read_json(directory / "config.json").get("auto_map"):
        report.error(where, f"{directory} needs code of its own (auto_map), which is never run: take a family of transformers")
    if not (directory / "tokenizer.json").is_file():
        report.error(where, f"{directory} holds no tokenizer.json: save the tokenizer as a fast one (`use_fast=True`)")
    return facts


def _parameters(where: str, directory: Path, report: Report) -> int:
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        report.error(
            where,
            f"{directory} holds no safetensors file, and pickled weights are never read: save it by "
            "`model.save_pretrained(directory, safe_serialization=True)`",
        )
    count = 0
    for file in files:
        try:
            count += sum(math.prod(entry.shape) for entry in read_tensor_entries(file, str(file)))
        except (DataLoss, OSError) as error:
            report.error(where, f"{error}: download the model again")
    return count


def _check_family(where: str, directory: Path, report: Report) -> None:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        report.error(where, f"transformers does not know the model in {directory}: {error}")
        return
    if config.get_text_config() is not config:
        report.error(where, f"{directory} holds a {config.model_type} model of more than text: take a text model")
    elif config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        report.error(where, f"{config.model_type} is no causal language model: take one that generates text")
    if getattr(config, "quantization_config", None):
        report.error(where, f"{directory} holds quantized weights: training needs float32, bfloat16 or float16")


def _check_recomputing(directory: Path, report: Report) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from honed.learner.models.recompute import SETTING, recompute_layers

    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):  # has modules and no weights
        model = AutoModelForCausalLM.from_config(config)
    try:
        recompute_layers(model)
    except FailedPrecondition as error:
        report.error(SETTING, str(error).removeprefix(f"{SETTING}: "))


def _pretrained(section: PretrainSettings, longest: int) -> int:
    """Parameters of the model that pretraining would make, near enough for a bill of memory."""
    width = section.hidden_size
    return width * (section.vocabulary + longest) + section.layers * 12 * width * width
