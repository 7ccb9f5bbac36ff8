"""The state of training: weights, the optimizer's tensors and the step, in checkpoints and as one hash."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lockstep.engine.models.sharding import ParameterShard
from lockstep.engine.weights.checksums import checksum
from lockstep.trainer_bridge.megatron.checkpoint import CheckpointFiles, named_shard, save_checkpoint
from lockstep.trainer_bridge.megatron.layout import LocalParameter, whole_tensors
from lockstep.trainer_bridge.megatron.optimizer import MasterAdamW
from lockstep.trainer_bridge.megatron.trained_model import TrainedModel


class TrainingState:
    """What a checkpoint holds of a model and of the optimizers of its chunks, step count included."""

    def __init__(self, model: TrainedModel, optimizers: Sequence[MasterAdamW]):
        self.model, self.optimizers = model, optimizers

    def save(self, path: str | Path, step_count: int, metadata: dict[str, Any]) -> None:
        """See MegatronTrainer.save."""
        common = {
            "model": asdict(self.model.config),
            "dtype": _dtype_name(self.model.dtype),
            "step_count": step_count,
            "state_hash": self.hash(),
            "metadata": metadata,
        }
        save_checkpoint(path, self._written(), common)

    @torch.no_grad()
    def load(self, files: CheckpointFiles) -> None:
        """Copies a checkpoint's tensors over the model's and the optimizers'. Raises ValueError for damaged ones."""
        for parameter in self.model.layout:
            self.model.weight(parameter).copy_(files.read(named_shard(parameter.shard, "weight")))
            optimizer, index = self._place(parameter)
            for kind in optimizer.state_names(index):
                optimizer.load_state_tensor(index, kind, files.read(named_shard(parameter.shard, kind)))
        for optimizer in self.optimizers:
            optimizer.zero_grad()
            optimizer.set_num_steps(files.common["step_count"])
        self.model.refresh_tied_copy()
        if self.hash() != files.common["state_hash"]:
            raise ValueError(
                f"checkpoint {files.path} is damaged: its tensors do not have the hash that was saved with them"
            )

    def check(self, files: CheckpointFiles) -> None:
        """Raises ValueError for a checkpoint of another model or dtype."""
        files.require(self.model.config)
        saved, own = files.common["dtype"], _dtype_name(self.model.dtype)
        if saved != own:
            raise ValueError(f"checkpoint {files.path} has dtype {saved}, the trainer {own}")

    def hash(self) -> str:
        """Of the whole model's weights and optimizer state: the same on all ranks, and for any number of them."""
        return checksum(self._whole_tensors())

    def _place(self, parameter: LocalParameter) -> tuple[MasterAdamW, int]:
        """The optimizer of a parameter, and its number there."""
        optimizer = self.optimizers[parameter.chunk]
        return optimizer, optimizer.index_of(self.model.parameters[parameter.name])

    def _written(self) -> Iterator[tuple[ParameterShard, torch.Tensor | None]]:
        """What a checkpoint holds of this rank's parts; None where another rank writes the same."""
        ranks = self.model.ranks
        for parameter in self.model.layout:
            optimizer, index = self._place(parameter)
            is_writer = ranks.data.rank == 0 and (parameter.shard.is_split or ranks.tensor.rank == 0)
            # All data-parallel ranks take part in gathering the optimizer's state.
            kinds = {kind: optimizer.state_tensor(index, kind) for kind in optimizer.state_names(index)}
            for kind, tensor in {"weight": self.model.weight(parameter), **kinds}.items():
                yield named_shard(parameter.shard, kind), tensor if is_writer else None

    def _whole_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        model = self.model
        yield from model.whole_weights()
        for kind in self.optimizers[0].state_names(0):

            def local(parameter: LocalParameter, kind: str = kind) -> torch.Tensor:
                optimizer, index = self._place(parameter)
                return optimizer.state_tensor(index, kind)

            for name, tensor in whole_tensors(model.config, model.ranks, local, torch.float32, model.device):
                yield f"{name}/{kind}", tensor


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
