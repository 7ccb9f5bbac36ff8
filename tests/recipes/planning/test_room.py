"""Problems without room where the task makes them when they are asked for, and prompts that leave little of it."""

import pickle
from dataclasses import replace

import pytest
from models import make_hf_model

from lockstep.engine import EngineConfig
from lockstep.engine.models.config import load_model_config
from lockstep.recipes.evaluation.config import EvalConfig
from lockstep.recipes.planning.room import eval_with_room, rl_with_room, sft_with_room
from lockstep.recipes.reward import policy_tasks
from lockstep.recipes.rl import rl, sft
from lockstep.recipes.rl.config import RewardConfig
from lockstep.recipes.runs.config import ModelSource
from lockstep.rollout.config import EvaluationConfig, PairSamplingConfig, RolloutConfig, TokenizerConfig
from lockstep.rollout.tasks import Problem, TaskSplits
from lockstep.rollout.tasks.problem import check_index
from lockstep.rollout.tasks.views import ReplacedProblems
from lockstep.rollout.tokenizer import build_tokenizer, load_tokenizer

LONG = 4000


class MadeTask:
    """Problems whose questions have about so many tokens, one after the other and again."""

    name = "made"

    def __init__(self, lengths, size=2000):
        self.lengths, self.size = lengths, size

    def __len__(self):
        return self.size

    def problem(self, index):
        check_index(index, self.size, self.name)
        question = "7" * self.lengths[index % len(self.lengths)] + f" {index}"
        return Problem(f"made/{index}", ({"role": "user", "content": question},), "7", solution="<answer>7</answer>")

    def score(self, problem, answer):
        return float(answer == "7")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    make_hf_model(path, "qwen3", seed=1, vocab_size=320, eos_token_id=1, max_position_embeddings=256)
    build_tokenizer(["1 2 3"], TokenizerConfig(vocab_size=320)).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("stage", ["rl", "sft"])
def test_problems_without_room_are_replaced_where_they_are_made_when_asked_for(model, capsys, stage):
    config_class, with_room = {"rl": (rl.RLConfig, rl_with_room), "sft": (sft.SFTConfig, sft_with_room)}[stage]
    further = ({},) if stage == "rl" else ()
    config = config_class(model=ModelSource(path=model))
    task = MadeTask((1, LONG, 1, 1))
    with pytest.raises(ValueError, match=r"made/1 .*has no room.*; task.overlong=skip leaves such problems out"):
        with_room(config, TaskSplits(task, task), *further)
    config = replace(config, task=replace(config.task, overlong="skip"))
    result = with_room(config, TaskSplits(task, task), *further)
    train = (result[0] if stage == "rl" else result).train
    assert len(train) == 2000
    chosen = [train.problem(index).problem_id for index in (0, 1, 2, 1997, 1999)]
    assert chosen == ["made/0", "made/2", "made/2", "made/1998", "made/1999"]
    assert "16 of the first 64 problems of 'made' have no room, and the next ones stand" in capsys.readouterr().out
    assert pickle.loads(pickle.dumps(train)).problem(5).problem_id == "made/6"  # as it goes to a reward actor
    with pytest.raises(IndexError):
        train.problem(2000)
    none = MadeTask((LONG,))
    with pytest.raises(ValueError, match="none of the 64 problems of task 'made' has room; the first: made/0"):
        with_room(config, TaskSplits(none, task), *further)


def test_where_no_problem_has_room_the_search_ends():
    task = ReplacedProblems(MadeTask((1,)), lambda problem: False)
    with pytest.raises(ValueError, match="none of 1000 problems of task 'made' from number 7 on can be taken"):
        task.problem(7)


def test_prompts_that_leave_less_than_a_whole_response_are_counted(model, capsys):
    config = rl.RLConfig(
        model=ModelSource(path=model),
        rollout=RolloutConfig(max_tokens=100),
        evaluation=EvaluationConfig(max_tokens=20),
    )
    task = MadeTask((1, 180, 170), size=3)
    rl_with_room(config, TaskSplits(task, task), {})
    said = " ".join(capsys.readouterr().out.split())
    assert "2 of 3 problems of 'made' leave less room than rollout.max_tokens=100, the least " in said
    assert "(the model allows 256 with the prompt): their responses end there" in said
    assert "evaluation.max_tokens" not in said
    evaluated = EvalConfig(
        engine=EngineConfig(model=model, max_model_len=200), evaluation=EvaluationConfig(max_tokens=198)
    )
    eval_with_room(evaluated, load_model_config(model), load_tokenizer(model), {"made": (config.task, task)})
    said = " ".join(capsys.readouterr().out.split())
    assert "3 of 3 problems of 'made' leave less room than evaluation.max_tokens=198, the least " in said
    assert "(engine.max_model_len allows 200 with" in said
    short = replace(config, rollout=RolloutConfig(max_tokens=8))
    rl_with_room(short, TaskSplits(task, task), {})
    assert capsys.readouterr().out == ""


def test_pairs_of_a_policy_need_room_before_they_are_sampled(model):
    config = RewardConfig(model=ModelSource(path=model), sampling=PairSamplingConfig(max_tokens=40))
    assert len(policy_tasks(config).train) == config.task.reasoning_gym.train_size
    for changes, message in (
        ({"sampling": PairSamplingConfig(max_tokens=250)}, "response needs 250, and the reward model allows 256"),
        (
            {"trainer": replace(config.trainer, max_tokens_per_micro_batch=100)},
            "needs 40, and half of trainer.max_tokens_per_micro_batch, in which both fit, allows 50",
        ),
        ({"engine": replace(config.engine, max_model_len=12)}, "needs 1, and engine.max_model_len allows 12"),
    ):
        with pytest.raises(ValueError, match=message):
            policy_tasks(replace(config, **changes))
