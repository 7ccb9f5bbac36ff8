"""Reading what a model wrote: whatever the text, nothing here raises anything but ValueError, or takes more than linear
time."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

_FENCE = "```"
_LONGEST_LANGUAGE = 40  # characters, with the white space around it


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError that says why it is none.

    Unlike json.loads, it takes no NaN, no Infinity and no number beyond a double, and replaces lone surrogates, with
    which no text can be written. Of equal keys the last one counts.
    """
    try:
        value = json.loads(text, parse_constant=_refused, parse_float=_finite)
        return _with_valid_texts(value) if "\\ud" in text.lower() else value
    except (RecursionError, MemoryError):
        raise ValueError("not JSON that can be read: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None


def valid_text(text: str) -> str:
    """The text as Unicode: pairs of surrogates joined, lone ones replaced. Other texts stay as they are."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def fenced_blocks(text: str, languages: Sequence[str]) -> list[str]:
    """The contents of ```LANGUAGE blocks, of these languages or without one, from the line after the opening fence.

    A block that is not closed is none, and what a block of another language holds is no block.
    """
    blocks, position = [], 0
    while (opened := text.find(_FENCE, position)) >= 0:
        position = opened + len(_FENCE)
        line_end = text.find("\n", position)
        if line_end < 0:
            break
        language = text[position : min(line_end, position + _LONGEST_LANGUAGE)].strip().lower()
        if len(language.split()) > 1 or position + _LONGEST_LANGUAGE < line_end:
            continue  # a fence within a line
        closed = text.find(_FENCE, line_end)
        if closed < 0:
            break
        if language in ("", *languages):
            blocks.append(text[line_end + 1 : closed])
        position = closed + len(_FENCE)
    return blocks


def shown(text: object, longest: int = 300) -> str:
    """One line for people: control characters escaped, and cut to a length."""
    text = str(text)
    return printable(text if len(text) <= longest else f"{text[:longest]}...", kept="")


def printable(text: str, kept: str = "\n\t") -> str:
    """The text with escapes in the place of characters that would act on a terminal, or hide what others say."""
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def _refused(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"a number of {len(digits)} characters is too large")
    return value


def _with_valid_texts(value: Any) -> Any:
    match value:
        case str():
            return valid_text(value)
        case list():
            return [_with_valid_texts(item) for item in value]
        case dict():
            return {valid_text(name): _with_valid_texts(item) for name, item in value.items()}
    return value
