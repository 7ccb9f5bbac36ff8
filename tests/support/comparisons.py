"""Comparing what engines and trainers returned, to the bit, with an account of what differs."""

from collections.abc import Sequence

from lockstep.engine import RequestOutput


def output_differences(expected: Sequence[RequestOutput], actual: Sequence[RequestOutput]) -> list[str]:
    """A line for each request whose tokens or log-probs are not the same; none if all bits agree."""
    assert len(expected) == len(actual)
    lines = []
    for index, (want, have) in enumerate(zip(expected, actual, strict=True)):
        assert want.prompt_ids == have.prompt_ids, "not the same requests"
        wanted = list(zip(want.token_ids, want.logprobs, strict=True))
        found = list(zip(have.token_ids, have.logprobs, strict=True))
        if wanted != found:
            lines.append(_first_difference(f"request {index}, {len(want.prompt_ids)} prompt tokens", wanted, found))
    return lines


def score_differences(
    expected: Sequence[Sequence[float | None]], actual: Sequence[Sequence[float | None]]
) -> list[str]:
    """A line for each sequence whose log-probs are not the same."""
    assert len(expected) == len(actual)
    return [
        _first_difference(f"sequence {index} of {len(want)} tokens", want, have)
        for index, (want, have) in enumerate(zip(expected, actual, strict=True))
        if list(want) != list(have)
    ]


def _first_difference(where: str, wanted: Sequence, found: Sequence) -> str:
    if len(wanted) != len(found):
        return f"{where}: {len(found)} values, not {len(wanted)}"
    differing = [i for i, (w, f) in enumerate(zip(wanted, found, strict=True)) if w != f]
    first = differing[0]
    return f"{where}: {len(differing)} of {len(wanted)} differ, first at {first}: {found[first]}, not {wanted[first]}"
