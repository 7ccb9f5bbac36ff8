"""cluster=ray: the same run on actors, also when an engine is killed in the middle."""

import os
import signal
import threading
import time
from dataclasses import replace

import pytest
from models import make_hf_model

from lockstep.engine import Engine, EngineConfig, SamplingParams
from lockstep.recipes.cluster.config import ClusterConfig
from lockstep.trainer_bridge import MegatronTrainer, TrainerConfig

ray = pytest.importorskip("ray")
from lockstep.recipes.cluster.ray_cluster import RayCluster  # noqa: E402

CONFIG = ClusterConfig(kind="ray", num_engines=2, stall_timeout_s=60.0, publish_timeout_s=60.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_hf_model(path, "qwen3", seed=1)
    return str(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "local", "num_engines": 2}, "num_engines=2 needs cluster.kind=ray"),
        ({"transport": "disk"}, "needs cluster.transport_directory"),
        ({"num_engines": 0}, "at least 1"),
        ({"trainer_ranks": 0}, "at least 1"),
        ({"trainer_ranks": 3, "colocate": True}, "trainer_ranks=3 is more than num_engines=2"),
        ({"engine_gpus": 0.5, "colocate": True}, "needs cluster.transport=cuda_ipc"),
        ({"stall_timeout_s": 0.0}, "stall_timeout_s must be positive"),
    ],
)
def test_impossible_clusters_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


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
        make_hf_model(other, "qwen3", seed=2)
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
        threading.Thread(target=lambda: (time.sleep(0.3), os.kill(victim, signal.SIGKILL))).start()
        outputs = cluster.engine.generate(prompts, slow)
        equal(outputs, engine.generate(prompts, slow))
        assert cluster.engine.num_replaced == 1
        # And one that dies between two calls is noticed by the next publish.
        os.kill(ray.get(cluster.engine.actors[1].identity.remote())["pid"], signal.SIGKILL)
        cluster.publish(version=2)
        engine.update_weights(local.named_weights(), version=2)
        equal(cluster.engine.generate(prompts, params), engine.generate(prompts, params))
        assert cluster.engine.num_replaced == 2
