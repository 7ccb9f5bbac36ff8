"""Rewards of a Ray cluster's workers, without a cluster: each sample is verified once, in a worker."""

import pickle
from types import SimpleNamespace

import pytest

ray = pytest.importorskip("ray")
from models import make_hf_model  # noqa: E402

from lockstep.engine import EngineConfig  # noqa: E402
from lockstep.recipes.cluster import remote_rewards  # noqa: E402
from lockstep.recipes.cluster.actors import RewardActor  # noqa: E402
from lockstep.recipes.cluster.config import ClusterConfig  # noqa: E402
from lockstep.recipes.cluster.remote_rewards import RemoteRewards  # noqa: E402
from lockstep.recipes.rl import rl  # noqa: E402
from lockstep.rollout.config import TokenizerConfig  # noqa: E402
from lockstep.rollout.rewards import Completion, LocalRewards  # noqa: E402
from lockstep.rollout.rewards.verifiers import VerifierPool  # noqa: E402
from lockstep.rollout.tasks import ReasoningGymConfig  # noqa: E402
from lockstep.rollout.tasks.reasoning_gym_task import build_reasoning_gym  # noqa: E402
from lockstep.rollout.tokenizer import build_tokenizer  # noqa: E402

CLUSTER = ClusterConfig(kind="ray", reward_workers=2)


class Handle:
    """An actor in this process: what it takes and gives is copied, as between processes."""

    def __init__(self, actor):
        self._actor = actor

    def __getattr__(self, name):
        if name == "__ray_ready__":
            return SimpleNamespace(remote=lambda: None)
        method = getattr(self._actor, name)
        return SimpleNamespace(remote=lambda *a: pickle.loads(pickle.dumps(method(*pickle.loads(pickle.dumps(a))))))


@pytest.fixture
def judged(monkeypatch):
    """How often each answer was judged, by the pool that did it."""
    counts: dict[tuple[int, str], int] = {}

    def judge(self, items):
        for _, text in items:
            counts[id(self), text] = counts.get((id(self), text), 0) + 1
        return [(float(text == problem.answer), None) for problem, text in items]

    monkeypatch.setattr(VerifierPool, "_judge", judge)
    monkeypatch.setattr(ray, "get", lambda reference, timeout: reference)
    monkeypatch.setattr(ray, "kill", lambda actor: None)
    monkeypatch.setattr(remote_rewards.RewardActor, "__init__", new_actor)
    return counts


def new_actor(self, seed, num_threads):
    self._rewards, self._built, self._tasks = LocalRewards(), [], {}


def start(actor_class, bundle, cpus, gpus):
    return SimpleNamespace(remote=lambda *arguments: Handle(actor_class(*arguments)))


def completions_of(task):
    texts = [f"<answer>{task.problem(i).answer if i % 2 else 'wrong ' + str(i)}</answer>" for i in range(6)]
    return [Completion(task.problem(i), text, 1) for i, text in enumerate(texts)]


def test_reward_and_accuracy_of_a_run_verify_a_sample_once(judged, tmp_path):
    make_hf_model(tmp_path, "qwen3", seed=1, vocab_size=320, eos_token_id=1)
    build_tokenizer(["1 + 2"], TokenizerConfig(vocab_size=320)).save_pretrained(tmp_path)
    splits = build_reasoning_gym(ReasoningGymConfig(train_size=9, held_out_size=4))
    rewards = RemoteRewards(CLUSTER, 0, 1, start)
    engine = SimpleNamespace(config=EngineConfig(model=str(tmp_path)))
    config = rl.RLConfig(reward={"correct": 1.0, "format": 0.5})
    worker = rl.rollout_worker(config, SimpleNamespace(engine=engine, rewards=rewards), splits.train)
    verdicts = worker.judge(completions_of(splits.train))
    assert verdicts == [(0.5, False), (1.5, True)] * 3
    assert set(judged.values()) == {1}
    assert len(judged) == 6
    rewards._replace(0, RuntimeError("lost"))
    assert worker.judge(completions_of(splits.train)) == verdicts
    other = rewards.build({"exact_match": 1.0}, splits.held_out)
    assert other(completions_of(splits.train)) == [0.0, 1.0] * 3


def test_a_task_goes_to_a_worker_once(judged):
    task = build_reasoning_gym(ReasoningGymConfig(train_size=9, held_out_size=4)).train
    rewards = RemoteRewards(CLUSTER, 0, 1, start)
    first = rewards.build({"correct": 1.0}, task)
    assert rewards.build({"correct": 1.0}, task).args == first.args
    assert rewards.build({"format": 1.0}, task).args != first.args
    assert [list(handle._actor._tasks) for handle in rewards.actors] == [[0], [0]]
    with pytest.raises(ValueError, match="no reward 'none'"):
        rewards.build({"none": 1.0}, task)
    assert first(completions_of(task)) == [0.0, 1.0] * 3
    assert isinstance(rewards.actors[0]._actor, RewardActor)
