"""TRL's GRPO on the task: run in the peers' environment, `python -m loadtest.peers.trl_grpo TASK`.

No reference model, no dropout, no clipping, no samples printed, no checkpoints. Unless the task takes it as it comes, it is
set up as fast as it can be: all of the batch in one pass, no gradient checkpointing.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from loadtest.peers.task import PEER_BATCH, Task, score
from loadtest.peers.told import Done, Teller


def reward(completions: Sequence[str], **others: Any) -> list[float]:
    """The task's reward, in the form in which TRL asks for it."""
    return [score(text) for text in completions]


def main(task: Task) -> None:
    """Trains until the time is over."""
    torch.set_num_threads(task.threads)
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})  # beyond the model's vocabulary: no policy samples it
    prompts = load_dataset("json", data_files=task.prompts, split="train").rename_column("text", "prompt")
    with tempfile.TemporaryDirectory() as directory:
        settings = GRPOConfig(
            output_dir=directory,
            max_steps=1_000_000,
            **_passes(task),
            num_generations=task.group,
            num_iterations=task.epochs,
            max_completion_length=task.tokens,
            generation_kwargs={"min_new_tokens": task.tokens},
            temperature=1.0,
            beta=task.kl,
            loss_type="grpo",
            learning_rate=task.learning_rate,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            disable_dropout=True,
            bf16=task.precision == "bfloat16",
            use_cpu=True,
            seed=task.seed,
        )
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(task.model),
            reward_funcs=reward,
            args=settings,
            train_dataset=prompts,
            processing_class=tokenizer,
            callbacks=[Teller(task.seconds, lambda logs: logs.get("reward"))],
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
    return {**whole, "steps_per_generation": 1, "gradient_checkpointing": False}


if __name__ == "__main__":
    main(Task.read(Path(sys.argv[1])))
