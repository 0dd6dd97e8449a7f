"""TRL's PPO, in the last release that has it, on the task: `python -m loadtest.peers.trl_ppo TASK` in the peers' environment.

No samples printed, no checkpoints, and a reward model that only looks tokens up. Unless the task takes it as it comes, it
is set up as fast as it can be: all of the batch in one pass, no gradient checkpointing. Its padding token lies outside of
what the policy can sample, which would otherwise end TRL's responses early.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer

from loadtest.peers.task import PEER_BATCH, Task, score, words
from loadtest.peers.told import Done, Teller


class Reward(torch.nn.Module):
    """`score` of the last tokens of each row, in the form in which TRL asks a reward model."""

    base_model_prefix = "backbone"

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.register_buffer("worth", torch.tensor([score(word) for word in words()]))

    def backbone(self, input_ids: torch.Tensor, **others: Any) -> SimpleNamespace:
        """The worth of each token, `[b, L, 1]`, for a hidden state."""
        return SimpleNamespace(hidden_states=(self.worth[input_ids].unsqueeze(-1),))

    def score(self, hidden: torch.Tensor) -> torch.Tensor:
        """The mean over the response, at each position."""
        return hidden[:, -self.tokens :].mean(1, keepdim=True).expand(hidden.shape)


def main(task: Task) -> None:
    """Trains until the time is over."""
    torch.set_num_threads(task.threads)
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})  # beyond the model's vocabulary: no policy samples it
    texts = load_dataset("json", data_files=task.prompts, split="train")
    prompts = texts.map(lambda row: {"input_ids": tokenizer(row["text"])["input_ids"]}, remove_columns=["text"])
    policy, reference = (AutoModelForCausalLM.from_pretrained(task.model) for _ in range(2))
    value = AutoModelForSequenceClassification.from_pretrained(task.model, num_labels=1)
    with tempfile.TemporaryDirectory() as directory:
        settings = PPOConfig(
            output_dir=directory,
            total_episodes=10_000_000,
            **_passes(task),
            num_mini_batches=1,
            num_ppo_epochs=task.epochs,
            response_length=task.tokens,
            temperature=1.0,
            kl_coef=task.kl,
            learning_rate=task.learning_rate,
            lr_scheduler_type="constant",
            num_sample_generations=0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=task.precision == "bfloat16",
            use_cpu=True,
            seed=task.seed,
        )
        trainer = PPOTrainer(
            args=settings,
            processing_class=tokenizer,
            model=policy,
            ref_model=reference,
            reward_model=Reward(task.tokens),
            value_model=value,
            train_dataset=prompts,
            callbacks=[Teller(task.seconds, lambda logs: logs.get("objective/scores"))],
        )
        try:
            trainer.train()
        except Done:
            return


def _passes(task: Task) -> dict[str, Any]:
    """How the batch is cut into passes, and whether they keep their activations."""
    if task.as_it_comes:
        return {"per_device_train_batch_size": PEER_BATCH, "gradient_accumulation_steps": task.batch // PEER_BATCH}
    whole = {"per_device_train_batch_size": task.batch, "gradient_accumulation_steps": 1}
    return {**whole, "local_rollout_forward_batch_size": task.batch, "gradient_checkpointing": False}


if __name__ == "__main__":
    main(Task.read(Path(sys.argv[1])))
