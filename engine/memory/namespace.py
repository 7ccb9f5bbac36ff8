"""What cached KV is a function of: a namespace, and the tokens up to it."""

from __future__ import annotations

from typing import NamedTuple


class Namespace(NamedTuple):
    """What KV depends on besides tokens. Requests share pages within one namespace only.

    version: of the weights. adapter: the name of an adapter, None without one. salt: keeps apart what its owner does
    not want to share. Only the version varies so far.
    """

    version: int
    adapter: str | None = None
    salt: str | None = None


class PageKey(NamedTuple):
    """The content of a page: the KV of the last page_size of `tokens`, which begin with the sequence's first."""

    namespace: Namespace
    tokens: tuple[int, ...]
