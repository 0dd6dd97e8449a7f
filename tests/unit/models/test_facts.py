"""What model directories say of themselves, in the words of several families."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from honed.kit.errors import DataLoss, InvalidArgument
from honed.models.facts import ModelFacts


def facts(directory: Path, config: Any, generation: Any = None) -> ModelFacts:
    (directory / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return ModelFacts.read(directory)


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        ({"max_position_embeddings": 2048}, 2048),
        ({"n_positions": 1024, "n_ctx": 1024}, 1024),
        ({"model_type": "mamba"}, None),
        ({"max_position_embeddings": 32768,
          "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}, 131072),
        ({"max_position_embeddings": 131072,
          "rope_parameters": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}}, 131072),
        ({"max_position_embeddings": 4096, "rope_scaling": None}, 4096),
    ],
)  # fmt: skip
def test_the_longest_sequence_whatever_it_is_called(config: dict[str, Any], longest: int | None, tmp_path: Path) -> None:
    found = facts(tmp_path, config)
    assert found.longest_sequence == longest
    found.check_length(1000)
    if longest is not None:
        with pytest.raises(InvalidArgument, match=f"set it to {longest} or less"):
            found.check_length(longest + 1, "generation.max_model_tokens")


def test_the_ends_of_a_response_are_those_of_the_generation_configuration(tmp_path: Path) -> None:
    chat = facts(tmp_path, {"eos_token_id": 1, "pad_token_id": 0}, {"eos_token_id": [1, 106]})
    assert (chat.end_token_ids, chat.pad_token_id) == ({1, 106}, 0)
    (tmp_path / "generation_config.json").unlink()
    assert facts(tmp_path, {"eos_token_id": 7}).end_token_ids == {7}
    assert facts(tmp_path, {}).end_token_ids == frozenset()


def test_a_padding_token_that_also_ends_a_response_is_a_token_like_any_other(tmp_path: Path) -> None:
    assert facts(tmp_path, {"eos_token_id": 5, "pad_token_id": 5}).pad_token_id is None
    assert facts(tmp_path, {"eos_token_id": [5, 6], "pad_token_id": -1}).pad_token_id is None


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataLoss, match=r"config\.json is missing"):
        ModelFacts.read(tmp_path)
    with pytest.raises(DataLoss, match=r"config\.json is not JSON"):
        facts(tmp_path, "{")
    with pytest.raises(DataLoss, match="must hold an object, not a list"):
        facts(tmp_path, "[]")


def test_no_torch_is_needed_for_facts_and_chat_templates() -> None:
    code = "import sys; from honed.models import chat, facts, packing, tokenizer; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
