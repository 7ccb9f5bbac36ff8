"""The types of what a tokenizer's JSON files say. transformers takes what it is given, and fails where it uses it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lockstep.engine.checkpoints.export import TOKENIZER_CONFIG
from lockstep.engine.foreign_files import has_file, read_json

SPECIAL_TOKENS_MAP, ADDED_TOKENS = "special_tokens_map.json", "added_tokens.json"
_MAX_TOKEN_ID = 2**31
_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")


def check_fields(directory: Path) -> None:
    """Raises ValueError that names the file and the key for a value of a type that it cannot have."""
    for name, kinds in _KINDS.items():
        if has_file(directory, name):
            for key, value in read_json(directory, name).items():
                _check(f"{directory / name}: {key}", value, _kind_of(key, kinds))
    if has_file(directory, ADDED_TOKENS):
        for token, number in read_json(directory, ADDED_TOKENS).items():
            _check(f"{directory / ADDED_TOKENS}: {token[:40]!r}", number, (_is_token_id, "a token id"))


def _kind_of(key: str, kinds: Mapping[str, Any]) -> Any:
    if key in kinds:
        return kinds[key]
    return (_is_token, "a text, or an object with content") if key.endswith("_token") else None


def _check(where: str, value: Any, kind: tuple[Callable[[Any], bool], str] | None) -> None:
    """None means that nothing is set, wherever it stands."""
    if kind is not None and value is not None and not kind[0](value):
        raise ValueError(f"{where} = {repr(value)[:60]}: it must be {kind[1]}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_TOKEN_ID


def _is_length(value: Any) -> bool:
    """Some write 1e30 for no bound."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _is_side(value: Any) -> bool:
    return value in ("left", "right") if isinstance(value, str) else False


def _is_token(value: Any) -> bool:
    if isinstance(value, Mapping):
        flags = all(isinstance(value.get(name, False), bool) for name in _FLAGS)
        return flags and isinstance(value.get("content"), str)
    return isinstance(value, str)


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(_is_token(token) for token in value)


def _are_named_tokens(value: Any) -> bool:
    return _are_tokens(value) or (isinstance(value, Mapping) and all(_is_token(token) for token in value.values()))


def _is_decoder(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    numbers = all(key.isascii() and key.isdecimal() and len(key) < 11 and int(key) < _MAX_TOKEN_ID for key in value)
    return numbers and all(isinstance(token, Mapping) and _is_token(token) for token in value.values())


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


_FLAG = (_is_flag, "true or false")
_TOKENS = {
    "additional_special_tokens": (_are_tokens, "a list of tokens"),
    "extra_special_tokens": (_are_named_tokens, "a list of tokens, or an object of them"),
}
_KINDS: Mapping[str, Mapping[str, Any]] = {
    TOKENIZER_CONFIG: {
        **_TOKENS,
        "added_tokens_decoder": (_is_decoder, "an object of token ids and tokens with content"),
        "model_max_length": (_is_length, "a positive number"),
        "max_length": (_is_length, "a positive number"),
        "tokenizer_class": (_is_text, "a text"),
        "model_input_names": (_are_texts, "a list of texts"),
        "padding_side": (_is_side, "left or right"),
        "truncation_side": (_is_side, "left or right"),
        "add_bos_token": _FLAG,
        "add_eos_token": _FLAG,
        "add_prefix_space": _FLAG,
        "clean_up_tokenization_spaces": _FLAG,
        "split_special_tokens": _FLAG,
        "legacy": _FLAG,
        "use_default_system_prompt": _FLAG,
        "spaces_between_special_tokens": _FLAG,
    },
    SPECIAL_TOKENS_MAP: _TOKENS,
}
