"""The comparing job: two versions of the store continue the same prompts with the same random numbers.

`python -m honed.learner.jobs.compare DIRECTORY` reads `task.json` there and writes `result.json`. It is a process of its own,
so that two models in memory concern nobody who serves.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from honed.artifacts.store import PolicyStore
from honed.artifacts.version import VersionId
from honed.models.chat import ChatMessage
from honed.models.facts import ModelFacts
from honed.models.loader import load_language_model
from honed.models.tokenizer import TextTokenizer, load_tokenizer, render_chat

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Sampling:
    """How to continue a prompt.

    Attributes:
        max_tokens: the most tokens of a response.
        temperature: over the logits.
        ends: tokens that end a response, themselves part of it; empty for responses of exactly `max_tokens`.
    """

    max_tokens: int
    temperature: float
    ends: frozenset[int]


def compare(task: Mapping[str, Any], into: Path) -> list[dict[str, Any]]:
    """Samples both versions; returns one row a prompt, each side with `text`, `token_ids`, `logprobs`, `other_logprobs`.

    Raises:
        HonedError: a version is not in the store or damaged, or a prompt cannot be used.
    """
    store = PolicyStore(task["store"], task["run"])
    directories = {side: store.fetch(VersionId.parse(task[side]), into / side) for side in ("left", "right")}
    tokenizer = load_tokenizer(directories["left"])
    ends = ModelFacts.read(directories["left"]).end_token_ids
    sampling = Sampling(task["max_tokens"], task["temperature"], frozenset() if task["fixed_length"] else ends)
    models = {side: load_language_model(path, dtype=_DTYPES[task["dtype"]]) for side, path in directories.items()}
    rows = []
    for number, prompt in enumerate(task["prompts"]):
        ids = _token_ids(prompt, tokenizer)
        row: dict[str, Any] = {"prompt": _shown(prompt), "prompt_token_ids": ids}
        for side, other in (("left", "right"), ("right", "left")):
            rng = torch.Generator().manual_seed(task["seed"] * 1_000_003 + number)
            response = continued(models[side], ids, sampling, rng)
            row[side] = {
                "text": tokenizer.decode(response),
                "token_ids": response,
                "logprobs": logprobs(models[side], ids, response, sampling.temperature),
                "other_logprobs": logprobs(models[other], ids, response, sampling.temperature),
            }
        rows.append(row)
    return rows


@torch.no_grad()
def continued(model: Any, prompt: Sequence[int], sampling: Sampling, rng: torch.Generator) -> list[int]:
    """Samples a response by one uniform number a token, so that equal models with equal numbers say the same."""
    step, cache, response = torch.tensor([list(prompt)]), None, []
    for _ in range(sampling.max_tokens):
        output = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        cumulative = (output.logits[0, -1].float() / sampling.temperature).softmax(-1).cumsum(-1)
        drawn = torch.rand(1, generator=rng) * cumulative[-1]
        token = min(int(torch.searchsorted(cumulative, drawn)), len(cumulative) - 1)
        response.append(token)
        if token in sampling.ends:
            break
        step = torch.tensor([[token]])
    return response


@torch.no_grad()
def logprobs(model: Any, prompt: Sequence[int], response: Sequence[int], temperature: float) -> list[float]:
    """Log-probability of each token of the response under the model, nats, at the sampling temperature."""
    ids = torch.tensor([[*prompt, *response]])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float() / temperature
    found: list[float] = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0].tolist()
    return found


def _token_ids(prompt: Mapping[str, Any], tokenizer: TextTokenizer) -> list[int]:
    if "token_ids" in prompt:
        return list(prompt["token_ids"])
    if "messages" in prompt:
        return render_chat(tokenizer, [ChatMessage(m["role"], m["content"]) for m in prompt["messages"]])
    return tokenizer.encode(prompt["text"], special_tokens=True)


def _shown(prompt: Mapping[str, Any]) -> str:
    if "messages" in prompt:
        return "\n".join(f"{m['role']}: {m['content']}" for m in prompt["messages"])
    return str(prompt.get("text") or " ".join(map(str, prompt["token_ids"])))


def main() -> None:
    """Runs the job of the directory that the command line names."""
    directory = Path(sys.argv[1])
    task = json.loads((directory / "task.json").read_text())
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    rows = compare(task, directory)
    partial = directory / "result.partial"
    partial.write_text(json.dumps(rows))
    partial.replace(directory / "result.json")


if __name__ == "__main__":
    main()
