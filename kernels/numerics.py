"""What a process must set, once and before its first matrix product, for the row contract to hold."""

import os
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from lockstep.kernels.linear.head_linear import head_linear
from lockstep.kernels.linear.linear import linear
from lockstep.kernels.linear.linear_silu_mul import linear_silu_mul
from lockstep.kernels.linear.silu_mul import silu_mul

# (N, K) of weights, small enough that the check costs milliseconds.
_CPU_SHAPES = ((384, 128), (128, 384), (260, 100), (1000, 256))
_CUDA_SHAPES = ((1024, 3072), (4096, 4096), (128, 4096), (20480, 1024))
# On a GPU enough for every tile that `linear_decode` chooses by the number of columns, ...
_CHECK_COLUMNS = {"cpu": 4096, "cuda": 20480}
# ... and for both sides of every border at which `linear` chooses another kernel by the number of rows.
_CHECK_BATCHES = {
    "cpu": (1, 2, 7, 16, 33, 64, 130),
    "cuda": (1, 2, 7, 16, 17, 32, 33, 64, 65, 130, 256, 257, 512, 2048),
}
_CHECK_ROWS = {"cpu": 288, "cuda": 2100}


def usable_device(name: str) -> torch.device:
    """The device of this name. ValueError: it is none of "cpu", "cuda" and "cuda:NUMBER", or this machine lacks it."""
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or not (number.isdecimal() or name == kind):
        raise ValueError(f'device must be "cpu", "cuda" or "cuda:NUMBER", got {name!r}')
    if kind == "cuda" and (torch.version.cuda is None or not torch.cuda.is_available()):
        built = "torch sees none (nvidia-smi lists those that the driver has; CUDA_VISIBLE_DEVICES may hide them)"
        if torch.version.cuda is None:
            built = f"torch {torch.__version__} is built for CPUs"
        raise ValueError(f"device={name} needs an NVIDIA GPU, and {built}; on a CPU: device=cpu dtype=float32")
    if kind == "cuda" and number and int(number) >= torch.cuda.device_count():
        raise ValueError(f"device={name}: there are {torch.cuda.device_count()} GPUs here, counted from 0")
    return torch.device(name)


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
    device: str | torch.device,
    dtype: torch.dtype,
    shapes: Iterable[tuple[int, int]] | None = None,
    head_shapes: Iterable[tuple[int, int]] = (),
) -> None:
    """Compares `linear` on rows alone, in small batches and in one large batch, to the bit.

    On a GPU also within a captured graph, where it chooses other kernels, and `linear_silu_mul` in the same way.

    shapes: (N, K) of the weights to try, best a model's own (of a very large N only so much is tried). Default: a few
    small ones. head_shapes: (N, K) of each head's weight for `head_linear`, of which two heads are tried, in either
    memory layout. Raises RuntimeError that names the shape and what to do.
    """
    device = torch.device(device)
    if shapes is None:
        shapes = _CUDA_SHAPES if device.type == "cuda" else _CPU_SHAPES
    generator = torch.Generator(device).manual_seed(0)
    random = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    with torch.no_grad():
        for n, k in sorted({(min(n, _CHECK_COLUMNS[device.type]), k) for n, k in shapes}):
            x = random(_CHECK_ROWS[device.type], k)
            weight = random(n, k) / k**0.5
            together = linear(x, weight)
            _check_rows(linear, x, weight, together)
            if x.is_cuda and n % 2 == 0:
                _check_rows(linear_silu_mul, x, weight, silu_mul(together))
        for n, k in sorted(head_shapes):
            x = random(_CHECK_ROWS[device.type], 2, k)
            for weight in (random(2, n, k) / k**0.5, (random(2, k, n) / k**0.5).mT):
                _check_rows(head_linear, x, weight, head_linear(x, weight))


def check_split_contract(
    device: str | torch.device, dtype: torch.dtype, weights: Iterable[tuple[tuple[int, int], int]], parts: int
) -> None:
    """Compares `linear` with a weight and with each of its `parts` parts, as ranks hold them, to the bit.

    weights: ((N, K), the dimension that is split); of N only so much is tried. Raises RuntimeError
    that names the shape.
    """
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for (n, k), dim in sorted({((min(n, _CHECK_COLUMNS[device.type]), k), dim) for (n, k), dim in weights}):
            x = torch.randn(64, k, generator=generator, device=device, dtype=dtype)
            weight = torch.randn(n, k, generator=generator, device=device, dtype=dtype) / k**0.5
            if dim == 0:
                together = linear(x, weight).split(-(-n // parts), dim=1)
                apart = [linear(x, part.clone()) for part in weight.split(-(-n // parts))]
            else:
                xs, parts_of_weight = x.split(k // parts, dim=1), weight.split(k // parts, dim=1)
                together = map(linear, xs, parts_of_weight)
                apart = [linear(a.contiguous(), b.contiguous()) for a, b in zip(xs, parts_of_weight, strict=True)]
            if not all(map(torch.equal, together, apart)):
                raise RuntimeError(
                    f"linear on {device} in {dtype} gives other bits with one of {parts} parts of a weight {[n, k]}, "
                    f"cut along dimension {dim}, than with all of it. {_REMEDY[device.type]}"
                )


def _check_rows(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, together: Tensor) -> None:
    batches = [slice(3 * i, 3 * i + size) for i, size in enumerate(_CHECK_BATCHES[x.device.type])]

    def outputs() -> list[Tensor]:
        return [function(x[rows], weight) for rows in batches]

    for run in (outputs, lambda: _in_graph(outputs)) if x.is_cuda else (outputs,):
        for rows, alone in zip(batches, run(), strict=True):
            if not torch.equal(alone, together[rows]):
                raise RuntimeError(
                    f"{function.__name__} on {x.device} in {x.dtype} gives a row other bits in a batch of {len(alone)} "
                    f"than in one of {len(x)}, weight {list(weight.shape)}. {_REMEDY[x.device.type]}"
                )


def _in_graph(function: Callable[[], list[Tensor]]) -> list[Tensor]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    graph.replay()
    torch.cuda.synchronize()
    return outputs


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
