"""What a drafter is. Any will do: a draft is accepted only where it equals the token that the target samples."""

from __future__ import annotations

from typing import Protocol

from lockstep.engine.request import Request


class Drafter(Protocol):
    """Guesses how requests go on. What it keeps about one lies in `request.drafter_state`, and goes with it."""

    def propose(self, request: Request, num_tokens: int) -> list[int]:
        """Up to num_tokens guesses at the tokens that follow `request.tokens`; none where it has no idea."""

    def stats(self) -> dict[str, int]:
        """What `Engine.stats` is to hold of it."""

    def finished(self, request: Request) -> None:
        """The request has ended by itself: its text may help with other samples of the same prompt."""
