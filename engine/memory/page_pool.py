"""The KV cache's pages as numbers with reference counts. What a page holds, and where it lies, is not known here."""

from __future__ import annotations

from collections.abc import Iterable


class PagePool:
    """Pages 0 .. num_pages - 1, each free or held by one or more owners.

    Free pages form a stack, so which pages a take() returns is a function of the calls made before it, and a page that
    was just released (and is warm in a cache) is the first to be used again.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages must be at least 1, got {num_pages}")
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    def references(self, page: int) -> int:
        return self._references[page]

    def take(self, count: int) -> list[int] | None:
        """`count` free pages with one reference each, or None (and no change) where fewer are free."""
        assert count >= 0, f"take({count})"
        if count > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        """One more reference to each page, none of which may be free."""
        references = self._references
        for page in pages:
            assert references[page] > 0, f"page {page} is free and cannot be retained"
            references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One reference less to each page; a page without references is free again."""
        references = self._references
        for page in pages:
            assert references[page] > 0, f"page {page} is free already"
            references[page] -= 1
            if references[page] == 0:
                self._free.append(page)

    def check_invariants(self) -> None:
        """AssertionError unless the free pages are exactly those without references, each listed once."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page is listed as free twice"
        assert all((self._references[page] == 0) == (page in free) for page in range(self.num_pages))
