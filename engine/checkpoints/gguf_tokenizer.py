"""The tokenizer that a GGUF file describes, as transformers' fast tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

_CONTROL, _USER_DEFINED = 3, 4  # of the file's token types
_TOKEN_ID_KEYS = {  # by transformers' names
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_alone() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


@dataclass(frozen=True)
class Pieces:
    """How text is cut before merging. whole_words: a piece that is in the vocabulary is that token, unmerged."""

    cut: Callable[[], pre_tokenizers.PreTokenizer]
    nfc: bool = False
    whole_words: bool = False


_QWEN = Pieces(lambda: _split(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"), nfc=True)
_LLAMA_3 = Pieces(lambda: _split(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"), whole_words=True)

# By `tokenizer.ggml.pre`.
PIECES: dict[str, Pieces] = {
    "default": Pieces(_gpt2),
    "gpt-2": Pieces(_gpt2),
    "smollm": Pieces(_digits_alone),
    "qwen2": _QWEN,
    "deepseek-r1-qwen": _QWEN,
    "llama-bpe": _LLAMA_3,
    "llama3": _LLAMA_3,
    "tekken": Pieces(lambda: _split(_TEKKEN), whole_words=True),
}


def build_tokenizer(metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The byte-level BPE tokenizer of a file's metadata, its special tokens and chat templates included.

    Raises ValueError for another kind of tokenizer, or one whose way of cutting text is not in PIECES.
    """
    given = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items() if "tokenizer.ggml." in key}
    if given.get("model") != "gpt2":
        raise ValueError(
            f"tokenizer.ggml.model = {given.get('model')!r} is not supported: only gpt2 (byte-level BPE) is"
        )
    pre = given.get("pre", "default")
    if pre not in PIECES:
        raise ValueError(f"tokenizer.ggml.pre = {pre!r} is none of {', '.join(PIECES)}")
    tokenizer = _byte_level_bpe(given, PIECES[pre])
    added = [
        AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, kind in zip(given["tokens"], given.get("token_type", ()), strict=False)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    named = {name: given["tokens"][given[key]] for name, key in _TOKEN_ID_KEYS.items() if key in given}
    tokenizer.post_processor = _with_bos(given, named) or processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=[t.content for t in added if t.special and t.content not in named.values()],
        chat_template=_chat_templates(metadata),
        clean_up_tokenization_spaces=False,
        **named,
    )


def _byte_level_bpe(given: Mapping[str, Any], pieces: Pieces) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate(given["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in given["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pieces.whole_words))
    if pieces.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pieces.cut()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _with_bos(given: Mapping[str, Any], named: Mapping[str, str]) -> processors.PostProcessor | None:
    # Llama 3's files leave the key out and mean it.
    if not given.get("add_bos_token", given.get("pre") in ("llama-bpe", "llama3")):
        return None
    bos = named["bos_token"]
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, given["bos_token_id"])]
    )


def _chat_templates(metadata: Mapping[str, Any]) -> str | dict[str, str] | None:
    """One template, or by name where there are several."""
    main, prefix = metadata.get("tokenizer.chat_template"), "tokenizer.chat_template."
    others = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    return {"default": main, **others} if main is not None and others else main
