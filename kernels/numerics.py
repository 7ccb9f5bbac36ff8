"""What a process must set, once and before its first matrix product, for the row contract to hold."""

import os
from collections.abc import Iterable

import torch

from lockstep.kernels.linear import linear

# (N, K) of weights, small enough that the check costs milliseconds.
_CPU_SHAPES = ((384, 128), (128, 384), (260, 100), (1000, 256))
_CUDA_SHAPES = ((1024, 3072), (4096, 4096), (128, 4096))
_CHECK_ROWS = 288
_CHECK_COLUMNS = 4096
_CHECK_BATCHES = (1, 2, 7, 16, 33, 64, 130)


def set_up(device: str | torch.device) -> None:
    """Makes `linear` keep the row contract on `device` ("cpu" or "cuda"). May be called again.

    Call it before the process's first matrix product: the libraries read these settings once.

    CPU: nothing is left to do, since importing lockstep.kernels has set MKL_CBWR.
    CUDA: cuBLASLt without a workspace, and so without split-K, no reduced-precision reductions, no TF32. Raises
    RuntimeError where CUBLASLT_WORKSPACE_SIZE or CUBLAS_WORKSPACE_CONFIG hold other values, or where cuBLAS already
    owns a workspace in this process (seen by freeing it: a few MiB of the allocator's memory go).
    """
    torch.set_float32_matmul_precision("highest")
    if torch.device(device).type == "cuda":
        _set_up_cublas()


def check_row_contract(
    device: str | torch.device, dtype: torch.dtype, shapes: Iterable[tuple[int, int]] | None = None
) -> None:
    """Compares `linear` on rows alone, in small batches and in one large batch, to the bit.

    shapes: (N, K) of the weights to try, best a model's own (of more than 4096 rows, only so many are tried). Default:
    a few small ones. Raises RuntimeError that names the shape and what to do.
    """
    device = torch.device(device)
    if shapes is None:
        shapes = _CUDA_SHAPES if device.type == "cuda" else _CPU_SHAPES
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for n, k in sorted({(min(n, _CHECK_COLUMNS), k) for n, k in shapes}):
            x = torch.randn(_CHECK_ROWS, k, generator=generator).to(device, dtype)
            weight = (torch.randn(n, k, generator=generator) / k**0.5).to(device, dtype)
            together = linear(x, weight)
            for batch, start in ((batch, 3 * i) for i, batch in enumerate(_CHECK_BATCHES)):
                if not torch.equal(linear(x[start : start + batch], weight), together[start : start + batch]):
                    raise RuntimeError(
                        f"linear on {device} in {dtype} gives a row other bits in a batch of {batch} than in one of "
                        f"{_CHECK_ROWS}, weight [{n}, {k}]. {_REMEDY[device.type]}"
                    )


_REMEDY = {
    "cpu": "Import lockstep before the process's first matrix product, or start the process with MKL_CBWR=AUTO,STRICT "
    "in its environment.",
    "cuda": "Call lockstep.kernels.numerics.set_up before the process's first matrix product, or start the process "
    "with CUBLASLT_WORKSPACE_SIZE=1 CUBLAS_WORKSPACE_CONFIG=:16:8 in its environment.",
}


def _set_up_cublas() -> None:
    # A cuBLASLt workspace of 1 KiB leaves no room for split-K; 0 makes cuBLASLt fail.
    environment = {"CUBLASLT_WORKSPACE_SIZE": "1", "CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    for name, value in environment.items():
        if os.environ.get(name, value) != value:
            raise RuntimeError(f"{name} is {os.environ[name]!r} but must be {value!r}: unset it")
    if any(name not in os.environ for name in environment) and _cublas_owns_workspace():
        raise RuntimeError(f"cuBLAS was used before set_up. {_REMEDY['cuda']}")
    os.environ.update(environment)
    torch.backends.cuda.preferred_blas_library("cublaslt")
    # (no reduced precision, no split-K) since torch 2.10
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = (False, False)
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = (False, False)


def _cublas_owns_workspace() -> bool:
    if not torch.cuda.is_initialized():
        return False
    before = torch.cuda.memory_allocated()
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated() < before
