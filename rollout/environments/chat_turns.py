"""A conversation as tokens: what stands between two turns of the policy, found through the chat template once."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from lockstep.rollout.chat_template import apply_template
from lockstep.rollout.end_of_turn import MARK, split_at_end, stop_token_ids
from lockstep.rollout.environments.environment import Messages, Opening, TokenIds
from lockstep.rollout.tokenizer import render_prompt


class ChatTurns:
    """Renders what the policy reads. What it wrote is never decoded and tokenised again.

    The prompt of turn k + 1 is the prompt of turn k, the tokens that were drawn, and `observation_ids`. Where a
    template renders earlier turns as they were (it appends), this equals the rendered conversation; a template that
    rewrites them (Qwen3 drops earlier reasoning) would show the policy another past than the one it is trained on.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._stop_ids = stop_token_ids(tokenizer)

    def opening_ids(self, opening: Opening) -> list[int]:
        """The episode's prompt, up to where the policy begins to write."""
        if _is_token_ids(opening.prompt):
            return list(opening.prompt)
        return render_prompt(self.tokenizer, opening.prompt, opening.tools)

    def observation_ids(self, observation: Messages | TokenIds) -> list[int]:
        """What follows a turn that the policy has ended with its stop token, up to where it writes again.

        Raises ValueError for an empty observation, and for a template that ends no turn with a special token.
        """
        if len(observation) == 0:
            raise ValueError("an episode that goes on needs an observation")
        if _is_token_ids(observation):
            return list(observation)
        turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
        _, _, after = apply_template(self.tokenizer, [*turn, *observation]).rpartition(MARK)
        split = split_at_end(self.tokenizer, after, self._stop_ids)
        if split is None:
            raise ValueError(
                f"the chat template of {self.tokenizer.name_or_path!r} ends an assistant's turn with "
                f"{after[:20]!r}, which is no special token at which generation stops: turns cannot be told apart"
            )
        return split[-1]  # without the template's end of turn: the policy's own stop token stands there


def _is_token_ids(content: Messages | TokenIds) -> bool:
    return isinstance(content, Sequence) and len(content) > 0 and isinstance(content[0], int)
