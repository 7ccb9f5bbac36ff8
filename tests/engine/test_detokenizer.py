"""Text from tokens: nothing is cleaned up, and what arrives token by token is what one decoding gives."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lockstep.engine.detokenizer import Detokenizer, decode_text

WORDS = ["<end>", "I", "do", "n't", "know", "1", ",", "2", "."]
TEXT = "I do n't know 1 , 2 ."


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer of words, which cleans up by default."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    made = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", clean_up_tokenization_spaces=True)
    assert made.decode(made.encode(TEXT)) != TEXT
    return made


def test_spaces_before_punctuation_stay(tokenizer):
    ids = [*tokenizer.encode(TEXT), tokenizer.eos_token_id]
    assert decode_text(tokenizer, tuple(ids)) == TEXT
    assert decode_text(tokenizer, ids, skip_special_tokens=False) == f"{TEXT} <end>"


@pytest.mark.parametrize(("stop", "text"), [((), TEXT), ((" , 2",), "I do n't know 1"), (("never",), TEXT)])
def test_token_by_token_it_is_the_same_text(tokenizer, stop, text):
    detokenizer = Detokenizer(tokenizer, stop)
    found = any(detokenizer.append(token) for token in tokenizer.encode(TEXT))  # nothing comes after a stop string
    assert found == detokenizer.found_stop == (text != TEXT)
    assert (detokenizer.text if detokenizer.found_stop else detokenizer.finish()) == text
