"""Megatron distributed checkpoints (format "torch_dist"), each written whole or not at all."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.validation import StrictHandling

from lockstep.engine.files import flush_to_disk


class InProcessSave(TorchDistSaveShardedStrategy):
    """Writes the same files as Megatron's strategy, from this process.

    Megatron's own starts a queue server with `spawn`, which imports the main program again (6 to 9 s, and a main
    module without a guard runs twice), forks writers from a process that has threads, and needs CUDA.
    """

    def __init__(self):
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> None:
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(by_key, is_loading=False),
            storage_writer=torch_checkpoint.FileSystemWriter(checkpoint_dir),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def save_checkpoint(path: str | Path, tensors: ShardedStateDict, common: dict[str, Any]) -> None:
    """Writes a checkpoint to a hidden sibling of `path` and renames it, so `path` is complete where it exists.

    tensors: Megatron sharded tensors, nested in dicts. common: plain values, the same on all ranks.
    Raises FileExistsError where `path` is.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"checkpoint {path} exists")
    unfinished = path.with_name(f".{path.name}.unfinished")
    if dist.get_rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save({**tensors, "common": common}, str(unfinished), sharded_strategy=InProcessSave())
    dist.barrier()
    if dist.get_rank() == 0:
        unfinished.rename(path)
        flush_to_disk(path.parent)
    dist.barrier()


def read_common(path: str | Path) -> dict[str, Any]:
    """The plain values of a checkpoint. Raises FileNotFoundError where there is none."""
    if not dist_checkpointing.check_is_distributed_checkpoint(str(path)):
        raise FileNotFoundError(f"no checkpoint in {path}")
    return dist_checkpointing.load_common_state_dict(str(path))["common"]


def load_tensors(path: str | Path, tensors: ShardedStateDict) -> dict[str, Any]:
    """Reads the tensors that `tensors` describes and returns them in the same nesting.

    The described tensors may be written on the way. Raises an error that names the tensors which only one side has, or
    which have another shape.
    """
    with torch.no_grad(), warnings.catch_warnings():
        # megatron-core 0.16.1 still calls what torch 2.13 names deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        return dist_checkpointing.load(tensors, str(path), strict=StrictHandling.RAISE_ALL)
