"""cluster=ray: the same run on actors, also when an engine is killed in the middle."""

import os
import signal
import threading
import time
from dataclasses import replace

import pytest
from fragile_actors import broken_engine, fragile_engine, fragile_trainer
from models import make_hf_model
from short_runs import Killed, without_times

from lockstep.engine import Engine, EngineConfig, SamplingParams
from lockstep.recipes.cluster.config import ClusterConfig
from lockstep.recipes.inputs import starting_directory
from lockstep.recipes.rl import rl
from lockstep.recipes.rl.learner import Learner
from lockstep.recipes.runs.config import START, ModelShape, ModelSource
from lockstep.recipes.runs.run_directory import read_metrics
from lockstep.rollout.config import EvaluationConfig, RolloutConfig
from lockstep.rollout.rewards import Completion, LocalRewards
from lockstep.rollout.tasks import ReasoningGymConfig
from lockstep.rollout.tasks.config import TaskConfig
from lockstep.trainer_bridge import MegatronTrainer, TrainerConfig
from lockstep.trainer_bridge.algorithms.config import AlgorithmConfig
from lockstep.trainer_bridge.algorithms.losses import sft_loss
from lockstep.trainer_bridge.packing import TrainSequence, pack

ray = pytest.importorskip("ray")
from lockstep.recipes.cluster import remote_engines, remote_trainer  # noqa: E402
from lockstep.recipes.cluster.ray_cluster import RayCluster  # noqa: E402

pytestmark = pytest.mark.timeout(900)  # each test starts Ray and several processes
CONFIG = ClusterConfig(kind="ray", num_engines=2, stall_timeout_s=60.0, publish_timeout_s=60.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_hf_model(path, "qwen3", seed=1, vocab_size=132)
    return str(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "local", "num_engines": 2}, "cluster local has no"),
        ({"transport": "disk"}, "needs cluster.transport_directory"),
        ({"num_engines": 0}, "at least 1"),
        ({"trainer_ranks": 0}, "at least 1"),
        ({"trainer_ranks": 3, "colocate": True}, "trainer_ranks=3 is more than num_engines=2"),
        ({"engine_gpus": 0.5, "colocate": True}, "needs cluster.transport=cuda_ipc"),
        ({"stall_timeout_s": 0.0}, "stall_timeout_s must be above 0"),
        ({"kind": "local", "num_engines": 1, "reward_workers": 1}, "it is an option of: ray"),
        ({"kind": "local", "num_engines": 1, "teacher_engines": 1}, "it is an option of: ray"),
        ({"reward_workers": -1}, "reward_workers must be at least 0"),
    ],
)
def test_impossible_clusters_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


def kill_at_work(actor, pid):
    """Once the engine makes steps: how long a generation takes depends on the machine."""
    idle = ray.get(remote_engines._health(actor, "progress"))
    while ray.get(remote_engines._health(actor, "progress")) == idle:
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)


