"""A second set of a model's weights: filled while the first one serves, then exchanged with it.

Runs inside vLLM's worker processes. The second set belongs to a twin of the serving model: another
instance of its class, made on the meta device, where tensors take no memory. Filling goes the way
that vLLM fills a model when it starts (the model's own `load_weights`, then the layout that the
kernels want, packed copies included), so the exchange has nothing left to compute.

Invariants:

* Filling touches nothing that serves, and what it took is freed when it fails or is abandoned.
* An exchange undoes itself: after it the twin holds what served before, so a second one is the
  roll-back.
* Memory: one set while nothing is prepared, two from the start of `fill` until `clear`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

Tensors = Iterable[tuple[str, torch.Tensor]]

_STRUCTURE = frozenset({"_parameters", "_buffers", "_modules"})
_CHUNK_BYTES = 64 << 20


class Abandoned(Exception):
    """Nobody wants the second set any more."""


class SecondSet:
    """The weights of `twin`, which stand ready to take the place of those of `live`."""

    def __init__(
        self, live: nn.Module, twin: nn.Module, lay_out: Callable[[nn.Module], None], *, in_place: bool = False
    ) -> None:
        """Takes no memory yet.

        Args:
            live: The model that serves.
            twin: Another instance of it, made by the same code, on the meta device.
            lay_out: Brings the loaded weights of one module into the layout that the kernels want.
            in_place: Exchange the contents of tensors and not the tensors: CUDA graphs hold on to
                addresses.

        Raises:
            ValueError: If the two are not built alike.
        """
        ours, theirs = dict(live.named_modules()), dict(twin.named_modules())
        if {name: type(module) for name, module in ours.items()} != {name: type(module) for name, module in theirs.items()}:
            raise ValueError("the second instance of the model is not built like the first")
        # What both share (rotary embeddings, for example) holds no weights of its own.
        self._pairs = tuple((ours[name], theirs[name]) for name in ours if ours[name] is not theirs[name])
        self._pristine = tuple(_contents(module) for _, module in self._pairs)
        self._twin = twin
        self._lay_out = lay_out
        self._in_place = in_place
        self._changed: tuple[frozenset[str], ...] | None = None

    def fill(self, tensors: Tensors, abandoned: Callable[[], bool] = lambda: False) -> None:
        """Loads a complete checkpoint into the twin and lays it out. Not thread-safe against itself and `clear`.

        Args:
            tensors: Name and value of each tensor of the checkpoint.
            abandoned: Asked now and then whether to give up.

        Raises:
            Abandoned: If `abandoned` said so.
            ValueError: If the checkpoint lacks a tensor.
        """
        self.clear()
        try:
            with torch.no_grad():
                self._materialize()
                wanted = {name for name, _ in self._twin.named_parameters()}
                loaded = self._twin.load_weights(_until(tensors, abandoned))  # type: ignore[operator]
                if loaded is not None and wanted - loaded:
                    raise ValueError(f"the checkpoint lacks {', '.join(sorted(wanted - loaded))}")
                for _, module in self._pairs:
                    if abandoned():
                        raise Abandoned
                    self._lay_out(module)
        except BaseException:
            self.clear()
            raise
        self._changed = tuple(
            frozenset(
                name for name, value in module.__dict__.items() if name not in _STRUCTURE and before.get(name) is not value
            )
            for (_, module), before in zip(self._pairs, self._pristine, strict=True)
        )

    def exchange(self) -> None:
        """Serves the second set; the first becomes the second. Only between two steps of the engine.

        Raises:
            RuntimeError: If the second set is not filled.
        """
        if self._changed is None:
            raise RuntimeError("no second set of weights is filled")
        done: set[int] = set()
        for (live, twin), changed in zip(self._pairs, self._changed, strict=True):
            for kind in ("_parameters", "_buffers"):
                ours, theirs = live.__dict__[kind], twin.__dict__[kind]
                for name in theirs:
                    if theirs[name] is None or name in twin._non_persistent_buffers_set:
                        continue  # what no checkpoint holds is the same in both
                    if not self._in_place:
                        ours[name], theirs[name] = theirs[name], ours[name]
                    elif ours[name].data_ptr() not in done:  # a tied tensor exchanged twice would be the old one again
                        done.add(ours[name].data_ptr())
                        _exchange_contents(ours[name], theirs[name])
            if not self._in_place:
                for name in changed:
                    _exchange_entry(live.__dict__, twin.__dict__, name)

    def clear(self) -> None:
        """Frees what the twin holds."""
        self._changed = None
        for (_, module), before in zip(self._pairs, self._pristine, strict=True):
            module.__dict__.clear()
            module.__dict__.update(before, _parameters=dict(before["_parameters"]), _buffers=dict(before["_buffers"]))

    def _materialize(self) -> None:
        made: dict[int, torch.Tensor] = {}  # tied parameters stay one
        for live, twin in self._pairs:
            for name, parameter in twin._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in made:
                    made[id(parameter)] = self._real(parameter, live._parameters[name].device)
                twin._parameters[name] = made[id(parameter)]
            for name, buffer in twin._buffers.items():
                if buffer is not None and name not in twin._non_persistent_buffers_set:
                    twin._buffers[name] = live._buffers[name].clone()  # not in every checkpoint

    def _real(self, parameter: torch.Tensor, device: torch.device) -> torch.Tensor:
        """An uninitialized parameter of the same shape, class and attributes (vLLM's loaders are among them)."""
        pinned = self._in_place and device.type == "cuda" and not _fits(device, parameter.nbytes)
        place = torch.device("cpu") if pinned else device
        tensor = torch.empty_strided(
            parameter.size(), parameter.stride(), dtype=parameter.dtype, device=place, pin_memory=pinned
        )
        real = nn.Parameter(tensor, requires_grad=False)
        real.__class__ = parameter.__class__  # type: ignore[assignment]
        real.__dict__.update(parameter.__dict__)
        return real


class Stage:
    """Fills a second set on a thread of its own and tells how far it is. Calls come from the engine's thread."""

    def __init__(self, second: SecondSet) -> None:
        """Nothing is filled yet."""
        self._second = second
        self._work = threading.Lock()
        self._wanted: int | None = None
        self._outcome: tuple[int, str] | None = None

    def begin(self, ticket: int, tensors: Tensors) -> None:
        """Begins to fill the second set; what it held goes. `ticket` names it."""
        self._wanted, self._outcome = ticket, None
        threading.Thread(target=self._fill, args=(ticket, tensors), name="honed-stage", daemon=True).start()

    def outcome(self, ticket: int) -> str | None:
        """None while it goes on, an empty text when it is ready, otherwise what went wrong."""
        if self._wanted != ticket:
            return "it was abandoned"
        return self._outcome[1] if self._outcome is not None and self._outcome[0] == ticket else None

    def exchange(self, ticket: int) -> None:
        """See `SecondSet.exchange`.

        Raises:
            RuntimeError: If the second set of that name is not ready.
        """
        if self.outcome(ticket) != "":
            raise RuntimeError(f"the second set of weights is not ready: {self.outcome(ticket)}")
        self._second.exchange()

    def end(self) -> None:
        """Gives the second set up and frees it, as soon as the thread comes to it."""
        self._wanted = None
        threading.Thread(target=self._clear, name="honed-stage-clear", daemon=True).start()

    def _fill(self, ticket: int, tensors: Tensors) -> None:
        with self._work:
            said = ""
            try:
                self._second.fill(tensors, lambda: self._wanted != ticket)
            except Abandoned:
                return
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
            if self._wanted == ticket:
                self._outcome = (ticket, said)

    def _clear(self) -> None:
        with self._work:
            if self._wanted is None:  # otherwise a new one is on its way, which clears first
                self._second.clear()


def _contents(module: nn.Module) -> dict[str, Any]:
    return {**module.__dict__, "_parameters": dict(module._parameters), "_buffers": dict(module._buffers)}


def _until(tensors: Tensors, abandoned: Callable[[], bool]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors:
        if abandoned():
            raise Abandoned
        yield name, tensor


def _exchange_entry(ours: dict[str, Any], theirs: dict[str, Any], name: str) -> None:
    missing = object()
    own, other = ours.pop(name, missing), theirs.pop(name, missing)
    if other is not missing:
        ours[name] = other
    if own is not missing:
        theirs[name] = own


@torch.no_grad()
def _exchange_contents(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """In pieces, so that the copy in between stays small."""
    if not (ours.is_contiguous() and theirs.is_contiguous()):
        held = ours.data.clone()
        ours.data.copy_(theirs.data)
        theirs.data.copy_(held)
        return
    ours, theirs = ours.data.view(-1), theirs.data.view(-1)
    step = max(1, _CHUNK_BYTES // ours.element_size())
    for start in range(0, ours.numel(), step):
        piece = ours[start : start + step].clone()
        ours[start : start + step].copy_(theirs[start : start + step], non_blocking=True)
        theirs[start : start + step].copy_(piece, non_blocking=True)


def _fits(device: torch.device, nbytes: int) -> bool:
    """Whether the device has room to spare; what vLLM left free is all there is."""
    free, _ = torch.cuda.mem_get_info(device)
    return free > nbytes + (1 << 30)
