"""A step in numbers: what every rank of an engine needs to take part in it."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np


@dataclass(frozen=True)
class RankStep:
    """T rows, the chunks of D decodes (of one row each), then those of P prefills. Arrays are int64.

    rows:       [3, T], token (or layout.PENDING), slot and position of each row.
    prefills:   [3, P], slot, length and, with this step's, tokens in the cache.
    sampled:    the rows that tokens are sampled from, ascending.
    scored:     [2, S], first row and end of the rows whose logits scoring wants.
    new_pages:  [2, N], places in the page table (as one row) and the pages that go there.
    page_copies: [2, C], pages to copy before the rows are computed, as kernels.memory.copy_pages takes them.
    """

    rows: np.ndarray
    prefills: np.ndarray
    sampled: np.ndarray
    scored: np.ndarray
    new_pages: np.ndarray
    page_copies: np.ndarray

    @property
    def num_rows(self) -> int:
        return self.rows.shape[1]

    @property
    def num_decodes(self) -> int:
        return self.num_rows - int(self.prefills[1].sum())

    def packed(self) -> np.ndarray:
        """The step as one int64 array: the sizes of the fields, then the fields."""
        arrays = [getattr(self, field.name) for field in fields(self)]
        return np.concatenate([[array.size for array in arrays], *[array.ravel() for array in arrays]]).astype(np.int64)

    @classmethod
    def unpacked(cls, packed: np.ndarray) -> RankStep:
        names = [field.name for field in fields(cls)]
        sizes, values = packed[: len(names)], packed[len(names) :]
        rows, prefills, sampled, scored, new_pages, page_copies = np.split(values, np.cumsum(sizes)[:-1])
        return cls(
            rows.reshape(3, -1),
            prefills.reshape(3, -1),
            sampled,
            scored.reshape(2, -1),
            new_pages.reshape(2, -1),
            page_copies.reshape(2, -1),
        )
