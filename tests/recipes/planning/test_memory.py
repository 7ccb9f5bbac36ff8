"""The arithmetic of memory against the trainer and the engine themselves."""

import functools

import pytest
import torch
from models import make_hf_model

from lockstep.engine import Engine, EngineConfig
from lockstep.engine.models.config import load_model_config
from lockstep.recipes.planning.memory import engine_memory, kv_bytes_per_token, num_parameters, trainer_memory
from lockstep.trainer_bridge import MegatronTrainer, TrainerConfig
from lockstep.trainer_bridge.algorithms.losses import grpo_loss
from lockstep.trainer_bridge.packing import TrainSequence, pack

TOKENS = 96


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("model"))
    make_hf_model(path, "qwen3", seed=1, num_hidden_layers=4, vocab_size=128)
    return path


def sizes(items) -> dict[str, int]:
    return {item.name: item.num_bytes for item in items}


def storage_bytes(tensors) -> int:
    return sum(
        storage.nbytes() for storage in {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}.values()
    )


def test_a_trainers_weights_and_optimizer_are_counted_and_its_activations_estimated(model):
    config = TrainerConfig(model=model, max_tokens_per_micro_batch=TOKENS)
    expected = sizes(trainer_memory(load_model_config(model), config, num_ranks=1))
    trainer = MegatronTrainer(config)
    parameters = [parameter for chunk in trainer.chunks for parameter in chunk.parameters()]
    assert expected["weights"] == storage_bytes(parameters)
    moments = [
        state[name]
        for optimizer in trainer.optimizers
        for state in optimizer._adamw.state.values()
        for name in ("exp_avg", "exp_avg_sq")
    ]
    assert expected["optimizer"] == storage_bytes(moments)

    saved, own = [], {parameter.untyped_storage().data_ptr() for parameter in parameters}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved.append(tensor)
        return tensor

    mask, logprobs = [False] + [True] * (TOKENS - 1), [-1.0] * (TOKENS - 1)
    batches = pack([TrainSequence(list(range(TOKENS)), mask, 1.0, logprobs)], TOKENS)
    loss = functools.partial(grpo_loss, clip_low=0.2, clip_high=0.2, kl_coefficient=0.0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.step(batches, loss)
    # An estimate: small tensors (positions, masks, the rotary table) are not in it.
    assert expected["activations"] == pytest.approx(storage_bytes(saved), rel=0.1)


def test_an_engines_weights_and_kv_are_counted(model):
    config = EngineConfig(model=model, kv_cache_tokens=640)
    shape = load_model_config(model)
    engine = Engine(config)
    items = sizes(engine_memory(shape, config, is_remote=True))
    assert items["weights"] == items["room for an update"] == storage_bytes(engine.weight_targets.values())
    assert items["weights"] == 4 * num_parameters(shape)
    assert items["KV cache"] == 640 * kv_bytes_per_token(shape, config)
    pages = [page for layer in engine.runner.target.kv_caches for page in layer]
    assert sum(page.nbytes for page in pages) == items["KV cache"]


@pytest.mark.parametrize("tensor", [1, 2])
def test_ranks_share_the_weights(model, tensor):
    shape = load_model_config(model)
    config = TrainerConfig(model=model, tensor_parallel_size=tensor, row_parallel_splits=2, gradient_splits=2)
    alone, shared = (sizes(trainer_memory(shape, config, num_ranks)) for num_ranks in (tensor, 2 * tensor))
    assert alone["weights"] == shared["weights"]  # data-parallel ranks hold the same weights,
    assert shared["optimizer"] == alone["optimizer"] // 2 * 3 // 2  # share the moments, and have pieces as masters
    whole = sizes(trainer_memory(shape, TrainerConfig(model=model), 1))["weights"]
    assert alone["weights"] == whole if tensor == 1 else 0.5 * whole < alone["weights"] < 0.6 * whole


def test_half_precision_has_fp32_masters_and_sums(model):
    config = TrainerConfig(model=model, device="cuda", dtype="bfloat16")
    shape = load_model_config(model)
    items = sizes(trainer_memory(shape, config, 1))
    count = num_parameters(shape)
    assert (items["weights"], items["gradients"], items["optimizer"]) == (2 * count, 6 * count, 12 * count)
