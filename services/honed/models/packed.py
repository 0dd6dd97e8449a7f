"""Sequences read one behind the other, as one row without padding: attention alone knows where each of them ends.

Everything else in a causal transformer looks at single tokens, so a row of many sequences costs what its tokens cost. Attention
is computed for each run of sequences of equal length, which lie in memory as a batch does: no token is copied or padded for it,
and packed neighbours (`packing`) are of similar length, so that runs are few.

Sequences that begin alike can share their beginning (`packing.Branches`): it is read once, and each sequence attends to it and
to what it has of its own. With eight responses to a prompt as long as they are, that is 44% fewer tokens.

What an attention gets from transformers for it is what flash attention gets, which makes no masks either: the soft cap and the
sliding window of each layer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Final

import torch
from torch import Tensor

from honed.models import lean  # noqa: F401  before transformers
from honed.models.packing import Branches, Runs, runs_of, tokens_of

# isort: split
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

logger = logging.getLogger(__name__)

NAME: Final = "honed_packed"


def use_packed_attention(language_model: Any) -> bool:
    """Has a causal language model of transformers read packed rows, in float32 on a CPU whatever the model computes in.

    Its base model then takes `runs`, beside tokens and positions `[1, T]`; without it, sequences `[b, L]` without padding, as
    before. No cache can be used any more.

    Returns:
        False where it attends in a way that is not known here; it is as it was then. Found out by reading two sequences.
    """
    config = language_model.config
    before = config._attn_implementation
    if before == NAME:  # a copy of a model that does
        return True
    if before not in ("sdpa", "eager") or getattr(config, "attention_chunk_size", None):
        return False
    alone = [_read(language_model, [tokens]) for tokens in _SAMPLE]
    AttentionInterface.register(NAME, _attend)
    language_model.set_attn_implementation(NAME)
    try:
        same = torch.allclose(_read(language_model, _SAMPLE), torch.cat(alone), rtol=1e-3, atol=1e-3)
    except (TypeError, ValueError, RuntimeError) as error:
        logger.debug("packed rows cannot be read", extra={"reason": str(error)})
        same = False
    if not same:
        language_model.set_attn_implementation(before)
    return same


_SAMPLE: Final = ((0, 1, 0), (1, 0))


@torch.no_grad()
def _read(language_model: Any, sequences: Sequence[Sequence[int]]) -> Tensor:
    device, lengths = language_model.device, [len(tokens) for tokens in sequences]
    packed = len(sequences) > 1
    read = language_model.base_model(
        input_ids=torch.tensor([[token for tokens in sequences for token in tokens]], device=device),
        position_ids=torch.tensor([[at for length in lengths for at in range(length)]], device=device),
        use_cache=False,
        **({"runs": runs_of(lengths)} if packed else {}),
    )
    hidden: Tensor = read.last_hidden_state[0]
    return hidden


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    runs: Runs | None = None,
    **how: Any,
) -> tuple[Tensor, None]:
    """Attention of `[b, H, L, D]`, or with `runs` of `[1, H, T, D]`, to `[b, L, H, D]` and `[1, T, H, D]`."""
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        raise ValueError("a model that reads packed rows takes neither padding nor a cache")
    if runs is None:
        return _causal(module, query, key, value, **how), None
    parts = zip(*(torch.split(tensor.squeeze(0), tokens_of(runs), dim=1) for tensor in (query, key, value)), strict=True)
    found = []
    for (count, shape), part in zip(runs, parts, strict=True):
        rows = [tensor.unflatten(1, (count, -1)).transpose(0, 1) for tensor in part]
        read = _branched(module, shape, *rows, **how) if isinstance(shape, Branches) else _causal(module, *rows, **how)
        found.append(read.flatten(0, 1))
    return (found[0] if len(found) == 1 else torch.cat(found)).unsqueeze(0), None


def _branched(module: torch.nn.Module, shape: Branches, query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
    """Groups of one shape `[n, H, T, D]` to `[n, T, H, D]`."""
    prefix, count, longest = shape.prefix, len(shape.lengths), max(shape.lengths)
    ragged = None if min(shape.lengths) == longest else _ragged(shape.lengths, query.device)

    def own(tensor: Tensor) -> Tensor:
        """What each sequence has of its own, `[n c, H, L, D]`; shorter ones repeat a token, which nothing before it sees."""
        after = tensor[:, :, prefix:] if ragged is None else tensor[:, :, prefix:].index_select(2, ragged[0])
        groups, heads, _, width = after.shape
        return after.reshape(groups, heads, count, longest, width).transpose(1, 2).flatten(0, 1)

    def seen(tensor: Tensor) -> Tensor:
        """The beginning, and what each sequence has of its own, `[n c, H, P + L, D]`."""
        before = tensor[:, None, :, :prefix].expand(-1, count, -1, -1, -1).flatten(0, 1)
        return torch.cat([before, own(tensor)], dim=2)

    before = _causal(module, query[:, :, :prefix], key[:, :, :prefix], value[:, :, :prefix], **how)
    after = _causal(module, own(query), seen(key), seen(value), **how)
    after = after.reshape(-1, count * longest, *after.shape[2:])
    return torch.cat([before, after if ragged is None else after.index_select(1, ragged[1])], dim=1)


@lru_cache(maxsize=256)
def _ragged(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Where in a row the tokens of sequences stand, padded to the longest `[c L]`; and where in that those of the row do."""
    sizes, longest = torch.tensor(lengths), max(lengths)
    places = torch.arange(longest).minimum(sizes.unsqueeze(1) - 1)
    starts = sizes.cumsum(0) - sizes
    kept = (torch.arange(longest) < sizes.unsqueeze(1)).flatten().nonzero().squeeze(1)
    return (places + starts.unsqueeze(1)).flatten().to(device), kept.to(device)


def _causal(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> Tensor:
    """Sequences `[b, H, L, D]` to `[b, L, H, D]`; of keys there may be more, before them."""
    if others.get("s_aux") is not None:
        raise ValueError("attention sinks are not known here")
    length, keys, dtype = query.shape[2], key.shape[2], query.dtype
    mask = None
    if softcap is not None or keys > length or (sliding_window is not None and length > sliding_window):
        mask = _mask(length, keys, sliding_window, query.device)
    with _precision(query.device):
        if query.device.type == "cpu":
            query, key, value = query.float(), key.float(), value.float()
        if softcap is None:
            result: Tensor = sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling)[0]
        else:
            result = _capped(module, query, key, value, mask, query.shape[-1] ** -0.5 if scaling is None else scaling, softcap)
    return result.to(dtype)


@contextmanager
def _precision(device: torch.device) -> Iterator[None]:
    """Autocast stays off on CPUs: see `attention`."""
    if device.type == "cpu":
        with torch.autocast("cpu", enabled=False):
            yield
    else:
        yield


def _mask(length: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """True where a query sees a key, `[1, 1, L, K]`; the last query stands at the last key."""
    before = keys - length
    seen = torch.ones(length, keys, dtype=torch.bool, device=device).tril(before)
    return (seen if window is None else seen.triu(before + 1 - window)).view(1, 1, length, keys)


def _capped(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float
) -> Tensor:
    """Attention with soft-capped scores, as Gemma 2 has it; SDPA has no kernel for it."""
    assert mask is not None
    key, value = (repeat_kv(tensor, module.num_key_value_groups) for tensor in (key, value))
    scores = torch.tanh(query @ key.transpose(2, 3) * (scaling / softcap)) * softcap
    shares = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32).to(value.dtype)
    return (shares @ value).transpose(1, 2)
