"""What an EngineConfig says about speculation: checked, and made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lockstep.engine.speculation.ngram import NgramDrafter
from lockstep.engine.speculation.policy import PolicyConfig, SpeculationPolicy
from lockstep.engine.speculation.speculation import MAX_DRAFT_TOKENS, Speculation

if TYPE_CHECKING:
    from lockstep.engine.engine import EngineConfig


def check_speculation(config: EngineConfig) -> None:
    """Raises ValueError that names the option which does not fit."""
    if (config.draft_model is None) != (config.num_draft_tokens == 0):
        raise ValueError(
            f"EngineConfig: a draft_model needs num_draft_tokens, and the other way round, got {config.draft_model!r} "
            f"and {config.num_draft_tokens}"
        )
    if not 0 <= config.num_draft_tokens <= MAX_DRAFT_TOKENS:
        raise ValueError(
            f"EngineConfig.num_draft_tokens must be 1 to {MAX_DRAFT_TOKENS}, got {config.num_draft_tokens}"
        )
    PolicyConfig(config.draft_max_requests, config.draft_min_accepted)
    if config.tp_size > 1 and config.draft_model not in (None, "ngram"):
        raise ValueError(f'EngineConfig.tp_size={config.tp_size} speculates with draft_model="ngram" only')


def new_speculation(config: EngineConfig, vocab_size: int) -> Speculation | None:
    """The engine's speculation; None where it has no draft model."""
    if config.draft_model is None:
        return None
    policy = SpeculationPolicy(PolicyConfig(config.draft_max_requests, config.draft_min_accepted))
    return Speculation(NgramDrafter(), policy, config.num_draft_tokens, vocab_size)
