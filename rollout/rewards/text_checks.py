"""Checks of texts by patterns and schemas, which can take for ever on some texts. They run in processes of a verifier
pool: see `verifiers`. Each function here makes one, of (problem, text) -> score.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jsonschema
import referencing

from lockstep.engine.text.model_output import parse_json

Check = Callable[[Any, str], float]


def pattern_check(pattern: str) -> Check:
    """1 where the pattern is found, else 0."""
    compiled = re.compile(pattern, re.DOTALL)
    return lambda problem, text: float(compiled.search(text) is not None)


def schema_check(schema: Mapping[str, Any] | bool) -> Check:
    """1 where the text is JSON of the schema, else 0; also where it is too deep, or a number too large, to tell.

    References are followed within the schema alone: nothing is fetched.
    """
    validator_class = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    validator = validator_class(schema, registry=referencing.Registry())

    def check(problem: Any, text: str) -> float:
        try:
            value = parse_json(text)
        except ValueError:
            return 0.0
        try:
            return float(validator.is_valid(value))
        except (ArithmeticError, RecursionError):
            return 0.0

    return check


def verdict_check(pattern: str, scores: Mapping[str, float], unparsed: float) -> Check:
    """The pattern's first group, where it is found last: a key of scores, or a finite number; else `unparsed`."""
    compiled = re.compile(pattern)

    def check(problem: Any, text: str) -> float:
        verdict = None
        for match in compiled.finditer(text):
            verdict = match.group(1)
        if verdict in scores:
            return float(scores[verdict])
        try:
            score = float(verdict or "")
        except ValueError:
            return unparsed
        return score if abs(score) < float("inf") else unparsed

    return check
