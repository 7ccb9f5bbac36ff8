"""Text from tokens: nothing is cleaned up, and what arrives token by token is what one decoding gives."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lockstep.engine.text.detokenizer import Detokenizer, decode_text, special_ids, unseen_ids

BYTES = bytes_to_unicode()  # byte -> the symbol that stands for it in a byte-level vocabulary

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
    detokenizer, ids = Detokenizer(tokenizer, stop), tokenizer.encode(TEXT)
    end = next((k for k, token in enumerate(ids, 1) if detokenizer.append(token)), len(ids))
    assert detokenizer.found_stop == (text != TEXT)
    assert detokenizer.cut(ids[:end]) == text


# Byte-level BPE, made by hand: each byte is a token, and some pairs, words and special tokens are tokens too.
SPECIAL = ["<|pad|>", "<|end|>", "<tool_call>"]
WORDS_OF_BYTES = ["st", "op", "stop", "é", "日", "日本", "😀"]
TEXTS = ["stop", "naïve €5 日本語 😀!", "sto stop st op", "🇩🇪日本", "a\ufffdb", "\u0301e", "\r\n\n", "stéop"]


@pytest.fixture(scope="module")
def byte_level():
    vocab = {symbol: index for index, symbol in enumerate(BYTES.values())}
    merges = []
    for text in WORDS_OF_BYTES:
        symbols = [BYTES[byte] for byte in text.encode()]
        while len(symbols) > 1:
            merges.append((symbols[0], symbols[1]))
            symbols[:2] = [symbols[0] + symbols[1]]
            vocab.setdefault(symbols[0], len(vocab))
    made = Tokenizer(models.BPE(vocab, list(dict.fromkeys(merges))))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<|pad|>", eos_token="<|end|>")


def brute_force(tokenizer, ids, stop, unseen=frozenset()):
    """(number of tokens, text): the shortest run of the first tokens whose text has a stop string, or all of them."""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode([t for t in ids[:end] if t not in unseen], clean_up_tokenization_spaces=False)
        found = [text.index(string) for string in stop if string in text]
        if found:
            return end, text[: min(found)]
    return len(ids), tokenizer.decode([t for t in ids if t not in unseen], clean_up_tokenization_spaces=False)


def streamed(tokenizer, ids, stop, unseen=frozenset()):
    detokenizer = Detokenizer(tokenizer, stop, unseen)
    end = next((k for k, token in enumerate(ids, 1) if detokenizer.append(token)), len(ids))
    return end, detokenizer.cut(ids[:end])


STOPS = st.lists(
    st.one_of(
        st.sampled_from(
            ["stop", "op", "p", "€", "日", "本語", "😀", "\ufffd", "a\ufffd", "\n", "stop€", "é", *SPECIAL]
        ),
        st.text(alphabet="stop€é日本😀\ufffd <|end>", min_size=1, max_size=5),
    ),
    min_size=1,
    max_size=3,
)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_stop_strings_are_found_where_the_text_of_the_tokens_has_them(byte_level, data):
    """Of any tokens: bytes that are no text, characters in pieces, special tokens."""
    whole = st.sampled_from(TEXTS).map(lambda text: byte_level.encode(text, add_special_tokens=False))
    piece = st.integers(0, len(byte_level) - 1).map(lambda token: [token])
    in_bytes = st.sampled_from(TEXTS).map(
        lambda text: byte_level.convert_tokens_to_ids([BYTES[b] for b in text.encode()])
    )
    ids = [token for part in data.draw(st.lists(st.one_of(whole, piece, in_bytes), max_size=12)) for token in part]
    stop = tuple(data.draw(STOPS))
    unseen = unseen_ids(byte_level, special_ids(byte_level), (), stop)
    assert streamed(byte_level, ids, stop, unseen) == brute_force(byte_level, ids, stop, unseen)


@pytest.mark.parametrize("num_bad", [1, 3, 40])
def test_a_stop_string_before_and_behind_bytes_that_are_no_text(byte_level, num_bad):
    bad = [byte_level.convert_tokens_to_ids(BYTES[0xFF])] * num_bad
    stop = byte_level.encode("stop", add_special_tokens=False)
    assert streamed(byte_level, [*stop, *bad], ("stop",)) == (len(stop), "")
    assert streamed(byte_level, [*bad, *stop, *bad], ("stop",)) == (num_bad + len(stop), "\ufffd" * num_bad)
    # One token that completes the stop string and begins a character.
    assert streamed(byte_level, [*bad, *stop, *bad], ("p\ufffd",))[0] == num_bad + len(stop) + 1


def test_long_runs_of_such_bytes_are_not_decoded_again_and_again(byte_level):
    lengths = []

    class Counting:
        def decode(self, token_ids, **options):
            lengths.append(len(token_ids))
            return byte_level.decode(token_ids, **options)

    detokenizer = Detokenizer(Counting(), ("stop",))
    for _ in range(500):
        detokenizer.append(byte_level.convert_tokens_to_ids(BYTES[0x80]))
    assert max(lengths) < 50


def test_special_tokens_are_seen_but_for_ends_and_padding(byte_level):
    pad, end, tool = map(byte_level.convert_tokens_to_ids, SPECIAL)
    letters = byte_level.encode("ab", add_special_tokens=False)
    ids = [letters[0], tool, pad, letters[1], end]
    special = special_ids(byte_level)
    assert special == {pad, end, tool}  # the last is said to be in the tokenizer's own file only
    assert unseen_ids(byte_level, special, (tool, letters[0])) == special  # a letter that ends requests is text
    assert unseen_ids(byte_level, special, (), ("x<|end|>",)) == {pad}
    assert decode_text(byte_level, ids, False, unseen_ids(byte_level, special, ())) == "a<tool_call>b"
    for stop, expected in (
        ("<tool_call>", (2, "a")),
        ("<tool", (2, "a")),
        ("b<|end|>", (5, "a<tool_call>")),
        ("|>", (5, "a<tool_call>b")),
    ):
        assert streamed(byte_level, ids, (stop,), unseen_ids(byte_level, special, (), (stop,))) == expected


# Pieces of a SentencePiece model, and bytes as <0xNN> for all else. A run of bytes that is no text as a whole is shown
# as one replacement character for each, so a byte may change what was shown of those before it.
PIECES = ["\u2581stop", "\u2581", "s", "t", "o", "p", "op\u2581", "\u00e9", "\u65e5", "\ufffd", "\n"]
DECODERS = {
    "as Llama": lambda: [decoders.Strip(" ", 1, 0)],
    "as Gemma": lambda: [],
}


@pytest.fixture(scope="module", params=DECODERS)
def byte_fallback(request):
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    made = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True))
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *DECODERS[request.param]()]
    made.decoder = decoders.Sequence(parts)
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<|pad|>", eos_token="<|end|>")


def bytes_of(text):
    """Ids of the byte pieces."""
    return [1 + byte for byte in text.encode()]


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_stop_strings_at_the_edges_of_byte_pieces(byte_fallback, data):
    piece = st.integers(257, len(byte_fallback) - 1).map(lambda token: [token])
    byte = st.sampled_from([0xFF, 0x80, 0xE2, 0x82, 0xAC, 0x73, 0xC3, 0xF0, 0x9F, 0x0A, 0x20]).map(lambda b: [1 + b])
    text = st.sampled_from(["\u20ac", "\u00e9", "stop", "\U0001f600", "\u20acs", "\u65e5\u672c", "\ufffd", "\u0301"])
    drawn = data.draw(st.lists(st.one_of(piece, byte, text.map(bytes_of)), max_size=14))
    ids = [token for part in drawn for token in part]
    stop = tuple(data.draw(STOPS))
    unseen = unseen_ids(byte_fallback, special_ids(byte_fallback), (), stop)
    assert streamed(byte_fallback, ids, stop, unseen) == brute_force(byte_fallback, ids, stop, unseen)


@pytest.mark.parametrize("bad", [[0xFF], [0xE2, 0x82], [0x80] * 40])
def test_bytes_that_undo_what_was_a_text(byte_fallback, bad):
    """The text of the bytes before changes: what a stop string is looked for in is the text as it is then."""
    bad, stop_token = [1 + byte for byte in bad], [257]
    ids = [*bytes_of("\u20ac"), *bad, *stop_token]
    for stop in (("\u20ac",), ("\ufffd\ufffd\ufffd\ufffd",), ("\ufffd stop",), ("p",), ("\u20acx",)):
        assert streamed(byte_fallback, ids, stop) == brute_force(byte_fallback, ids, stop)


class Counting:
    """A tokenizer that counts what it decodes."""

    def __init__(self, tokenizer):
        self.tokenizer, self.backend_tokenizer, self.lengths = tokenizer, tokenizer.backend_tokenizer, []

    def decode(self, token_ids, **options):
        self.lengths.append(len(token_ids))
        return self.tokenizer.decode(token_ids, **options)


@pytest.mark.parametrize("text", ["\u0e2a\u0e27\u0e31\u0e2a", "\u20ac" * 2000, "\U0001f600" * 1000])
def test_long_texts_in_byte_pieces_are_not_decoded_again_and_again(byte_fallback, text):
    counting = Counting(byte_fallback)
    detokenizer = Detokenizer(counting, ("never",))
    ids = [*bytes_of(text), 259] * (1 if len(text) > 100 else 50)
    for token in ids:
        assert not detokenizer.append(token)
    assert sum(counting.lengths) < 100 * 64 + 30 * len(ids)
    assert detokenizer.cut(ids) == byte_fallback.decode(ids)


@pytest.mark.parametrize("end", [b"\xff", b"\xe2", "\u20ac".encode()], ids=["broken", "unfinished", "whole"])
def test_long_runs_of_byte_pieces_are_searched_as_they_are(byte_fallback, end):
    ids = [257, *bytes_of("\u20ac" * 60 + "x"), *(1 + byte for byte in end), 259, 257]
    for stop in (("x",), ("stop\ufffd",), ("\ufffd" * 180,), ("\u20acs",), ("\ufffds",), ("x\u20acs",), ("x\ufffd",)):
        assert streamed(byte_fallback, ids, stop) == brute_force(byte_fallback, ids, stop)
