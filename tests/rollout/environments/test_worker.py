"""Episodes as training samples: what the policy wrote, and it alone, is learned from with the engine's log-probs."""

from dataclasses import replace

import pytest
import user_environments
from models import make_hf_model

from lockstep.engine import Engine, EngineConfig
from lockstep.recipes.cluster.local import LocalCluster
from lockstep.recipes.rl.config import RLConfig
from lockstep.recipes.rl.learner import Learner
from lockstep.rollout.config import EvaluationConfig, RolloutConfig, TokenizerConfig
from lockstep.rollout.environments import EnvironmentConfig, Opening, StepResult
from lockstep.rollout.environments.worker import EpisodeWorker, build_worker
from lockstep.rollout.evaluation import evaluate
from lockstep.rollout.rewards.rules import LengthOptions
from lockstep.rollout.rewards.rules import length_reward as length_reward_of
from lockstep.rollout.tasks import ReasoningGymConfig, build_task
from lockstep.rollout.tokenizer import build_tokenizer
from lockstep.rollout.worker import RolloutWorker
from lockstep.trainer_bridge import TrainerConfig

ECHO = EnvironmentConfig(kind="user_environments.Echo", options={"num_turns": 2}, own_process=False)


class EndsOften(EpisodeWorker):
    """A random model seldom draws the end token: any of these ends a turn as well."""

    def sampling_params(self, seed, max_tokens):
        return replace(super().sampling_params(seed, max_tokens), stop_token_ids=tuple(range(25)))


def play_step(worker):
    """The groups of step 1."""
    groups = [worker.begin_at(position) for position in (2, 3)]
    assert worker.extend(groups) == sum(sum(sample.written) for group in groups for sample in group.samples)
    return [group.samples for group in groups]


def length_reward(completions):
    return [len(completion.text) / 10 for completion in completions]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("model"))
    task = build_task(ReasoningGymConfig("chain_sum", train_size=40, held_out_size=4)).train
    tokenizer = build_tokenizer([task.problem(i).question for i in range(20)], TokenizerConfig(vocab_size=280))
    make_hf_model(
        path,
        "qwen3",
        seed=2,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        max_position_embeddings=512,
    )
    tokenizer.save_pretrained(path)
    return path, tokenizer, task, Engine(EngineConfig(model=path, kv_cache_tokens=8192))


def test_an_update_learns_from_the_written_tokens_with_the_engines_log_probs(parts):
    path, tokenizer, task, engine = parts
    rollout = RolloutConfig(prompts_per_step=2, samples_per_prompt=4, max_tokens=12)
    worker = EndsOften(engine, tokenizer, task, length_reward, rollout, 7, ECHO)
    groups = play_step(worker)
    samples = [sample for group in groups for sample in group]
    assert {len(sample.turn_rewards) for sample in samples} == {1, 2}
    for sample in samples:
        assert len(sample.response_ids) == len(sample.logprobs) == len(sample.response_mask)
        assert [lp is None for lp in sample.logprobs] == [not w for w in sample.response_mask]
        assert sum(sample.turn_rewards) == sample.reward
        played = 0.25 * (len(sample.turn_rewards) - (sample.finish_reason == "length"))
        assert sample.reward == pytest.approx(played + len(sample.text) / 10)
    assert play_step(worker) == groups

    cluster = LocalCluster(TrainerConfig(model=path, learning_rate=1e-3), EngineConfig(model=path))
    with Learner(RLConfig(rollout=rollout), cluster, path) as learner:
        stats = learner.step(groups)
    assert stats["logprob_diff_max"] == 0.0
    assert stats["trained_tokens"] == sum(sum(sample.response_mask) for sample in samples)
    assert stats["trained_tokens"] < sum(len(sample.response_ids) for sample in samples)


