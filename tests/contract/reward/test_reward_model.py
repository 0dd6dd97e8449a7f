"""A Hugging Face reward model as a scorer, against transformers itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tests.unit.reward.support import edit_config, make_reward_model

from honed.kit.errors import DataLoss, FailedPrecondition
from honed.models.tokenizer import TextTokenizer, load_tokenizer
from honed.reward.model_scorer import ModelScorer
from honed.reward.scorer import BadSample, ScorerInput

EOS = 0
WORDS = ["a", "some words", "rather more words than in the first one", "x" * 50]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reward_model(tmp_path_factory.mktemp("models") / "a", bias=0.75)


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> TextTokenizer:
    return load_tokenizer(directory)


@pytest.fixture
def copy(directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(directory, tmp_path / "copy"))


def expected(directory: Path, ids: list[int]) -> float:
    """One sequence through transformers' own classifier, which pools a single one at its last token."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        return float(model(torch.tensor([ids])).logits[0, 0]) + float(getattr(model.config, "reward_bias", 0.0))


def pairs(tokenizer: TextTokenizer) -> list[ScorerInput]:
    """Prompts and responses of many lengths; some responses end in the end-of-text token, once and twice."""
    endings: list[tuple[int, ...]] = [(), (EOS,), (EOS, EOS)]
    return [
        ScorerInput(
            tokenizer,
            prompt_tokens=tuple(tokenizer.encode(prompt, special_tokens=True)),
            response_tokens=(*tokenizer.encode(response, special_tokens=False), *ending),
        )
        for prompt in WORDS
        for response in WORDS
        for ending in endings
    ]


def test_a_score_is_what_transformers_says_of_the_whole_sequence(directory: Path, tokenizer: TextTokenizer) -> None:
    model = ModelScorer("rm", directory, tokenizer)
    batch = pairs(tokenizer)
    for sample, output in zip(batch, model.score(batch), strict=True):
        ids = [*sample.prompt_ids, *sample.response_ids]
        assert output.value == pytest.approx(expected(directory, ids), abs=1e-5)


@pytest.mark.parametrize("pad", [None, EOS])
def test_a_padded_batch_scores_as_each_sample_alone_whatever_the_padding_id(tmp_path: Path, pad: int | None) -> None:
    model_directory = make_reward_model(tmp_path / "m", pad=pad)
    tokenizer = load_tokenizer(model_directory)
    model = ModelScorer("rm", model_directory, tokenizer)
    batch = pairs(tokenizer)
    together = [output.value for output in model.score(batch)]
    alone = [model.score([sample])[0].value for sample in batch]
    assert together == pytest.approx(alone, abs=1e-6)
    assert len({round(value, 4) for value in alone}) == len(batch), "ends that look like padding count"


def test_a_small_token_budget_changes_no_score(directory: Path, tokenizer: TextTokenizer) -> None:
    batch = pairs(tokenizer)
    wide = ModelScorer("rm", directory, tokenizer).score(batch)
    narrow = ModelScorer("rm", directory, tokenizer, batch_tokens=60).score(batch)
    assert [o.value for o in wide] == pytest.approx([o.value for o in narrow], abs=1e-6)


def test_text_scores_as_its_tokens(directory: Path, tokenizer: TextTokenizer) -> None:
    model = ModelScorer("rm", directory, tokenizer)
    text = ScorerInput(tokenizer, prompt="the prompt", response=" and more")
    tokens = ScorerInput(tokenizer, prompt_tokens=text.prompt_ids, response_tokens=text.response_ids)
    assert model.score([text])[0] == model.score([tokens])[0]


def test_another_tokenizer_means_that_the_text_is_tokenised_again(
    directory: Path, copy: Path, tokenizer: TextTokenizer
) -> None:
    document = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (copy / "tokenizer.json").write_text(json.dumps(document))
    swapped = load_tokenizer(copy)
    sample = ScorerInput(swapped, prompt_tokens=tuple(swapped.encode("ab", special_tokens=True)), response="ba")
    assert list(sample.prompt_ids) != tokenizer.encode("ab", special_tokens=True)
    [output] = ModelScorer("rm", directory, swapped).score([sample])
    assert output.value == pytest.approx(expected(directory, tokenizer.encode("abba", special_tokens=True)), abs=1e-5)


