"""TRLX's random walks: its graph, and optimality against cases worked out by hand."""

import itertools
import json

import pytest

from honed.conductor.sampling import Continuation
from honed.kit.errors import InvalidArgument
from honed.models.new_tokenizer import train_tokenizer
from honed.recipes.made.base import Sampled, find_made
from honed.recipes.made.walks import GOAL, LONGEST, NODES, Graph, Walks, draw
from honed.reward.function_scorer import Sample

#      a ← b ← c ← d, a way from d to a by e alone, and f that leads only to itself
SMALL = Graph(((0,), (0,), (1,), (2, 4), (0,), (5,)))


def test_the_fewest_nodes_to_the_goal():
    assert SMALL.fewest == (1, 2, 3, 3, 2, LONGEST)


@pytest.mark.parametrize(
    ("walk", "optimality"),
    [
        ("c b a", 1.0),  # 3 nodes, and fewer do not do
        ("d e a", 1.0),
        ("d c b a", (10 - 4) / (10 - 3)),  # a node more than by e
        ("d e a z", 1.0),  # what follows the goal does not count
        ("d b a", 0.0),  # there is no edge from d to b
        ("d c b", 0.0),  # does not reach the goal
        ("d", 0.0),
        ("d zz a", 0.0),  # a word that is no node
        ("a", 1.0),
    ],
)
def test_optimality(walk, optimality):
    assert SMALL.optimality(walk) == pytest.approx(optimality)


@pytest.mark.parametrize("walk", ["", "z a", "f f", "word a"])
def test_a_walk_without_a_start_that_leads_to_the_goal_is_refused(walk):
    with pytest.raises(InvalidArgument, match="a walk begins at a node with a way to the goal"):
        SMALL.optimality(walk)


def test_a_walk_that_is_longer_than_any_of_the_data_scores_nothing_rather_than_less():
    there_and_back = Graph(((0,), (2, 0), (1,)))
    assert there_and_back.optimality(" ".join(["b c"] * 6 + ["b", "a"])) == 0.0


def test_the_draws_are_the_benchmarks_own():
    """The first walks of TRLX's example at its seed, without its letters' delimiter."""
    graph, walks = draw()
    assert len(walks) == 1_000
    assert walks == draw()[1]
    assert walks[:3] == ["o s e o t b a", "q k a", "j r m h n b a"]
    assert graph.edges[GOAL] == (GOAL,)
    assert all(node not in graph.edges[node] for node in range(1, NODES))
    assert all(2 <= fewest < LONGEST for fewest in graph.fewest[1:])
    for walk in walks:
        nodes = walk.split()
        assert 2 <= len(nodes) <= LONGEST
        assert "a" not in nodes[:-1]
        assert nodes[-1] == "a" or len(nodes) == LONGEST
        assert all(ord(there) - 97 in graph.edges[ord(here) - 97] for here, there in itertools.pairwise(nodes))
    assert draw(7)[0] != graph


def test_the_scorer_reads_prompt_and_response_as_one_walk():
    graph, walks = draw()
    start, _, rest = next(walk for walk in walks if walk.endswith("a")).partition(" ")
    assert Walks()([Sample(start, " " + rest), Sample(start, " " + start)]) == [graph.optimality(f"{start} {rest}"), 0.0]
    samples = [Sample(walk[0], walk[1:]) for walk in walks[:200]]
    assert Walks(graph_seed=7)(samples) != Walks()(samples)


def test_each_start_is_a_prompt_and_each_node_one_token(tmp_path):
    data = find_made("walks")
    data.write(tmp_path, seed=1)
    files = data.files(tmp_path)
    texts, prompts, held_out = (
        [json.loads(line)["text"] for line in path.read_text().splitlines()]
        for path in (files.texts[0], files.prompts, files.evaluation.prompts)
    )
    assert len(prompts) == NODES - 1 == len({walk[0] for walk in texts})
    assert files.evaluation.samples == len(held_out) == 15 * len(prompts)
    tokenizer = train_tokenizer(texts, vocabulary_size=278, max_length=32)
    assert all(len(tokenizer(walk).input_ids) == 1 + len(walk.split()) for walk in texts[:50])


def test_what_a_run_changed_is_the_mean_optimality():
    def rows(*walks):
        return [Continuation(walk[0], walk[1:], (), (), (), "1.0") for walk in walks]

    _, walks = draw()
    arrives = next(walk for walk in walks if walk == "q k a")
    [change] = find_made("walks").measure(Sampled(rows("q z", arrives), rows(arrives, arrives), [], []), seed=1)
    assert (change.before, change.after) == (0.5, 1.0)
