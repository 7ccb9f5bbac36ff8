"""Where in a sequence a reward model's score stands."""

from collections.abc import Sequence
from typing import Literal, get_args

ScoreAt = Literal["last_non_pad", "last"]


def scored_part(token_ids: Sequence[int], pad_token_id: int | None, score_at: ScoreAt = "last_non_pad") -> list[int]:
    """The sequence up to the token whose value is its score; what stands behind cannot change that value.

    "last_non_pad" is transformers' rule (GenericForSequenceClassification): the last token that is not the model's
    pad_token_id, the very first one where all are, and the last one of a model without. Where pad is the end token, the
    score is that of the token before the end. "last": the last token, whatever it is.
    """
    if score_at not in get_args(ScoreAt):
        raise ValueError(f"score_at must be one of {', '.join(get_args(ScoreAt))}, got {score_at!r}")
    length = len(token_ids)
    if score_at == "last_non_pad" and pad_token_id is not None:
        while length > 1 and token_ids[length - 1] == pad_token_id:
            length -= 1
    return list(token_ids[:length])
