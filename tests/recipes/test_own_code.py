"""A run whose task, environment, algorithm and reward are a user's own files in the working folder."""

import json
import os
import sys

import pytest

from lockstep.recipes import cli

FILES = {
    "my_task.py": """
from lockstep.rollout.tasks import Problem, TaskSplits
from lockstep.rollout.tasks.problem import conversation

class Numbers:
    name = "numbers"
    def __init__(self, numbers):
        self.numbers = numbers
    def __len__(self):
        return len(self.numbers)
    def problem(self, index):
        number = self.numbers[index]
        return Problem(f"numbers/{number}", conversation(f"What comes after {number}?", None), str(number + 1))
    def score(self, problem, answer):
        return float(answer == problem.answer)

def numbers(size=4):
    return TaskSplits(Numbers(range(size)), Numbers(range(size, size + 2)))
""",
    "my_algorithm.py": """
from lockstep.trainer_bridge.algorithms.algorithm_config import Algorithm, loss_of, with_usual_options
from lockstep.trainer_bridge.algorithms.surrogates import clipped

def best_of_group(config, shaping, margin=0.0):
    config, shaping = with_usual_options(config.own(aggregation="token_mean", kl_in="loss"), shaping)
    def advantages(groups):
        print("advantages of", len(groups), "groups, margin", margin)
        return [[[float(len(r.logprobs)) - margin] * len(r.logprobs) for r in group] for group in groups]
    return Algorithm(config, advantages, loss_of(config, clipped))

def nothing(config, shaping):
    return {}
""",
    "my_environment.py": """
import os
from lockstep.rollout.environments import Opening, StepResult

class Once:
    def __init__(self, greeting):
        self.greeting = greeting
    def reset(self, problem):
        with open("opened", "a") as file:  # in another process than the run
            print(self.greeting, problem.problem_id, os.getpid(), file=file)
        return Opening(problem.messages)
    def step(self, action):
        return StepResult(done=True)
""",
    "my_reward.py": "def score(problem, response):\n    return 0.25\n",
}
SHAPE = ("num_layers=1", "hidden_size=32", "head_dim=16", "ffn_hidden_size=32", "max_position_embeddings=128")
TINY = [
    "steps=1",
    *(f"model.shape.{size}" for size in SHAPE),
    *("rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", "rollout.max_tokens=6"),
    *("evaluation.max_tokens=4", "evaluation.num_problems=2", "engine.kv_cache_tokens=1024"),
]


@pytest.fixture
def own_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    yield tmp_path
    for name in FILES:
        sys.modules.pop(name.removesuffix(".py"), None)


def test_every_part_may_be_a_file_or_a_dotted_path(own_files, capsys):
    own = (
        "task.kind=my_task.numbers task.options={size:6} algorithm.name=my_algorithm.py:best_of_group "
        "algorithm.options={margin:0.5} environment.kind=my_environment.py:Once environment.options={greeting:opened} "
        "reward=my_reward.score"
    )
    cli.main(["rl", *own.split(), *TINY])
    shown = capsys.readouterr().out
    assert "advantages of 2 groups, margin 0.5" in shown
    opened = [line.split() for line in (own_files / "opened").read_text().splitlines()]
    assert {line[0] for line in opened} == {"opened"}
    assert all(line[1].startswith("numbers/") for line in opened)
    assert str(os.getpid()) not in {line[2] for line in opened}
    samples = [json.loads(line) for line in (own_files / "runs/rl/rollouts/step_000001.jsonl").read_text().splitlines()]
    assert {sample["reward"] for sample in samples} == {0.25}
    assert all(sample["problem_id"].startswith("numbers/") for sample in samples)


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("task.kind=sumz", "no task.kind 'sumz'; there are: reasoning_gym, local_files, guess_number"),
        ("task.kind=local_file", "did you mean: local_files"),
        ("task.kind=my_task.py:number", "did you mean: numbers"),
        ("task.kind=my_reward.py:score", "takes (problem, response)"),
        ("task.kind=my_task.py:Numbers task.options={numbers:[1]}", "gave a Numbers, not TaskSplits"),
        ("task.options={size:3}", "task.options are for tasks of your own"),
        ("algorithm.name=my_algorithm.py:best_of_groups", "did you mean: best_of_group"),
        ("algorithm.name=gropo", "did you mean: grpo"),
        ("algorithm.options={a:1}", "algorithm.options are for an algorithm of your own"),
        ("algorithm.name=my_algorithm.py:nothing", "gave a dict, not an Algorithm"),
    ],
)
def test_what_is_not_there_is_one_line(own_files, capsys, override, error):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["rl", *override.split(), *TINY, "--dry-run"])
    assert exit_info.value.code == 2
    shown = capsys.readouterr().err
    assert error in shown
    assert "Traceback" not in shown
