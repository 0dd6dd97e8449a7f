"""Makes prompts of texts, their first words, and what follows of them.

Cut at a space, because the tokenizer never joins words: the tokens of the prompt are then a prefix of the tokens of the text.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence

from honed.kit.errors import InvalidArgument


def first_words(texts: Sequence[str], *, seed: int, shortest: int = 3, longest: int = 6) -> list[str]:
    """One prompt per text, in order: its first `shortest` to `longest` words, how many is drawn evenly for each.

    Few words, so that the prompt opens a sentence and seldom decides yet whether it praises or damns: what follows is the
    policy's to choose. A text that has no word left after its `shortest` first ones gives no prompt.

    Raises:
        InvalidArgument: when the bounds are not 1 <= shortest <= longest.
    """
    if not 1 <= shortest <= longest:
        raise InvalidArgument("data.prompt_words", f"need 1 <= shortest <= longest, not {shortest} and {longest}")
    rng = random.Random(seed)
    prompts = []
    for text in texts:
        words = text.split()
        count = rng.randint(shortest, longest)  # drawn for every text: dropping one text changes no other prompt
        if len(words) > shortest:
            prompts.append(" ".join(words[: min(count, len(words) - 1)]))
    return prompts


def cut_in_two(texts: Iterable[str], *, seed: int, shortest: int, longest: int, left: int) -> Iterator[tuple[str, str]]:
    """Each text as its first `shortest` to `longest` words and all others; without texts that leave fewer than `left` words.

    Raises:
        InvalidArgument: when the bounds are not 1 <= shortest <= longest and 1 <= left.
    """
    if not 1 <= shortest <= longest or left < 1:
        raise InvalidArgument(
            "data.prompt_words", f"need 1 <= shortest <= longest and 1 <= left, not {shortest}, {longest}, {left}"
        )
    rng = random.Random(seed)
    for text in texts:
        words, count = text.split(), rng.randint(shortest, longest)  # drawn for every text, as above
        if len(words) >= count + left:
            yield " ".join(words[:count]), " ".join(words[count:])
