"""What the JSON files of a model directory say: limits, special tokens, kind of model.

Read without torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from honed.kit.errors import DataLoss, InvalidArgument

# GPT-2 and its relatives have names of their own for the length of their position table.
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")


@dataclass(frozen=True)
class ModelFacts:
    """Facts of one model directory.

    Attributes:
        directory: Where it was read from.
        model_type: transformers' name of the family, such as `gpt2` or `gemma3_text`.
        layers: Of the decoder; None if the configuration does not say.
        vocabulary_size: Token ids that the model knows, often more than its tokenizer's; None if
            the configuration does not say.
        longest_sequence: The most tokens that it can read; None if nothing limits them.
        end_token_ids: Tokens that end a response: those of generation_config.json, else of
            config.json. Real chat models have several, and name the one that ends a turn only in
            generation_config.json.
        pad_token_id: The padding token; None if there is none, or if it is one that also ends a
            response: such a token can be sampled, and says nothing of padding.
    """

    directory: Path
    model_type: str
    layers: int | None
    vocabulary_size: int | None
    longest_sequence: int | None
    end_token_ids: frozenset[int]
    pad_token_id: int | None

    @classmethod
    def read(cls, directory: Path) -> ModelFacts:
        """Reads config.json and, where there is one, generation_config.json.

        Raises:
            DataLoss: A file is missing or damaged; names it.
        """
        config = read_json(directory / "config.json")
        generation = directory / "generation_config.json"
        sampling = read_json(generation) if generation.is_file() else {}
        text = config.get("text_config")
        text = text if isinstance(text, dict) else config
        ends = _ids(sampling.get("eos_token_id")) or _ids(config.get("eos_token_id")) or _ids(text.get("eos_token_id"))
        pads = _ids(sampling.get("pad_token_id")) or _ids(config.get("pad_token_id"))
        return cls(
            directory=directory,
            model_type=str(config.get("model_type", "")),
            layers=_positive(text.get("num_hidden_layers")) or _positive(text.get("n_layer")),
            vocabulary_size=_positive(text.get("vocab_size")),
            longest_sequence=_longest(text),
            end_token_ids=ends,
            pad_token_id=min(pads - ends, default=None),
        )

    def check_length(self, tokens: int, setting: str = "generation.max_model_tokens") -> None:
        """Checks that the model can read sequences of `tokens` tokens.

        Raises:
            InvalidArgument: It cannot; names the setting, the model and its limit.
        """
        if self.longest_sequence is not None and tokens > self.longest_sequence:
            raise InvalidArgument(
                setting,
                f"is {tokens}, and the model in {self.directory} ({self.model_type}) has positions for "
                f"{self.longest_sequence} tokens; set it to {self.longest_sequence} or less",
            )

    def check_layers(self, layers: int, setting: str = "learner.unfrozen_layers") -> None:
        """Checks that the model has so many layers to train.

        Raises:
            InvalidArgument: It has fewer; names the setting, the model and how many it has.
        """
        if self.layers is not None and layers > self.layers:
            raise InvalidArgument(
                setting,
                f"is {layers}, and the model in {self.directory} ({self.model_type}) has {self.layers} layers; set it to "
                f"{self.layers} or less, or to null to train everything",
            )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        DataLoss: The file is missing, no JSON, or holds something else; names it.
    """
    try:
        tree = json.loads(path.read_bytes())
    except OSError as error:
        raise DataLoss(f"{path} is missing or cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise DataLoss(f"{path} is not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise DataLoss(f"{path} must hold an object, not a {type(tree).__name__}")
    return tree


def chat_template_source(directory: Path) -> str | None:
    """The chat template of a model directory: chat_template.jinja, else that of tokenizer_config.json; None if there is none.

    Of several named templates the one called `default` is meant.

    Raises:
        DataLoss: A file is damaged; names it.
    """
    own, config = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    if own.is_file():
        try:
            return own.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataLoss(f"{own} cannot be read as text: {error}") from error
    templates = read_json(config).get("chat_template") if config.is_file() else None
    if isinstance(templates, list):
        named = {row.get("name"): row.get("template") for row in templates if isinstance(row, dict)}
        templates = named.get("default")
    return templates if isinstance(templates, str) else None


def _longest(config: dict[str, Any]) -> int | None:
    lengths = [length for key in _LENGTH_KEYS if (length := _positive(config.get(key))) is not None]
    if not lengths:
        return None
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if isinstance(rope, dict) and isinstance(rope.get("factor"), int | float):
        # Stretched positions; some configurations state the length before the stretch, some the one after.
        original = _positive(rope.get("original_max_position_embeddings"))
        return max(lengths[0], int(original * rope["factor"]) if original else 0)
    return lengths[0]


def _ids(value: object) -> frozenset[int]:
    found = value if isinstance(value, list) else [value]
    return frozenset(item for item in found if type(item) is int and item >= 0)


def _positive(value: object) -> int | None:
    return value if type(value) is int and value > 0 else None
