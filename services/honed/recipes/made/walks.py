"""Random walks on a directed graph, to find shortest paths from: TRLX's benchmark.

21 nodes, each with an edge to another one by probability 0.1, drawn until each node has an edge; node `a` is the goal, which no
edge leaves. 1,000 walks from nodes other than the goal, of 10 nodes at most, which end at the goal. The draws are those of
TRLX's example in its order, so that its seed 1002 gives its graph and its walks. A node is a letter, and a word of the text: it
becomes one token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Final

from honed.conductor.settings import DataSettings, EvaluationSettings
from honed.kit.errors import InvalidArgument
from honed.kit.jsonl import write_lines
from honed.recipes.made.base import Change, MadeData, Sampled, made
from honed.reward.function_scorer import Sample
from honed.settings import Count, Section

if TYPE_CHECKING:
    from numpy.random import RandomState

NODES: Final = 21
EDGE_PROBABILITY: Final = 0.1
WALKS: Final = 1_000
LONGEST: Final = 10
"""Nodes of a walk."""
GOAL: Final = 0
SEED: Final = 1002
SAMPLES: Final = 15
"""How often each start is continued to measure: optimality is a mean over what the policy may sample."""


@dataclass(frozen=True)
class Graph:
    """Where one may go.

    Attributes:
        edges: Of each node, the nodes that an edge leads to; the goal has one to itself.
    """

    edges: tuple[tuple[int, ...], ...]

    @property
    def fewest(self) -> tuple[int, ...]:
        """Of each node, how many nodes its shortest walk to the goal has, itself and the goal among them.

        At most `LONGEST`, which is also said where no walk leads to the goal.
        """
        found = {GOAL: 1}
        waiting = deque([GOAL])
        while waiting:
            node = waiting.popleft()
            for before in range(len(self.edges)):
                if node in self.edges[before] and before not in found:
                    found[before] = found[node] + 1
                    waiting.append(before)
        return tuple(min(LONGEST, found.get(node, LONGEST)) for node in range(len(self.edges)))

    def optimality(self, walk: str) -> float:
        """How near a walk comes to the shortest one from its start: 1 is as short, 0 does not reach the goal.

        `(10 - n) / (10 - fewest)` for a walk that reaches the goal as its n-th node, as TRLX has it; what stands behind the
        goal does not count. 0 for a walk that takes an edge which is not there.

        Args:
            walk: Its nodes, letters with spaces between.

        Raises:
            InvalidArgument: It begins with no node that leads to the goal within 10 nodes.
        """
        nodes = [_node(word) for word in walk.split()]
        start = nodes[0] if nodes else None
        if start is None or start not in range(len(self.edges)) or self.fewest[start] >= LONGEST:
            raise InvalidArgument("prompt", f"a walk begins at a node with a way to the goal, and this one is {walk!r}")
        for place, node in enumerate(nodes):
            if place and node not in self.edges[nodes[place - 1]]:
                return 0.0
            if node == GOAL:
                return max(0.0, (LONGEST - (place + 1)) / (LONGEST - self.fewest[start]))
        return 0.0


def draw(seed: int = SEED) -> tuple[Graph, list[str]]:
    """A graph, and walks on it."""
    import numpy as np  # a run file is read without

    chance = np.random.RandomState(seed)  # the generator that the example has; its draws never change
    adjacent = np.zeros((NODES, NODES), dtype=bool)
    while not adjacent.any(axis=1).all():
        adjacent = chance.rand(NODES, NODES) > 1 - EDGE_PROBABILITY
        np.fill_diagonal(adjacent, False)
    adjacent[GOAL, :] = False
    adjacent[GOAL, GOAL] = True
    graph = Graph(tuple(tuple(int(node) for node in np.flatnonzero(row)) for row in adjacent))
    return graph, [" ".join(map(_letter, _walk(graph, chance))) for _ in range(WALKS)]


def _walk(graph: Graph, chance: RandomState) -> Iterator[int]:
    node = GOAL
    while node == GOAL:
        node = int(chance.randint(NODES))
    yield node
    for _ in range(LONGEST - 1):
        node = int(chance.choice(graph.edges[node]))
        yield node
        if node == GOAL:
            return


def _letter(node: int) -> str:
    return chr(ord("a") + node)


def _node(word: str) -> int:
    """A number that is no node for a word that is none."""
    return ord(word) - ord("a") if len(word) == 1 else -1


@lru_cache
def _graph(seed: int) -> Graph:
    return draw(seed)[0]


class Walks(Section):
    """The scorer `walks`: the optimality of prompt and response as one walk, from 0 to 1."""

    graph_seed: Count = SEED

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """Scores a batch.

        Raises:
            InvalidArgument: A prompt is no start of a walk.
        """
        graph = _graph(self.graph_seed)
        return [graph.optimality(f"{sample.prompt} {sample.response}") for sample in samples]


@made("walks")
class RandomWalks(MadeData):
    """The graph is the benchmark's: the seed of the run decides what is drawn from it, and not the graph."""

    title = "random walks on TRLX's graph; prompts are their starts"
    prose = False

    def files(self, directory: Path) -> DataSettings:
        """See `MadeData`."""
        return DataSettings(
            texts=(directory / "texts.jsonl",),
            prompts=directory / "prompts.jsonl",
            evaluation=EvaluationSettings(prompts=directory / "evaluation.jsonl", samples=SAMPLES * (NODES - 1)),
        )

    def write(self, directory: Path, seed: int) -> None:
        """See `MadeData`."""
        _, walks = draw()
        starts = sorted({walk[0] for walk in walks})
        write_lines(directory / "texts.jsonl", ({"text": walk} for walk in walks))
        write_lines(directory / "prompts.jsonl", ({"text": start} for start in starts))
        write_lines(directory / "evaluation.jsonl", ({"text": start} for start in starts * SAMPLES))

    def measure(self, sampled: Sampled, seed: int) -> list[Change]:
        """See `MadeData`."""
        graph = _graph(SEED)
        before, after = (
            fmean(graph.optimality(f"{row.prompt} {row.text}") for row in rows) for rows in (sampled.before, sampled.after)
        )
        return [Change("optimality of sampled walks (0 to 1)", before, after)]
