"""Claims about the policy with its value head, against the language model's own forward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.unit.learner.samples import VOCABULARY, random_episodes, tiny_llama
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertLMHeadModel, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from honed.kit.errors import DataLoss, FailedPrecondition, InvalidArgument
from honed.learner.data.batches import Rows, micro_batches
from honed.learner.data.episode import Episode
from honed.learner.loop.canary import canary_logprobs
from honed.learner.models import policy as policy_module
from honed.learner.models.policy import PolicyModel, ReferenceModel
from honed.learner.objectives import policy_gradient
from honed.models import packed, token_head
from honed.models.packed import NAME, use_packed_attention
from honed.models.token_head import TokenHead, chosen_logprobs, chosen_logprobs_and_entropy


def gpt2() -> GPT2LMHeadModel:
    """Learned positions and dropout of 0.1, so that wrong positions or training mode would show."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)
    )


def alone(model: torch.nn.Module, episode: Episode) -> Tensor:
    """Logits of each response token, one unpadded sequence at a time, temperature applied."""
    tokens = torch.tensor([[*episode.prompt, *episode.response]])
    logits: Tensor = model(input_ids=tokens).logits[0]
    return logits[len(episode.prompt) - 1 : -1] / episode.temperature


@pytest.mark.parametrize("make", [tiny_llama, lambda: tiny_llama(tied=False), gpt2])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@torch.no_grad()
def test_detail_1_and_3_packed_logprobs_equal_each_sequence_alone_with_its_temperature(
    make: object, temperature: float
) -> None:
    assert callable(make)
    language_model = make().eval()
    episodes = random_episodes(12, temperature=temperature)
    rows = Rows.of(episodes)
    policy = PolicyModel(language_model)
    got, entropies = torch.zeros(rows.mask.shape), torch.zeros(rows.mask.shape)
    for batch in micro_batches(episodes, range(12), max_tokens=50, width=rows.mask.shape[1]):
        measured = policy.measure(batch)
        got.view(-1)[batch.slots], entropies.view(-1)[batch.slots] = measured.logprobs, measured.entropies
        torch.testing.assert_close(policy.evaluate(batch).logprobs, measured.logprobs)
        torch.testing.assert_close(ReferenceModel(language_model).logprobs(batch), measured.logprobs)
    for row, episode in enumerate(episodes):
        logits = alone(language_model, episode)
        expected = logits.log_softmax(-1).gather(1, torch.tensor(episode.response).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(got[row][: len(expected)], expected, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(entropies[row][: len(expected)], policy_gradient.entropy(logits), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [tiny_llama, gpt2])
def test_a_packed_row_gives_the_gradient_of_sequences_that_share_a_pass_by_their_length(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    episodes = random_episodes(12)
    (batch,) = micro_batches(episodes, range(12), max_tokens=1000, width=9)
    assert len(batch.runs) > 2
    packed = PolicyModel(make())
    monkeypatch.setattr(policy_module, "use_packed_attention", lambda model: False)
    apart = PolicyModel(make())
    assert packed.language_model.config._attn_implementation == NAME
    assert apart.language_model.config._attn_implementation == "sdpa"
    gradients = []
    for model in (packed, apart):
        now = model.evaluate(batch)
        (now.logprobs.sum() + now.values.sum()).backward()
        gradients.append([p.grad for p in model.trainable().values()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_model_whose_attention_is_not_known_is_left_as_it_was() -> None:
    model = tiny_llama().eval()
    for layer in model.model.layers:
        layer.self_attn.forward = eager_by_itself(layer.self_attn)
    assert not use_packed_attention(model)
    assert model.config._attn_implementation == "sdpa"


def eager_by_itself(attention: Any) -> Callable[..., Any]:
    """An attention that asks nobody how to attend: one that knows no runs."""
    own = LlamaForCausalLM(attention.config).config
    own._attn_implementation = "sdpa"

    def forward(*args: Any, **kwargs: Any) -> Any:
        before, attention.config = attention.config, own
        kwargs.pop("runs", None)
        try:
            return type(attention).forward(attention, *args, **kwargs)
        finally:
            attention.config = before

    return forward


@pytest.mark.parametrize("make", [tiny_llama, gpt2])
def test_layers_that_are_computed_again_give_the_same_bits(make: Callable[[], Any]) -> None:
    batch = micro_batches(random_episodes(12), range(12), max_tokens=1000, width=9)[0]
    gradients, kept = [], []
    for recompute in (False, True):
        policy = PolicyModel(make(), recompute=recompute)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, into=sizes: into.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
            logprobs = policy.evaluate(batch).logprobs
        logprobs.sum().backward()
        gradients.append({name: p.grad for name, p in policy.trainable().items() if p.grad is not None})
        kept.append(sum(sizes))
        assert not any(module.training for module in policy.modules() if isinstance(module, torch.nn.Dropout))
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert kept[1] < 0.5 * kept[0]


def test_a_model_without_layers_that_can_be_computed_again_is_refused() -> None:
    model = tiny_llama()
    model.supports_gradient_checkpointing = False
    with pytest.raises(FailedPrecondition, match=r"learner\.gradient_checkpointing"):
        PolicyModel(model, recompute=True)


def test_detail_6_the_value_head_starts_at_exactly_zero_and_still_learns() -> None:
    policy = PolicyModel(tiny_llama())
    batch = micro_batches(random_episodes(4), range(4), max_tokens=1000, width=9)[0]
    values = policy.evaluate(batch).values
    assert bool((values == 0).all())
    (values - 1.0).square().sum().backward()
    gradient = policy.value_head.weight.grad
    assert gradient is not None
    assert bool(gradient.abs().sum() > 0)


def test_the_value_loss_reaches_the_transformer_only_through_a_shared_trunk() -> None:
    batch = micro_batches(random_episodes(4), range(4), max_tokens=1000, width=9)[0]
    for shared in (True, False):
        policy = PolicyModel(tiny_llama(), shared_trunk=shared)
        torch.nn.init.ones_(policy.value_head.weight)
        policy.evaluate(batch).values.sum().backward()
        reached = [p.grad for name, p in policy.trainable().items() if not name.startswith("value_head") and p.grad is not None]
        assert bool(reached) is shared


def test_there_is_no_dropout_in_training() -> None:
    policy = PolicyModel(gpt2())
    batch = micro_batches(random_episodes(4), range(4), max_tokens=1000, width=9)[0]
    assert torch.equal(policy.evaluate(batch).logprobs, policy.evaluate(batch).logprobs)
    assert not policy.language_model.training


@pytest.mark.parametrize("rows", [4, 256])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.25, None), (1.0, 1.5), (3.0, 2.0)])
def test_the_closed_form_gradient_equals_autograd(
    biased: bool, scale: float, cap: float | None, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(token_head._ROWS, "cpu", (rows, 1))
    source = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 6, generator=source, requires_grad=True)
    weight = torch.randn(20, 6, generator=source, requires_grad=True)
    bias = torch.randn(20, generator=source, requires_grad=True) if biased else None
    targets = torch.randint(20, (9,), generator=source)
    temperatures = torch.rand(9, generator=source) + 0.5
    upstream = torch.randn(9, generator=source)
    inputs = [hidden, weight, *([bias] if bias is not None else [])]

    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    logits = logits / temperatures.unsqueeze(1)
    plain = logits.log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)
    head = TokenHead(weight, bias, scale, cap)
    ours = chosen_logprobs(hidden, head, targets, temperatures)
    torch.testing.assert_close(ours, plain)
    expected = torch.autograd.grad(plain, inputs, upstream, retain_graph=True)
    for got, want in zip(torch.autograd.grad(ours, inputs, upstream, retain_graph=True), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    with pytest.raises(RuntimeError, match="once only"):
        torch.autograd.grad(ours, inputs, upstream)
    again = chosen_logprobs(hidden, head, targets, temperatures, keep=False)
    for got, want in zip(torch.autograd.grad(again, inputs, upstream), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    chosen, entropies = chosen_logprobs_and_entropy(hidden, head, targets, temperatures)
    torch.testing.assert_close(chosen, plain)
    torch.testing.assert_close(entropies, policy_gradient.entropy(logits))
    torch.testing.assert_close(head.logits(hidden) / temperatures.unsqueeze(1), logits)


@pytest.mark.parametrize(("gradient", "keep", "whole"), [(True, True, 1), (True, False, 0), (False, True, 0)])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_one_tensor_of_all_tokens_and_the_vocabulary_is_made_at_most(
    gradient: bool, keep: bool, whole: int, cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(token_head._ROWS, "cpu", (8, 1))
    hidden, weight = torch.randn(64, 4, requires_grad=gradient), torch.randn(32, 4, requires_grad=gradient)
    targets, ones = torch.zeros(64, dtype=torch.long), torch.ones(64)
    with Largest() as seen, torch.set_grad_enabled(gradient):
        chosen, _ = chosen_logprobs_and_entropy(hidden, TokenHead(weight, None, 1.0, cap), targets, ones, keep=keep)
        if gradient:
            chosen.sum().backward()
    assert seen.made == whole


class Largest(TorchDispatchMode):
    """Counts storages of 64 x 32 numbers."""

    made = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        known = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, Tensor)}
        known |= {tensor.untyped_storage().data_ptr() for tensor in (kwargs or {}).values() if isinstance(tensor, Tensor)}
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() == 64 * 32 * 4:
                self.made += tensor.untyped_storage().data_ptr() not in known
        return result


def test_bfloat16_keeps_weights_and_logprobs_in_float32_and_stays_near() -> None:
    exact, fast = PolicyModel(tiny_llama()), PolicyModel(tiny_llama(), precision="bfloat16")
    batch = micro_batches(random_episodes(8), range(8), max_tokens=1000, width=9)[0]
    a, b = exact.evaluate(batch), fast.evaluate(batch)
    assert b.logprobs.dtype == b.values.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in fast.parameters())
    torch.testing.assert_close(a.logprobs, b.logprobs, atol=0.1, rtol=0)
    b.logprobs.sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in fast.parameters())


