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
            raise ValueError("there are no prompts to train on: conductor.prompts is empty")
        self._run, self._prompts, self._seed, self._settings = run, prompts, seed, settings

    @classmethod
    def load(cls, run: str, path: Path, model: Path, seed: int, settings: ConductorSettings) -> PromptSequence:
        """Reads JSON lines with `token_ids`, or `text` for the tokenizer of the model directory.

        Raises:
            ValueError: the file is missing, damaged, or a line has neither; names file and line.
        """
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        return cls(run, [_token_ids(path, number, row, tokenizer) for number, row in read_lines(path)], seed, settings)

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


def _token_ids(path: Path, number: int, row: dict[str, Any], tokenizer: Tokenizer) -> list[int]:
    if isinstance(row.get("token_ids"), list):
        return [int(token) for token in row["token_ids"]]
    if isinstance(row.get("text"), str):
        return list(tokenizer.encode(row["text"]).ids)
    raise ValueError(f"{path}, line {number}: needs `text` or `token_ids`")
