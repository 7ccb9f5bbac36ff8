"""The rewards by name, and their weighted sum."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from lockstep.engine.models.config import load_model_config
from lockstep.rollout.rewards import code, functions, models, rules
from lockstep.rollout.rewards.models import RewardEngines
from lockstep.rollout.rewards.reward import Completion, Reward, each
from lockstep.rollout.tasks.problem import Task


@dataclass(frozen=True)
class Kind:
    """options: a reward's config; build: what makes it for a task."""

    options: type
    build: Callable[[Any, Task, RewardEngines], Reward]


REWARDS: dict[str, Kind] = {
    "task": Kind(rules.NoOptions, lambda options, task, engines: each(rules.task_reward(task))),
    "correct": Kind(rules.NoOptions, lambda options, task, engines: each(rules.correct_reward(task))),
    "exact_match": Kind(rules.NoOptions, lambda options, task, engines: each(rules.exact_match)),
    "format": Kind(rules.NoOptions, lambda options, task, engines: each(rules.answer_format)),
    "regex": Kind(rules.RegexOptions, lambda options, task, engines: each(rules.regex_reward(options))),
    "json_schema": Kind(
        rules.JsonSchemaOptions, lambda options, task, engines: each(rules.json_schema_reward(options))
    ),
    "length": Kind(rules.LengthOptions, lambda options, task, engines: rules.length_reward(options)),
    "math": Kind(functions.MathOptions, lambda options, task, engines: functions.math_reward(options)),
    "code": Kind(code.CodeOptions, lambda options, task, engines: code.code_reward(options)),
    "function": Kind(functions.FunctionOptions, lambda options, task, engines: functions.function_reward(options)),
    "reward_model": Kind(
        models.RewardModelOptions, lambda options, task, engines: models.reward_model_reward(options, engines)
    ),
    "judge": Kind(models.JudgeOptions, lambda options, task, engines: models.judge_reward(options, engines)),
}


def build_reward(terms: Mapping[str, Any] | str, task: Task, engines: RewardEngines) -> Reward:
    """The weighted sum of rewards.

        {"correct": 1.0, "format": 0.1, "my_package.my_module.my_reward": 0.5}
        {"regex": {"weight": 0.5, "pattern": "^Let"}, "short": {"kind": "length", "max_tokens": 99, "buffer_tokens": 9}}
        "path/to/file.py:my_reward"

    A key is a name in REWARDS, or any name where `kind` gives that, or the path of a function. A value is a weight, or
    the reward's options and `weight` (1 if it is not given). Empty is {"task": 1.0}; a string is one function's path.
    Raises ValueError that names the term for an unknown name or option, and as the rewards do.
    """
    if isinstance(terms, str):
        terms = {terms: 1.0}
    built = [_build_term(name, value, task, engines) for name, value in (terms or {"task": 1.0}).items()]

    def reward(completions: Sequence[Completion]) -> list[float]:
        totals = [0.0] * len(completions)
        for weight, term in built:
            totals = [total + weight * score for total, score in zip(totals, term(completions), strict=True)]
        return totals

    return reward


def check_reward(terms: Mapping[str, Any] | str, task: Task) -> None:
    """Raises ValueError as `build_reward` does, and starts no engine."""
    build_reward(terms, task, _UnstartedEngines())


class _UnstartedEngines(RewardEngines):
    """Knows of a model what its directory says."""

    def engine(self, model: str, options: Mapping[str, Any]) -> Any:
        return SimpleNamespace(model_config=load_model_config(self.config(model, options).model))


class LocalRewards(RewardEngines):
    """Makes rewards that are computed in this process. Use as a context manager."""

    def build(self, terms: Mapping[str, Any] | str, task: Task) -> Reward:
        """See `build_reward`."""
        return build_reward(terms, task, self)


def _build_term(name: str, value: Any, task: Task, engines: RewardEngines) -> tuple[float, Reward]:
    options = dict(value) if isinstance(value, Mapping) else {"weight": value}
    weight = options.pop("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise ValueError(f"reward {name!r}: the weight must be a number, got {weight!r}")
    kind = options.pop("kind", name)
    if kind not in REWARDS:
        if "kind" in (value if isinstance(value, Mapping) else ()) or "." not in kind:
            known = ", ".join(REWARDS)
            raise ValueError(f"no reward {kind!r}; there are: {known}, or the path of a function")
        kind, options = "function", {"path": name, **options}
    try:
        return float(weight), REWARDS[kind].build(_options(REWARDS[kind].options, options), task, engines)
    except ValueError as error:
        raise ValueError(f"reward {name!r}: {error}") from error


def _options(options_class: type, values: Mapping[str, Any]) -> Any:
    """A frozen config, and those within it, from plain values."""
    known = typing.get_type_hints(options_class)
    if unknown := sorted(values.keys() - known.keys()):
        raise ValueError(f"unknown option {unknown[0]!r}; there are: {', '.join(known) or 'none'}")
    missing = [
        f.name
        for f in dataclasses.fields(options_class)
        if f.default is f.default_factory is dataclasses.MISSING and f.name not in values
    ]
    if missing:
        raise ValueError(f"option {missing[0]!r} is needed")
    nested = {
        name: next((arm for arm in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(arm)), None)
        for name, hint in known.items()
    }
    return options_class(
        **{
            name: _options(nested[name], value) if nested[name] and isinstance(value, Mapping) else value
            for name, value in values.items()
        }
    )