def test_actors_give_the_bits_of_one_process_through_updates_and_a_killed_engine(model, tmp_path):
    engine_config, trainer_config = EngineConfig(model=model), TrainerConfig(model=model, learning_rate=1e-2)
    prompts = [[5, 6, 7], [5, 6, 7], [9, 8], [1, 2, 3, 4]]
    params = [SamplingParams(max_tokens=40, seed=seed, ignore_eos=True) for seed in range(4)]
    local, engine = MegatronTrainer(trainer_config), Engine(engine_config)

    def equal(outputs, expected):
        assert [(o.token_ids, o.logprobs, o.weight_versions) for o in outputs] == [
            (o.token_ids, o.logprobs, o.weight_versions) for o in expected
        ]

    with RayCluster(CONFIG, trainer_config, engine_config, seed=0, num_threads=1) as cluster:
        equal(cluster.engine.generate(prompts, params), engine.generate(prompts, params))
        assert cluster.engine.score([[3, 4, 5]]) == engine.score([[3, 4, 5]]) == cluster.trainer.logprobs([[3, 4, 5]])

        # New weights, made by a load: the actors' engines take them through the transport.
        other = tmp_path / "other"
        make_hf_model(other, "qwen3", seed=2, vocab_size=132)
        donor = MegatronTrainer(TrainerConfig(model=str(other)))
        donor.save(tmp_path / "checkpoint")
        cluster.trainer.load(tmp_path / "checkpoint")
        local.load(tmp_path / "checkpoint")
        assert cluster.trainer.weights_hash() == local.weights_hash()
        report = cluster.publish(version=1)
        assert report["checksum"] == local.weights_hash()
        engine.update_weights(local.named_weights(), version=1)
        equal(cluster.engine.generate(prompts, params), engine.generate(prompts, params))

        # An engine is killed while it generates; its replacement must serve version 1.
        victim = ray.get(cluster.engine.actors[0].identity.remote())["pid"]
        slow = [replace(p, max_tokens=240) for p in params]
        threading.Thread(target=kill_at_work, args=(cluster.engine.actors[0], victim)).start()
        outputs = cluster.engine.generate(prompts, slow)
        equal(outputs, engine.generate(prompts, slow))
        assert cluster.engine.num_replaced == 1
        # And one that dies between two calls is noticed by the next publish.
        os.kill(ray.get(cluster.engine.actors[1].identity.remote())["pid"], signal.SIGKILL)
        cluster.publish(version=2)
        engine.update_weights(local.named_weights(), version=2)
        equal(cluster.engine.generate(prompts, params), engine.generate(prompts, params))
        assert cluster.engine.num_replaced == 2


def test_an_engine_lost_while_the_trainer_is_ahead_gets_its_version_from_another_engine(model):
    trainer_config, engine_config = TrainerConfig(model=model, learning_rate=1e-2), EngineConfig(model=model)
    prompts, params = [[5, 6, 7], [9, 8]], SamplingParams(max_tokens=10, seed=3, ignore_eos=True)
    with RayCluster(CONFIG, trainer_config, engine_config, seed=0, num_threads=1) as cluster:
        cluster.trainer.step(train_batches(), sft_loss)
        cluster.publish(version=1)
        before = cluster.engine.generate(prompts, params)
        cluster.trainer.step(train_batches(), sft_loss)  # version 1 is now in the engines alone
        for victim in (0, 1):
            os.kill(ray.get(cluster.engine.actors[victim].identity.remote())["pid"], signal.SIGKILL)
            after = cluster.engine.generate(prompts, params)
            assert cluster.engine.num_replaced == victim + 1
            assert [(o.token_ids, o.logprobs) for o in after] == [(o.token_ids, o.logprobs) for o in before]
            assert {version for o in after for version in o.weight_versions} == {1}
        report = cluster.publish(version=2)
        assert report["publish_s"] < CONFIG.publish_timeout_s / 2, "somebody waited for an engine that is gone"
        changed = cluster.engine.generate(prompts, params)
        assert [o.logprobs for o in changed] != [o.logprobs for o in before]


def train_batches():
    sequences = [
        TrainSequence([(7 * i + j * j) % 132 for j in range(12 + i)], [False] * 4 + [True] * (8 + i)) for i in range(4)
    ]
    return pack(sequences, 32)


@pytest.mark.parametrize(
    ("cluster", "trainer", "engine"),
    [
        ({"trainer_ranks": 2, "num_engines": 1}, {"tensor_parallel_size": 2}, {"tp_size": 2}),
        ({"trainer_ranks": 2, "colocate": True, "transport": "cuda_ipc"}, {"gradient_splits": 2}, {}),
    ],
    ids=["tensor parallel on both sides", "data parallel, colocated"],
)
def test_ranks_of_the_trainer_give_the_bits_of_one(model, cluster, trainer, engine):
    common = {"learning_rate": 1e-2, "row_parallel_splits": 2, "gradient_splits": 2}
    alone = MegatronTrainer(TrainerConfig(model=model, **common))
    served = Engine(EngineConfig(model=model, row_parallel_splits=2))
    trainer_config = TrainerConfig(model=model, **(common | trainer))
    engine_config = EngineConfig(model=model, row_parallel_splits=2, **engine)
    prompts, params = [[5, 6, 7], [9, 8]], SamplingParams(max_tokens=10, seed=3, ignore_eos=True)
    with RayCluster(replace(CONFIG, **cluster), trainer_config, engine_config, seed=0, num_threads=1) as remote:
        stats = remote.trainer.step(train_batches(), sft_loss)
        assert stats == alone.step(train_batches(), sft_loss)
        report = remote.publish(version=1)
        assert report["checksum"] == alone.weights_hash() == remote.trainer.weights_hash()
        served.update_weights(alone.named_weights(), version=1)
        outputs, expected = remote.engine.generate(prompts, params), served.generate(prompts, params)
        assert [(o.token_ids, o.logprobs) for o in outputs] == [(o.token_ids, o.logprobs) for o in expected]
        assert {o.weight_versions[0] for o in outputs} == {1}


