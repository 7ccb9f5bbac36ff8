"""Drafts copied from where the last few tokens stood before: in the request's own text, or in its group's."""

from __future__ import annotations

from collections import OrderedDict

from lockstep.engine.request import Request

# Lengths of the runs of tokens that are looked up. The longest that is found decides.
NGRAM_SIZES = (5, 4, 3, 2)
# Bounds of the memory: prompts whose texts are kept, and tokens indexed of each (a token takes about 0.5 KB).
MAX_GROUPS = 512
MAX_INDEXED_TOKENS = 16384


class _Index:
    """Where the runs of tokens in some texts were last seen."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, ...], tuple[list[int], int]] = {}
        self.num_tokens = 0

    def add(self, tokens: list[int], start: int) -> None:
        """Notes what stands before each token from `start` on, up to the bound. `tokens` may grow later."""
        end = min(len(tokens), start + MAX_INDEXED_TOKENS - self.num_tokens)
        for place in range(start, end):
            for size in NGRAM_SIZES:
                if size <= place:
                    self._seen[tuple(tokens[place - size : place])] = (tokens, place)
        self.num_tokens += max(0, end - start)

    def find(self, ngram: tuple[int, ...]) -> tuple[list[int], int] | None:
        """(text, place) of what followed the run the last time."""
        return self._seen.get(ngram)


class _History:
    """A request's own text, of which `num_indexed` tokens are in `own`, and what its group shares."""

    __slots__ = ("group", "num_indexed", "own")

    def __init__(self, group: _Index, num_indexed: int) -> None:
        self.own = _Index()
        self.group = group
        self.num_indexed = num_indexed


class NgramDrafter:
    """Looks up a request's last tokens in its own output, then in its prompt and that prompt's finished samples."""

    def __init__(self) -> None:
        self._groups: OrderedDict[tuple[int, ...], _Index] = OrderedDict()  # by prompt, least recently used first

    def propose(self, request: Request, num_tokens: int) -> list[int]:
        tokens, history = request.tokens, request.drafter_state
        if history is None:
            history = request.drafter_state = _History(self._group(request), request.num_prompt)
        history.own.add(tokens, history.num_indexed)
        history.num_indexed = len(tokens)
        for size in NGRAM_SIZES:
            ngram = tuple(tokens[-size:])
            found = history.own.find(ngram) or history.group.find(ngram)
            if found is not None:
                return _continued(*found, num_tokens, is_own=found[0] is tokens)
        return []

    def finished(self, request: Request) -> None:
        self._group(request).add(request.tokens, request.num_prompt)

    def stats(self) -> dict[str, int]:
        return {}

    def _group(self, request: Request) -> _Index:
        prompt = tuple(request.prompt_ids)
        group = self._groups.get(prompt)
        if group is None:
            group = self._groups[prompt] = _Index()
            group.add(request.prompt_ids, max(1, request.num_prompt - MAX_INDEXED_TOKENS // 2))
            if len(self._groups) > MAX_GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end(prompt)
        return group


def _continued(text: list[int], place: int, num_tokens: int, is_own: bool) -> list[int]:
    """What follows in the text. Where a request's own ends, it repeats itself: the text went in a circle there."""
    drafts = text[place : place + num_tokens]
    period = len(drafts)
    while is_own and len(drafts) < num_tokens:
        drafts.append(drafts[-period])
    return drafts