def test_evaluation_plays_the_environment(parts):
    _, tokenizer, task, engine = parts
    config = EvaluationConfig(num_problems=3, samples_per_problem=2, max_tokens=8, temperature=1.0)
    environment = EnvironmentConfig(kind="calculator")
    result = evaluate(engine, tokenizer, task, length_reward, config, 0, environment)
    assert all(sample.response_mask is not None for sample in result.samples)
    assert b'"name": "calculator"' in tokenizer.decode(result.samples[0].prompt_ids).encode()
    again = evaluate(engine, tokenizer, task, length_reward, config, 0, environment)
    assert result.digest == again.digest


def test_the_kind_chooses_the_worker(parts):
    _, tokenizer, task, engine = parts
    arguments = (engine, tokenizer, task, None, RolloutConfig(), 0)
    assert type(build_worker(*arguments, EnvironmentConfig())) is RolloutWorker
    assert type(build_worker(*arguments, ECHO)) is EpisodeWorker


class Sometimes:
    """Raises where a problem's number is one of `failing`."""

    def __init__(self, failing, method="reset"):
        self.failing, self.method = failing, method

    def ask(self, method, problem):
        if method == self.method and int(problem.problem_id.rpartition("/")[2]) in self.failing:
            raise SystemExit(f"no {method} of {problem.problem_id}")

    def reset(self, problem):
        self.problem = problem
        self.ask("reset", problem)
        return Opening(problem.messages)

    def step(self, action):
        self.ask("step", self.problem)
        return StepResult(reward=0.5, done=True)


class EndsAtOnce(EpisodeWorker):
    def sampling_params(self, seed, max_tokens):
        return replace(super().sampling_params(seed, max_tokens), stop_token_ids=tuple(range(self.vocab_size)))


def worker_of(parts, failing, method, **options):
    _, tokenizer, task, engine = parts
    rollout = RolloutConfig(prompts_per_step=2, samples_per_prompt=2, max_tokens=4)
    reward = LengthOptions(max_tokens=1, buffer_tokens=1)
    worker = EndsAtOnce(
        engine, tokenizer, task, length_reward_of(reward), rollout, 7, EnvironmentConfig(kind="calculator", **options)
    )
    worker.new_environment = lambda: Sometimes(failing, method)
    return worker


@pytest.mark.parametrize("method", ["reset", "step"])
@pytest.mark.parametrize("on_error", ["fail", "retry", "skip"])
def test_failures_are_counted_and_cost_their_group_or_their_reward(parts, on_error, method, caplog):
    worker = worker_of(parts, set(), method)
    groups = [worker.begin_at(position) for position in range(4)]
    numbers = [int(group.problem.problem_id.rpartition("/")[2]) for group in groups]
    worker = worker_of(parts, {numbers[1]}, method, on_error=on_error, max_retries=1)
    worker.extend(groups)
    for group in groups:
        broken = group is groups[1]
        assert group.num_failures == (0 if not broken else 4 if on_error == "retry" else 2)
        assert group.is_lost == (broken and (on_error == "skip" or method == "reset"))
        for sample in group.samples:
            assert sample.finish_reason == ("error" if broken else "stop")
            assert sample.reward == sum(sample.turn_rewards) == (0.0 if broken else 0.5 - 1.0)
            assert not (broken and sample.correct)
            assert len(sample.turn_rewards) == len(sample.turn_seeds) == (not broken or method == "step")
            assert sample.prompt_ids == groups[groups.index(group)].prompt_ids
    (line,) = {record.getMessage() for record in caplog.records}
    problem = groups[1].problem.problem_id
    assert line == f"Sometimes.{method} failed at turn 0 of {problem}: SystemExit: no {method} of {problem}"
    stored = groups[1].samples
    again = worker_of(parts, set(), method)  # the environment is well again
    replayed = again.begin_at(1)
    again.play_again(replayed, stored)
    assert replayed.samples == stored


@pytest.mark.parametrize("method", ["reset", "step"])
def test_all_episodes_failing_alike_end_the_run(parts, method):
    worker = worker_of(parts, range(1000), method, on_error="skip")
    with pytest.raises(ValueError, match=rf"all episodes fail alike, 4 of 4.*Sometimes.{method} failed at.*SystemExit"):
        worker.extend([worker.begin_at(position) for position in range(2)])
    one_problem = worker_of(parts, range(1000), method)
    group = one_problem.begin_at(0)
    one_problem.extend([group])  # it may be the problem's fault
    assert [sample.finish_reason for sample in group.samples] == ["error", "error"]


