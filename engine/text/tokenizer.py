"""Tokenizers of model directories, which may come from anywhere."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lockstep.engine.checkpoints.export import SIDECARS, TOKENIZER_CONFIG
from lockstep.engine.foreign_files import MissingFileError, has_file, inner_file
from lockstep.engine.models.config import CONFIG_FILE, load_model_config, other_format
from lockstep.engine.text.tokenizer_fields import check_fields
from lockstep.engine.text.tokenizer_probe import check_patterns

MAX_FILE_BYTES = 2**29
# One of these is there wherever there is a tokenizer.
_TOKENIZER_FILES = (
    "*token*.json",
    "tokenizer.model*",
    "vocab.*",
    "spiece.model",
    "sentencepiece.bpe.model",
    "*.tiktoken",
    "tekken.json",
)
# How many characters a tokenizer may make of one before it cuts text into tokens.
MAX_GROWTH = 64


class Tokenizer(Protocol):
    """What is used of transformers' tokenizers."""

    eos_token: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    all_special_ids: Sequence[int]
    added_tokens_decoder: Mapping[int, Any]
    chat_template: str | dict[str, str] | None
    name_or_path: str
    special_tokens_map: Mapping[str, Any]

    def __len__(self) -> int: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str: ...

    def get_chat_template(self, *, tools: Any = None) -> str: ...

    def apply_chat_template(
        self, conversation: Sequence[Mapping[str, Any]], tools: Any = None, **options: Any
    ) -> Any: ...

    def save_pretrained(self, save_directory: str | Path) -> Any: ...


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer saved in a local directory. No code of the directory is run.

    Raises MissingFileError where there is none, and ValueError, which names the file where it can, for one that
    cannot be read, needs code of its own, or makes much of little.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise MissingFileError(f"{directory} is no model directory: there is no such directory")
    if not any(any(directory.glob(name)) for name in _TOKENIZER_FILES):
        load_model_config(directory)  # which says what else the directory is
        raise MissingFileError(f"{directory} holds no tokenizer: fetch tokenizer.json and {TOKENIZER_CONFIG}")
    _check_files(directory)
    from transformers import AutoTokenizer  # seconds of imports that users of token ids do without

    with _refusals(directory):
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    _check_growth(directory, tokenizer)
    check_patterns(str(directory), getattr(tokenizer, "backend_tokenizer", None))
    with _refusals(directory):
        _try_out(tokenizer)
    return tokenizer


@contextlib.contextmanager
def _refusals(directory: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:  # of transformers, tokenizers, sentencepiece; Rust's panics are BaseExceptions
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise _refusal(directory, error) from None


def _check_files(directory: Path) -> None:
    """That none is waited for, leads out of the directory, or fills the memory."""
    found = [
        (directory / pattern).parent / file.name
        for pattern in ("config.json", *SIDECARS)
        for file in (directory / pattern).parent.glob(pattern.rpartition("/")[2])
    ]
    for file in found:
        size = inner_file(file.parent, file.name).stat().st_size
        if size > MAX_FILE_BYTES:
            raise ValueError(f"{file} has {size} bytes: it is not what its name says")
    check_fields(directory)


def _try_out(tokenizer: Tokenizer) -> None:
    """What a file says may be refused where it is used first."""
    ids = tokenizer.encode("a 1", add_special_tokens=False)
    tokenizer.decode([*ids, *tokenizer.all_special_ids])
    dict(tokenizer.added_tokens_decoder)


def _refusal(directory: Path, error: BaseException) -> ValueError:
    """What is wrong with the tokenizer, or with what else makes the directory no model's."""
    if has_file(directory, CONFIG_FILE) or other_format(directory) is not None:
        try:
            load_model_config(directory)
        except ValueError as fault:
            return fault
    line = " ".join(str(error).split())
    if "trust_remote_code" in line or "custom code" in line:
        line = "it needs Python code of its own, which is not run; use a tokenizer that has a tokenizer.json"
    return ValueError(f"the tokenizer of {directory} cannot be read: {type(error).__name__}: {line[:300]}")


def _check_growth(directory: Path, tokenizer: Tokenizer) -> None:
    """A normalizer can replace one character by many, and each of these by many: a short text fills the memory."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.normalizer is None:
        return
    growth = _growth(json.loads(backend.normalizer.__getstate__()))
    if growth > MAX_GROWTH:
        raise ValueError(f"{directory}/tokenizer.json: its normalizer makes up to {growth:g} characters of one")


def _growth(normalizer: Any) -> float:
    """By how much a normalizer, as tokenizer.json describes it, can lengthen a text."""
    if normalizer.get("type") == "Sequence":
        growth = 1.0
        for inner in normalizer.get("normalizers", ()):
            growth *= _growth(inner)
        return growth
    if normalizer.get("type") == "Replace":
        pattern = normalizer.get("pattern", {})
        # A pattern may match between any two characters.
        shortest = len(pattern["String"]) if "String" in pattern else 0
        content = len(normalizer.get("content", ""))
        return max(1.0, content / shortest if shortest else 1.0 + content)
    return 1.0
