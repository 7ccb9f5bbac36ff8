"""Rewards that are functions in a file or a package: a user's own, in this process or in isolated ones, and math's."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lockstep.engine import user_code
from lockstep.rollout.rewards.failures import FailureWarnings
from lockstep.rollout.rewards.isolation import Limits
from lockstep.rollout.rewards.models import RewardEngines
from lockstep.rollout.rewards.reward import Completion, Reward
from lockstep.rollout.rewards.score_values import check_signature, plain_score, reason_of, settled
from lockstep.rollout.rewards.verifiers import Verifier, open_pool

_MATH_CHECK = f"{Path(__file__).with_name('math_check.py')}:same_mathematics"
_TAKES = ("problem", "response")
_BATCH_TAKES = ("problems", "responses")


@dataclass(frozen=True)
class FunctionOptions:
    """path: a dotted path, or `path/to/file.py:function`. The function may be `async`.

    batch: it takes (problems, responses) and returns a list, in place of (problem, response) and a number.
    limits: it runs in isolated processes, where it is stopped at these limits and scored 0; null runs it here.
    num_workers: isolated processes that judge at a time.
    timeout_s: that an `async` function's score is waited for; those of a batch are waited for together.
    """

    path: str
    batch: bool = False
    limits: Limits | None = None
    num_workers: int = 2
    timeout_s: float = 60.0

    def __post_init__(self):
        if not isinstance(self.path, str):
            raise ValueError(f"path must be a text, got {self.path!r}")
        if self.batch and self.limits is not None:
            raise ValueError(f"{self.path}: an isolated function takes one response at a time, so batch must be false")
        if not self.timeout_s > 0 or self.num_workers < 1:
            raise ValueError(
                f"{self.path}: timeout_s must be positive and num_workers at least 1, "
                f"got {self.timeout_s} and {self.num_workers}"
            )

    @property
    def reference(self) -> str:
        """The path, absolute where it is a file's: an isolated process has another working folder."""
        file, separator, name = self.path.rpartition(".py:")
        return f"{os.path.abspath(os.path.expanduser(file))}{separator}{name}" if separator else self.path


@dataclass(frozen=True)
class MathOptions:
    """limits: of the comparison of one answer, which simplifies expressions and may take for ever.

    num_workers: isolated processes that compare at a time.
    ignore_units: 10 is right where the reference is 10 cm, and 50 where it is 50%.
    """

    limits: Limits = field(default_factory=Limits)
    num_workers: int = 2
    ignore_units: bool = False


def checked_function(options: FunctionOptions) -> Callable[..., Any]:
    """The function. Raises ValueError for a path that leads to none, and for one that takes other arguments."""
    function = user_code.load_object(options.reference, "reward function")
    check_signature(function, options.path, _BATCH_TAKES if options.batch else _TAKES)
    return function


def function_reward(options: FunctionOptions, engines: RewardEngines | None) -> Reward:
    """Raises as `checked_function`. What the function raises is a sample's failure; a result that is no number is a
    ValueError here, and a failure where it runs isolated.
    """
    function = checked_function(options)
    if options.limits is not None:
        verifier = Verifier(
            options.path, options.reference, limits=options.limits, takes=_TAKES, cwd=os.getcwd(), each_alone=True
        )
        return _pooled(verifier, options.num_workers, engines)
    score_all = _batch_scores if options.batch else _each_score
    warnings = FailureWarnings(options.path)

    def reward(completions: Sequence[Completion]) -> list[float]:
        values = score_all(function, options, completions)
        return [
            warnings.failed(completion.problem.problem_id, reason_of(value.error))
            if isinstance(value, _Failure)
            else plain_score(value, options.path, options.timeout_s)
            for completion, value in zip(completions, values, strict=True)
        ]

    return reward


def math_reward(options: MathOptions, engines: RewardEngines | None) -> Reward:
    """1 where the answer means what the reference means, else 0; see `math_check`."""
    arguments = {"ignore_units": options.ignore_units}
    verifier = Verifier("math", _MATH_CHECK, arguments, options.limits, each_alone=False)
    return _pooled(verifier, options.num_workers, engines)


def _pooled(verifier: Verifier, num_workers: int, engines: RewardEngines | None) -> Reward:
    pool = open_pool(verifier, num_workers, engines)
    return lambda completions: pool.verify([(c.problem, c.text) for c in completions])


@dataclass(frozen=True)
class _Failure:
    """What a function raised in the place of a score."""

    error: BaseException


def _called(function: Any, *arguments: Any) -> Any:
    """Whatever it raises, SystemExit too, is a failure; but Ctrl-C is the user's."""
    try:
        return function(*arguments)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return _Failure(error)


def _each_score(function: Any, options: FunctionOptions, completions: Sequence[Completion]) -> list[Any]:
    values = [_called(function, completion.problem, completion.text) for completion in completions]
    awaited = [number for number, value in enumerate(values) if inspect.isawaitable(value)]
    if awaited:
        results = settled([values[number] for number in awaited], options.path, options.timeout_s)
        for number, result in zip(awaited, results, strict=True):
            values[number] = _Failure(result) if isinstance(result, BaseException) else result
    return values


def _batch_scores(function: Any, options: FunctionOptions, completions: Sequence[Completion]) -> list[Any]:
    value = _called(function, [c.problem for c in completions], [c.text for c in completions])
    if inspect.isawaitable(value):
        (value,) = settled([value], options.path, options.timeout_s)
        value = _Failure(value) if isinstance(value, BaseException) else value
    if not isinstance(value, _Failure):
        if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
            raise ValueError(
                f"{options.path} returned a {type(value).__name__}; with batch=true it must return a list of numbers, "
                f"one for each of the {len(completions)} responses"
            )
        value = _called(list, value)  # a generator's body runs now
    if isinstance(value, _Failure):
        return [value] * len(completions)
    if len(value) != len(completions):
        raise ValueError(f"{options.path} gave {len(value)} scores for {len(completions)} responses")
    return value
