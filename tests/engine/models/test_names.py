"""The name table: to_hf inverts to_megatron bit for bit, and the layout is Megatron-core's."""

from dataclasses import replace

import pytest
import torch
import transformers
from models import EXPERTS, FAMILY_NAMES, LATENT_FAMILIES, named_like_in_files, tiny_config

from lockstep.engine.models.config import ModelConfig, parse_model_config
from lockstep.engine.models.layers.mlp import GatedMLP
from lockstep.engine.models.layers.moe import Experts
from lockstep.engine.models.layers.shard import WHOLE
from lockstep.engine.models.names import (
    Entry,
    as_stacked,
    expand,
    format_table,
    itemsizes,
    to_hf,
    to_megatron,
)
from lockstep.engine.models.sharding import product_shapes

OPTIONS = {
    "plain": {},
    "one kv head": {"num_key_value_heads": 1},
    "no grouping": {"num_key_value_heads": 4},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
}
CASES = [
    pytest.param(family, overrides, id=f"{family} {name}")
    for family in FAMILY_NAMES
    for name, overrides in OPTIONS.items()
    if (name != "biases" or family == "llama") and (name != "one kv head" or family not in LATENT_FAMILIES)
]
CASES += [
    pytest.param("qwen3", {"attention_bias": True}, id="qwen3 attention bias"),
    pytest.param("qwen3_moe", {"mlp_only_layers": [1]}, id="qwen3_moe dense layer"),
    pytest.param("qwen3_moe", {"num_experts": 1, "num_experts_per_tok": 1}, id="qwen3_moe one expert"),
]
CASES += [pytest.param(family, {"q_lora_rank": None}, id=f"{family} whole queries") for family in LATENT_FAMILIES]
CASES += [pytest.param(family, EXPERTS, id=f"{family} experts") for family in LATENT_FAMILIES]
CASES.append(pytest.param("deepseek_v2", {"mlp_bias": True}, id="deepseek_v2 mlp bias"))


def make_config(family: str, overrides: dict) -> ModelConfig:
    return parse_model_config(tiny_config(family, **overrides).to_dict())


def random_hf_tensors(entry: Entry, dtype: torch.dtype) -> list[torch.Tensor]:
    # Random bits, NaN patterns among them: a permutation must keep every one.
    width = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]
    info = torch.iinfo(width)
    return [torch.randint(info.min, info.max, shape, dtype=width).view(dtype) for shape in entry.hf_shapes]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    width = torch.int16 if a.dtype == torch.bfloat16 else torch.int32
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(width), b.contiguous().view(width))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "overrides"), CASES)
def test_round_trip(family, overrides, dtype):
    torch.manual_seed(0)
    for entry in expand(make_config(family, overrides)):
        hf_tensors = random_hf_tensors(entry, dtype)
        merged = to_megatron(entry, hf_tensors)
        assert tuple(merged.shape) == entry.shape
        back = to_hf(entry, merged)
        assert all(same_bits(a, b) for a, b in zip(hf_tensors, back, strict=True)), entry.megatron
        again = to_megatron(entry, back)
        assert same_bits(again, merged), entry.megatron


@pytest.mark.parametrize(("family", "overrides"), CASES)
def test_hf_names_are_transformers_own(family, overrides):
    hf_config = tiny_config(family, **overrides)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(hf_config)
    biases = [(name, tensor) for name, tensor in model.named_buffers() if name.endswith("e_score_correction_bias")]
    weights = [*model.named_parameters(), *biases]
    theirs = {name: tuple(tensor.shape) for name, tensor in named_like_in_files(weights).items()}
    ours = {
        name: shape
        for entry in expand(make_config(family, overrides))
        for name, shape in zip(entry.hf_names, entry.hf_shapes, strict=True)
    }
    assert ours == theirs


def entry_named(config: ModelConfig, name: str) -> Entry:
    return next(entry for entry in expand(config) if entry.megatron == name)


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_qkv_rows_are_grouped(kind):
    config = make_config("qwen2", {})
    entry = entry_named(config, f"decoder.layers.1.self_attention.linear_qkv.{kind}")
    rest = (64,) if kind == "weight" else ()
    head = torch.arange(16.0).reshape(16, *[1] * len(rest)).expand(16, *rest)
    q = torch.cat([head + 1000 * index for index in range(4)])
    k = torch.cat([head + 10_000 + 1000 * index for index in range(2)])
    v = torch.cat([head + 20_000 + 1000 * index for index in range(2)])
    merged = to_megatron(entry, [q, k, v])
    heads = [int(block.flatten()[0]) for block in merged.split(16)]
    assert heads == [0, 1000, 10_000, 20_000, 2000, 3000, 11_000, 21_000]
    assert torch.equal(merged[:16], head)


def test_gate_comes_before_up():
    entry = entry_named(make_config("llama", {}), "decoder.layers.0.mlp.linear_fc1.weight")
    merged = to_megatron(entry, [torch.zeros(96, 64), torch.ones(96, 64)])
    assert merged[:96].eq(0).all()
    assert merged[96:].eq(1).all()


