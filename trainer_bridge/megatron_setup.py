"""Megatron-core's process-wide state: the distributed backend and the parallel groups.

With our own layer spec, no RNG use, and our own writer for checkpoints (checkpoint.py), megatron-core 0.16.1 needs no
patch to run on a machine without CUDA.
"""

import warnings

import torch
import torch.distributed as dist

with warnings.catch_warnings():
    # Megatron-core warns that these are missing when it is imported; what they would do runs in lockstep.kernels.
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*")
    import megatron.core.models.gpt
    import megatron.core.optimizer  # noqa: F401
    from megatron.core import parallel_state


def initialize_megatron(
    device: torch.device, tensor_model_parallel_size: int = 1, pipeline_model_parallel_size: int = 1
) -> None:
    """Makes torch.distributed and Megatron's parallel groups ready. Does nothing where they are.

    Under torchrun the process joins the job's group. Otherwise it is a world of one on an in-process store, which
    takes no port.

    Raises RuntimeError when Megatron was initialized before with other parallel sizes.
    """
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if dist.is_torchelastic_launched():
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    wanted = (tensor_model_parallel_size, pipeline_model_parallel_size)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(*wanted)
    present = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    if present != wanted:
        raise RuntimeError(f"Megatron has (tensor, pipeline) parallel sizes {present} in this process, wanted {wanted}")
