"""Prometheus metrics of a generator, beside those that every service has."""

from __future__ import annotations

from functools import partial

from prometheus_client import Counter, Gauge

from honed.generation.gate import RequestGate, RequestKind
from honed.generation.worker import WORKING, RolloutWorker

IN_FLIGHT = Gauge("honed_generation_samples_in_flight", "Samples taken and not ended, waiting ones included.", ["kind"])
ROOM = Gauge("honed_generation_training_room", "Samples that training may take now.")
TRAINING_WORKS = Gauge(
    "honed_generation_training_works", "1 while prompts are taken for training; 0 while Redis is away, a version is missed ..."
)
APPLICATION_PROMPTS = Counter(
    "honed_generation_application_prompts_total",
    "Prompts of applications that were drawn for training, by what became of them: offered, redacted_away, redactor_failed, "
    "no_text, overflow, redis.",
    ["outcome"],
)


def count_application_prompt(outcome: str) -> None:
    """Counts one prompt of an application that was drawn for training."""
    APPLICATION_PROMPTS.labels(outcome).inc()


def observe(gate: RequestGate, worker: RolloutWorker) -> None:
    """Reads the metrics from these objects from now on."""
    for kind in RequestKind:
        IN_FLIGHT.labels(kind.value).set_function(partial(gate.in_flight_of, kind))
    ROOM.set_function(lambda: gate.training_room)
    TRAINING_WORKS.set_function(lambda: worker.state == WORKING)
