"""The trainer: Megatron-core on the engine's kernels, losses, packing, checkpoints, and publishing weights."""

from lockstep.trainer_bridge.megatron_setup import initialize_megatron
from lockstep.trainer_bridge.publish import publish, share_weights
from lockstep.trainer_bridge.trainer import MegatronTrainer, TrainerConfig

__all__ = ["MegatronTrainer", "TrainerConfig", "initialize_megatron", "publish", "share_weights"]
