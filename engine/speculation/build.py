"""What an EngineConfig says about speculation: checked, and made."""

from __future__ import annotations

import torch

from lockstep.engine.checkpoints.draft_checkpoint import load_draft
from lockstep.engine.checkpoints.draft_config import load_draft_config
from lockstep.engine.config import EngineConfig
from lockstep.engine.memory.kv_memory import MemoryConfig
from lockstep.engine.models.decoder import Decoder
from lockstep.engine.models.eagle3 import Eagle3Draft, initialize
from lockstep.engine.speculation.drafter import Drafter
from lockstep.engine.speculation.eagle import EagleDrafter
from lockstep.engine.speculation.ngram import NgramDrafter
from lockstep.engine.speculation.policy import PolicyConfig, SpeculationPolicy
from lockstep.engine.speculation.speculation import NoSpeculation, Speculation


def load_draft_model(config: EngineConfig, model: Decoder) -> Eagle3Draft | None:
    """The EAGLE-3 model of the config, with the target's dtype, on its device; None where there is none."""
    if not config.has_draft_model:
        return None
    dtype, embedding = getattr(torch, config.dtype), model.embedding.word_embeddings.weight
    if config.load_format != "dummy":
        options = {"head_weight": model.head_weight, "numbers_of": config.draft_layer_ids}
        return load_draft(config.draft_model, model.config, embedding, dtype, **options)
    draft = Eagle3Draft(load_draft_config(config.draft_model, model.config, config.draft_layer_ids), embedding, dtype)
    initialize(draft, config.seed)
    return draft


def new_eagle(
    config: EngineConfig, draft: Eagle3Draft | None, memory: MemoryConfig, max_model_len: int
) -> EagleDrafter | None:
    """The drafter of a draft model, with its KV cache."""
    if draft is None:
        return None
    return EagleDrafter(draft, config.num_draft_tokens, memory.num_pages, memory.page_size, max_model_len)


def new_speculation(config: EngineConfig, eagle: EagleDrafter | None, vocab_size: int) -> Speculation | NoSpeculation:
    """The engine's speculation, as the config has it."""
    if config.draft_model is None:
        return NoSpeculation()
    drafter: Drafter = eagle or NgramDrafter()
    policy = SpeculationPolicy(PolicyConfig(config.draft_max_requests, config.draft_min_accepted))
    return Speculation(drafter, policy, config.num_draft_tokens, vocab_size)
