"""The run's endless sequence of prompts: turn t is always the same prompt with the same seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from honed.config import ConductorSettings
from honed.kit.jsonl import read_lines
from honed.queue.messages import Message
from honed.v1 import common_pb2

_SEED_SPACE = 1 << 48


class PromptSequence:
    """Goes through all prompts again and again, each time in another order."""

    def __init__(self, run: str, prompts: list[list[int]], seed: int, settings: ConductorSettings) -> None:
        """`prompts` are token ids.

        Raises:
            ValueError: there are no prompts.
        """
        if not prompts:
            raise ValueError("there are no prompts to train on: data.prompts is empty")
        self._run, self._prompts, self._seed, self._settings = run, prompts, seed, settings

    @classmethod
    def load(cls, run: str, path: Path, model: Path, seed: int, settings: ConductorSettings, *, longest: int) -> PromptSequence:
        """Reads JSON lines with `token_ids`, or `text` for the tokenizer of the model directory.

        Args:
            run: its name.
            path: the file.
            model: whose tokenizer.
            seed: of order and samples.
            settings: how to sample.
            longest: tokens that a prompt may have; the generator would refuse a longer one again and again.

        Raises:
            ValueError: the file is missing, damaged, or a line has no prompt that can be used; names file and line.
        """
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        prompts = [_token_ids(path, number, row, tokenizer, longest) for number, row in read_lines(path)]
        return cls(run, prompts, seed, settings)

    def messages(self, first: int, count: int) -> Iterator[Message]:
        """The turns `first` to `first + count`, as entries of the stream `prompts`."""
        for turn in range(first, first + count):
            epoch, place = divmod(turn, len(self._prompts))
            task = common_pb2.PromptTask(
                group_id=f"{self._run}-{turn}",
                run=self._run,
                prompt_token_ids=self._prompts[self._order(epoch)[place]],
                sampling=common_pb2.SamplingParams(
                    max_tokens=self._settings.response_tokens,
                    temperature=self._settings.temperature,
                    seed=random.Random(f"{self._seed}/{turn}").randrange(_SEED_SPACE),
                    fixed_length=self._settings.fixed_length,
                ),
                samples=self._settings.samples_per_prompt,
            )
            yield Message(task.group_id, task.SerializeToString())

    @lru_cache(maxsize=2)  # noqa: B019  # a run has one sequence, which lives as long as the process
    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self._prompts)))
        random.Random(f"{self._seed}/epoch/{epoch}").shuffle(order)
        return order


def check_prompts(path: Path) -> None:
    """Reads a file of prompts as far as that goes without a tokenizer, to find a bad one before any work is done.

    Raises:
        ValueError: the file is missing, damaged, empty, or a line has no prompt; names file and line.
    """
    empty = True
    for number, row in read_lines(path):
        empty = False
        _check_has_prompt(path, number, row)
    if empty:
        raise ValueError(f"{path} holds no prompts")


def _check_has_prompt(path: Path, number: int, row: dict[str, Any]) -> None:
    if not isinstance(row.get("token_ids"), list) and not isinstance(row.get("text"), str):
        raise ValueError(f"{path}, line {number}: needs `text` or `token_ids`")


def _token_ids(path: Path, number: int, row: dict[str, Any], tokenizer: Tokenizer, longest: int) -> list[int]:
    _check_has_prompt(path, number, row)
    ids: list[int] = row["token_ids"] if "token_ids" in row else tokenizer.encode(row["text"]).ids
    size = tokenizer.get_vocab_size()
    if not ids or not all(type(token) is int and 0 <= token < size for token in ids):
        raise ValueError(f"{path}, line {number}: must hold at least one token id, each from 0 to {size - 1}")
    if len(ids) > longest:
        raise ValueError(
            f"{path}, line {number}: has {len(ids)} tokens; generation.max_prompt_tokens and generation.max_model_tokens "
            f"leave room for {longest}"
        )
    return ids
