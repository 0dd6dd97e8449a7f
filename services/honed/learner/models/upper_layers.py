"""Training the upper layers alone, and a reference that is a copy of just those (TRLX's hydra).

Below the layers that train nothing changes, so the policy's own states there are the reference's too: computed once, and their
weights kept once. What trains is the last layers, the final norm, and an output layer of its own. One that is tied to the
input embeddings stays as it is: moving it would move the states below.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
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
    below: list[Tensor] = []
    with _entering(layers[-unfrozen], below.append):
        language_model.base_model(input_ids=_text(language_model), use_cache=False)
    if any(states.requires_grad for states in below):
        raise FailedPrecondition(
            f"{type(language_model).__name__} has weights below its layers that are no embeddings: set {_SETTING} to null"
        )


class UpperReference(ReferenceModel):
    """The policy as it was, of which only what trains is a copy."""

    def __init__(self, policy: TokenModel, unfrozen: int, *, precision: Precision = "float32") -> None:
        """Copies what trains of `policy`, which was made of a model that `freeze_lower_layers` has seen.

        Raises:
            FailedPrecondition: The copy does not say the same: the family's upper layers cannot be read apart.
        """
        model = policy.language_model
        super().__init__(_copy(model, shared=[p for p in model.parameters() if not p.requires_grad]), precision=precision)
        upper = _copy(self.language_model, shared=list(self.language_model.parameters()))
        keep_layers(upper, slice(-unfrozen, None))
        # The same weights once more, without the lower layers: for a batch whose states there are known.
        self._upper = ReferenceModel(upper, precision=precision)
        self._check(policy)

    def beside(self, policy: PolicyModel, batch: MicroBatch) -> tuple[TokenMeasurement, Tensor]:
        """See `ReferenceModel`; the lower layers are computed once."""
        states: list[Tensor] = []
        with _entering(_first(policy, self._upper), states.append):
            measured = policy.measure(batch)
        with torch.no_grad(), self._entered_by(states):
            return measured, self._upper.logprobs(batch)

    def _entered_by(self, states: list[Tensor]) -> AbstractContextManager[None]:
        """What enters the upper layers, pass by pass."""
        passes = iter(states)
        return _entering(_first(self._upper, self._upper), lambda _: next(passes))

    @torch.no_grad()
    def _check(self, policy: TokenModel) -> None:
        read = {"input_ids": _text(policy.language_model), "use_cache": False}
        states: list[Tensor] = []
        with _entering(_first(policy, self._upper), states.append):
            theirs = policy.language_model.base_model(**read).last_hidden_state
        with self._entered_by(states):
            own = self._upper.language_model.base_model(**read).last_hidden_state
        if not torch.allclose(own, theirs, rtol=1e-4, atol=1e-4):
            name = type(policy.language_model).__name__
            raise FailedPrecondition(f"the upper layers of {name} read more than the states below them: set {_SETTING} to null")


def _copy(model: Any, *, shared: Iterable[nn.Parameter]) -> Any:
    """A copy of the modules around the same parameters, and copies of those that are not shared."""
    known: dict[int, Any] = {id(parameter): parameter for parameter in shared}
    return copy.deepcopy(model, known)


def _first(model: TokenModel, upper: TokenModel) -> nn.Module:
    """The first of a model's layers that `upper` has too."""
    layers = decoder_layers(model.language_model)[1]
    return layers[-len(decoder_layers(upper.language_model)[1])]


@contextmanager
def _entering(layer: nn.Module, call: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
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
