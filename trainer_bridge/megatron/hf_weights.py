"""HF directories and the trained model: its configuration, its first weights, and exports."""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from lockstep.engine.checkpoints.checkpoint import check_weights, iterate_weights
from lockstep.engine.checkpoints.export import save_hf
from lockstep.engine.models.config import ModelConfig, as_scalar_model, load_model_config, read_config_json
from lockstep.engine.weights.dummy_weights import fill_dummy
from lockstep.trainer_bridge.config import TrainerConfig
from lockstep.trainer_bridge.megatron.layout import local_parts
from lockstep.trainer_bridge.megatron.trained_model import HEAD, TrainedModel


def trained_model_config(config: TrainerConfig) -> ModelConfig:
    """Of the model in `config.model`, with the head that is trained.

    Raises ValueError for a directory that cannot be read, or with a scalar head where a language model is wanted.
    """
    held = load_model_config(config.model)
    if config.load_format == "auto":
        check_weights(config.model, held)
    if config.head == "scalar":
        return held.with_scalar_head()
    if held.head == "scalar":
        raise ValueError(f'{config.model} has a scalar head: TrainerConfig.head must be "scalar"')
    return held


@torch.no_grad()
def import_weights(config: TrainerConfig, model: TrainedModel) -> None:
    """Fills the parameters from the directory `config.model`, or with random numbers (load_format "dummy")."""
    if config.load_format == "dummy":
        whole = _dummy_weights(model, config.seed)
    else:
        held = load_model_config(config.model)
        whole = iterate_weights(config.model, held)
        if held.head != model.config.head:
            whole = _with_new_head(whole, model.config.hidden_size)
    for parameter, part in local_parts(model.layout, whole):
        model.weight(parameter).copy_(part)
    model.refresh_tied_copy()


def export_hf(config: TrainerConfig, model: TrainedModel, path: str | Path) -> None:
    """See MegatronTrainer.export_hf."""
    if dist.get_rank() == 0:
        source = Path(config.model)
        source_config = read_config_json(source)
        if config.head == "scalar":
            source_config = as_scalar_model(source_config)
        save_hf(path, source_config, model.whole_weights(), model.config, source_dir=source)
    else:
        for _ in model.whole_weights():  # every rank sends its parts
            pass
    if model.ranks.world is not None:
        dist.barrier()


def _with_new_head(whole: Iterator[tuple[str, torch.Tensor]], hidden_size: int) -> Iterator[tuple[str, torch.Tensor]]:
    """A language model's weights with a scalar head of zeros."""
    yield from ((name, tensor) for name, tensor in whole if name != HEAD)
    yield HEAD, torch.zeros(1, hidden_size, dtype=torch.float32, device="cpu")


def _dummy_weights(model: TrainedModel, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    for parameter in model.layout:
        dtype = model.weight(parameter).dtype  # not always the trainer's: see the router's bias
        whole = torch.empty(parameter.shard.whole_shape, dtype=dtype, device=model.device)
        fill_dummy(parameter.name, whole, seed)
        yield parameter.name, whole
