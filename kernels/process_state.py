"""What a process may have set for its own arithmetic, held off while Lockstep computes.

A default dtype or device cannot reach a result: every tensor here is made with its own. The rest is in this file.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

_SUBNORMAL, _ONE = np.float32(1e-39), np.float32(1)
_PRODUCTS = {"cpu": torch.backends.mkldnn.matmul, "cuda": torch.backends.cuda.matmul}


@contextmanager
def own_state(
    device: torch.device, num_threads: int | None = None, learns: bool = False, builds: bool = False
) -> Iterator[None]:
    """Within it, results on `device` are those of a process that has set nothing; what was set is back afterwards.

    Held off: autocast; fp32 products in fewer bits (`torch.set_float32_matmul_precision` and the flags behind it); on a
    CPU also the flushing of subnormal numbers to 0 in this thread (kernels' own threads never flush).
    num_threads: on a CPU, with so many of torch's threads, which are a setting of each thread of a process: some
        libraries cut the sums of small products by their number. None: with as many as there are.
    learns: and no_grad and inference_mode, for a call that takes gradients.
    builds: and inference_mode and the default device, for a call that makes a model.
    A call in a process that has set nothing costs a few microseconds.
    """
    with ExitStack() as restored:
        if torch.is_autocast_enabled(device.type):
            restored.enter_context(torch.autocast(device.type, enabled=False))
        products = _PRODUCTS[device.type]
        if (precision := products.fp32_precision) != "ieee":
            products.fp32_precision = "ieee"
            restored.callback(setattr, products, "fp32_precision", precision)
        if device.type == "cpu":
            if flushes_subnormals():
                torch.set_flush_denormal(False)
                restored.callback(torch.set_flush_denormal, True)
            if num_threads not in (None, now := torch.get_num_threads()):
                torch.set_num_threads(num_threads)
                restored.callback(torch.set_num_threads, now)
        if (learns or builds) and torch.is_inference_mode_enabled():
            restored.enter_context(torch.inference_mode(False))
        if learns and not torch.is_grad_enabled():
            restored.enter_context(torch.enable_grad())
        if builds:
            restored.enter_context(torch.device(device))
        yield


def flushes_subnormals() -> bool:
    """Whether this thread takes fp32 numbers under 2**-126 for 0."""
    return _SUBNORMAL * _ONE == 0
