"""The services of a run in one table: their gRPC names, how they are started, and what sets them apart.

A service's section of the settings, its command `honed serve NAME` and its module `honed.NAME.main` carry its own name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Service:
    """One service.

    Attributes:
        name: as in the settings, in `endpoints.json` and on the command line.
        grpc_name: full name of its public gRPC service; its health under this name is its readiness.
        replicated: several processes of it may run; each registers itself in Redis.
        nice: how far it stands back when cores are short. Serving goes before learning: a push pauses people for as long as
            the engine waits for a core.
    """

    name: str
    grpc_name: str
    replicated: bool = False
    nice: int = 0

    @property
    def module(self) -> str:
        """The module whose `run(settings)` serves it."""
        return f"honed.{self.name}.main"


SERVICES: Final = {
    service.name: service
    for service in (
        Service("generation", "honed.v1.GenerationService", replicated=True),
        Service("reward", "honed.v1.RewardService", replicated=True, nice=10),
        Service("preference", "honed.v1.PreferenceService"),
        Service("learner", "honed.v1.LearnerService", nice=10),
        Service("conductor", "honed.v1.ConductorService"),
    )
}
REPLICATED: Final = tuple(name for name, service in SERVICES.items() if service.replicated)
