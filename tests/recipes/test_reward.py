"""The reward stage: it learns what pairs prefer, resumes to the bit, and its model serves as a reward."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from lockstep.engine import Engine, EngineConfig
from lockstep.recipes import reward
from lockstep.recipes.runs.config import START, ModelShape, ModelSource
from lockstep.recipes.runs.run_directory import read_metrics
from lockstep.recipes.runs.sinks import Sinks
from lockstep.recipes.training_run import TrainingRun
from lockstep.rollout import preferences
from lockstep.rollout.config import PairSamplingConfig, TokenizerConfig
from lockstep.rollout.preferences import Preference, read_pairs, sample_pairs, write_pairs
from lockstep.rollout.rewards.failures import StepFailures
from lockstep.rollout.rewards.models import conversation_ids
from lockstep.rollout.tokenizer import build_tokenizer, load_tokenizer
from lockstep.rollout.worker import RolloutWorker
from lockstep.trainer_bridge import TrainerConfig
from lockstep.trainer_bridge.algorithms.preference import PreferencePair


@pytest.fixture
def config(tmp_path):
    """Pairs that prefer the larger digit."""
    lines = [
        {"prompt": f"{a}{b}", "chosen": f"<answer>{max(a, b)}</answer>", "rejected": f"<answer>{min(a, b)}</answer>"}
        for a in range(10)
        for b in range(10)
        if a != b
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[1::2] + lines[::2]))
    return reward.RewardConfig(
        name="rm",
        runs_dir=str(tmp_path),
        model=ModelSource(shape=ModelShape(num_layers=1, hidden_size=32, head_dim=16, ffn_hidden_size=64)),
        trainer=TrainerConfig(model=START, learning_rate=1e-2, max_tokens_per_micro_batch=512),
        train_files=(str(tmp_path / "pairs.jsonl"),),
        held_out_fraction=0.3,
        pairs_per_step=16,
        steps=30,
        checkpoint_every=10,
        evaluate_every=15,
        num_threads=1,
    )


class Killed(BaseException):
    """Stands in for a kill: nothing catches it."""


def test_it_learns_resumes_and_serves(config, tmp_path, monkeypatch):
    tables = []
    with monkeypatch.context() as patch:
        patch.setattr(Sinks, "record_samples", lambda self, *table: tables.append(table))
        results = reward.run(config)
    assert results["accuracy_after"] > 0.9 > results["accuracy_before"]
    evaluations = [record for record in read_metrics(tmp_path / "rm") if record["stage"] == "eval"]
    assert [step for step, _, _ in tables] == [0, 15, 30]
    assert {(stage, len(rows)) for _, stage, rows in tables} == {("eval", 8)}
    row = tables[-1][2][0]
    assert row["correct"] == (row["chosen score"] > row["rejected score"])
    assert (row["data set"], row["chosen"]) == ("held out", f"<answer>{max(row['prompt'])}</answer>")

    assert [record["step"] for record in evaluations] == [0, 15, 30]
    assert evaluations[-1]["margin"] > 0.0

    record = TrainingRun.record

    def record_and_die(self, step, metrics):
        record(self, step, metrics)
        if step == 15:
            raise Killed

    again = replace(config, name="again")
    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "record", record_and_die)
        with pytest.raises(Killed):
            reward.run(again)
    assert reward.run(again)["weights_hash"] == results["weights_hash"]

    engine, tokenizer = Engine(EngineConfig(model=results["model"])), load_tokenizer(results["model"])
    messages = [{"role": "user", "content": "38"}]
    eight, three = engine.reward(
        [conversation_ids(tokenizer, messages, f"<answer>{digit}</answer>") for digit in (8, 3)]
    )
    assert eight > three


def test_a_policy_s_right_answers_become_pairs_with_its_wrong_ones(monkeypatch):
    right, wrong = (("r", True), ("s", True)), (("w", False), ("v", False))
    answers = [(("x", False), ("y", True)), right, wrong, (("y", True), ("x", False))]
    problems = [SimpleNamespace(messages=({"role": "user", "content": str(index)},)) for index in range(4)]

    class Task:
        name = "letters"
        problem = staticmethod(problems.__getitem__)

        def __len__(self):
            return len(problems)

    def begin(self, problem, index, step, num_samples):
        assert num_samples == 2
        samples = [SimpleNamespace(text=text, correct=correct) for text, correct in answers[index]]
        return SimpleNamespace(problem=problem, samples=samples)

    def init(self, engine, tokenizer, task, *others):
        self.task, self.failures = task, StepFailures()

    monkeypatch.setattr(RolloutWorker, "__init__", init)
    monkeypatch.setattr(RolloutWorker, "begin", begin)
    monkeypatch.setattr(RolloutWorker, "extend", lambda self, groups: None)
    options = PairSamplingConfig(samples_per_problem=2)
    assert sample_pairs(None, None, Task(), 9, options, 0) == [
        Preference(problem.messages, "y", "x") for problem in (problems[0], problems[3])
    ]
    answers[0] = right
    with pytest.raises(ValueError, match="of 3 problems of 'letters' none got both"):
        sample_pairs(None, None, Task(), 3, options, 0)


@pytest.mark.parametrize(
    ("right", "text", "error"),
    [
        (0, "<answer>1</answer>", r"0 of 128 answers are right\. Take a policy=DIR that has learned the task"),
        (0, "", "0 of 128 answers are right, and in none an answer was found. Take a policy"),
        (2, "<answer>1</answer>", r"128 of 128 answers are right\. Take a harder task, or a higher sampling.temp"),
    ],
)
def test_a_policy_that_gives_no_pair_is_not_asked_on(monkeypatch, right, text, error):
    tried = []

    def sample_first(self, number, samples, step, begin):
        tried.append(range(begin, number))
        group = SimpleNamespace(samples=[SimpleNamespace(text=text, correct=n < right) for n in range(samples)])
        return [group] * len(tried[-1])

    def init(self, *others):
        self.failures = StepFailures()

    monkeypatch.setattr(RolloutWorker, "__init__", init)
    monkeypatch.setattr(RolloutWorker, "sample_first", sample_first)
    options = PairSamplingConfig(samples_per_problem=2)
    with pytest.raises(ValueError, match=f"of 64 problems of 'sums' none got both .*; {error}"):
        sample_pairs(None, None, Sized("sums"), 900, options, 0)
    assert tried == [range(64)]


class Sized:
    def __init__(self, name):
        self.name = name

    def __len__(self):
        return 1000


def test_the_first_problems_and_the_others_give_the_pairs_of_all(monkeypatch):
    monkeypatch.setattr(preferences, "TRIED_FIRST", 3)
    tried = []

    def sample_first(self, number, samples, step, begin):
        tried.extend(range(begin, number))
        answers = [SimpleNamespace(text="r", correct=True), SimpleNamespace(text="w", correct=False)]
        return [SimpleNamespace(problem=SimpleNamespace(messages=(n,)), samples=answers) for n in range(begin, number)]

    def init(self, *others):
        self.failures = StepFailures()

    monkeypatch.setattr(RolloutWorker, "__init__", init)
    monkeypatch.setattr(RolloutWorker, "sample_first", sample_first)
    for number, expected in ((2, 2), (3, 3), (8, 8), (2000, 1000)):
        tried.clear()
        pairs = sample_pairs(None, None, Sized("all"), number, PairSamplingConfig(), 0)
        assert tried == [pair.messages[0] for pair in pairs] == list(range(expected))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({}, "there are no pairs to learn from, and a model that is made from nothing .* train_files=PAIRS.jsonl"),
        ({"held_out_files": ("x.jsonl",)}, "held_out_files are given without train_files"),
        ({"policy": "/no/where"}, "/no/where"),
    ],
)
def test_without_anything_to_make_pairs_of_it_ends_before_there_is_a_directory(config, tmp_path, changes, error):
    with pytest.raises((ValueError, OSError), match=error):
        reward.run(replace(config, train_files=(), **changes))
    assert not (tmp_path / "rm").exists()


def test_pairs_are_read_as_they_are_written_and_in_the_forms_of_others(tmp_path):
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "é"}
    pairs = [Preference((question,), "é", "no"), Preference((question, answer, question), "a\nb", "c")]
    write_pairs(tmp_path / "own.jsonl", pairs)
    assert read_pairs([str(tmp_path / "own.jsonl")]) == pairs
    forms = [
        {"prompt": "q", "chosen": "é", "rejected": "no"},
        {"chosen": [question, answer], "rejected": [question, {"role": "assistant", "content": "no"}]},
        {"prompt": [question], "chosen": [answer], "rejected": "no"},
    ]
    (tmp_path / "forms.jsonl").write_text("\n".join(json.dumps(form) for form in forms))
    assert read_pairs([str(tmp_path / "forms.jsonl")]) == [pairs[0]] * 3


def test_pairs_are_learned_from_where_the_model_will_be_scored():
    tokenizer = build_tokenizer(["38"], TokenizerConfig(vocab_size=270))
    pair = Preference(({"role": "user", "content": "38"},), "8", "3")
    ids = tokenizer.encode("<|user|>38<|end|><|assistant|>8", add_special_tokens=False)
    end = tokenizer.eos_token_id
    assert reward.tokenized(tokenizer, pair, end).chosen == ids
    for other in (None, tokenizer.pad_token_id):
        assert reward.tokenized(tokenizer, pair, other).chosen == [*ids, end]


def test_lone_surrogates_are_replaced_where_pairs_are_written(tmp_path):
    write_pairs(tmp_path / "out.jsonl", [Preference(({"role": "user", "content": "\ud800q"},), "\U0001f600", "c")])
    (pair,) = read_pairs([str(tmp_path / "out.jsonl")])
    assert (pair.messages[0]["content"], pair.chosen) == ("\ufffdq", "\U0001f600")


def test_a_pair_that_is_too_long_is_named_before_the_start(config):
    pairs = [PreferencePair([1] * 20, [1] * 30), PreferencePair([1] * 300, [1] * 40)]
    reward.check_lengths("training", pairs, config, longest=300)
    with pytest.raises(ValueError, match="training pair 2 has conversations of 300 and 40 tokens"):
        reward.check_lengths("training", pairs, config, longest=99)
    small = replace(config, trainer=replace(config.trainer, max_tokens_per_micro_batch=339))
    with pytest.raises(ValueError, match=r"pair 2 has 340 tokens, and .*_batch=339"):
        reward.check_lengths("training", pairs, small, longest=300)


def test_missing_pairs_are_named(config, tmp_path):
    with pytest.raises(ValueError, match="no preference file"):
        reward.run(replace(config, name="a", train_files=(str(tmp_path / "absent.jsonl"),)))
    with pytest.raises(ValueError, match="0 held out"):
        reward.run(replace(config, name="b", held_out_fraction=0.0))