def test_names_of_a_biased_layer():
    config = make_config("llama", {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 1})
    assert [entry.megatron for entry in expand(config)] == [
        "embedding.word_embeddings.weight",
        "decoder.layers.0.input_layernorm.weight",
        "decoder.layers.0.self_attention.linear_qkv.weight",
        "decoder.layers.0.self_attention.linear_qkv.bias",
        "decoder.layers.0.self_attention.linear_proj.weight",
        "decoder.layers.0.self_attention.linear_proj.bias",
        "decoder.layers.0.pre_mlp_layernorm.weight",
        "decoder.layers.0.mlp.linear_fc1.weight",
        "decoder.layers.0.mlp.linear_fc1.bias",
        "decoder.layers.0.mlp.linear_fc2.weight",
        "decoder.layers.0.mlp.linear_fc2.bias",
        "decoder.final_layernorm.weight",
        "output_layer.weight",
    ]


def test_experts_are_stacked_by_index():
    config = make_config("qwen3_moe", {"num_experts": 3})
    fc1 = entry_named(config, "decoder.layers.1.mlp.experts.linear_fc1.weight")
    fc2 = entry_named(config, "decoder.layers.1.mlp.experts.linear_fc2.weight")
    assert fc1.hf_names[2:4] == tuple(f"model.layers.1.mlp.experts.1.{part}_proj.weight" for part in ("gate", "up"))
    assert (fc1.shape, fc1.expert_dim, fc1.shard_dim) == ((3, 64, 64), 0, None)
    assert (fc2.shape, fc2.expert_dim, fc2.shard_dim) == ((3, 64, 32), 0, None)
    merged = to_megatron(fc1, [torch.full((32, 64), float(index)) for index in range(6)])
    assert merged[:, ::32, 0].tolist() == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
    assert merged[:, 31::32, 63].tolist() == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
    assert (64, 64) in product_shapes(config, WHOLE, row_parallel_splits=1)
    stacked = as_stacked(fc1)
    assert stacked.hf_names == ("model.layers.1.mlp.experts.gate_up_proj",)
    assert to_megatron(stacked, [merged]) is merged


def test_dense_layers_among_those_with_experts():
    config = make_config("qwen3_moe", {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]})
    assert [type(layer.mlp) for layer in config.layers] == [GatedMLP, Experts, GatedMLP, GatedMLP]
    mlps = [entry.megatron for entry in expand(config) if ".mlp." in entry.megatron]
    dense = ["linear_fc1", "linear_fc2"]
    wanted = {0: dense, 1: ["router", "experts.linear_fc1", "experts.linear_fc2"], 2: dense, 3: dense}
    assert mlps == [f"decoder.layers.{i}.mlp.{name}.weight" for i, names in wanted.items() for name in names]


def test_a_router_with_a_bias_and_shared_experts():
    config = make_config("qwen3_moe", {"num_hidden_layers": 1})
    (layer,) = config.layers
    mlp = replace(layer.mlp, has_expert_bias=True, shared_ffn_hidden_size=80)
    config = replace(config, layers=(replace(layer, mlp=mlp),))
    entries = {entry.megatron.removeprefix("decoder.layers.0.mlp."): entry for entry in expand(config)}
    assert entries["router.expert_bias"].hf_names == ("model.layers.0.mlp.gate.e_score_correction_bias",)
    assert entries["router.expert_bias"].fp32
    assert entries["shared_experts.linear_fc1.weight"].shape == (160, 64)
    shared_fc2 = entries["shared_experts.linear_fc2.weight"]
    assert shared_fc2.hf_names == ("model.layers.0.mlp.shared_experts.down_proj.weight",)
    assert not any(entry.fp32 for name, entry in entries.items() if name != "router.expert_bias")


def test_a_routers_bias_has_four_bytes_an_element_in_any_dtype():
    config = make_config("deepseek_v3", EXPERTS)
    sizes = itemsizes(config, torch.bfloat16)
    assert {name for name, size in sizes.items() if size == 4} == {
        f"decoder.layers.{number}.mlp.router.expert_bias"
        for number, layer in enumerate(config.layers)
        if isinstance(layer.mlp, Experts)
    }
    assert set(sizes.values()) == {2, 4}
    assert sizes.keys() == {entry.megatron for entry in expand(config)}


def test_wrong_shapes_are_named():
    config = make_config("qwen3", {})
    entry = entry_named(config, "decoder.layers.0.mlp.linear_fc1.weight")
    with pytest.raises(ValueError, match=r"up_proj\.weight: expected shape \(96, 64\), got \(95, 64\)"):
        to_megatron(entry, [torch.zeros(96, 64), torch.zeros(95, 64)])
    with pytest.raises(ValueError, match=r"expected the 2 tensors .*up_proj"):
        to_megatron(entry, [torch.zeros(96, 64)])
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.linear_fc1\.weight: expected shape \(192, 64\)"):
        to_hf(entry, torch.zeros(191, 64))


def test_table_prints_every_parameter():
    entries = expand(make_config("qwen3", {}))
    lines = format_table(entries).splitlines()
    assert len(lines) == len(entries)
    qkv = next(line for line in lines if "layers.2.self_attention.linear_qkv.weight" in line)
    assert qkv.split() == [
        "decoder.layers.2.self_attention.linear_qkv.weight",
        "[256x64]",
        *("dim", "0", "qkv"),
        *(f"model.layers.2.self_attn.{part}_proj.weight" for part in "qkv"),
    ]
