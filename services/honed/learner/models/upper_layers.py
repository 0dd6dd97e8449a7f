"""Training the upper layers alone, and a reference that is a copy of just those (TRLX's hydra).

Below the layers that train nothing changes, so the policy's own states there are the reference's too: computed once, and their
weights kept once. What trains is the last layers, the final norm, and an output layer of its own. One that is tied to the
input embeddings stays as it is: moving it would move the states below.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from honed.kit.errors import FailedPrecondition, InvalidArgument
from honed.learner.data.batches import MicroBatch
from honed.learner.models.policy import PolicyModel, ReferenceModel, TokenMeasurement, TokenModel
from honed.models.attention import Precision
from honed.models.layers import decoder_layers, keep_layers

_SETTING: Final = "learner.unfrozen_layers"


def freeze_lower_layers(language_model: Any, unfrozen: int) -> None:
    """Leaves the last `unfrozen` layers to train, and what comes after them.

    Raises:
        InvalidArgument: There are fewer layers.
        FailedPrecondition: Something trains below them, or the family's layers cannot be found.
    """
    _, layers = decoder_layers(language_model)
    if not 1 <= unfrozen <= len(layers):
        raise InvalidArgument(_SETTING, f"the model has {len(layers)} layers, {unfrozen} of them cannot train")
    embeddings = [module for module in language_model.modules() if isinstance(module, nn.Embedding)]
    for module in (*embeddings, *layers[: len(layers) - unfrozen]):
        module.requires_grad_(False)
    lower = LowerLayers(language_model, unfrozen)
    below = lower.read(lambda: language_model.base_model(input_ids=_text(language_model), use_cache=False))
    if below.requires_grad:
        raise FailedPrecondition(
            f"{type(language_model).__name__} has weights below its layers that are no embeddings: set {_SETTING} to null"
        )


class LowerLayers:
    """The states that enter the first layer that trains."""

    def __init__(self, language_model: Any, unfrozen: int) -> None:
        """Changes nothing at the model."""
        self._first = decoder_layers(language_model)[1][-unfrozen]

    @contextmanager
    def watched(self) -> Iterator[list[Tensor]]:
        """A list that gets the states of each pass of the model inside the block."""
        seen: list[Tensor] = []
        with _before(self._first, lambda states: seen.append(states)):
            yield seen

    def read(self, run: Callable[[], object]) -> Tensor:
        """The states of the pass that `run` makes; the layers above are not computed."""

        def stop(states: Tensor) -> None:
            raise _Reached(states)

        try:
            with _before(self._first, stop):
                run()
        except _Reached as reached:
            return reached.states
        raise FailedPrecondition(f"{type(self._first).__name__} is not run with the states of the layers below it")


class UpperReference(ReferenceModel):
    """The policy as it was, of which only what trains is a copy."""

    def __init__(self, policy: TokenModel, unfrozen: int, *, precision: Precision = "float32") -> None:
        """Copies what trains of `policy`, which was made of a model that `freeze_lower_layers` has seen.

        Raises:
            FailedPrecondition: The copy does not say the same: the family's upper layers cannot be read apart.
        """
        shared: dict[int, Any] = {id(p): p for p in policy.language_model.parameters() if not p.requires_grad}
        upper = copy.deepcopy(policy.language_model, shared)
        keep_layers(upper, slice(-unfrozen, None))
        super().__init__(upper, precision=precision)
        self._lower = LowerLayers(policy.language_model, unfrozen)
        self._states_of = policy.hidden_states  # a method, not the module: its weights are not the reference's
        self._first = (decoder_layers(upper)[1][0],)
        self._check(policy)

    def logprobs(self, batch: MicroBatch) -> Tensor:
        """See `TokenModel`; one pass of the policy's lower layers and the copy's upper ones."""
        return self._above(self._lower.read(lambda: self._states_of(batch.tokens, batch.states)), batch)

    def beside(self, policy: PolicyModel, batch: MicroBatch) -> tuple[TokenMeasurement, Tensor]:
        """See `ReferenceModel`; the lower layers are computed once."""
        with self._lower.watched() as seen:
            measured = policy.measure(batch)
        return measured, self._above(seen[0], batch)

    @torch.no_grad()
    def _above(self, states: Tensor, batch: MicroBatch) -> Tensor:
        with self._entered_by(states):
            return super().logprobs(batch)

    def _entered_by(self, states: Tensor) -> Any:
        return _before(self._first[0], lambda _: states)

    @torch.no_grad()
    def _check(self, policy: TokenModel) -> None:
        read = {"input_ids": _text(policy.language_model), "use_cache": False}
        with self._lower.watched() as seen:
            theirs = policy.language_model.base_model(**read).last_hidden_state
        with self._entered_by(seen[0]):
            own = self.language_model.base_model(**read).last_hidden_state
        if not torch.allclose(own, theirs, rtol=1e-4, atol=1e-4):
            name = type(policy.language_model).__name__
            raise FailedPrecondition(f"the upper layers of {name} read more than the states below them: set {_SETTING} to null")


class _Reached(Exception):  # no error: it ends a pass
    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


@contextmanager
def _before(layer: nn.Module, call: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Calls with the states that enter a layer; what is returned, if anything, enters in their place."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        states = args[0] if args else kwargs["hidden_states"]
        other = call(states)
        entered = states if other is None else other
        return ((entered, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": entered})

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _text(language_model: Any) -> Tensor:
    """Two tokens."""
    weight: Tensor = language_model.get_input_embeddings().weight
    return torch.tensor([[0, min(1, weight.shape[0] - 1)]], device=weight.device)
