"""When and why a request ends."""

from __future__ import annotations

from lockstep.engine.request import FinishReason, Request


def end_reason(request: Request) -> FinishReason | None:
    """Why a request that was given results ends with them, if it does. Tokens after its end are forgotten.

    A reward ends its request too, but later: see Engine._end_rewarded.
    """
    if request.kind != "generate":
        return "stop" if request.kind == "score" and len(request.logprobs) == len(request.tokens) - 1 else None
    tokens, reason = request.tokens, None
    for index in range(request.num_judged, len(tokens)):
        token = tokens[index]
        if token in request.stop_ids or (request.detokenizer is not None and request.detokenizer.append(token)):
            reason = "stop"
        elif index + 1 >= request.max_tokens:
            reason = "length"
        if reason is not None:
            request.cut(index + 1)
            break
    request.num_judged = len(tokens)
    return reason
