"""Layouts: each element of each parameter is held once, and parts are those that Megatron's layers expect."""

from dataclasses import replace

import pytest
import torch
from layouts import local_tensors
from models import EXPERTS, tiny_config

from lockstep.engine.models.config import parse_model_config
from lockstep.engine.models.names import expand, to_megatron
from lockstep.engine.models.sharding import slices
from lockstep.trainer_bridge.config import ParallelSizes
from lockstep.trainer_bridge.megatron.layout import check_sizes, local_layout, local_parts, trainer_layout
from lockstep.trainer_bridge.weight_plan import engine_layout, plan_transfers


def model_config(family="qwen3", **options):
    options = {**(EXPERTS if family.startswith("deepseek") else {}), **options}
    options = {"vocab_size": 132, "num_hidden_layers": 4, "num_key_value_heads": 4, **options}
    return parse_model_config({**tiny_config(family, **options).to_dict(), "model_type": family})


SIZES = [
    ParallelSizes(),
    ParallelSizes(tensor=2, row_parallel_splits=2),
    ParallelSizes(pipeline=2, virtual_pipeline=2),
    ParallelSizes(tensor=4, pipeline=2, data=2, row_parallel_splits=4, gradient_splits=2),
    ParallelSizes(tensor=2, expert=2, pipeline=2, row_parallel_splits=2),
]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3_moe", {"attention_bias": True, "num_experts": 4}),
        ("qwen3_moe", {"decoder_sparse_step": 2, "tie_word_embeddings": True, "num_experts": 4}),
        ("deepseek_v3", {}),
    ],
)
def test_every_element_is_held_once_per_data_parallel_rank(sizes, family, options):
    model = model_config(family, **options)
    counts = {entry.megatron: torch.zeros(entry.shape, dtype=torch.int64) for entry in expand(model)}
    for rank in range(sizes.tensor * sizes.data * sizes.pipeline):
        tensor_rank, data_rank, _ = sizes.coordinates(rank)
        for parameter in local_layout(model, sizes, rank):
            shard = parameter.shard
            assert shard.whole_shape == tuple(counts[parameter.name].shape)
            once = torch.zeros(shard.whole_shape, dtype=torch.int64)
            shard.copy_to_whole(once, torch.ones(shard.local_shape, dtype=torch.int64))
            assert once.sum() == torch.Size(shard.local_shape).numel()
            if data_rank == 0 and (shard.is_split or tensor_rank == 0):
                counts[parameter.name] += once
    assert all((count == 1).all() for count in counts.values())


