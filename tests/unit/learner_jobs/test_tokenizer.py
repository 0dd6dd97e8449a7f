import json

import pytest
from tests.unit.learner_jobs.conftest import TEXTS

from honed.kit.errors import DataLoss, InvalidArgument
from honed.models.new_tokenizer import END_OF_TEXT, END_OF_TEXT_ID, train_tokenizer
from honed.models.tokenizer import TextTokenizer, load_tokenizer


def test_any_text_comes_back(tokenizer):
    for text in ("plain words", "naïve café 🎬 <b>", "tabs\tand\nlines", "日本"):
        assert tokenizer.decode(TextTokenizer(tokenizer).encode_all([text])[0]) == " " + text


def test_a_saved_tokenizer_loads_as_the_same_one(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert {"tokenizer.json", "tokenizer_config.json"} <= {path.name for path in tmp_path.iterdir()}
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode_all(TEXTS) == TextTokenizer(tokenizer).encode_all(TEXTS)
    assert (loaded._tokenizer.bos_token, loaded._tokenizer.eos_token, loaded._tokenizer.eos_token_id) == (
        END_OF_TEXT,
        END_OF_TEXT,
        END_OF_TEXT_ID,
    )
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == 64


def test_encoding_with_special_tokens_begins_as_every_training_text_does(tokenizer):
    assert tokenizer("A film")["input_ids"] == [END_OF_TEXT_ID, *TextTokenizer(tokenizer).encode_all(["A film"])[0]]


def test_there_is_no_pad_token(tokenizer):
    assert tokenizer.pad_token is None


def test_the_tokens_of_first_words_are_a_prefix_of_the_tokens_of_the_text(tokenizer):
    for text in TEXTS:
        words = text.split()
        whole = TextTokenizer(tokenizer).encode_all([text])[0]
        for count in range(1, len(words)):
            prompt = TextTokenizer(tokenizer).encode_all([" ".join(words[:count])])[0]
            assert whole[: len(prompt)] == prompt


def test_training_is_deterministic():
    first, second = (train_tokenizer(TEXTS, vocabulary_size=300, max_length=64) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_a_vocabulary_without_room_for_every_byte_is_refused():
    with pytest.raises(InvalidArgument, match="257"):
        train_tokenizer(TEXTS, vocabulary_size=256, max_length=64)


def test_a_directory_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(DataLoss, match=str(tmp_path)):
        load_tokenizer(tmp_path)


def test_no_texts_give_no_tokens(tokenizer):
    assert TextTokenizer(tokenizer).encode_all([]) == []
