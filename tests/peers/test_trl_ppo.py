"""Against TRL's PPO, which was removed after 1.12.0: the release that `make peers` lays beside the others.

Its arithmetic is in one method, `PPOTrainer.train`. That is called for one update on an object that holds no more than it
reads, with models that answer with random numbers; its module's `masked_whiten` and `masked_mean` are listened to on the way.

TRL learns from a step more than was sampled: the first pad behind a response has a value, and the score is its reward. So it is
compared with ours on rows that are one token longer, unless they fill the batch's width.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from tests.peers.parity import SHAPES, Batch, loss_of, same
from torch import Tensor
from trl.experimental.ppo import PPOTrainer, ppo_trainer

from honed.learner.objectives import advantage, policy_gradient, value
from honed.learner.settings import LearnerSettings

PEER = "PPOTrainer.train"
VOCABULARY, PAD = 7, 0
GAMMA, LAM = 0.98, 0.9


@dataclass(frozen=True)
class Update:
    """One update of TRL's.

    Attributes:
        mask: The steps that TRL learns values of: a response's tokens and the one behind them.
        responses: The response's tokens.
        old, reference, new: Log-probabilities, zero on pads; `new` with its gradient.
        old_values, values: Likewise.
        token_rewards: Before they are whitened; None where they are not whitened.
        rewards: What advantages are made of; None likewise.
        raw, whitened: Advantages, before and after whitening.
        policy_loss, value_loss: Scalars.
        gradient: Of the sum of both losses by the log-probabilities of response tokens.
        value_gradient: By the values.
    """

    mask: Tensor
    responses: Tensor
    old: Tensor
    reference: Tensor
    new: Tensor
    old_values: Tensor
    values: Tensor
    token_rewards: Tensor | None
    rewards: Tensor | None
    raw: Tensor
    whitened: Tensor
    policy_loss: Tensor
    value_loss: Tensor
    gradient: Tensor
    value_gradient: Tensor


class Listener:
    """Calls a function, and keeps what it was called with and what it answered."""

    def __init__(self, function: Any) -> None:
        self.function, self.calls = function, []

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        answer = self.function(*args, **kwargs)
        given = args[0].detach().clone() if not args[0].requires_grad else args[0]
        self.calls.append((given, kwargs.get("mask", args[1] if len(args) > 1 else None), answer))
        return answer


def update_of_trl(
    monkeypatch: pytest.MonkeyPatch, batch: Batch, *, whiten_rewards: bool = True, kl: str = "k1", **settings: Any
) -> Update:
    """One update on the batch's scores and values, and on log-probabilities of random logits."""
    rows, width = batch.mask.shape
    source = torch.Generator().manual_seed(7)
    logits, reference = (torch.randn(rows, width, VOCABULARY, generator=source) for _ in range(2))
    new_logits = logits + 0.3 * torch.randn(logits.shape, generator=source)
    sampled = torch.randint(1, VOCABULARY, (rows, width), generator=source).masked_fill(~batch.mask, PAD)
    queries = torch.full((rows, 1), PAD + 1)
    values = batch.values.clone().requires_grad_()

    def framed(tensor: Tensor) -> Tensor:
        """As a model answers on query and response: answers at the token before, and one more at the end."""
        return torch.cat([tensor, tensor[:, -1:]], 1)

    model = MagicMock()
    policy_answer = SimpleNamespace(logits=framed(new_logits))

    def forward(of: Any, *_: Any) -> Any:
        return (policy_answer, framed(values.unsqueeze(2))) if of is model else SimpleNamespace(logits=framed(reference))

    def reward(of: Any, *_: Any) -> tuple[Tensor, Tensor, Any]:
        return framed(batch.old_values.unsqueeze(2)), batch.scores, None

    whitened, averaged = Listener(ppo_trainer.masked_whiten), Listener(ppo_trainer.masked_mean)
    chosen = Listener(ppo_trainer.selective_log_softmax)
    monkeypatch.setattr(ppo_trainer, "masked_whiten", whitened)
    monkeypatch.setattr(ppo_trainer, "masked_mean", averaged)
    monkeypatch.setattr(ppo_trainer, "selective_log_softmax", chosen)
    monkeypatch.setattr(ppo_trainer, "forward", forward)
    monkeypatch.setattr(ppo_trainer, "get_reward", reward)
    monkeypatch.setattr(ppo_trainer, "unwrap_model_for_generation", lambda *_, **__: nullcontext(MagicMock()))
    monkeypatch.setattr(ppo_trainer, "batch_generation", lambda *_: (torch.cat([queries, sampled], 1), logits))
    monkeypatch.setattr(np.random, "permutation", np.arange)

    new_logits.requires_grad_()
    policy_answer.logits = framed(new_logits)
    losses: list[Tensor] = []

    def backward(loss: Tensor) -> None:
        chosen.calls[-1][2].retain_grad()
        loss.backward()
        losses.append(loss)

    every = {
        "response_length": width,
        "temperature": 1.0,
        "num_ppo_epochs": 1,
        "num_mini_batches": 1,
        "gradient_accumulation_steps": 1,
        "num_total_batches": 1,
        "total_episodes": rows,
        "batch_size": rows,
        "local_batch_size": rows,
        "local_mini_batch_size": rows,
        "per_device_train_batch_size": rows,
        "local_rollout_forward_batch_size": rows,
        "logging_steps": None,
        "eval_steps": None,
        "save_steps": None,
        "num_sample_generations": 0,
        "ds3_gather_for_generation": False,
        "missing_eos_penalty": None,
        "whiten_rewards": whiten_rewards,
        "kl_estimator": kl,
        "kl_coef": 0.1,
        "gamma": GAMMA,
        "lam": LAM,
        "cliprange": 0.2,
        "cliprange_value": 0.2,
        "vf_coef": 0.5,
    }
    stub = SimpleNamespace(
        args=SimpleNamespace(**every | settings),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"),
            print=lambda *_: None,
            unwrap_model=lambda wrapped: wrapped,
            accumulate=lambda _: nullcontext(),
            gather_for_metrics=lambda tensor: tensor,
            backward=backward,
        ),
        optimizer=MagicMock(),
        lr_scheduler=MagicMock(),
        model=model,
        ref_model=object(),
        reward_model=object(),
        processing_class=SimpleNamespace(pad_token_id=PAD, eos_token_id=PAD + 1),
        dataloader=[{"input_ids": queries}],
        stop_token_id=None,
        state=SimpleNamespace(),
        control=SimpleNamespace(should_save=False),
        callback_handler=MagicMock(**{"on_step_end.return_value": SimpleNamespace(should_save=False)}),
        train_dataset_len=rows,
        is_deepspeed_enabled=False,
        log=lambda _: None,
    )
    stub.callback_handler.on_train_begin.return_value = stub.control
    stub.callback_handler.on_train_end.return_value = stub.control
    PPOTrainer.train(stub)

    old, theirs, new = (call[2] for call in chosen.calls)
    # Both masked means that carry a gradient: of value losses, then of policy losses.
    value_loss, policy_loss = (call for call in averaged.calls if call[0].requires_grad)
    whitenings = list(whitened.calls)
    raw, _, advantages = whitenings.pop()
    mask = value_loss[1]
    # After whitening, TRL zeroes what is past the mask.
    rewards = whitenings[0][2].masked_fill(~mask, 0.0) if whitenings else None
    return Update(
        mask=mask,
        responses=batch.mask,
        old=old.masked_fill(~batch.mask, 0.0),
        reference=theirs.masked_fill(~batch.mask, 0.0),
        new=new.detach().masked_fill(~batch.mask, 0.0),
        old_values=batch.old_values.masked_fill(~mask, 0.0),
        values=values.detach().masked_fill(~mask, 0.0),
        token_rewards=whitenings[0][0] if whitenings else None,
        rewards=rewards,
        raw=raw,
        whitened=advantages.masked_fill(~policy_loss[1], 0.0),
        policy_loss=policy_loss[2].detach(),
        value_loss=0.5 * value_loss[2].detach(),
        gradient=new.grad,
        value_gradient=values.grad,
    )


