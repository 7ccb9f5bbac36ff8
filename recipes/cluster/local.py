"""The trainer, one engine and the rewards in this process."""

from __future__ import annotations

import logging
from typing import Any

from lockstep.engine import Engine, EngineConfig
from lockstep.rollout.rewards import LocalRewards
from lockstep.trainer_bridge import MegatronTrainer, TrainerConfig, publish

_LOG = logging.getLogger(__name__)


class LocalCluster:
    """`trainer`, `engine`, `publish` between them, `rewards`, and what an algorithm may have beside these: a critic, a
    teacher. Use as a context manager.

    overlaps: whether the trainer can make a step while the engine generates; here they share the device.
    """

    overlaps = False

    def __init__(self, trainer: TrainerConfig, engine: EngineConfig):
        _LOG.info("loading the model %s into the trainer and the engine", trainer.model)
        self.trainer = MegatronTrainer(trainer)
        self.engine = Engine(engine)
        self.rewards = LocalRewards()

    def open_critic(self, config: TrainerConfig) -> MegatronTrainer:
        return MegatronTrainer(config)

    def open_teacher(self, config: EngineConfig) -> Engine:
        return Engine(config)

    def publish(self, version: int) -> dict[str, Any]:
        return publish(self.trainer, self.engine, version)

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(self, *exception: object) -> None:
        self.engine.shutdown()
        self.rewards.close()
