"""The mixture-of-experts layer: DeepSeek's routing and shared experts against transformers, and independent rows."""

from dataclasses import replace

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from lockstep.engine.models.layers.layer import ModuleFactory
from lockstep.engine.models.layers.moe import Experts, MixtureOfExperts
from lockstep.engine.weights.dummy_weights import initialize_dummy

SHAPE = {"num_experts": 12, "experts_per_token": 3, "ffn_hidden_size": 24}
DEEPSEEK = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "routed_scaling_factor": 2.5,
    "n_group": 4,
    "topk_group": 2,
}
V2 = Experts(**SHAPE, shared_ffn_hidden_size=48, num_groups=4, top_groups=2, weight_scale=2.5, fp32_logits=True)
V3 = replace(V2, scoring="sigmoid", has_expert_bias=True, group_score="sum_of_top_2", normalize_weights=True)
REFERENCES = {
    "v2": (V2, DeepseekV2Moe, DeepseekV2Config(**DEEPSEEK, topk_method="group_limited_greedy")),
    "v3": (V3, DeepseekV3MoE, DeepseekV3Config(**DEEPSEEK, norm_topk_prob=True)),
}


def dummy_layer(moe: Experts) -> MixtureOfExperts:
    layer = moe.build(ModuleFactory(64, torch.device("cpu"), torch.float32))
    initialize_dummy(layer, seed=5)
    return layer


@pytest.mark.parametrize("version", REFERENCES)
def test_equals_deepseeks_layer_in_transformers(version):
    moe, module, config = REFERENCES[version]
    config._experts_implementation = "eager"
    layer, reference = dummy_layer(moe), module(config)
    gate, up = layer.shared_experts.linear_fc1.weight.chunk(2)
    theirs = {
        "gate.weight": layer.router.weight,
        "experts.gate_up_proj": layer.experts.linear_fc1.weight,
        "experts.down_proj": layer.experts.linear_fc2.weight,
        "shared_experts.gate_proj.weight": gate,
        "shared_experts.up_proj.weight": up,
        "shared_experts.down_proj.weight": layer.shared_experts.linear_fc2.weight,
    }
    if moe.has_expert_bias:
        theirs["gate.e_score_correction_bias"] = layer.router.expert_bias
    reference.load_state_dict(theirs)
    hidden = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(layer(hidden), reference(hidden[None])[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("moe", [Experts(**SHAPE), V2, V3], ids=["plain", "v2", "v3"])
def test_a_row_does_not_know_its_neighbours(moe):
    layer = dummy_layer(moe)
    hidden = torch.randn(150, 64, generator=torch.Generator().manual_seed(0))
    together = layer(hidden)
    padded = torch.cat([hidden, torch.full((13, 64), torch.nan)])
    assert torch.equal(layer(padded)[:150], together)
    for rows in (torch.tensor([77]), torch.arange(3, 19), torch.randperm(150), torch.tensor([5] * 40)):
        assert torch.equal(layer(hidden[rows]), together[rows])


def test_dummy_experts_have_the_scale_of_their_columns():
    layer = dummy_layer(V3)
    for weight in (layer.experts.linear_fc1.weight, layer.experts.linear_fc2.weight):
        assert weight.std().item() == pytest.approx(weight.shape[-1] ** -0.5, rel=0.05)
        assert not torch.equal(weight[0], weight[1])
    assert layer.router.expert_bias.abs().max() <= 0.1