def longer(shape: str) -> Batch:
    """A batch whose values go on behind its responses, as a value head's do."""
    batch = Batch.random(shape)
    source = torch.Generator().manual_seed(11)
    values, old_values = (torch.randn(batch.mask.shape, generator=source) for _ in range(2))
    return replace(batch, values=values, old_values=old_values)


@pytest.mark.parametrize("shape", SHAPES)
def test_token_rewards_whose_score_is_at_the_last_step(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = longer(shape)
    update = update_of_trl(monkeypatch, batch)
    ours = advantage.token_rewards(update.old, update.reference, batch.scores, update.mask, beta=0.1)
    same(ours, update.token_rewards.masked_fill(~update.mask, 0.0), what="token_rewards, k1", peer=PEER)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_k3_estimate_of_the_kl(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = replace(longer(shape), scores=torch.zeros(len(SHAPES[shape])))
    update = update_of_trl(monkeypatch, batch, kl="k3", kl_coef=1.0)
    ours = policy_gradient.reference_kl_terms(update.old, update.reference)
    same(ours, -update.token_rewards, what="reference_kl_terms, k3", peer=PEER)


@pytest.mark.parametrize("shape", SHAPES)
def test_generalised_advantages(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    update = update_of_trl(monkeypatch, longer(shape))
    ours = advantage.generalised_advantages(update.rewards, update.old_values, update.mask, gamma=GAMMA, lam=LAM)
    same(ours, update.raw.masked_fill(~update.mask, 0.0), what="generalised_advantages", peer=PEER)


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_whitening_follows_openais_population_variance_where_trl_divides_by_one_less(shape: str, shift_mean: bool) -> None:
    """lm-human-preferences divides by n, and so do we; TRL's deviation is that of n - 1, the rest is the same."""
    batch = Batch.random(shape)
    count, kept = int(batch.mask.sum()), batch.rewards[batch.mask]
    theirs = ppo_trainer.masked_whiten(batch.rewards, batch.mask, shift_mean=shift_mean)
    ours = advantage.whiten(batch.rewards, batch.mask, shift_mean=shift_mean)
    mean = 0.0 if shift_mean else float(kept.mean())
    rescaled = (ours - mean) * ((count - 1) / count) ** 0.5 + mean
    what = f"whiten, shift_mean {shift_mean}, times sqrt((n - 1) / n)"
    same(rescaled[batch.mask], theirs[batch.mask], what=what, peer="ppo_trainer.masked_whiten")

    population = ppo_trainer.masked_var(batch.rewards, batch.mask, unbiased=False)
    plain = (batch.rewards - kept.mean()) * torch.rsqrt(population + 1e-8) + mean
    same(ours[batch.mask], plain[batch.mask], what=f"whiten, shift_mean {shift_mean}", peer="ppo_trainer.masked_var")


@pytest.mark.parametrize("shape", SHAPES)
def test_the_clipped_losses_of_policy_and_value_and_their_gradients(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's policy loss is a mean over sampled tokens, its value loss a mean over those and the step more."""
    update = update_of_trl(monkeypatch, longer(shape))
    returns = update.raw + update.old_values
    ours = Batch(
        mask=update.responses,
        logprobs=update.new,
        proximal=update.old,
        reference=update.reference,
        behaviour=update.old,
        values=update.values,
        old_values=update.old_values,
        rewards=returns,
        advantages=update.whitened,
        scores=torch.zeros(len(update.new)),
    ).with_gradient()
    rows = {"advantages": ours.advantages, "returns": returns}
    policy_loss = loss_of(LearnerSettings(value_coefficient=0.0), ours, rows)
    step_more = (tensor[update.mask] for tensor in (ours.values, ours.old_values, returns))
    value_loss = value.value_loss_terms(*step_more, clip=0.2).mean()
    same(policy_loss, update.policy_loss, what="ppo, policy loss", peer=PEER)
    same(value_loss, update.value_loss, what="value_loss_terms", peer=PEER)
    (policy_loss + 0.5 * value_loss).backward()
    same(ours.logprobs.grad, update.gradient, what="gradient of ppo by log-probabilities", peer=PEER)
    same(ours.values.grad, update.value_gradient, what="gradient of ppo by values", peer=PEER)
