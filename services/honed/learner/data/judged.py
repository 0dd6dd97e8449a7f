"""Judgements of people as token ids, in the form in which a scorer reads prompt and response."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import fsum
from typing import Final

from honed.kit.errors import InvalidArgument
from honed.learner.data.judgement import Judgement, Ranking, Rating, Tokens
from honed.learner.data.labelled import Labelled
from honed.learner.data.pair import Pair
from honed.learner.settings import RewardTrainingSettings
from honed.models.tokenizer import TextTokenizer
from honed.v1 import preference_pb2

_STRONGEST: Final = 3  # "much better", of `PairwiseJudgement.strength`
_TOO_LONG: Final = "longer than generation.max_model_tokens"


@dataclass(frozen=True)
class Judged:
    """What one judgement says of texts.

    Attributes:
        prompt: Empty for texts that stand alone.
        responses: Best first; the rated one alone for a rating.
        rating: From 0 to 1; None for an order.
        ranks: Of each response, rising, equal where they tie; empty where all differ.
        strength: How much better the first of two is, of the most that can be said: 0 to 1, 0 where nobody was asked.
        weight: How much it counts.
    """

    prompt: str
    responses: tuple[str, ...]
    rating: float | None = None
    ranks: tuple[int, ...] = ()
    strength: float = 0.0
    weight: float = 1.0


def read_judgement(judgement: preference_pb2.Judgement) -> Judged | None:
    """What a judgement says; None where it says nothing of an order or a rating, as ties of all responses do."""
    prompt, texts = judgement.prompt, [response.text for response in judgement.responses]
    match judgement.WhichOneof("verdict"):
        case "pairwise" if not judgement.pairwise.tie:
            pair = judgement.pairwise
            return Judged(prompt, (texts[pair.preferred], texts[pair.other]), strength=pair.strength / _STRONGEST)
        case "ranking" if len(set(judgement.ranking.ranks)) > 1:
            ranks = judgement.ranking.ranks
            order = sorted(range(len(texts)), key=lambda place: ranks[place])
            ties = len(set(ranks)) < len(ranks)
            return Judged(prompt, tuple(texts[i] for i in order), ranks=tuple(ranks[i] for i in order) if ties else ())
        case "rating":
            rating = judgement.rating
            value = (rating.value - rating.low) / (rating.high - rating.low)
            return Judged(prompt, (texts[rating.response],), value)
    return None


def weighed(judgements: Iterable[preference_pb2.Judgement], section: RewardTrainingSettings) -> Iterator[Judged]:
    """What judgements say to a reward model, by the weights of those who judged; without what says nothing, or weighs nothing.

    Where the best of a ranking is all that is learned, one with several that are best says nothing; where scores learn by
    how much they should differ, neither does a ranking, or a comparison without its strength.
    """
    for judgement in judgements:
        weight = section.weight(judgement.annotator, judgement.source)
        row = read_judgement(judgement) if weight else None
        if row is None or (section.objective == "best_of_k" and row.ranks and row.ranks[0] == row.ranks[1]):
            continue
        if section.objective == "scalar_compare" and row.rating is None and not row.strength:
            continue
        yield replace(row, weight=weight)


def read_pairs(judgement: preference_pb2.Judgement) -> list[Judged]:
    """The pairs of responses that a judgement orders, the better one first; of a ranking also those beside its ties."""
    if judgement.WhichOneof("verdict") == "ranking":
        ranked = sorted(
            zip(judgement.ranking.ranks, (r.text for r in judgement.responses), strict=True), key=lambda row: row[0]
        )
        return [
            Judged(judgement.prompt, (better, worse))
            for (rank, better), (other, worse) in combinations(ranked, 2)
            if rank < other
        ]
    judged = read_judgement(judgement)
    return [judged] if judged is not None and judged.rating is None else []


def read_labels(judgement: preference_pb2.Judgement) -> list[Judged]:
    """What a judgement says of single responses, as ratings: thumbs and complaints are the ends of the scale.

    So are the two sides of a comparison, and the best and the worst of a ranking; those between are neither good nor bad.
    """
    texts = [response.text for response in judgement.responses]
    match judgement.WhichOneof("verdict"):
        case "thumbs":
            rated = {judgement.thumbs.response: float(judgement.thumbs.up)}
        case "flag":
            rated = {judgement.flag.response: 0.0}
        case "pairwise" if not judgement.pairwise.tie:
            rated = {judgement.pairwise.preferred: 1.0, judgement.pairwise.other: 0.0}
        case "ranking":
            ranks = judgement.ranking.ranks
            best, worst = min(ranks), max(ranks)
            ends = {place: rank for place, rank in enumerate(ranks) if rank in (best, worst)}
            rated = {place: float(rank == best) for place, rank in ends.items() if best != worst}
        case "rating":
            single = read_judgement(judgement)
            return [single] if single is not None else []
        case _:
            rated = {}
    return [Judged(judgement.prompt, (texts[place],), value) for place, value in rated.items()]


def encode(
    tokenizer: TextTokenizer, rows: Sequence[Judged], *, sees_prompt: bool, margin: float = 0.0
) -> tuple[list[Judgement], dict[str, int]]:
    """Judgements as token ids, in their order, and how many were left out, by reason.

    Weights get a mean of 1, so that those that are all the same change nothing.

    Args:
        tokenizer: Of the model that reads them.
        rows: What people said.
        sees_prompt: Whether the scorer reads the prompt too; without it each response stands alone, behind the special
            tokens that begin a text.
        margin: Of a comparison of full strength; that of a weaker one is as much less.
    """
    prefix = tokenizer.prefix
    prompts = {"": prefix}
    if sees_prompt:
        prompts |= {text: tuple(tokenizer.encode(text, special_tokens=True)) for text in {row.prompt for row in rows} if text}
    encoded = iter(tokenizer.encode_all(_texts(rows)))
    found: list[tuple[Judged, Tokens, tuple[Tokens, ...]]] = []
    left: Counter[str] = Counter()
    for row in rows:
        head = prompts.get(row.prompt, prefix)
        responses = tuple(tuple(next(encoded)) for _ in row.responses)
        if all(head + response for response in responses):
            found.append((row, head, responses))
        else:
            left["a response is empty, and nothing stands before it that the model could read"] += 1
    mean = fsum(row.weight for row, _, _ in found) / max(1, len(found))
    judgements: list[Judgement] = []
    for row, head, responses in found:
        weight = row.weight / mean
        if row.rating is None:
            judgements.append(Ranking(head, responses, row.ranks, margin * row.strength, weight))
        else:
            judgements.append(Rating(head, responses[0], row.rating, weight))
    return judgements, dict(left)


def encode_pairs(
    tokenizer: TextTokenizer, rows: Sequence[Judged], *, longest: int, append_end: bool
) -> tuple[list[Pair], dict[str, int]]:
    """Pairs of responses as the policy reads them, in their order, and how many were left out, by reason.

    Args:
        tokenizer: Of the policy.
        rows: Pairs; see `read_pairs`.
        longest: Tokens that prompt and response may have together.
        append_end: Whether a response ends with the end-of-text token.

    Raises:
        InvalidArgument: A text stands alone, and the tokenizer has no token that could stand before it; or none that ends it.
    """
    pairs: list[Pair] = []
    left: Counter[str] = Counter()
    for number, (prompt, (chosen, rejected)) in enumerate(_continuations(tokenizer, rows, append_end=append_end)):
        if not chosen or not rejected or chosen == rejected:
            left["nothing to tell apart"] += 1
        elif len(prompt) + max(len(chosen), len(rejected)) > longest:
            left[_TOO_LONG] += 1
        else:
            pairs.append(Pair(f"pair-{number}", prompt, chosen, rejected))
    return pairs, dict(left)


def encode_labelled(
    tokenizer: TextTokenizer, rows: Sequence[Judged], *, threshold: float, longest: int, append_end: bool
) -> tuple[list[Labelled], dict[str, int]]:
    """Responses that were called good or bad as the policy reads them, in their order, and how many were left out, by reason.

    Args:
        tokenizer: Of the policy.
        rows: Ratings; see `read_labels`.
        threshold: Ratings above it are good, those below it bad.
        longest: See `encode_pairs`.
        append_end: See `encode_pairs`.

    Raises:
        InvalidArgument: See `encode_pairs`.
    """
    found: list[Labelled] = []
    left: Counter[str] = Counter()
    for number, (prompt, [response]) in enumerate(_continuations(tokenizer, rows, append_end=append_end)):
        rating = rows[number].rating
        if rating is None or rating == threshold:
            left["neither good nor bad"] += 1
        elif not response:
            left["empty"] += 1
        elif len(prompt) + len(response) > longest:
            left[_TOO_LONG] += 1
        else:
            found.append(Labelled(f"response-{number}", prompt, response, rating > threshold))
    return found, dict(left)


def _continuations(
    tokenizer: TextTokenizer, rows: Sequence[Judged], *, append_end: bool
) -> Iterator[tuple[Tokens, list[Tokens]]]:
    """Prompt and responses of each row as the policy reads them."""
    end, first = tokenizer.end, tokenizer.prefix or ((tokenizer.end,) if tokenizer.end is not None else ())
    if append_end and end is None:
        raise InvalidArgument("learner.preferences.append_end", "the tokenizer has no end-of-text token: set it to false")
    prompts = {text: tuple(tokenizer.encode(text, special_tokens=True)) for text in {row.prompt for row in rows} if text}
    encoded = iter(tokenizer.encode_all(_texts(rows)))
    tail = (end,) if append_end and end is not None else ()
    for row in rows:
        prompt = prompts.get(row.prompt) or first
        if not prompt:
            raise InvalidArgument("judgements", "some have no prompt, and the tokenizer has no token that begins a text")
        yield prompt, [(*next(encoded), *tail) for _ in row.responses]


def _texts(rows: Iterable[Judged]) -> list[str]:
    return [text for row in rows for text in row.responses]
