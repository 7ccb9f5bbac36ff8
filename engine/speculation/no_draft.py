"""What an engine without a draft model has in the place of one."""

from __future__ import annotations

from typing import NoReturn

import torch


class NoDraftModel:
    """draft_model: of the config."""

    def __init__(self, draft_model: str | None):
        self._draft_model = draft_model

    def next_version(self, version: int) -> NoReturn:
        raise ValueError(f"update_draft: this engine has no draft model, draft_model={self._draft_model!r}")

    def share_embedding(self, weight: torch.Tensor) -> None:
        """Nobody reads it."""