# Faults ---------------------------------------------------------------------------------------------------------------


def rl_config(runs_dir, cluster: ClusterConfig) -> rl.RLConfig:
    return rl.RLConfig(
        name="run",
        runs_dir=str(runs_dir),
        num_threads=1,
        model=ModelSource(shape=ModelShape(num_layers=2, hidden_size=32, head_dim=16, ffn_hidden_size=64)),
        task=TaskConfig(reasoning_gym=ReasoningGymConfig(dataset="chain_sum", train_size=50, held_out_size=4)),
        trainer=TrainerConfig(model=START, learning_rate=1e-2, max_tokens_per_micro_batch=512),
        engine=EngineConfig(model=START, kv_cache_tokens=4096),
        rollout=RolloutConfig(prompts_per_step=4, samples_per_prompt=4, max_tokens=12),
        reward={"user_rewards.length_reward": 1.0},
        evaluation=EvaluationConfig(num_problems=2, max_tokens=4),
        evaluate_every=2,
        steps=2,
        checkpoint_every=2,
        cluster=cluster,
    )


def test_a_run_whose_engines_are_killed_ends_with_the_weights_of_one_without_faults(tmp_path, monkeypatch):
    undisturbed = rl.run(rl_config(tmp_path / "local", ClusterConfig()))
    deaths = tmp_path / "deaths"
    deaths.mkdir()
    monkeypatch.setattr(remote_engines, "EngineActor", fragile_engine(deaths))
    disturbed = rl.run(rl_config(tmp_path / "ray", replace(CONFIG, reward_workers=1)))
    assert sorted(path.name for path in deaths.iterdir()) == ["generating", "received 2", "receiving 1"]
    assert disturbed["weights_hash"] == undisturbed["weights_hash"]
    rollouts = [tmp_path / name / "run" / "rollouts" / "step_000002.jsonl" for name in ("local", "ray")]
    assert rollouts[0].read_bytes() == rollouts[1].read_bytes()
    metrics = read_metrics(tmp_path / "local" / "run")
    assert any(record.get("grad_norm", 0) > 0 for record in metrics), "nothing was learned: the test lost its point"


def test_a_critic_beside_a_trainer_of_two_ranks_gives_the_run_of_one_process(tmp_path, monkeypatch):
    """Also when it dies in its second step and is resumed."""
    options = {"algorithm": AlgorithmConfig(name="ppo", critic_learning_rate=1e-2, mini_batches=2)}
    local, remote = local_and_remote(tmp_path, options, replace(CONFIG, num_engines=1, trainer_ranks=2))
    learn = Learner.step

    def die_at_step_2(learner, groups):
        if learner.config.steps_made(learner.trainer.step_count) == 1:
            raise Killed
        return learn(learner, groups)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", die_at_step_2)
        with pytest.raises(Killed):
            rl.run(remote)
    assert_same_training(local, remote)


def test_a_teacher_as_an_actor_gives_the_run_of_one_process(tmp_path):
    config = rl_config(tmp_path, ClusterConfig())
    teacher = str(starting_directory(config.model, tmp_path / "teacher", config.task.build().train, seed=7))
    options = {"algorithm": AlgorithmConfig(name="distillation", teacher_model=teacher), "reward": {}}
    assert_same_training(*local_and_remote(tmp_path, options, replace(CONFIG, num_engines=1, teacher_engines=2)))
    with pytest.raises(ValueError, match=r"set cluster\.teacher_engines=1"):
        replace(config, cluster=CONFIG, **options)


