"""Splits the movie texts into three parts that share no text: for the reward model, for the independent judge, and held out.

The ids of the movie set are plain numbers without the review they came from; the texts are one-sentence summaries by
different critics, so there is no review to group by. Two texts occur twice up to case and punctuation; such twins go to the
same part. Texts that merely share a stock phrase ("one of the best films of the year") are different texts.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from honed.demo.data.ratings import MOVIES, RatedText
from honed.kit.errors import InvalidArgument

HELD_OUT = 1_500
JUDGE = 3_000

_PLACEHOLDERS = re.compile(r"(?<!\w)@anonymous\b(?!\.\w)|http://url_removed")


@dataclass(frozen=True)
class Split:
    """The parts of the data, by what may see them.

    Attributes:
        reward: trains the language model (texts) and the reward model (ratings).
        judge: trains the independent judge; its texts give the prompts of training. No other model sees its ratings.
        held_out: measures agreement and gives the prompts of evaluation. Nothing trains on it, in any stage.
        unrated: texts of the other sets, for the language model, without the data set's placeholders; their ratings stay
            untouched.
    """

    reward: tuple[RatedText, ...]
    judge: tuple[RatedText, ...]
    held_out: tuple[RatedText, ...]
    unrated: tuple[str, ...]

    @property
    def language_texts(self) -> tuple[str, ...]:
        """What the language model may be pretrained on."""
        return tuple(rated.text for rated in self.reward) + self.unrated


def normal_form(text: str) -> str:
    """The text's letters and digits in lower case: equal for texts that differ in case, punctuation or spacing only."""
    return " ".join(re.findall(r"\w+", text.lower()))


def without_placeholders(text: str) -> str:
    """The text without what stands for a removed user name or address in the tweets, white space collapsed.

    A policy that may say such a token says nothing else: the reward model read only film reviews, where it never occurs, and
    cannot find fault with it.
    """
    return " ".join(_PLACEHOLDERS.sub(" ", text).split())


def split(sets: Mapping[str, Sequence[RatedText]], *, seed: int, held_out: int = HELD_OUT, judge: int = JUDGE) -> Split:
    """Splits deterministically: the same texts, sizes and seed give the same parts, whatever the order of the texts.

    Texts of other sets that equal a movie text of `judge` or `held_out` are left out of `unrated`.

    Args:
        sets: the rated sets by name; `movieReviewSnippets` must be among them.
        seed: of the shuffle.
        held_out: texts to hold out.
        judge: texts for the judge.

    Raises:
        InvalidArgument: when the movie set cannot give the asked sizes and leave a text for the reward model.
    """
    groups: dict[str, list[RatedText]] = {}
    for rated in sorted(sets[MOVIES], key=lambda item: (normal_form(item.text), item.id)):
        groups.setdefault(normal_form(rated.text), []).append(rated)
    if min(held_out, judge) < 1 or held_out + judge >= len(groups):
        raise InvalidArgument(
            "data.split", f"{held_out} held-out and {judge} judge texts do not fit into {len(groups)} different texts"
        )
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    # Twins last: then the sizes come out exactly and every twin lies in the part that trains the reward model.
    order.sort(key=len)
    parts = order[:held_out], order[held_out : held_out + judge], order[held_out + judge :]
    held_part, judge_part, reward_part = (tuple(rated for group in part for rated in group) for part in parts)
    hidden = {normal_form(rated.text) for rated in held_part + judge_part}
    others = (rated.text for name, rows in sorted(sets.items()) if name != MOVIES for rated in rows)
    unrated = tuple(text for text in map(without_placeholders, others) if text and normal_form(text) not in hidden)
    return Split(reward_part, judge_part, held_part, unrated)


def texts_of(rated: Iterable[RatedText]) -> list[str]:
    """The bare texts, in order."""
    return [item.text for item in rated]
