"""Against TRL's trainers, whose losses are inside of methods: those are called on objects that hold no more than they read."""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.peers.parity import CAP, GROUP, SHAPES, Batch, loss_of, same, weights_of
from torch import Tensor
from torch.nn import functional
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer, RLOOTrainer
from trl.experimental.cpo import CPOTrainer

from honed.learner.objectives import direct, group, preference
from honed.learner.settings import LearnerSettings

BETA = 0.4


def accelerator() -> SimpleNamespace:
    """One process: what is gathered and reduced is what was given."""
    return SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=1,
        process_index=0,
        gather=lambda tensor: tensor,
        gather_for_metrics=lambda tensor: tensor,
        reduce=lambda tensor, reduction: tensor,
        autocast=nullcontext,
    )


def trainer(**fields: Any) -> SimpleNamespace:
    """What every trainer reads of itself, and what one reads beside that."""
    model = SimpleNamespace(training=True, is_gradient_checkpointing=False)
    every = {
        "model": model,
        "ref_model": None,
        "accelerator": accelerator(),
        "aux_loss_enabled": False,
        "beta": BETA,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    return SimpleNamespace(**every | fields)


class Model:
    """Answers with log-probabilities that are given to it, beside what trainers report."""

    training, is_gradient_checkpointing = True, False

    def __init__(self, *logprobs: Tensor) -> None:
        """One `[n, T]` for each call, zero where no completion's token is."""
        self._logprobs = list(logprobs)

    def __call__(self, **inputs: Any) -> SimpleNamespace:
        logprobs = self._logprobs.pop(0)
        zeros = torch.zeros_like(logprobs)
        return SimpleNamespace(log_probs=logprobs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def completions(mask: Tensor) -> dict[str, Tensor]:
    """Inputs of one token of prompt and the completions behind it."""
    whole = torch.cat([torch.zeros(len(mask), 1, dtype=torch.long), mask.long()], 1)
    return {"input_ids": torch.ones_like(whole), "attention_mask": torch.ones_like(whole), "completion_mask": whole}


# Direct preferences: the first half of a batch was chosen, the second rejected.


def dpo_of_trl(batch: Batch, kind: str, label_smoothing: float = 0.0) -> Tensor:
    stub = trainer(
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        ld_alpha=None,
        precompute_ref_logps=False,
        ref_model=Model(batch.reference),
        f_divergence_type="reverse_kl",
        loss_types=[kind],
        loss_weights=[1.0],
        label_smoothing=label_smoothing,
        use_weighting=False,
    )
    return DPOTrainer._compute_loss(stub, Model(batch.logprobs), completions(batch.mask), False)


def margins_of(batch: Batch, *, mean: bool) -> Tensor:
    ratios = (batch.logprobs - batch.reference).sum(1)
    if mean:
        ratios = ratios / batch.mask.sum(1)
    chosen, rejected = ratios.chunk(2)
    return chosen - rejected


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo"])
def test_dpo_hinge_and_ipo_whose_margin_is_of_means_over_tokens(kind: direct.Kind, shape: str) -> None:
    ours, theirs = (Batch.random(shape).with_gradient() for _ in range(2))
    loss = direct.direct_preference(margins_of(ours, mean=kind == "ipo"), beta=BETA, kind=kind).mean()
    expected = dpo_of_trl(theirs, kind)
    peer = f"DPOTrainer._compute_loss, {kind}"
    same(loss, expected, what=f"direct_preference {kind}", peer=peer)
    loss.backward()
    expected.backward()
    same(ours.logprobs.grad, theirs.logprobs.grad, what=f"gradient of direct_preference {kind}", peer=peer)


@pytest.mark.parametrize("shape", SHAPES)
def test_label_smoothing_is_that_of_aot_whose_sorting_moves_nothing_in_a_batch_of_one(shape: str) -> None:
    """TRL's "sigmoid" reads no label smoothing (its "robust" is another loss); its "aot_unpaired" and CPO do as cDPO."""
    batch = Batch.random(shape)
    losses = direct.direct_preference(margins_of(batch, mean=False), beta=BETA, label_smoothing=0.1)
    for pair, loss in enumerate(losses):
        index = torch.tensor([pair, pair + len(losses)])
        one = Batch(**{name: rows[index] for name, rows in vars(batch).items()})
        expected = dpo_of_trl(one, "aot_unpaired", label_smoothing=0.1)
        same(loss, expected, what="direct_preference label_smoothing", peer="DPOTrainer._compute_loss, aot_unpaired")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "label_smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.1), ("hinge", 0.0), ("ipo", 0.0)])
def test_each_comparisons_loss_is_that_of_cpo_where_the_reference_is_uniform(
    kind: direct.Kind, label_smoothing: float, shape: str
) -> None:
    chosen, rejected = Batch.random(shape).logprobs.mean(1).chunk(2)
    stub = trainer(alpha=0.0, loss_type=kind, label_smoothing=label_smoothing)
    expected, _, _ = CPOTrainer.cpo_loss(stub, chosen, rejected)
    loss = direct.direct_preference(chosen - rejected, beta=BETA, kind=kind, label_smoothing=label_smoothing)
    what = f"direct_preference {kind}{' label_smoothing' if label_smoothing else ''}, each term"
    same(loss, expected, what=what, peer="CPOTrainer.cpo_loss")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(4))
def test_kto_and_the_kl_of_mismatched_pairs_that_it_judges_against(shape: str, seed: int) -> None:
    ours, theirs = (Batch.random(shape, seed).with_gradient() for _ in range(2))
    mismatched = Batch.random(shape, seed + 100)
    desirable = torch.arange(len(ours.scores)) % 3 != 1
    labelled = completions(theirs.mask) | {"label": desirable}
    labelled |= {f"KL_{name}": tensor for name, tensor in completions(mismatched.mask).items()}
    stub = trainer(
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        calculate_KL=True,
        precompute_ref_logps=False,
        ref_model=Model(mismatched.reference, theirs.reference),
        loss_type="kto",
        desirable_weight=1.2,
        undesirable_weight=0.9,
    )
    stub._compute_kl_logps = lambda model, inputs: KTOTrainer._compute_kl_logps(stub, model, inputs)
    expected = KTOTrainer._compute_loss(stub, Model(mismatched.logprobs, theirs.logprobs), labelled, False)

    kl = direct.mismatched_kl((mismatched.logprobs - mismatched.reference).sum(1))
    log_ratios = (ours.logprobs - ours.reference).sum(1)
    weights = {"desirable_weight": 1.2, "undesirable_weight": 0.9}
    loss = direct.kto(log_ratios, desirable, kl, beta=BETA, **weights).mean()
    same(kl, torch.tensor(stub._metrics["train"]["kl"][0]), what="mismatched_kl", peer="KTOTrainer._compute_loss")
    same(loss, expected, what="kto", peer="KTOTrainer._compute_loss")
    loss.backward()
    expected.backward()
    same(ours.logprobs.grad, theirs.logprobs.grad, what="gradient of kto", peer="KTOTrainer._compute_loss")


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_bradley_terry_with_and_without_a_margin(shape: str, margin: bool) -> None:
    chosen, rejected = Batch.random(shape).scores.chunk(2)
    stub = trainer(args=SimpleNamespace(center_rewards_coefficient=None))
    inputs = {"attention_mask": torch.ones(len(chosen) * 2, 1)}
    if margin:
        inputs["margin"] = torch.linspace(0.5, 1.5, len(chosen))
    logits = torch.cat([chosen, rejected]).unsqueeze(1)
    expected = RewardTrainer.compute_loss(stub, lambda **_: SimpleNamespace(logits=logits), inputs)
    loss = preference.bradley_terry(chosen, rejected, inputs.get("margin"))
    same(loss, expected, what=f"bradley_terry{', margin' if margin else ''}", peer="RewardTrainer.compute_loss")


# Groups of responses to one prompt.


def scored_by_trl(kind: type, batch: Batch, **fields: Any) -> dict[str, Tensor]:
    """What GRPOTrainer and RLOOTrainer make of responses and their scores, before they learn."""
    lengths = batch.mask.sum(1).tolist()
    prompts, texts, tokens = ["p"] * len(lengths), ["c"] * len(lengths), [[1] * n for n in lengths]
    ids = [[1]] * len(lengths)
    sampler = [row[:n].tolist() for row, n in zip(batch.behaviour, lengths, strict=True)] if fields.get("use_vllm") else None
    answers = [batch.proximal, batch.reference]
    stub = trainer(
        args=SimpleNamespace(
            per_device_train_batch_size=len(lengths),
            gradient_checkpointing_kwargs=None,
            steps_per_generation=1,
            gradient_accumulation_steps=1,
        ),
        _tokenizer=SimpleNamespace(pad_token_id=0),
        pad_to_multiple_of=None,
        mask_truncated_completions=False,
        num_generations=GROUP,
        reward_weights=torch.ones(1),
        reward_func_names=["score"],
        reward_funcs=[None],
        ref_model=object(),
        _logs=defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)),
        _pending_extra_logs={},
        _pending_metrics={},
        _calculate_rewards=lambda *_: batch.scores.unsqueeze(1),
        **fields,
    )
    if kind is GRPOTrainer:
        stub._generate = lambda _: (ids, tokens, None, texts, sampler, {}, None, None)
        answers = answers if sampler else answers[1:]
    else:
        stub._generate = lambda _: (ids, tokens, texts)

    def log_probabilities(*_: Any, **__: Any) -> tuple[Tensor, None, None]:
        return answers.pop(0)[:, : max(lengths)], None, None

    stub._get_per_token_logps_and_entropies = log_probabilities
    return kind._generate_and_score_completions(stub, [{"prompt": prompt} for prompt in prompts])


