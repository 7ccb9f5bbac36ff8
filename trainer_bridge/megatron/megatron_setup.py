"""Megatron-core's process-wide state: the distributed backend and the parallel groups.

With our own layer spec, no RNG use, and our own writer for checkpoints (checkpoint.py), megatron-core 0.16.1 needs no
patch to run on a machine without CUDA.
"""

import math
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist

with warnings.catch_warnings():
    # Megatron-core warns that these are missing when it is imported; what they would do runs in lockstep.kernels.
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*")
    import megatron.core.models.gpt
    import megatron.core.optimizer  # noqa: F401
    from megatron.core import parallel_state


def initialize_megatron(
    device: torch.device,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    timeout_s: float = 600.0,
) -> None:
    """Makes torch.distributed and Megatron's parallel groups ready. Does nothing where they are.

    Under torchrun the process joins the job's group, and "cuda" is the GPU of its local rank. Otherwise it is a world
    of one on an in-process store, which takes no port. The ranks that are left over make data-parallel copies.
    timeout_s: how long a rank waits for another before it raises; Megatron's own groups round it up to minutes.

    Raises ValueError when the sizes do not divide the world, and RuntimeError when Megatron was initialized before with
    other parallel sizes.
    """
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if dist.is_torchelastic_launched():
            if device.type == "cuda" and device.index is None:
                torch.cuda.set_device(dist.get_node_local_rank())
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    model_ranks, world_size = tensor_model_parallel_size * pipeline_model_parallel_size, dist.get_world_size()
    if world_size % model_ranks:
        raise ValueError(
            f"the world has {world_size} ranks, which tensor_parallel_size {tensor_model_parallel_size} * "
            f"pipeline_parallel_size {pipeline_model_parallel_size} = {model_ranks} does not divide"
        )
    wanted = (tensor_model_parallel_size, pipeline_model_parallel_size)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(*wanted, distributed_timeout_minutes=math.ceil(timeout_s / 60))
    present = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    if present != wanted:
        raise RuntimeError(f"Megatron has (tensor, pipeline) parallel sizes {present} in this process, wanted {wanted}")
