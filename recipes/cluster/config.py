"""Where a run's trainer and engines live."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from lockstep.engine import EngineConfig
from lockstep.engine.choices import OneOf
from lockstep.engine.fields.field_types import Count, NotNegative, Seconds, Size, Text, check_fields
from lockstep.trainer_bridge import TrainerConfig


@dataclass(frozen=True)
class ClusterConfig:
    """The same run, with the same results, on other processes and machines. ClusterConfig(kind="ray", ...) is a
    RayClusterConfig.

    kind: "local", one engine and the trainer in this process; or "ray", each an actor of a Ray cluster.
    """

    kind: Literal["local", "ray"] = "local"

    def __new__(cls, *arguments: Any, **options: Any) -> ClusterConfig:
        return CLUSTER_CONFIGS.new(cls, arguments, options)

    def __post_init__(self):
        check_fields(self, "cluster")


@dataclass(frozen=True)
class LocalClusterConfig(ClusterConfig):
    """No options: it is this process."""

    num_engines: ClassVar[int] = 1
    trainer_ranks: ClassVar[int] = 1
    address: ClassVar[str | None] = None


@dataclass(frozen=True)
class RayClusterConfig(ClusterConfig):
    """address: of a running cluster ("auto": the one this machine belongs to); null starts one on this machine.
    num_engines: the requests of a step are balanced over so many engines.
    trainer_ranks: processes of the trainer; what trainer.tensor_parallel_size and pipeline_parallel_size leave over
        are data parallel.
    transport: how weights travel: "distributed" (NCCL between GPUs, gloo between CPUs), "cuda_ipc" (between processes
        that share a GPU, or a machine's memory) or "disk" (through `transport_directory`, which all machines share).
    engine_cpus, engine_gpus, trainer_cpus, trainer_gpus: what an engine and what a rank of the trainer reserve;
        fractions share. An engine of engine.tp_size > 1 needs as many GPUs.
    reward_workers: actors that compute rewards, each with reward_cpus and reward_gpus (for reward models and judges); a
        reward must then not depend on which completions it scores together. 0: rewards are computed by the driver.
    teacher_engines: engines that score for algorithm.name=distillation; each reserves what an engine does.
    colocate: rank r of the trainer shares the reservation of engine r, and the engines give back the memory of their KV
        cache while it trains.
    start_timeout_s: until an actor is ready. step_timeout_s: of one call of the trainer. publish_timeout_s: of a weight
        update. stall_timeout_s: an engine that makes no step for so long is replaced; reward_timeout_s: and a reward
        worker that gives no scores for so long.
    max_replacements: engines that may be replaced in a run, and reward workers.
    """

    address: Text | None = None
    num_engines: Size = 1
    trainer_ranks: Size = 1
    transport: Literal["distributed", "cuda_ipc", "disk"] = "distributed"
    transport_directory: Text | None = None
    engine_cpus: NotNegative = 0.5
    engine_gpus: NotNegative = 0.0
    trainer_cpus: NotNegative = 0.5
    trainer_gpus: NotNegative = 0.0
    reward_workers: Count = 0
    reward_cpus: NotNegative = 0.5
    reward_gpus: NotNegative = 0.0
    teacher_engines: Count = 0
    colocate: bool = False
    start_timeout_s: Seconds = 300.0
    step_timeout_s: Seconds = 3600.0
    stall_timeout_s: Seconds = 120.0
    publish_timeout_s: Seconds = 120.0
    reward_timeout_s: Seconds = 600.0
    max_replacements: Count = 10

    def __post_init__(self):
        super().__post_init__()
        if self.transport == "disk" and self.transport_directory is None:
            raise ValueError("cluster.transport=disk needs cluster.transport_directory, which all machines share")
        if self.colocate and self.trainer_ranks > self.num_engines:
            raise ValueError(
                f"cluster.colocate puts rank r of the trainer beside engine r: trainer_ranks={self.trainer_ranks} is "
                f"more than num_engines={self.num_engines}"
            )
        if self.colocate and self.engine_gpus and self.transport == "distributed":
            raise ValueError(
                "NCCL takes one process per GPU: cluster.colocate with GPUs needs cluster.transport=cuda_ipc"
            )

    def trainer_bundles(self) -> list[int]:
        """The number of the reservation of each of the trainer's ranks; engine i has number i."""
        first = 0 if self.colocate else self.num_engines
        return list(range(first, first + self.trainer_ranks))

    def reward_bundles(self) -> list[int]:
        """Of each reward worker."""
        first = self._behind_the_trainer()
        return list(range(first, first + self.reward_workers))

    def teacher_bundles(self) -> list[int]:
        """Of each teacher."""
        first = self._behind_the_trainer() + self.reward_workers
        return list(range(first, first + self.teacher_engines))

    def _behind_the_trainer(self) -> int:
        """The first reservation that neither an engine nor a rank of the trainer has."""
        return max(self.num_engines, 1 + self.trainer_bundles()[-1])


CLUSTER_CONFIGS = OneOf(
    ClusterConfig,
    "cluster",
    "kind",
    {"local": LocalClusterConfig, "ray": RayClusterConfig},
    unknown="no cluster.kind",
)
AnyCluster = Annotated[ClusterConfig, CLUSTER_CONFIGS]


def check_cluster(config: RayClusterConfig, trainer: TrainerConfig, engine: EngineConfig) -> None:
    """Raises ValueError for a trainer or an engine that a Ray cluster of this config cannot hold."""
    model_ranks = trainer.tensor_parallel_size * trainer.pipeline_parallel_size
    if config.trainer_ranks % model_ranks:
        raise ValueError(
            f"cluster.trainer_ranks={config.trainer_ranks} is no multiple of trainer.tensor_parallel_size * "
            f"trainer.pipeline_parallel_size = {model_ranks}"
        )
    if engine.device.startswith("cuda") and 1 < engine.tp_size > config.engine_gpus:
        raise ValueError(f"engine.tp_size={engine.tp_size} needs cluster.engine_gpus={engine.tp_size}")
    if config.colocate and engine.tp_size > 1:
        raise ValueError("cluster.colocate needs engine.tp_size=1: an engine of several ranks keeps its KV cache")
