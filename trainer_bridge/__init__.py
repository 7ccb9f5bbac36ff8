"""The trainer: Megatron-core on the engine's kernels, losses, packing, checkpoints, and publishing weights.

The names below are imported at their first use: an engine's process, which takes weights through `transports`, has no
need of Megatron-core and its seconds of importing.
"""

import importlib

_HOMES = {
    "MegatronTrainer": "trainer",
    "TrainerConfig": "trainer",
    "initialize_megatron": "megatron.megatron_setup",
    "publish": "transports.in_process",
    "share_weights": "transports.in_process",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
