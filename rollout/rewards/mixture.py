"""The rewards by name, and their weighted sum."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lockstep.engine import user_code
from lockstep.engine.models.config import load_model_config
from lockstep.rollout.rewards import code, functions, models, rules, text_rewards
from lockstep.rollout.rewards.failures import FailedScore
from lockstep.rollout.rewards.models import RewardEngines
from lockstep.rollout.rewards.reward import Completion, Reward, each
from lockstep.rollout.tasks.problem import BatchTask, Task


@dataclass(frozen=True)
class RewardKind:
    """options: a reward's config; build: what makes it for a task."""

    options: type
    build: Callable[[Any, Task, RewardEngines], Reward]


REWARDS: dict[str, RewardKind] = {
    "task": RewardKind(rules.NoOptions, lambda options, task, engines: rules.task_reward(task)),
    "correct": RewardKind(rules.NoOptions, lambda options, task, engines: rules.correct_reward(task)),
    "exact_match": RewardKind(rules.NoOptions, lambda options, task, engines: each(rules.exact_match)),
    "format": RewardKind(rules.NoOptions, lambda options, task, engines: each(rules.answer_format)),
    "regex": RewardKind(
        text_rewards.RegexOptions, lambda options, task, engines: text_rewards.regex_reward(options, engines)
    ),
    "json_schema": RewardKind(
        text_rewards.JsonSchemaOptions, lambda options, task, engines: text_rewards.json_schema_reward(options, engines)
    ),
    "length": RewardKind(rules.LengthOptions, lambda options, task, engines: rules.length_reward(options)),
    "math": RewardKind(functions.MathOptions, lambda options, task, engines: functions.math_reward(options, engines)),
    "code": RewardKind(code.CodeOptions, lambda options, task, engines: code.code_reward(options)),
    "function": RewardKind(
        functions.FunctionOptions, lambda options, task, engines: functions.function_reward(options, engines)
    ),
    "reward_model": RewardKind(
        models.RewardModelOptions, lambda options, task, engines: models.reward_model_reward(options, engines)
    ),
    "judge": RewardKind(models.JudgeOptions, lambda options, task, engines: models.judge_reward(options, engines)),
}

CORRECT: Mapping[str, float] = {"correct": 1.0}  # what accuracy is


def build_reward(terms: Mapping[str, Any] | str, task: Task, engines: RewardEngines | None) -> Reward:
    """The weighted sum of rewards. A term without a verdict on a sample adds 0, and makes the sum a FailedScore.

        {"correct": 1.0, "format": 0.1, "my_package.my_module.my_reward": 0.5}
        {"regex": {"weight": 0.5, "pattern": "^Let"}, "short": {"kind": "length", "max_tokens": 99, "buffer_tokens": 9}}
        "path/to/file.py:my_reward"

    A key is a name in REWARDS, or any name where `kind` gives that, or the path of a function. A value is a weight, or
    the reward's options and `weight` (1 if it is not given). Empty is {"task": 1.0}; a string is one function's path.
    Raises ValueError that names the term for an unknown name or option, and as the rewards do.
    """
    built = [_build_term(name, value, task, engines) for name, value in _named_terms(terms).items()]

    def reward(completions: Sequence[Completion]) -> list[float]:
        totals = [0.0] * len(completions)
        failed: dict[int, str] = {}
        for weight, term in built:
            scores = term(completions)
            failed |= {number: score.reason for number, score in enumerate(scores) if isinstance(score, FailedScore)}
            totals = [total + weight * score for total, score in zip(totals, scores, strict=True)]
        return [FailedScore(total, failed[n]) if n in failed else total for n, total in enumerate(totals)]

    return reward


def check_reward(terms: Any) -> None:
    """Finds what is wrong with a reward before anything starts: names, options, weights, files and signatures.

    Raises ValueError as `build_reward`.
    """
    for name, value in _named_terms(terms).items():
        _, kind, options = _term(name, value)
        with _naming(name):
            options = _options(REWARDS[kind].options, options)
            if isinstance(options, functions.FunctionOptions):
                functions.checked_function(options)
            if isinstance(options, models.RewardModelOptions | models.JudgeOptions):
                load_model_config(RewardEngines.config(options.model, options.engine).model)


class LocalRewards(RewardEngines):
    """Makes rewards that are computed in this process, once for the same terms and task. Use as a context manager."""

    def __init__(self):
        super().__init__()
        self._built: list[tuple[Any, Task, Reward]] = []

    def build(self, terms: Mapping[str, Any] | str, task: Task) -> Reward:
        """See `build_reward`."""
        for known_terms, known_task, reward in self._built:
            if known_task is task and known_terms == terms:
                return reward
        reward = build_reward(terms, task, self)
        self._built.append((copy.deepcopy(terms), task, reward))
        return reward

    def close(self) -> None:
        super().close()
        for _, task, _ in self._built:
            if isinstance(task, BatchTask):
                task.close()


def _named_terms(terms: Any) -> Mapping[str, Any]:
    if isinstance(terms, str):
        return {terms: 1.0}
    if terms is not None and not isinstance(terms, Mapping):
        raise ValueError(f"reward must be weights by name, or the path of one function, got {terms!r}")
    return terms or {"task": 1.0}


def _term(name: str, value: Any) -> tuple[float, str, dict[str, Any]]:
    """A term's weight, its kind, which is a key of REWARDS, and its other options."""
    options = dict(value) if isinstance(value, Mapping) else {"weight": value}
    weight = options.pop("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise ValueError(f"reward {name!r}: the weight must be a number, got {weight!r}")
    kind = options.pop("kind", name)
    if kind not in REWARDS:
        if "kind" in (value if isinstance(value, Mapping) else ()) or "." not in kind:
            raise ValueError(user_code.unknown_name("no reward", kind, REWARDS, ", or the path of a function"))
        kind, options = "function", {"path": name, **options}
    return float(weight), kind, options


def _build_term(name: str, value: Any, task: Task, engines: RewardEngines | None) -> tuple[float, Reward]:
    weight, kind, options = _term(name, value)
    with _naming(name):
        return weight, REWARDS[kind].build(_options(REWARDS[kind].options, options), task, engines)


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """A ValueError within says which term it is about."""
    try:
        yield
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
