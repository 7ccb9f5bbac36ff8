"""The cluster that a config asks for."""

from __future__ import annotations

from lockstep.engine import EngineConfig
from lockstep.recipes.cluster.config import ClusterConfig
from lockstep.recipes.cluster.local import LocalCluster
from lockstep.trainer_bridge import TrainerConfig


def open_cluster(
    config: ClusterConfig, trainer: TrainerConfig, engine: EngineConfig, seed: int, num_threads: int | None
):
    """What LocalCluster is, in this process or as Ray's actors."""
    if config.kind == "local":
        return LocalCluster(trainer, engine)
    try:
        from lockstep.recipes.cluster.ray_cluster import RayCluster  # ray is an optional dependency
    except ImportError as error:
        raise ValueError(f"cluster=ray needs the package ray: pip install 'lockstep-rl[ray]' ({error})") from error
    return RayCluster(config, trainer, engine, seed, num_threads)