def local_and_remote(tmp_path, options, cluster):
    local = replace(rl_config(tmp_path / "local", ClusterConfig()), checkpoint_every=1, **options)
    local = replace(local, trainer=replace(local.trainer, gradient_splits=2))
    return local, replace(local, runs_dir=str(tmp_path / "ray"), cluster=cluster)


def assert_same_training(local, remote):
    assert rl.run(remote)["weights_hash"] == rl.run(local)["weights_hash"]
    metrics = [[record for record in read_metrics(c.directory) if record["stage"] == "rl"] for c in (local, remote)]
    assert without_times(metrics[0]) == without_times(metrics[1])
    assert all(record["grad_norm"] > 0 for record in metrics[0]), "nothing was learned: the test lost its point"


FAULTY_REWARD = """
import os, signal, time
from pathlib import Path

def score(problem, response):
    if response in ("die", "hang"):
        try:
            Path(__file__).with_name(response).touch(exist_ok=False)
        except FileExistsError:
            return 7.0
        os.kill(os.getpid(), signal.SIGKILL) if response == "die" else time.sleep(600)
    return float(len(response))
"""


def test_reward_workers_give_the_scores_of_one_process_also_when_one_dies_or_hangs(model, tmp_path):
    tasks = TaskConfig(reasoning_gym=ReasoningGymConfig(dataset="chain_sum", train_size=9, held_out_size=4))
    task = tasks.build().train
    answers = [f"<answer>{task.problem(i).answer}</answer>" for i in range(1, 5)]
    texts = ["die", *answers, "", "no answer", "hang"]
    completions = [Completion(task.problem(i), text, len(text)) for i, text in enumerate(texts)]
    (tmp_path / "faulty.py").write_text(FAULTY_REWARD)
    terms = {"correct": 1.0, f"{tmp_path / 'faulty.py'}:score": 0.01}
    config = replace(CONFIG, num_engines=1, reward_workers=2, reward_timeout_s=30.0)
    with RayCluster(config, TrainerConfig(model=model), EngineConfig(model=model), 0, 1) as cluster:
        rewards = cluster.rewards
        assert rewards.build(terms, task)(completions[1:7]) == LocalRewards().build(terms, task)(completions[1:7])
        assert rewards.num_replaced == 0
        scores = rewards.build(terms, task)(completions)  # the first worker dies, the second hangs
        assert rewards.num_replaced == 2
        assert scores == LocalRewards().build(terms, task)(completions)
        assert scores[:2] == [0.07, 1.0 + len(answers[0]) / 100]
        with pytest.raises(ValueError, match="no reward 'none'"):
            rewards.build({"none": 1.0}, task)


@pytest.mark.parametrize("stage", ["joining", "sending"])
def test_a_trainer_that_is_killed_at_a_publish_leaves_the_old_version_serving(model, stage, monkeypatch):
    monkeypatch.setattr(remote_trainer, "TrainerActor", fragile_trainer(stage))
    config = replace(CONFIG, publish_timeout_s=10.0)
    prompts, params = [[5, 6, 7], [9, 8]], SamplingParams(max_tokens=10, seed=3, ignore_eos=True)
    with RayCluster(config, TrainerConfig(model=model), EngineConfig(model=model), 0, 1) as cluster:
        before = cluster.engine.generate(prompts, params)
        started = time.monotonic()
        with pytest.raises(RuntimeError, match="the trainer's process died; resume"):
            cluster.publish(version=1)
        assert time.monotonic() - started < 30.0
        after = cluster.engine.generate(prompts, params)
        assert [(o.token_ids, o.logprobs) for o in before] == [(o.token_ids, o.logprobs) for o in after]
        assert {version for o in after for version in o.weight_versions} == {0}
        assert cluster.engine.num_replaced == 0


def test_engines_that_never_get_a_version_are_replaced(model, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_engines, "EngineActor", broken_engine(tmp_path, number=2))
    config = replace(CONFIG, publish_timeout_s=6.0)
    with RayCluster(config, TrainerConfig(model=model), EngineConfig(model=model), 0, 1) as cluster:
        cluster.publish(version=1)
        assert cluster.engine.num_replaced == 2
        assert [ray.get(actor.identity.remote())["version"] for actor in cluster.engine.actors] == [1, 1]
