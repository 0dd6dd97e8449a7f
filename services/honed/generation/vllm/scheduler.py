"""vLLM's scheduler with one addition: while it is paused, canary requests run, and they run alone.

Runs inside vLLM's engine process. After a change of weights the requests in flight must not be
stepped before the canaries have passed, but the canaries need steps. So the arrival of a canary
during a pause takes every other request out of the waiting queue; they go back, in their order,
when the pause ends. If nobody ends it, nothing is ever sampled by unverified weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler

from honed.generation.vllm.plugin import CANARY_PREFIX

if TYPE_CHECKING:
    from vllm.v1.request import Request, RequestStatus


class CanariesFirst(Scheduler):  # type: ignore[misc]  # vLLM is not typed
    """See the module. Requests in flight must have been preempted (`reset_prefix_cache(reset_running_requests=True)`)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes what the scheduler takes."""
        super().__init__(*args, **kwargs)
        self._held: list[Request] = []
        self._verifying = False

    def add_request(self, request: Request) -> None:
        """Queues a request; a canary that comes during a pause starts the verification."""
        canary = request.request_id.startswith(CANARY_PREFIX)
        if canary and self.pause_state == PauseState.PAUSED_ALL and not self.running:
            self._hold(list(self.waiting))
            self._verifying = True
            super().set_pause_state(PauseState.UNPAUSED)
        super().add_request(request)
        if self._verifying and not canary:
            self._hold([request])

    def set_pause_state(self, pause_state: PauseState) -> None:
        """Ends the verification; what it held goes on, or stays with the next pause until that ends."""
        super().set_pause_state(pause_state)
        self._verifying = False
        for request in reversed(self._held):
            self.waiting.prepend_request(request)
        self._held.clear()

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        """Ends requests, held ones too."""
        finished: list[Request] = super().finish_requests(request_ids, finished_status)
        if self._held:
            gone = {request.request_id for request in finished}
            self._held = [request for request in self._held if request.request_id not in gone]
        return finished

    def _hold(self, requests: list[Request]) -> None:
        self.waiting.remove_requests(requests)
        self._held.extend(requests)


class AsyncCanariesFirst(CanariesFirst, AsyncScheduler):  # type: ignore[misc]
    """The same for asynchronous scheduling."""
