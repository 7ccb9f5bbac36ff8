"""The reference model of a KL penalty: other weights that stand in for the trained ones."""

from functools import cached_property

import torch

from lockstep.engine.checkpoints.checkpoint import iterate_weights
from lockstep.engine.models.config import load_model_config
from lockstep.trainer_bridge.megatron.layout import local_parts
from lockstep.trainer_bridge.megatron.trained_model import EMBEDDING, HEAD, TrainedModel

ReferenceWeights = list[dict[str, torch.Tensor]]  # per chunk, tensors by the names of its parameters


class ReferenceModel:
    """The weights of the HF directory `path`, for the modules of the trained model."""

    def __init__(self, path: str, model: TrainedModel):
        self._path, self._model = path, model

    @cached_property
    def weights(self) -> ReferenceWeights:
        """Read at the first use, and kept.

        All ranks take them together. Raises ValueError for a model of another shape.
        """
        model = self._model
        if (config := load_model_config(self._path)) != model.config:
            raise ValueError(f"reference model {self._path} is {config}, the trained one {model.config}")
        weights: ReferenceWeights = [{} for _ in model.chunks]
        for parameter, part in local_parts(model.layout, iterate_weights(self._path, model.config, model.dtype)):
            weights[parameter.chunk][parameter.module_name] = part.to(model.device, copy=True)
        if (tied_copy := model.chunks[-1].tied_copy) is not None:
            weights[-1][HEAD] = torch.empty_like(tied_copy, requires_grad=False)
        model.copy_tied(weights[0].get(EMBEDDING), weights[-1].get(HEAD))
        return weights
