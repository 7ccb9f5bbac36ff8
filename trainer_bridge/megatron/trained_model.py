"""This rank's part of the trained model: its model chunks, and their parameters by their names in the whole model."""

from collections.abc import Iterator

import torch
import torch.distributed as dist

from lockstep.engine.models.config import ModelConfig
from lockstep.engine.models.layers.linear import format_named
from lockstep.engine.models.names import head_matrix_shapes
from lockstep.engine.models.sharding import product_shapes
from lockstep.kernels import numerics
from lockstep.trainer_bridge.config import TrainerConfig
from lockstep.trainer_bridge.megatron.layout import LocalParameter, check_sizes, local_layout, shard_of, whole_tensors
from lockstep.trainer_bridge.megatron.megatron_setup import initialize_megatron
from lockstep.trainer_bridge.megatron.model import LockstepGPTModel
from lockstep.trainer_bridge.megatron.parallel import Ranks

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


class TrainedModel:
    """The model chunks of this process, without weights at first (see hf_weights.import_weights).

    chunks: one module for each virtual pipeline stage of this rank. layout: which part of which parameter they hold.
    parameters: name in the whole model -> the live parameter. Raises ValueError for impossible sizes or formats.
    """

    def __init__(self, config: TrainerConfig, model: ModelConfig, device: torch.device):
        self.config, self.device, self.dtype = model, device, getattr(torch, config.dtype)
        self.ranks = self._join_ranks(config)
        self._prepare_kernels()
        sizes = self.ranks.sizes
        linear_format = format_named(config.linear_format, "TrainerConfig.linear_format", sizes.tensor)
        self.chunks = [
            LockstepGPTModel(model, device, self.dtype, self.ranks, chunk, config.recompute, linear_format)
            for chunk in range(sizes.virtual_pipeline)
        ]
        self.layout = local_layout(model, sizes, dist.get_rank())
        self.parameters = {
            parameter.name: self.chunks[parameter.chunk].get_parameter(parameter.module_name)
            for parameter in self.layout
        }

    def _join_ranks(self, config: TrainerConfig) -> Ranks:
        tensor, pipeline = config.tensor_parallel_size, config.pipeline_parallel_size
        initialize_megatron(self.device, tensor, pipeline, config.rank_timeout_s)
        sizes = config.parallel_sizes(dist.get_world_size())
        check_sizes(sizes, self.config)
        return Ranks.of_this_process(sizes)

    def _prepare_kernels(self) -> None:
        numerics.set_up(self.device)
        sizes = self.ranks.sizes
        shapes = product_shapes(self.config, shard_of(sizes, self.ranks.tensor.rank), sizes.row_parallel_splits)
        numerics.check_row_contract(self.device, self.dtype, shapes, head_matrix_shapes(self.config))
        if self.config.head == "scalar":
            numerics.check_row_contract(self.device, torch.float32, {(1, self.config.hidden_size)})

    def weight(self, parameter: LocalParameter) -> torch.Tensor:
        """The live tensor of a parameter of `layout`."""
        return self.parameters[parameter.name].detach()

    def whole_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See MegatronTrainer.whole_weights."""
        yield from whole_tensors(self.config, self.ranks, self.weight, self.dtype, self.device)

    def check_length(self, num_tokens: int) -> None:
        """Raises ValueError for a sequence that is longer than the model's positions."""
        limit = self.config.max_position_embeddings
        if num_tokens > limit:
            raise ValueError(f"a sequence has {num_tokens} tokens, the model has {limit} positions")

    def refresh_tied_copy(self) -> None:
        """Gives the last stage the first one's embedding, where they are tied and on different ranks."""
        tied_copy = self.chunks[-1].tied_copy
        embedding = self.parameters.get(EMBEDDING)
        self.copy_tied(
            None if embedding is None else embedding.detach(), None if tied_copy is None else tied_copy.detach()
        )

    def copy_tied(self, embedding: torch.Tensor | None, head: torch.Tensor | None) -> None:
        """Sends `embedding` from the first stage into `head` of the last one. All pipeline ranks call this."""
        stages = self.ranks.pipeline
        if stages.group is None or not self.config.tie_word_embeddings:
            return
        if stages.rank == 0:
            dist.send(embedding, stages.global_rank(stages.size - 1), group=stages.group)
        elif stages.rank == stages.size - 1:
            dist.recv(head, stages.global_rank(0), group=stages.group)
