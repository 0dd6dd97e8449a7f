"""Claims about the second set of weights, over a small model with what makes real ones hard: tied, packed, and shared parts."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterable, Iterator

import pytest
import torch
from torch import nn

from honed.generation.vllm.staging import Abandoned, SecondSet, Stage

SHARED = nn.Module()


class Packed(nn.Linear):
    """As on CPUs: after loading, the weights live in a closure, and the parameter is empty."""

    def pack(self) -> None:
        kept = self.weight.detach().clone()
        self.kernel = lambda x: x @ kept.T
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernel(x)  # type: ignore[no-any-return]


class Model(nn.Module):
    """Embedding, a packed layer, a gain with a buffer, and a packed head that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.layer = Packed(3, 3, bias=False)
        self.gain = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("table", torch.arange(3.0), persistent=False)
        self.head = nn.Module()
        self.head.weight = self.embedding.weight
        self.rotary = SHARED
        self.own_method = self.mark  # bound to this very module, as vLLM's custom ops are

    def mark(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gain

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = set()
        for name, tensor in tensors:
            self.get_parameter(name).data.copy_(tensor)
            loaded.add(name)
        return loaded

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.own_method(self.layer(self.embedding(ids)) * self.scale) + self.table * 0
        return self.head.kernel(hidden)  # type: ignore[no-any-return]


def lay_out(module: nn.Module) -> None:
    if isinstance(module, Packed):
        module.pack()
    elif isinstance(getattr(module, "weight", None), nn.Parameter) and not isinstance(module, nn.Embedding):
        kept = module.weight.detach().clone()  # type: ignore[union-attr,operator]
        module.kernel = lambda x: x @ kept.T  # type: ignore[assignment]


def weights(seed: int) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    shapes = {"embedding.weight": (5, 3), "layer.weight": (3, 3), "gain": (3,)}
    return {name: torch.randn(shape, generator=chance) for name, shape in shapes.items()}


def loaded(seed: int) -> Model:
    model = Model()
    with torch.no_grad():
        model.load_weights(weights(seed).items())
        for module in model.modules():
            lay_out(module)
    return model


def twin() -> Model:
    with torch.device("meta"):
        return Model()


IDS = torch.arange(5)


@pytest.mark.parametrize("in_place", [False, True])
def test_an_exchange_serves_the_second_set_and_another_one_the_first_again(in_place: bool) -> None:
    live = loaded(1)
    if in_place:  # CUDA graphs hold on to addresses; there nothing is packed
        live.layer.weight.data = weights(1)["layer.weight"]
        live.layer.kernel = lambda x: x @ live.layer.weight.T
        live.head.kernel = lambda x: x @ live.head.weight.T  # type: ignore[assignment,operator,union-attr]
    second = SecondSet(live, twin(), (lambda module: None) if in_place else lay_out, in_place=in_place)
    addresses = {name: p.data_ptr() for name, p in live.named_parameters()}
    expected = [loaded(seed)(IDS) for seed in (1, 2, 3)]
    second.fill(weights(2).items())
    torch.testing.assert_close(live(IDS), expected[0])  # filling touches nothing that serves
    for at in (1, 0, 1):
        second.exchange()
        torch.testing.assert_close(live(IDS), expected[at])
    second.fill(weights(3).items())
    torch.testing.assert_close(live(IDS), expected[1])
    second.exchange()
    torch.testing.assert_close(live(IDS), expected[2])
    assert live.head.weight is live.embedding.weight
    if in_place:
        assert {name: p.data_ptr() for name, p in live.named_parameters()} == addresses


def test_a_second_set_takes_memory_only_from_fill_to_clear() -> None:
    live = loaded(1)
    other = twin()
    second = SecondSet(live, other, lay_out)
    assert all(p.is_meta for p in other.parameters())
    second.fill(weights(2).items())
    second.exchange()
    old = weakref.ref(other.embedding.weight)
    second.clear()
    gc.collect()
    assert old() is None
    assert not hasattr(other.layer, "kernel")
    assert all(p.is_meta for p in other.parameters())
    torch.testing.assert_close(live(IDS), loaded(2)(IDS))
    with pytest.raises(RuntimeError, match="no second set"):
        second.exchange()


@pytest.mark.parametrize("fault", ["missing", "shape", "abandoned"])
def test_a_fill_that_fails_frees_everything_and_touches_nothing(fault: str) -> None:
    live, other = loaded(1), twin()
    second = SecondSet(live, other, lay_out)
    tensors = weights(2)
    if fault == "missing":
        del tensors["gain"]
    if fault == "shape":
        tensors["gain"] = torch.zeros(4)
    asked: list[int] = []

    def abandoned() -> bool:
        asked.append(1)
        return fault == "abandoned" and len(asked) > 2

    with pytest.raises((ValueError, RuntimeError, Abandoned), match="lacks gain" if fault == "missing" else None):
        second.fill(tensors.items(), abandoned)
    assert all(p.is_meta for p in other.parameters())
    torch.testing.assert_close(live(IDS), loaded(1)(IDS))
    second.fill(weights(2).items())
    second.exchange()
    torch.testing.assert_close(live(IDS), loaded(2)(IDS))


def test_a_model_that_is_built_otherwise_is_refused() -> None:
    other = twin()
    other.more = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="not built like"):
        SecondSet(loaded(1), other, lay_out)


def settle(stage: Stage, ticket: int) -> str:
    """Waits for the outcome; the thread holds the lock until it is there."""
    for thread in threading.enumerate():
        if thread.name.startswith("honed-stage"):
            thread.join(5)
    outcome = stage.outcome(ticket)
    assert outcome is not None
    return outcome


def test_a_stage_tells_when_it_is_ready_and_what_went_wrong() -> None:
    live = loaded(1)
    stage = Stage(SecondSet(live, twin(), lay_out))
    go_on = threading.Event()

    def slowly() -> Iterator[tuple[str, torch.Tensor]]:
        go_on.wait(5)
        yield from weights(2).items()

    stage.begin(7, slowly())
    assert stage.outcome(7) is None
    with pytest.raises(RuntimeError, match="not ready"):
        stage.exchange(7)
    go_on.set()
    assert settle(stage, 7) == ""
    stage.exchange(7)
    torch.testing.assert_close(live(IDS), loaded(2)(IDS))
    stage.begin(8, {"gain": torch.zeros(3)}.items())
    assert "lacks" in settle(stage, 8)


def test_an_abandoned_stage_stops_reading_and_frees_what_it_had() -> None:
    live, other = loaded(1), twin()
    stage = Stage(SecondSet(live, other, lay_out))
    begun, go_on, read = threading.Event(), threading.Event(), []

    def slowly() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights(2).items():
            read.append(name)
            begun.set()
            go_on.wait(5)
            yield name, tensor

    stage.begin(1, slowly())
    assert begun.wait(5)
    stage.end()
    go_on.set()
    assert settle(stage, 1) == "it was abandoned"
    assert len(read) == 1
    assert all(p.is_meta for p in other.parameters())
