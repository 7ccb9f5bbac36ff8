"""Tensor ops that keep the row contract: the bits of an output row depend on that row's inputs and the weights alone.

Import Lockstep before the process's first matrix product: MKL reads its mode at its first call, and only in its strict
mode do its sums not depend on the number of rows and threads. `numerics.check_row_contract` sees if it was too late.
"""

import importlib.util
import os

if importlib.util.find_spec("triton") is None:
    raise ImportError(
        "Lockstep needs the package triton, on machines without a GPU too: on Linux, pip install triton; it runs on no "
        "other system",
        name="triton",
    )

os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
