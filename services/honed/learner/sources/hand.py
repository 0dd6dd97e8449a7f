"""What is in the learner's hands of a stream: the newest delivery of each entry, and whose rollout it is."""

from __future__ import annotations

from collections.abc import Iterable

from honed.learner.sources.held import Held
from honed.queue.holding import Holding
from honed.queue.messages import Delivery


class Hand:
    """Rollouts that were received and not yet let go: they wait, or are collected."""

    def __init__(self, leases: Holding) -> None:
        """Empty at first; `leases` renews what is in it."""
        self._leases = leases
        self._newest: dict[str, Delivery] = {}
        """By entry."""
        self._entries: dict[str, str] = {}
        """By rollout id."""

    def holds(self, rollout_id: str) -> bool:
        """Whether the rollout is in hand."""
        return rollout_id in self._entries

    def takes_again(self, delivery: Delivery) -> bool:
        """Whether the delivery is of an entry in hand, which it then renews: the lease of an earlier one ran out."""
        earlier = self._newest.get(delivery.entry)
        if earlier is None:
            return False
        self._leases.discard([earlier])
        if earlier.message.id == delivery.message.id:
            self._hold(delivery)
            return True
        # After a failover an entry's id can come a second time, for something else. What was in hand under it does not exist
        # in Redis any more; it trains, and is acknowledged in vain.
        del self._newest[delivery.entry]
        return False

    def add(self, held: Held) -> None:
        """Takes a rollout."""
        self._hold(held.delivery)
        self._entries[held.rollout_id] = held.delivery.entry

    def let_go(self, held: Iterable[Held]) -> list[Delivery]:
        """Gives rollouts up; returns the newest delivery of each, which is the one to end in Redis."""
        deliveries = []
        for each in held:
            self._entries.pop(each.rollout_id, None)
            newest = self._newest.get(each.delivery.entry)
            if newest is not None and newest.message.id == each.delivery.message.id:
                del self._newest[each.delivery.entry]
            else:
                newest = each.delivery
            deliveries.append(newest)
        self._leases.discard(deliveries)
        return deliveries

    def _hold(self, delivery: Delivery) -> None:
        self._newest[delivery.entry] = delivery
        self._leases.add([delivery])