def test_an_evaluation_counts_failures_as_wrong(parts, monkeypatch):
    _, tokenizer, task, engine = parts
    monkeypatch.setattr(user_environments, "Sometimes", Sometimes, raising=False)
    environment = EnvironmentConfig(
        kind="user_environments.Sometimes", options={"failing": [1]}, on_error="skip", own_process=False
    )
    config = EvaluationConfig(num_problems=3, samples_per_problem=2, max_tokens=2, temperature=1.0)
    result = evaluate(engine, tokenizer, task, length_reward, config, 0, environment)
    assert result.metrics()["environment_failures"] == 2
    assert [sample.finish_reason == "error" for sample in result.samples] == [False] * 2 + [True] * 2 + [False] * 2


def test_a_process_of_their_own_changes_no_episode(parts):
    _, tokenizer, task, engine = parts
    rollout = RolloutConfig(prompts_per_step=2, samples_per_prompt=2, max_tokens=6)
    here, there = (
        play_step(
            EndsAtOnce(engine, tokenizer, task, length_reward, rollout, 7, replace(ECHO, own_process=own_process))
        )
        for own_process in (False, True)
    )
    assert here == there
    assert all(len(sample.turn_rewards) == 2 for group in here for sample in group)


def test_environments_of_the_users_own_cannot_hang_the_run(parts):
    """By default: code that holds the interpreter's lock for ever costs its episodes, and no more."""
    _, tokenizer, task, engine = parts
    config = EnvironmentConfig(kind="user_environments.Hostile", options={"deed": "compute"}, timeout_s=1.0)
    assert config.is_apart
    rollout = RolloutConfig(prompts_per_step=1, samples_per_prompt=1, max_tokens=6)
    with pytest.raises(
        ValueError, match=r"all episodes fail alike, 2 of 2.*Hostile.step failed .*no answer within 1 s"
    ):
        play_step(EndsAtOnce(engine, tokenizer, task, length_reward, rollout, 7, config))
    for kind in ("calculator", "guess_number", "single_turn"):
        assert not EnvironmentConfig(kind=kind).is_apart
        assert EnvironmentConfig(kind=kind, own_process=True).is_apart
    assert not EnvironmentConfig(kind="mine.py:One", own_process=False).is_apart


def test_a_length_is_of_what_the_policy_wrote(parts):
    """What tools and environments say is not counted, by the length reward neither."""
    _, tokenizer, task, engine = parts
    counted = []

    def reward(completions):
        counted.extend(completion.num_tokens for completion in completions)
        return [0.0] * len(completions)

    rollout = RolloutConfig(prompts_per_step=2, samples_per_prompt=4, max_tokens=12)
    groups = play_step(EndsOften(engine, tokenizer, task, reward, rollout, 7, ECHO))
    samples = [sample for group in groups for sample in group]
    assert counted == [sum(sample.response_mask) for sample in samples]
    assert counted != [len(sample.response_ids) for sample in samples]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"kind": "chess"}, "no environment.kind 'chess'; there are: single_turn, calculator, guess_number"),
        ({"kind": "user_environments.Chess"}, "cannot find the environment"),
        ({"max_turns": 0}, "max_turns must be at least 1"),
        ({"timeout_s": 0}, "timeout_s must be above 0, got 0"),
        ({"on_error": "stop"}, "on_error must be one of fail, retry, skip, got 'stop'"),
        ({"max_retries": -1}, "max_retries must be at least 0"),
        ({"tool_format": "xml"}, "no environment.tool_format 'xml'; known: hermes"),
        ({"kind": "calculator", "options": {"a": 1}}, "options are for your own"),
    ],
)
def test_what_cannot_be_is_refused_by_name(change, error):
    with pytest.raises(ValueError, match=error):
        EnvironmentConfig(**change).factory()
