"""How the two sides of an input become text and tokens."""

from collections.abc import Sequence

from tests.unit.reward.support import ByteTokenizer, item

from honed.reward.scorer import ScorerInput


class SpaceEater(ByteTokenizer):
    """Drops the space in front of what it decodes, as SentencePiece tokenizers do."""

    def decode(self, token_ids: Sequence[int]) -> str:
        return super().decode(token_ids).removeprefix(" ")


def test_token_ids_are_decoded_and_text_is_encoded() -> None:
    tokens, text = item(list(b"bc"), [256, 97]), item("bc", "a")
    assert (tokens.prompt_text, tokens.response_text) == (text.prompt_text, text.response_text) == ("a", "bc")
    assert (tokens.prompt_ids, tokens.response_ids) == (text.prompt_ids, text.response_ids) == ((256, 97), (98, 99))


def test_a_response_keeps_the_space_behind_its_prompt() -> None:
    sample = ScorerInput(SpaceEater(), prompt_tokens=tuple(b" I like"), response_tokens=tuple(b" cats"))
    assert sample.prompt_text + sample.response_text == "I like cats"


def test_a_letter_split_between_prompt_and_response_does_no_harm() -> None:
    whole = "é".encode()
    sample = item(list(whole[1:]), list(whole[:1]))
    assert (sample.prompt_text, sample.response_text) == ("\ufffd", "\ufffd")


def test_nothing_stays_nothing() -> None:
    sample = item("")
    assert (sample.prompt_text, sample.response_text, sample.prompt_ids, sample.response_ids) == ("", "", (), ())
    assert sample.cost == 1
