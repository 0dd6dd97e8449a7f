"""Every family that honed promises goes through base, policy, reward model, export and update, against transformers' own."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.families import FAMILIES, POSITIONS, make_family_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from honed.artifacts.version import VersionId
from honed.kit.errors import InvalidArgument
from honed.learner.algorithms.ppo import PPO, Options
from honed.learner.data.batches import micro_batches
from honed.learner.data.episode import Episode, TokenSpan
from honed.learner.loop.canary import canary_logprobs
from honed.learner.loop.export import export_policy
from honed.learner.models.policy import PolicyModel, ReferenceModel
from honed.learner.objectives.kl import FixedKL
from honed.learner.objectives.normalise import GainBias
from honed.learner.settings import LearnerSettings
from honed.learner.train import rng
from honed.learner.train.on_policy import OnPolicyUpdates
from honed.learner.train.optimizer import build_optimizer
from honed.learner.train.trainer import Trainer, TrainSettings
from honed.models.facts import ModelFacts
from honed.models.loader import load_language_model
from honed.models.packed import NAME
from honed.models.packing import Branches
from honed.models.pooling import Place, Pooling
from honed.models.reward_model import RewardModel

TEXT = tuple(range(40, 64))
SEQUENCES = [[5, 9, 77], list(range(30, 70)), [1, 0, 0], [200]]


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family_model(tmp_path_factory.mktemp(request.param) / "base", request.param)


def own(directory: Path, kind: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """The model under transformers alone, attending by its reference implementation."""
    return kind.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager", **options).eval()


@torch.no_grad()
def logprobs(model: Any, ids: tuple[int, ...], temperature: float = 1.0) -> list[float]:
    logits = model(torch.tensor([ids])).logits[0, :-1].float() / temperature
    picked: list[float] = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    return picked


def episodes(count: int = 12) -> list[Episode]:
    """Ragged ones, some longer than a sliding window, at a temperature that is not 1."""
    source = random.Random(3)
    made = []
    for index in range(count):
        length = source.randint(1, 30)
        made.append(
            Episode(
                rollout_id=f"r{index}",
                entry_id=f"{index}-0",
                prompt=tuple(source.randrange(2, 258) for _ in range(source.randint(1, 12))),
                response=tuple(source.randrange(2, 258) for _ in range(length)),
                logprobs=tuple(source.uniform(-7.0, -4.0) for _ in range(length)),
                spans=(TokenSpan(VersionId(1, 0), 0, length),),
                reward=source.gauss(0.0, 1.0),
                temperature=0.7,
            )
        )
    return made


@torch.no_grad()
def test_token_logprobs_and_canaries_are_transformers_own(base: Path) -> None:
    policy, reference = PolicyModel(load_language_model(base)), own(base)
    batch = episodes()
    (packed,) = micro_batches(batch, range(len(batch)), max_tokens=10_000, width=30)
    measured = policy.measure(packed).logprobs
    expected = {}
    for row, episode in enumerate(batch):
        whole = logprobs(reference, (*episode.prompt, *episode.response), 0.7)[len(episode.prompt) - 1 :]
        expected.update({row * 30 + place: value for place, value in enumerate(whole)})
    assert measured.tolist() == pytest.approx([expected[int(slot)] for slot in packed.slots], abs=5e-5)
    (canary,) = canary_logprobs(policy, [TEXT])
    assert canary.logprobs == pytest.approx(logprobs(reference, TEXT), abs=5e-5)


def sharing_a_prompt() -> list[Episode]:
    """Ragged responses to two prompts, one of them longer than a sliding window, equal ones to a third, and one alone."""
    made, source = episodes(12), random.Random(4)
    prompts = [tuple(source.randrange(2, 258) for _ in range(length)) for length in (20, 12, 17)]
    ragged = [replace(episode, prompt=prompts[number // 4]) for number, episode in enumerate(made[:8])]
    equal = [replace(episode, prompt=prompts[2], response=tuple(range(n, n + 7))) for n, episode in enumerate(made[8:11], 9)]
    return [*ragged, *equal, made[11]]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_prompt_that_is_read_once_for_its_responses_says_and_teaches_the_same(base: Path, precision: Any) -> None:
    batch = sharing_a_prompt()
    read = {}
    for share in (False, True):
        (packed,) = micro_batches(batch, range(len(batch)), max_tokens=10_000, width=30, share_prompts=share)
        assert any(isinstance(shape, Branches) for _, shape in packed.runs) == share
        policy = PolicyModel(load_language_model(base), precision=precision)
        said = policy.evaluate(packed).logprobs
        weights = torch.cos(torch.arange(30 * len(batch)).float())[packed.slots]
        (said * weights).sum().backward()
        placed = torch.zeros(30 * len(batch)).index_copy(0, packed.slots, said.detach())
        read[share] = placed, {name: p.grad for name, p in policy.language_model.named_parameters()}, len(packed.tokens)
    (alone, own, every), (together, shared, fewer) = read[False], read[True]
    assert fewer == every - 3 * 20 - 3 * 12 - 2 * 17
    close = {"atol": 1e-4, "rtol": 1e-4} if precision == "float32" else {"atol": 0.1, "rtol": 0.05}
    torch.testing.assert_close(together, alone, **close)
    for name, gradient in shared.items():
        if precision == "float32":
            torch.testing.assert_close(gradient, own[name], atol=2e-3, rtol=1e-3)
        else:
            cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), own[name].flatten(), dim=0)
            assert float(cosine) > 0.98, name


def test_the_gradient_of_a_packed_row_is_that_of_each_sequence_alone_with_layers_computed_again_or_not(base: Path) -> None:
    batch = episodes()
    (packed,) = micro_batches(batch, range(len(batch)), max_tokens=10_000, width=30)
    assert len(packed.runs) > 2
    reference = own(base)
    for episode in batch:
        ids = torch.tensor([[*episode.prompt, *episode.response]])
        logits = reference(ids).logits[0, len(episode.prompt) - 1 : -1].float() / 0.7
        logits.log_softmax(-1).gather(1, torch.tensor(episode.response).unsqueeze(1)).sum().backward()
    expected = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    for recompute in (False, True):
        policy = PolicyModel(load_language_model(base), recompute=recompute)
        assert policy.language_model.config._attn_implementation == NAME
        policy.evaluate(packed).logprobs.sum().backward()
        for name, parameter in policy.language_model.named_parameters():
            if name in expected:
                torch.testing.assert_close(parameter.grad, expected[name], atol=2e-3, rtol=1e-3)


def test_an_update_moves_the_weights_and_the_export_says_what_the_policy_says(base: Path, tmp_path: Path) -> None:
    policy = PolicyModel(load_language_model(base))
    before = {name: value.clone() for name, value in policy.tensors().items()}
    reference, learner = ReferenceModel(load_language_model(base)), LearnerSettings()
    trainer = Trainer(
        policy,
        OnPolicyUpdates(PPO(learner, Options()), policy, reference, learner, kl=FixedKL(0.1), normaliser=GainBias()),
        build_optimizer("adam_tf", policy.trainable().values(), lr=1e-3),
        settings=TrainSettings(learning_rate=1e-3, epochs=2, minibatches=2, microbatch_tokens=200),
        generator=rng.generator(0),
    )
    stats = trainer.update(episodes())
    assert stats["kl"] == pytest.approx(0.0, abs=1e-4), "before the update the policy is the reference"
    # An attention's key bias alone shifts all scores of a query alike, so its gradient may be nothing.
    still = [name for name, value in policy.tensors().items() if torch.equal(value, before[name])]
    assert not [name for name in still if not name.endswith("k_proj.bias")]
    for dtype in ("float32", "bfloat16"):
        export_policy(policy, base, tmp_path / dtype, dtype=dtype)
        tied = policy.language_model.config.tie_word_embeddings
        read = own(tmp_path / dtype)
        tolerance = 5e-5 if dtype == "float32" else 0.5
        (canary,) = canary_logprobs(policy, [TEXT])
        assert logprobs(read, TEXT) == pytest.approx(canary.logprobs, abs=tolerance)
        assert ("lm_head.weight" in stored(tmp_path / dtype)) is not tied, "a tied output layer is stored once"
        load_language_model(tmp_path / dtype)


def stored(directory: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(directory / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("layers", [None, 2])
def test_a_reward_model_trains_on_the_body_and_scores_as_transformers_does(
    base: Path, layers: int | None, tmp_path: Path
) -> None:
    model = RewardModel.from_language_model(base, rng=rng.generator(1), layers=layers)
    model.normalise(SEQUENCES)
    model.raw_scores(SEQUENCES, dropout=0.2, rng=rng.generator(2)).sum().backward()
    unmoved = [p for p in model.classifier.parameters() if p.grad is None]
    assert not unmoved
    model.save(tmp_path / "rm", base)
    assert json.loads((tmp_path / "rm" / "config.json").read_text())["architectures"][0].endswith("ForSequenceClassification")
    read = RewardModel.load(tmp_path / "rm")
    assert read.rewards(SEQUENCES) == pytest.approx(model.rewards(SEQUENCES), abs=1e-4)
    plain = own(tmp_path / "rm", AutoModelForSequenceClassification)
    assert plain.config.num_hidden_layers == (layers or 3)
    with torch.no_grad():
        alone = [float(plain(torch.tensor([ids])).logits[0, 0]) + read.bias for ids in SEQUENCES]
    assert read.rewards(SEQUENCES) == pytest.approx(alone, abs=1e-4)
    assert read.max_tokens == POSITIONS
    assert (tmp_path / "rm" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("read", ["last", "mean"])
def test_a_head_reads_the_layers_and_tokens_that_it_is_told_to(base: Path, read: Place, tmp_path: Path) -> None:
    model = RewardModel.from_language_model(base, rng=rng.generator(1), pooling=Pooling(read, (3, 1)))
    model.save(tmp_path / "rm", base)
    features = RewardModel.load(tmp_path / "rm").features(SEQUENCES)
    body = own(base).base_model
    for ids, found in zip(SEQUENCES, features, strict=True):
        with torch.no_grad():
            hidden = body(torch.tensor([ids]), output_hidden_states=True).hidden_states
        states = torch.cat([hidden[3][0], hidden[1][0]], dim=-1)
        torch.testing.assert_close(found, states[-1] if read == "last" else states.mean(0), atol=1e-4, rtol=1e-4)
    short = RewardModel.from_language_model(base, rng=rng.generator(1), pooling=Pooling(read, (1, 2)))
    assert short.classifier.config.num_hidden_layers == 2, "what is above is not read"


def test_more_layers_than_there_are_is_refused(base: Path) -> None:
    with pytest.raises(InvalidArgument, match="has 3, cannot keep 4"):
        RewardModel.from_language_model(base, rng=rng.generator(1), layers=4)


def test_a_generator_that_wants_more_positions_than_the_model_has_is_refused_with_the_reason(base: Path) -> None:
    facts = ModelFacts.read(base)
    facts.check_length(POSITIONS)
    with pytest.raises(
        InvalidArgument, match=rf"generation\.max_model_tokens: is 129, .* has positions for {POSITIONS} tokens"
    ):
        facts.check_length(POSITIONS + 1)
    assert facts.end_token_ids == {0}
    assert facts.vocabulary_size == 264
