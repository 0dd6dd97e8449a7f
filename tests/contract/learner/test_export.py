"""Claims about the published policy directory, read back by transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.support import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from honed.kit.errors import DataLoss, InvalidArgument
from honed.learner.loop.canary import canary_logprobs
from honed.learner.loop.export import export_policy
from honed.learner.models.policy import PolicyModel
from honed.models.loader import load_language_model

TEXT = (5, 6, 7, 8, 9, 10)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.make_tiny_model(tmp_path / "base", seed=1)


@pytest.fixture
def policy(base: Path) -> PolicyModel:
    policy = PolicyModel(load_language_model(base, device=torch.device("cpu")))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01)
    return policy


def test_an_exported_policy_gives_the_canaries_of_the_one_in_memory(base: Path, policy: PolicyModel, tmp_path: Path) -> None:
    export_policy(policy, base, tmp_path / "out")
    (canary,) = canary_logprobs(policy, [TEXT])
    read = tiny.token_logprobs(tiny.load(tmp_path / "out"), TEXT)
    assert read == pytest.approx(canary.logprobs, abs=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("hone").input_ids) == "hone"
    assert not [p for p in (tmp_path / "out").iterdir() if p.suffix in {".bin", ".pt", ".py"}]


def test_a_bfloat16_export_says_so_and_leaves_the_policy_in_float32(base: Path, policy: PolicyModel, tmp_path: Path) -> None:
    export_policy(policy, base, tmp_path / "out", dtype="bfloat16")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {p.dtype for p in read.parameters()} == {torch.bfloat16}
    assert read.config.dtype == torch.bfloat16
    assert {p.dtype for p in policy.parameters()} == {torch.float32}


def test_an_export_never_mixes_with_files_that_are_there(base: Path, policy: PolicyModel, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="not empty"):
        export_policy(policy, base, base)
    (tmp_path / "bare").mkdir()
    with pytest.raises(InvalidArgument, match="no tokenizer files"):
        export_policy(policy, tmp_path / "bare", tmp_path / "out")


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataLoss, match=r"config\.json is missing"):
        load_language_model(tmp_path, device=torch.device("cpu"))
