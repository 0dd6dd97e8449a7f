"""Real data of one's own for a small run: shop reviews that people rated, as prompts and comparisons, and a model for them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from honed.demo.data.comparisons import Comparison, draw_comparisons
from honed.demo.data.fetch import default_directory, fetch
from honed.demo.data.openings import first_words
from honed.demo.data.ratings import RatedText, read_ratings
from honed.kit.errors import HonedError

SHOP = "amazonReviewSnippets"
VOCABULARY, LONGEST = 2048, 96


def shop_reviews() -> tuple[RatedText, ...]:
    """The rated snippets of shop reviews. Fails the test where they cannot be had: skipped, it would prove nothing unseen."""
    directory = default_directory()
    try:
        return read_ratings(fetch(directory))[SHOP]
    except HonedError as error:
        pytest.fail(f"this test needs the human ratings, and {directory} cannot get them: {error}", pytrace=False)


def write_review_files(root: Path, reviews: tuple[RatedText, ...], *, pairs: int = 6000, held_out: int = 1000) -> None:
    """Writes `prompts.jsonl`, `evaluation.jsonl`, and comparisons in TRL's format: `pairs.jsonl` and `held.jsonl`.

    No text is in both.
    """
    cut = len(reviews) * 3 // 4
    train, rest = reviews[:cut], reviews[cut:]
    prompts = first_words([review.text for review in train], seed=1)
    _write(root / "prompts.jsonl", ({"text": text} for text in prompts[:200]))
    _write(root / "evaluation.jsonl", ({"text": text} for text in first_words([r.text for r in rest], seed=1)[:8]))
    _write(root / "pairs.jsonl", map(_trl, itertools.islice(draw_comparisons(train, seed=1, sitting=8), pairs)))
    _write(root / "held.jsonl", map(_trl, itertools.islice(draw_comparisons(rest, seed=2), held_out)))


def make_review_model(directory: Path, reviews: tuple[RatedText, ...]) -> Path:
    """A random Llama whose tokenizer knows the reviews' words."""
    import torch

    from honed.learner.supervised.language_model import ModelShape, new_language_model, save_language_model
    from honed.models.new_tokenizer import train_tokenizer

    tokenizer = train_tokenizer([r.text for r in reviews], vocabulary_size=VOCABULARY, max_length=LONGEST)
    rng = torch.Generator().manual_seed(1)
    model = new_language_model(ModelShape(64, 2, 32, LONGEST), vocabulary_size=len(tokenizer), rng=rng)
    save_language_model(model, tokenizer, directory)
    return directory


def _trl(pair: Comparison) -> Mapping[str, str]:
    return {"prompt": "", "chosen": pair.chosen.text, "rejected": pair.rejected.text}


def _write(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
