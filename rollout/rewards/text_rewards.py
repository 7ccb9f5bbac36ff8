"""Rewards of a text's form: a pattern that it holds, a JSON schema that it keeps. Judged in isolated processes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema

from lockstep.engine.text.model_output import fenced_blocks, parse_json
from lockstep.rollout.rewards.isolation import Limits
from lockstep.rollout.rewards.reward import Completion, Reward
from lockstep.rollout.rewards.verifiers import PoolOwner, Verifier, open_pool
from lockstep.rollout.tasks.answers import extract_answer


@dataclass(frozen=True)
class RegexOptions:
    """pattern: searched for with re.DOTALL. in_answer: in the extracted answer, and not in the whole response.

    limits: of one search, which a pattern with nested repetitions may make endless.
    """

    pattern: str
    in_answer: bool = False
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class JsonSchemaOptions:
    """schema: a JSON schema, or schema_file: the path of one; its references are followed within it alone.

    limits: of one comparison.
    """

    schema: Mapping[str, Any] = field(default_factory=dict)
    schema_file: str | None = None
    limits: Limits = field(default_factory=Limits)


def regex_reward(options: RegexOptions, owner: PoolOwner | None) -> Reward:
    """1 where the pattern is found, else 0. Raises ValueError for a pattern that is none."""
    compile_pattern(options.pattern)
    pool = open_pool(text_check("regex", "pattern_check", options.limits, pattern=options.pattern), 1, owner)

    def reward(completions: Sequence[Completion]) -> list[float]:
        texts = [(extract_answer(c.text) or "") if options.in_answer else c.text for c in completions]
        return pool.verify([(c.problem, text) for c, text in zip(completions, texts, strict=True)])

    return reward


def json_schema_reward(options: JsonSchemaOptions, owner: PoolOwner | None) -> Reward:
    """1 where the answer (tagged, else the last fenced block, else the whole response) is JSON of the schema, else 0.

    Raises ValueError for a schema that is none.
    """
    schema = options.schema
    if options.schema_file is not None:
        try:
            schema = parse_json(Path(options.schema_file).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"schema_file={options.schema_file}: {error}") from error
    dialect = schema.get("$schema", "") if isinstance(schema, Mapping) else ""
    if not isinstance(schema, Mapping | bool) or not isinstance(dialect, str):
        raise ValueError("json_schema: a schema is an object (or true or false), and its $schema a text")
    validator_class = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        validator_class.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"json_schema: {error.message}") from error
    pool = open_pool(text_check("json_schema", "schema_check", options.limits, schema=schema), 1, owner)

    def reward(completions: Sequence[Completion]) -> list[float]:
        return pool.verify([(c.problem, _json_of(c.text)) for c in completions])

    return reward


def compile_pattern(pattern: str, num_groups: int = 0) -> re.Pattern[str]:
    """Raises ValueError for a pattern that is none, or that has fewer groups."""
    try:
        compiled = re.compile(pattern)
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(f"pattern {pattern!r}: {error}") from error
    if compiled.groups < num_groups:
        raise ValueError(f"pattern {pattern!r} has no group: put what counts in it into ( )")
    return compiled


def text_check(name: str, function: str, limits: Limits, **arguments: Any) -> Verifier:
    """The verifier that a function of text_checks.py makes."""
    path = Path(__file__).with_name("text_checks.py")
    return Verifier(name, f"{path}:{function}", arguments, limits=limits, each_alone=False, must_confine=False)


def _json_of(response: str) -> str:
    fenced = fenced_blocks(response, ("json",))
    return extract_answer(response) or (fenced[-1] if fenced else response)
