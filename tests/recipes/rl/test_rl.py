"""The loop on a Ray cluster, where training and generation overlap: the bits of one process."""

from dataclasses import replace

import pytest
from short_runs import assert_same_run, stale_config

from lockstep.recipes.cluster.config import ClusterConfig
from lockstep.recipes.rl import rl

ray = pytest.importorskip("ray")
from lockstep.recipes.cluster.ray_cluster import RayCluster  # noqa: E402


def test_an_overlapped_asynchronous_run_is_the_run_of_one_process(tmp_path, monkeypatch):
    config = stale_config(tmp_path / "local")
    local = rl.run(config)
    generated_for = []
    send = RayCluster.publish

    def publish(self, version):
        generated_for.append((version, self.overlaps, self.trainer.is_ahead))
        return send(self, version)

    monkeypatch.setattr(RayCluster, "publish", publish)
    cluster = ClusterConfig(kind="ray", num_engines=2)
    results = rl.run(replace(config, runs_dir=str(tmp_path / "ray"), cluster=cluster))
    assert_same_run(tmp_path / "ray" / "short", results, (tmp_path / "local" / "short", local))
    assert generated_for == [(version, True, True) for version in range(1, config.steps + 1)]
