"""Trains a byte-level BPE tokenizer and saves it in the form that transformers and vLLM load.

One special token ends texts and begins them: `<|endoftext|>`, id 0. There is no pad token. Whoever
pads a batch keeps the lengths and never looks for padding by token id, so that no token that the
policy may sample is mistaken for padding.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from honed.kit.errors import InvalidArgument

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
_SMALLEST_VOCABULARY = 257  # every byte and the end of text


def train_tokenizer(texts: Iterable[str], *, vocabulary_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Returns a tokenizer fitted to `texts`; deterministic.

    Encoding with special tokens puts the end-of-text token in front, which is how every training
    text begins. A text's first word is encoded like any other (a space is put before it), so a
    prompt cut between words has a prefix of the text's tokens.

    Args:
        texts: what to learn the merges from.
        vocabulary_size: tokens in all, at least 257. Fewer come out when the texts do not give as
            many merges.
        max_length: the longest sequence that the model takes, in tokens.

    Raises:
        InvalidArgument: when the vocabulary cannot hold every byte.
    """
    if vocabulary_size < _SMALLEST_VOCABULARY:
        raise InvalidArgument("vocabulary_size", f"needs {_SMALLEST_VOCABULARY} at least, got {vocabulary_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, END_OF_TEXT_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
