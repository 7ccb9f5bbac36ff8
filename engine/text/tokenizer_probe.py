"""Whether a tokenizer's regular expressions come to an end, tried in a process that can be ended.

They may take exponential time for some texts, and nothing interrupts one that runs. So they are tried at loading, in
tokenizer_probe_process.py, on texts that bring out the known kinds: runs of the characters that they name.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DEADLINE_S = 10.0
MEMORY_BYTES = 2**30
_PROGRAM = Path(__file__).with_name("tokenizer_probe_process.py")
_PARTS = ("normalizer", "pre_tokenizer", "decoder")
_OPERATORS = "()[]{}|+*?.^$\\ \n\t"
_MAX_WORDS = 400


def check_patterns(name: str, backend: Any) -> None:
    """Raises ValueError where a tokenizer's regular expressions fail, or take longer than DEADLINE_S.

    backend: of the library `tokenizers`, or None.
    """
    found = {part: getattr(backend, part, None) for part in _PARTS}
    parts = {part: json.loads(value.__getstate__()) for part, value in found.items() if value is not None}
    patterns = [pattern for part in parts.values() for pattern in _patterns(part)]
    if patterns and (fault := _fault(json.dumps(parts), tuple(patterns))) is not None:
        raise ValueError(f"{name}/tokenizer.json: {fault}; its regular expressions are {str(patterns)[:300]}")


@functools.lru_cache(maxsize=32)
def _fault(parts: str, patterns: tuple[str, ...]) -> str | None:
    """What is wrong with the parts of a tokenizer, if anything is."""
    words = [word for pattern in patterns for word in _words(pattern)]
    characters = "".join(dict.fromkeys("".join(words)))
    job = {"parts": json.loads(parts), "seeds": list(dict.fromkeys(words))[:_MAX_WORDS], "characters": characters}
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(_PROGRAM), str(MEMORY_BYTES)],
            input=json.dumps(job).encode(),
            capture_output=True,
            env={},
            timeout=DEADLINE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"it does not cut some texts of a few hundred characters within {DEADLINE_S:g} s"
    if done.stdout.strip() == b"done":
        return None
    return "it cannot cut some texts of a few hundred characters without too many steps, or too much memory"


def _words(pattern: str) -> list[str]:
    """What stands for itself in a pattern, or may: its characters, and two and three in a row without the operators."""
    plain = "".join(c for c in pattern if c not in _OPERATORS)
    return [plain[at : at + length] for length in (1, 2, 3) for at in range(len(plain) - length + 1)]


def _patterns(part: Any) -> Iterator[str]:
    match part:
        case {"Regex": str() as pattern}:
            yield pattern
        case dict():
            for value in part.values():
                yield from _patterns(value)
        case list():
            for value in part:
                yield from _patterns(value)
