"""Claims about groups of rollouts that train together or not at all."""

from __future__ import annotations

from tests.unit.learner.samples import random_episodes

from honed.learner.data.episode import Episode
from honed.learner.sources.held import Groups, Held
from honed.queue.messages import Delivery, Message


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def held(*names: str) -> list[Held]:
    """Rollouts `<group><index>`."""
    [episode] = random_episodes(1)
    made = []
    for at, name in enumerate(names):
        own = Episode(**{**vars(episode), "rollout_id": name, "group_id": name[0]})
        made.append(Held(Delivery(f"{at}-0", Message(name, b""), 1, "me", "scored"), own))
    return made


def names(found: list[Held]) -> list[str]:
    return [each.rollout_id for each in found]


def test_groups_come_in_the_order_in_which_they_became_whole_however_much_is_in_hand() -> None:
    waiting = held("b0", "a0", "c0", "a1", "b1")
    found = [names(group) for group in Groups(2, 60, Clock()).whole(waiting)]
    assert found == [["a0", "a1"], ["b0", "b1"]]
    assert [names(group) for group in Groups(2, 60, Clock()).whole(waiting[:4])] == found[:1]
    assert [names(group) for group in Groups(1, 60, Clock()).whole(waiting)] == [[name] for name in names(waiting)]


def test_with_one_that_leaves_its_group_leaves_for_the_same_reason() -> None:
    groups = Groups(2, 60, Clock())
    stay, gone = held("a0", "b0", "b1"), held("a1")
    torn = groups.torn(stay, {"stale": gone, "rolled_back": []})
    assert {reason: names(found) for reason, found in torn.items()} == {"stale": ["a0"]}
    assert Groups(1, 60, Clock()).torn(stay, {"stale": gone}) == {}


def test_the_rest_of_a_group_is_waited_for_until_its_deadline() -> None:
    clock = Clock()
    groups = Groups(2, 60, clock)
    waiting = held("a0", "b0", "b1")
    assert groups.torn(waiting, {}) == {}
    clock.now = 59.0
    assert groups.torn([*waiting, *held("c0")], {}) == {}
    clock.now = 61.0
    groups.read_to_end(59.0)
    assert groups.torn([*waiting, *held("c0")], {}) == {}, "the rest may stand in the stream, unread since an update began"
    groups.read_to_end(61.0)
    assert {reason: names(found) for reason, found in groups.torn([*waiting, *held("c0")], {}).items()} == {
        "incomplete_group": ["a0"]
    }
    assert groups.torn([*held("a0", "a1"), *held("c0", "c1")], {}) == {}
    clock.now = 200.0
    groups.read_to_end(200.0)
    assert groups.torn(held("c0"), {}) == {}, "its time begins when it is torn"