def test_a_rank_holds_its_query_groups_and_its_gates_and_ups():
    model, sizes = model_config(), ParallelSizes(tensor=2, row_parallel_splits=2)
    entries = {entry.megatron: entry for entry in expand(model)}
    # The model that is one rank's half: half of the heads, groups and ffn columns.
    layer = model.layers[0]
    mixer = replace(layer.mixer, num_heads=2, num_kv_heads=2)
    mlp = replace(layer.mlp, ffn_hidden_size=layer.mlp.ffn_hidden_size // 2)
    half = replace(model, layers=(replace(layer, mixer=mixer, mlp=mlp),) * model.num_layers)
    half_entries = {entry.megatron: entry for entry in expand(half)}
    for name in ("decoder.layers.3.self_attention.linear_qkv.weight", "decoder.layers.3.mlp.linear_fc1.weight"):
        hf = [torch.randn(shape) for shape in entries[name].hf_shapes]
        whole = to_megatron(entries[name], hf)
        for rank in (0, 1):
            expected = to_megatron(half_entries[name], [tensor.chunk(2)[rank] for tensor in hf])
            layout = [p for p in local_layout(model, sizes, rank) if p.name == name]
            ((parameter, part),) = local_parts(layout, [(name, whole)])
            assert torch.equal(part, expected)
            again = torch.zeros_like(whole)
            parameter.shard.copy_to_whole(again, expected)
            ((_, part),) = local_parts(layout, [(name, again)])
            assert torch.equal(part, expected)


def test_layers_are_numbered_from_0_in_each_stage():
    layout = local_layout(model_config(), ParallelSizes(pipeline=2, virtual_pipeline=2), rank=1)
    placed = {(p.name, p.chunk, p.module_name) for p in layout if "input_layernorm" in p.name}
    assert placed == {
        ("decoder.layers.1.input_layernorm.weight", 0, "decoder.layers.0.input_layernorm.weight"),
        ("decoder.layers.3.input_layernorm.weight", 1, "decoder.layers.0.input_layernorm.weight"),
    }


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ({"tensor": 2}, {}, "tensor_parallel_size 2 does not divide row_parallel_splits 1"),
        ({"row_parallel_splits": 3}, {}, "row_parallel_splits must be a power of two, got 3"),
        ({"pipeline": 0}, {}, "pipeline_parallel_size must be at least 1, got 0"),
        ({"tensor": 4, "row_parallel_splits": 4}, {"num_key_value_heads": 2}, "num_key_value_heads = 2"),
        ({"tensor": 2, "row_parallel_splits": 2}, {"vocab_size": 131}, "2 does not divide the vocabulary of 131"),
        ({"row_parallel_splits": 64}, {}, "row_parallel_splits 64 does not divide intermediate_size = 96"),
        ({"pipeline": 2, "virtual_pipeline": 4}, {}, "= 8 does not divide the 4 layers"),
        ({"virtual_pipeline": 2}, {}, "virtual_pipeline_parallel_size needs pipeline_parallel_size"),
        ({"data": 2}, {}, "data-parallel size 2 does not divide gradient_splits 1"),
        ({"data": 3, "gradient_splits": 4}, {}, "data-parallel size 3 does not divide gradient_splits 4"),
        (
            {"tensor": 2, "row_parallel_splits": 2, "expert": 2},
            {},
            "expert_parallel_size=2 does not divide .* 0 experts",
        ),
        ({"expert": 2}, {"family": "qwen3_moe"}, "expert_parallel_size=2 must be 1 .* or tensor_parallel_size=1"),
        (
            {"tensor": 4, "row_parallel_splits": 4, "expert": 4},
            {"family": "qwen3_moe"},
            "expert_parallel_size=4 does not divide the model's 6 experts",
        ),
        (
            {"row_parallel_splits": 32},
            {"family": "deepseek_v3"},
            r"does not divide num_attention_heads \* v_head_dim = 80",
        ),
    ],
)
def test_impossible_sizes_are_named(sizes, options, message):
    with pytest.raises(ValueError, match=message):
        check_sizes(ParallelSizes(**sizes), model_config(**options))


TRAINERS = {
    "TP1": ParallelSizes(),
    "TP2": ParallelSizes(tensor=2, row_parallel_splits=2),
    "EP2": ParallelSizes(tensor=2, expert=2, row_parallel_splits=2),
    "PP2": ParallelSizes(pipeline=2),
    "TP2 x PP2 x DP2": ParallelSizes(tensor=2, pipeline=2, data=2, row_parallel_splits=2, gradient_splits=2),
    "PP2, 2 chunks": ParallelSizes(pipeline=2, virtual_pipeline=2),
}
# Ranks, replicas, ranks that share out the experts.
ENGINES = {"TP1": (1, 1), "TP2": (2, 1), "EP2": (2, 1, 2), "2 replicas": (1, 2), "2 replicas of TP2": (2, 2)}


@pytest.mark.parametrize("engines", ENGINES)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_plan_brings_every_engine_tensor_to_its_bits(trainer, engines):
    model = model_config("qwen3_moe", attention_bias=True, decoder_sparse_step=2)
    sources, targets = trainer_layout(model, TRAINERS[trainer]), engine_layout(model, *ENGINES[engines])
    generator = torch.Generator().manual_seed(1)
    values = {entry.megatron: torch.randn(entry.shape, generator=generator) for entry in expand(model)}
    held = {rank: local_tensors(shards, values) for rank, shards in sources.items()}
    received = {
        rank: {shard.name: torch.full(shard.local_shape, float("nan")) for shard in shards}
        for rank, shards in targets.items()
    }
    for t in plan_transfers(sources, targets):
        place = received[t.target_rank][t.name][slices(t.target)]
        assert place.isnan().all(), f"{t.name} is written twice"
        place.copy_(held[t.source_rank][t.name][slices(t.source)])
    for rank, shards in targets.items():
        for name, tensor in local_tensors(shards, values).items():
            assert torch.equal(received[rank][name], tensor), (rank, name)
