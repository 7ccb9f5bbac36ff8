"""Which of several engines serves which request."""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def balance(prompts: Sequence[Hashable], costs: Sequence[int], loads: Sequence[int]) -> list[int]:
    """The number of an engine for each request; loads: what each engine already has to do, in the unit of costs.

    Requests of one prompt go to one engine, which computes the prompt once; the costliest prompts are placed first,
    each on the engine that has the least to do.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(index)
    totals = list(loads)
    places = [0] * len(prompts)
    for members in sorted(groups.values(), key=lambda members: -sum(costs[i] for i in members)):
        least = totals.index(min(totals))
        totals[least] += sum(costs[i] for i in members)
        for index in members:
            places[index] = least
    return places
