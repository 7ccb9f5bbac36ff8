"""What drafts there are, and for which engines."""

from __future__ import annotations

from typing import Literal

NGRAM = "ngram"  # in the place of a draft's directory: tokens are copied from the text
MAX_DRAFT_TOKENS = 8
# Engines that serve EAGLE-3 drafts, and whose numbers of the target's layers stand in a draft's config.json.
ServingEngine = Literal["sglang", "vllm"]
LayerIds = Literal["auto", "sglang", "vllm"]
