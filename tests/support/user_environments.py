"""An environment of a user's, found by its dotted path."""

import itertools
import os
import re
import signal
import sys
from typing import ClassVar

from lockstep.rollout.environments import Action, Opening, StepResult


class Echo:
    """Tells the policy how long its turn was, `num_turns` times; a quarter of a point for each turn."""

    def __init__(self, num_turns: int):
        self.num_turns = num_turns
        self.played = 0

    def reset(self, problem) -> Opening:
        return Opening(problem.messages)

    def step(self, action: Action) -> StepResult:
        self.played += 1
        observation = [{"role": "user", "content": f"{len(action.token_ids)} tokens"}]
        return StepResult(observation, reward=0.25, done=self.played == self.num_turns)


class Unreliable(Echo):
    """Every fifth of all calls, of all episodes, fails: what fails is not the same when it is played again."""

    calls = itertools.count(1)

    def __init__(self):
        super().__init__(num_turns=2)

    def reset(self, problem) -> Opening:
        self.call()
        return super().reset(problem)

    def step(self, action: Action) -> StepResult:
        self.call()
        return super().step(action)

    def call(self) -> None:
        if next(Unreliable.calls) % 5 == 0:
            raise ConnectionError("the service is gone")


class Hostile(Echo):
    """Does what no process survives, or gets out of, at its second turn."""

    DEEDS: ClassVar = {
        "hold the lock": lambda: re.match(r"(a+)+$", "a" * 40 + "!"),
        "compute": lambda: 9**9**9,
        "leave": lambda: os._exit(0),
        "be killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "exit": lambda: sys.exit("bye"),
        "return nothing": lambda: None,
        "return its past": lambda: {"observation": [], "reward": 1e999},
    }

    def __init__(self, deed: str):
        super().__init__(num_turns=3)
        self.deed = deed

    def step(self, action: Action) -> StepResult:
        return self.DEEDS[self.deed]() if self.played == 1 else super().step(action)