def grpo_scored_by_trl(batch: Batch, scale: str, *, corrects: bool = False) -> dict[str, Tensor]:
    """With `corrects` as on vLLM, whose log-probabilities are the behaviour's: weights truncated at `CAP`."""
    fields = {
        "environment_factories": None,
        "environments": None,
        "tools": None,
        "num_iterations": 1,
        "use_vllm": corrects,
        "vllm_importance_sampling_correction": corrects,
        "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_clip_min": None,
        "vllm_importance_sampling_clip_max": CAP,
        "multi_objective_aggregation": "sum_then_normalize",
        "scale_rewards": scale,
    }
    return scored_by_trl(GRPOTrainer, batch, **fields)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_grpo_advantages_by_unbiased_deviations(scale: str, shape: str) -> None:
    """Both divide by n - 1 and add 1e-4; verl adds 1e-6."""
    batch = Batch.random(shape)
    ours = group.relative_advantages(batch.scores, batch.groups, scale)
    peer = "GRPOTrainer._generate_and_score_completions"
    same(ours, grpo_scored_by_trl(batch, scale)["advantages"], what=f"relative_advantages, scale {scale}", peer=peer)


def sequence_loss_of_trl(kind: type, batch: Batch, inputs: dict[str, Tensor], **fields: Any) -> Tensor:
    """The loss of GRPOTrainer or RLOOTrainer by log-probabilities that are given to it."""
    stub = trainer(**{"epsilon_low": 0.2, "epsilon_high": 0.28} | fields)
    stub._get_per_token_logps_and_entropies = lambda *_, **__: (batch.logprobs, torch.zeros_like(batch.logprobs), None)
    tokens = batch.mask.long()
    whole = {
        "prompt_ids": torch.ones(len(tokens), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(tokens), 1, dtype=torch.long),
        "completion_ids": tokens,
        "completion_mask": tokens,
        **inputs,
    }
    return kind._compute_loss(stub, None, whole)


