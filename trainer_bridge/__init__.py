"""The trainer: Megatron-core on the engine's kernels, losses, packing, checkpoints, and publishing weights.

The names below are imported at their first use: an engine's process, which takes weights through `transports`, has no
need of Megatron-core and its seconds of importing.
"""

import lockstep.kernels  # noqa: F401  it sets the mode of MKL, which must come before the first matrix product
from lockstep.lazy_names import lazy_names

_HOMES = {
    "MegatronTrainer": "trainer",
    "TrainerConfig": "config",
    "initialize_megatron": "megatron.megatron_setup",
    "publish": "transports.in_process",
    "share_weights": "transports.in_process",
}
__all__ = list(_HOMES)
__getattr__ = lazy_names(__name__, _HOMES)
