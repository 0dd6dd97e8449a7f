"""What a run goes through, one phase after another, each of which leaves an artifact behind.

- `pretrain`: a language model from nothing, on data.texts.
- `sft`: that, or conductor.start_from, fine-tuned on data.demonstrations. The result of both is version 0.0 of the policy.
- `reward_model`: on the judgements of the preference service.
- `online`: the loop, with learner.algorithm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from honed.artifacts.settings import TRAINED

if TYPE_CHECKING:  # the tree itself asks here
    from honed.config import RunSettings

Phase = Literal["pretrain", "sft", "reward_model", "online"]
_ORDER: Final[tuple[Phase, ...]] = get_args(Phase)


def implied_phases(settings: RunSettings) -> tuple[Phase, ...]:
    """The phases of a run that names none: what its data and scorers call for."""
    wanted: dict[Phase, bool] = {
        "pretrain": settings.conductor.start_from is None,
        "sft": bool(settings.data.demonstrations),
        "reward_model": any(scorer.source == TRAINED for scorer in settings.reward.scorers),
        "online": True,
    }
    return tuple(phase for phase in _ORDER if wanted[phase])


def serves_reward(settings: RunSettings) -> bool:
    """Whether the run has a reward that can be loaded: scorers, and what they are trained by where that is needed."""
    reads = any(scorer.source == TRAINED for scorer in settings.reward.scorers)
    return bool(settings.reward.scorers) and (not reads or settings.goes_through("reward_model"))


def with_algorithm(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of a run file, in which `{online: NAME}` among the phases has become learner.algorithm.

    Raises:
        ValueError: learner.algorithm names another one.
    """
    changed = dict(tree)
    phases = changed.get("phases")
    if not isinstance(phases, (list, tuple)):
        return changed
    plain: list[Any] = []
    for phase in phases:
        if isinstance(phase, Mapping) and list(phase) == ["online"]:
            learner = dict(changed.get("learner") or {})
            if learner.setdefault("algorithm", phase["online"]) != phase["online"]:
                raise ValueError(f"phases: online is {phase['online']}, and learner.algorithm {learner['algorithm']}: name one")
            changed["learner"], phase = learner, "online"
        plain.append(phase)
    changed["phases"] = plain
    return changed


def impossible_phases(settings: RunSettings) -> Iterator[str]:
    """What is wrong with the phases that a run names, with what to do."""
    phases = settings.phases
    if phases is None:
        return
    if list(phases) != sorted(set(phases), key=_ORDER.index):
        yield f"phases: {', '.join(phases)} must each be there once, in the order {', '.join(_ORDER)}"
    starts = settings.conductor.start_from
    if "pretrain" in phases and starts is not None:
        yield f"phases: pretrain makes a model from nothing, and conductor.start_from names {starts}: leave one of them out"
    if "pretrain" not in phases and starts is None:
        yield "phases: without pretrain, conductor.start_from must name the model to begin with"
    if "sft" in phases and not settings.data.demonstrations:
        yield "phases: sft has nothing to learn from: name data.demonstrations"
    reads = any(scorer.source == TRAINED for scorer in settings.reward.scorers)
    if "reward_model" in phases and not reads:
        yield "phases: no scorer reads what reward_model trains: give one of reward.scorers the source trained"
    if "reward_model" not in phases and "online" in phases and reads:
        yield (
            "phases: a scorer has the source trained, and reward_model is left out: name the artifact of another run, "
            "artifact:NAME/VERSION, or a directory"
        )