def test_a_response_alone_begins_as_every_text_does(tmp_path: Path) -> None:
    directory = make_reward_model(tmp_path / "m")
    document = json.loads((directory / "tokenizer.json").read_text())
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [1], "tokens": ["<bos>"]}},
    }
    (directory / "tokenizer.json").write_text(json.dumps(document))
    tokenizer = load_tokenizer(directory)
    assert tokenizer.prefix == (1,)
    alone = ModelScorer("rm", directory, tokenizer, sees_prompt=False)
    ids = tokenizer.encode("word", special_tokens=False)
    want = pytest.approx(expected(directory, [1, *ids]), abs=1e-5)
    assert alone.score([ScorerInput(tokenizer, prompt="prompt", response_tokens=tuple(ids))])[0].value == want
    assert ModelScorer("rm", directory, tokenizer).score([ScorerInput(tokenizer, response="word")])[0].value == want


def test_what_does_not_fit_is_cut_from_the_prompts_beginning_and_reported(tmp_path: Path) -> None:
    directory = make_reward_model(tmp_path / "m", positions=16)
    tokenizer = load_tokenizer(directory)
    model = ModelScorer("rm", directory, tokenizer)
    prompt, response = tuple(range(10, 24)), (30, 31, 32, 33)
    [fits, cut, long] = model.score(
        [
            ScorerInput(tokenizer, prompt_tokens=prompt[-12:], response_tokens=response),
            ScorerInput(tokenizer, prompt_tokens=prompt, response_tokens=response),
            ScorerInput(tokenizer, prompt_tokens=prompt, response_tokens=response * 5),
        ]
    )
    assert model.max_tokens == 16
    assert (fits.truncated_tokens, cut.truncated_tokens, long.truncated_tokens) == (0, 2, 18)
    assert fits.value == pytest.approx(cut.value, abs=1e-6)


def test_the_version_is_that_of_the_content(directory: Path, tokenizer: TextTokenizer, copy: Path) -> None:
    version = ModelScorer("rm", directory, tokenizer).version
    (copy / "README.md").write_text("notes")
    assert ModelScorer("rm", copy, tokenizer).version == version
    edit_config(copy, reward_bias=0.5)
    assert ModelScorer("rm", copy, tokenizer).version != version


def test_a_token_outside_the_vocabulary_and_an_empty_sample_are_the_samples_fault(
    directory: Path, tokenizer: TextTokenizer
) -> None:
    model = ModelScorer("rm", directory, tokenizer)
    good = ScorerInput(tokenizer, response="x")
    with pytest.raises(BadSample, match="token id 999999 is outside the vocabulary of 258") as caught:
        model.score([good, ScorerInput(tokenizer, response_tokens=(999_999,))])
    assert caught.value.sample == 1
    with pytest.raises(BadSample, match="nothing to read"):
        model.score([ScorerInput(tokenizer, response="")])


def test_a_damaged_or_foreign_directory_is_refused_with_the_reason(copy: Path, tokenizer: TextTokenizer) -> None:
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataLoss, match="bytes, but the header describes"):
        ModelScorer("rm", copy, tokenizer)
    weights.unlink()
    with pytest.raises(DataLoss, match="no safetensors file; pickled weights are not read"):
        ModelScorer("rm", copy, tokenizer)
    weights.write_bytes(whole)
    edit_config(copy, reward_bias="high")
    with pytest.raises(DataLoss, match="reward_bias is 'high'"):
        ModelScorer("rm", copy, tokenizer)
    (copy / "config.json").write_text("{")
    with pytest.raises(DataLoss, match=r"config\.json is not JSON"):
        ModelScorer("rm", copy, tokenizer)
    with pytest.raises(DataLoss, match="there is no model directory"):
        ModelScorer("rm", copy / "nowhere", tokenizer)


def test_a_head_that_is_missing_is_never_filled_with_random_numbers(copy: Path, tokenizer: TextTokenizer) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    head = tensors.pop("score.weight")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataLoss, match=r"lacks weights of the model \(1, the first is 'score\.weight'"):
        ModelScorer("rm", copy, tokenizer)
    save_file({**tensors, "score.weight": head * float("nan")}, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataLoss, match=r"'score\.weight' holds values that are not finite"):
        ModelScorer("rm", copy, tokenizer)


def test_a_classifier_of_several_labels_and_an_encoder_are_refused(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    with pytest.raises(FailedPrecondition, match="one label, this one has 3"):
        ModelScorer("rm", make_reward_model(tmp_path / "three", labels=3), tokenizer)
    from transformers import BertConfig, BertForSequenceClassification

    bert = BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=1
    )
    directory = make_reward_model(tmp_path / "bert")
    BertForSequenceClassification(bert).save_pretrained(directory)
    with pytest.raises(FailedPrecondition, match="encoders are not supported"):
        ModelScorer("rm", directory, tokenizer)
