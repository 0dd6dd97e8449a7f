"""How the reward service comes by the policy's tokenizer."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import pytest
from tests.support.tiny import make_tiny_model, publish_version

from honed.artifacts.store import PolicyStore
from honed.artifacts.version import VersionId
from honed.kit.errors import FailedPrecondition
from honed.reward.policy_tokenizer import policy_tokenizer


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "scratch"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    return directory


async def test_its_files_alone_are_fetched_and_nothing_of_them_stays(scratch: Path, tmp_path: Path) -> None:
    store = PolicyStore(tmp_path / "store", "run")
    model = make_tiny_model(tmp_path / "model", 0)
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    publish_version(store, model, VersionId(0, 0))
    # Weights that nobody can read: whoever asks for them fails.
    (tmp_path / "store" / "run" / "0.0" / "model.safetensors").unlink()
    tokenizer = await policy_tokenizer(store, timeout_s=5)
    assert tokenizer.decode(tokenizer.encode("hone", special_tokens=True)) == "hone"
    assert tokenizer.template is not None
    assert not list(scratch.glob("honed-*"))


async def test_it_waits_for_the_version_that_pretraining_makes(scratch: Path, tmp_path: Path) -> None:
    store = PolicyStore(tmp_path / "store", "run")
    waiting = asyncio.create_task(policy_tokenizer(store, timeout_s=30))
    await asyncio.sleep(0)
    assert not waiting.done()
    publish_version(store, make_tiny_model(tmp_path / "model", 0), VersionId(0, 0))
    assert (await waiting).digest


async def test_a_store_that_stays_empty_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match=r"no version of run 'run'.* `honed job pretrain` does"):
        await policy_tokenizer(PolicyStore(tmp_path / "store", "run"), timeout_s=0.05)
