"""The inference engine. See docs/design.md for the promises; `Engine` is the public class.

The names below are imported at their first use: a config need not wait for torch.
"""

import lockstep.kernels  # noqa: F401  it sets the mode of MKL, which must come before the first matrix product
from lockstep.lazy_names import lazy_names

_HOMES = {
    "Engine": "engine",
    "EngineConfig": "config",
    "Generator": "generator",
    "ReplicatedEngine": "replicated_engine",
    "RequestOutput": "request",
    "SamplingParams": "request",
    "TokenEvent": "generator",
}
__all__ = list(_HOMES)
__getattr__ = lazy_names(__name__, _HOMES)