def test_on_a_cpu_a_bfloat16_model_attends_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[torch.dtype] = set()
    inner = packed.sdpa_attention_forward

    def watched(module: object, query: Tensor, *args: Tensor, **kwargs: object) -> object:
        seen.add(query.dtype)
        return inner(module, query, *args, **kwargs)

    monkeypatch.setattr(packed, "sdpa_attention_forward", watched)
    policy = PolicyModel(tiny_llama(), precision="bfloat16")
    policy.measure(micro_batches(random_episodes(4), range(4), max_tokens=1000, width=9)[0])
    assert seen == {torch.float32}


def test_a_model_whose_logits_are_made_in_an_unknown_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: (hidden @ model.lm_head.weight.t()) ** 3)
    with pytest.raises(FailedPrecondition, match="in a way that the learner does not know"):
        PolicyModel(model)


def test_a_model_that_reads_ahead_is_refused() -> None:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        is_decoder=False,
    )
    model = BertLMHeadModel(config)
    # Its head is more than one layer too; make that pass, so that the direction of attention decides.
    model.cls.predictions.transform = torch.nn.Identity()
    with pytest.raises(FailedPrecondition, match="reads what comes after"):
        PolicyModel(model)


def test_tied_weights_are_stored_once_and_weights_of_another_model_are_refused() -> None:
    policy = PolicyModel(tiny_llama())
    stored = policy.tensors()
    assert not any("lm_head" in name for name in stored)
    other = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_tensors({name: value.clone() for name, value in stored.items()})
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), other.parameters(), strict=True))
    with pytest.raises(DataLoss, match="names differ"):
        other.load_tensors({"x": torch.zeros(1)})
    with pytest.raises(DataLoss, match="has shape"):
        other.load_tensors(stored | {"value_head.bias": torch.zeros(2)})


@torch.no_grad()
def test_canaries_are_the_models_own_float32_logprobs_at_temperature_1() -> None:
    policy = PolicyModel(tiny_llama(), precision="bfloat16")
    (record,) = canary_logprobs(policy, [[1, 2, 3, 4, 5]], start=2)
    logits = policy.language_model(input_ids=torch.tensor([[1, 2, 3, 4, 5]])).logits[0]
    expected = logits[1:4].log_softmax(-1).gather(1, torch.tensor([[3], [4], [5]])).squeeze(1)
    torch.testing.assert_close(torch.tensor(record.logprobs), expected, atol=1e-5, rtol=0)
    assert (record.token_ids, record.start) == ((1, 2, 3, 4, 5), 2)
    with pytest.raises(InvalidArgument, match=r"texts\[0\]"):
        canary_logprobs(policy, [[1, 2]], start=2)