GRPO = {
    "GRPO": ({}, {"loss_type": "grpo"}),
    "GRPO without KL": ({"beta": 0.0}, {"loss_type": "grpo"}),
    "Dr. GRPO": ({"scale": "none", "reduction": "constant", "constant": 17}, {"loss_type": "dr_grpo", "scale": "none"}),
    "DAPO": ({"reduction": "tokens"}, {"loss_type": "dapo"}),
    "token mean": ({"reduction": "tokens"}, {"loss_type": "bnpo"}),
    "GSPO": ({"ratio": "response"}, {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
    # TRL's bound of CISPO is of the ratio itself, ours of how far over 1 it may go.
    "CISPO": ({"surrogate": "cispo", "reduction": "tokens"}, {"loss_type": "cispo", "epsilon_high": 1.28}),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("name", GRPO)
def test_grpo_and_its_successors_also_decoupled_by_truncated_weights_of_stale_tokens(
    name: str, decoupled: bool, shape: str
) -> None:
    options, theirs = dict(GRPO[name][0]), dict(GRPO[name][1])
    beta, scale = options.pop("beta", 0.04), theirs.pop("scale", "group")
    learner = LearnerSettings(
        algorithm="grpo", clip_ratio=0.2, options={"clip_high": 0.28, **options}, kl={"coefficient": beta}
    )
    batch, peer_batch = (Batch.random(shape).with_gradient() for _ in range(2))
    loss = loss_of(learner, batch, decoupled=decoupled)

    fields: dict[str, Any] = {
        "beta": beta,
        "max_completion_length": 17,
        "importance_sampling_level": "token",
        "current_gradient_accumulation_steps": 1,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": decoupled,
        "vllm_importance_sampling_correction": decoupled,
        "_entropy_bonus_enabled": False,
        "args": SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        **theirs,
    }
    scored = grpo_scored_by_trl(peer_batch, scale, corrects=decoupled)
    inputs = {
        "advantages": scored["advantages"],
        "old_per_token_logps": peer_batch.proximal,
        "ref_per_token_logps": peer_batch.reference,
        "num_items_in_batch": peer_batch.mask.sum(),
    }
    what = f"grpo, {name}"
    peer = f"GRPOTrainer._compute_loss, {fields['loss_type']}, {fields['importance_sampling_level']}"
    if decoupled:
        # Rows end where the longest response does.
        ratio = scored["importance_sampling_ratio"]
        longest = ratio.shape[1]
        kept = batch.mask[:, :longest]
        same(weights_of(batch)[:, :longest][kept], ratio[kept], what="behaviour_weights", peer="GRPOTrainer, token_truncate")
        inputs["importance_sampling_ratio"] = functional.pad(ratio, (0, batch.mask.shape[1] - longest))
        what, peer = f"{what}, decoupled", f"{peer}, vllm_importance_sampling_correction"
    expected = sequence_loss_of_trl(GRPOTrainer, peer_batch, inputs, **fields)
    same(loss, expected, what=what, peer=peer)
    loss.backward()
    expected.backward()
    same(batch.logprobs.grad, peer_batch.logprobs.grad, what=f"gradient of {what}", peer=peer)


@pytest.mark.parametrize("shape", SHAPES)
def test_dual_clip_is_the_two_sided_clip_of_grpo(shape: str) -> None:
    """TRL bounds the ratio itself by `delta`; where that is over the clip range, both bound the same losses."""
    batch, peer_batch = (Batch.random(shape).with_gradient() for _ in range(2))
    advantages = torch.linspace(-1.5, 0.5, len(batch.scores))
    learner = LearnerSettings(options={"dual_clip": 1.4}, clip_ratio=0.2, value_coefficient=0.0)
    rows = {"advantages": advantages.unsqueeze(1).expand(batch.mask.shape), "returns": torch.zeros_like(batch.rewards)}
    loss = loss_of(learner, batch, rows)
    expected = sequence_loss_of_trl(
        GRPOTrainer,
        peer_batch,
        {"advantages": advantages, "old_per_token_logps": peer_batch.proximal},
        beta=0.0,
        loss_type="bnpo",
        importance_sampling_level="token",
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        args=SimpleNamespace(delta=1.4, use_bias_correction_kl=False),
        epsilon_high=0.2,
    )
    same(loss, expected, what="ppo, dual_clip", peer="GRPOTrainer._compute_loss, bnpo, delta")
    loss.backward()
    expected.backward()
    same(batch.logprobs.grad, peer_batch.logprobs.grad, what="gradient of ppo, dual_clip", peer="GRPOTrainer, delta")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normalise", [False, True])
def test_rloo_with_the_kl_of_whole_responses_in_their_reward(normalise: bool, shape: str) -> None:
    batch, peer_batch = (Batch.random(shape).with_gradient() for _ in range(2))
    learner = LearnerSettings(algorithm="rloo", clip_ratio=0.2, options={"normalise": normalise}, kl={"coefficient": 0.05})
    loss = loss_of(learner, batch)
    fields = {"beta": 0.05, "reward_clip_range": None, "normalize_advantages": normalise}
    scored = scored_by_trl(RLOOTrainer, peer_batch, **fields)
    rewards = batch.scores - 0.05 * (batch.proximal - batch.reference).sum(1)
    if not normalise:
        advantages = group.leave_one_out_advantages(rewards, batch.groups)
        same(
            advantages,
            scored["advantages"],
            what="leave_one_out_advantages",
            peer="RLOOTrainer._generate_and_score_completions",
        )
    inputs = {name: scored[name] for name in ("advantages", "old_logps")}
    expected = sequence_loss_of_trl(RLOOTrainer, peer_batch, inputs, epsilon_high=0.2)
    what = f"rloo{', normalise' if normalise else ''}"
    same(loss, expected, what=what, peer="RLOOTrainer._compute_loss")
    loss.backward()
    expected.backward()
    same(batch.logprobs.grad, peer_batch.logprobs.grad, what=f"gradient of {what}", peer="RLOOTrainer._compute_loss")
