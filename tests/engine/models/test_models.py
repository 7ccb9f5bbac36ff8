"""The decoder over a paged cache against transformers in fp32, and what config.json may and may not ask for."""

import json
import math
from dataclasses import replace

import pytest
import torch
from models import EXPERTS, FAMILY_NAMES, LATENT_FAMILIES, make_hf_model, tiny_config

from lockstep.engine.checkpoints.checkpoint import load_into
from lockstep.engine.memory.layer_caches import new_layer_caches
from lockstep.engine.models.config import UnsupportedModelError, load_model_config, parse_model_config
from lockstep.engine.models.decoder import Decoder
from lockstep.engine.models.layers.context import AttentionContext, AttentionPart
from lockstep.engine.models.layers.mlp import GatedMLP
from lockstep.engine.models.layers.moe import Experts
from lockstep.engine.models.names import expand

PAGE_SIZE = 8
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
SLIDING = {"use_sliding_window": True, "sliding_window": 11}
CASES = {
    "llama": ("llama", {"num_key_value_heads": 4}),
    "llama tied, one kv head": ("llama", {"tie": True, "num_key_value_heads": 1}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama head_dim, llama3 rope": ("llama", {"head_dim": 32, "rope_parameters": LLAMA3}),
    "llama linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    "llama yarn": ("llama", {"rope_parameters": YARN}),
    "llama yarn, all options": (
        "llama",
        {
            "tie": True,
            "rope_parameters": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 1.2, "mscale_all_dim": 0.7},
        },
    ),
    "mistral window": ("mistral", {"sliding_window": 11}),
    "mistral no window, tied": ("mistral", {"sliding_window": None, "head_dim": 32, "tie": True}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2 upper layers slide, tied": ("qwen2", {"tie": True, "max_window_layers": 1, **SLIDING}),
    "qwen2 layer types": (
        "qwen2",
        {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], **SLIDING},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3 biases, tied": ("qwen3", {"attention_bias": True, "tie": True, "rms_norm_eps": 1e-2}),
    "qwen3 layer types, yarn": (
        "qwen3",
        {
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": YARN,
            **SLIDING,
        },
    ),
    "qwen3 moe": ("qwen3_moe", {}),
    "qwen3 moe, weights sum to 1, tied": ("qwen3_moe", {"norm_topk_prob": True, "tie": True}),
    "qwen3 moe, a dense layer among them": ("qwen3_moe", {"mlp_only_layers": [1], "norm_topk_prob": True}),
    "qwen3 moe, every second layer, biases, windows": (
        "qwen3_moe",
        {"decoder_sparse_step": 2, "attention_bias": True, "use_sliding_window": True, "sliding_window": 11},
    ),
    "qwen3 moe, one expert a token": ("qwen3_moe", {"num_experts_per_tok": 1, "num_experts": 5}),
    "qwen3 moe, all experts": ("qwen3_moe", {"num_experts_per_tok": 4, "num_experts": 4}),
}
LATENT_YARN = {**YARN, "mscale": 1.2, "mscale_all_dim": 0.7}
ODD_SIZES = {
    "hidden_size": 60,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "kv_lora_rank": 33,
    "qk_nope_head_dim": 7,
    "qk_rope_head_dim": 6,
    "v_head_dim": 5,
}
CASES |= {
    "deepseek_v2": ("deepseek_v2", {}),
    # transformers' complex numbers need even strides.
    "deepseek_v2 whole queries, odd sizes": (
        "deepseek_v2",
        {"q_lora_rank": None, **ODD_SIZES, "kv_lora_rank": 34, "qk_nope_head_dim": 10},
    ),
    "deepseek_v2 yarn, mlp biases, tied": (
        "deepseek_v2",
        {"rope_parameters": LATENT_YARN, "mlp_bias": True, "tie": True, "rms_norm_eps": 1e-2},
    ),
    "deepseek_v2 experts": ("deepseek_v2", {**EXPERTS, "topk_method": "greedy"}),
    "deepseek_v2 experts in groups": ("deepseek_v2", {**EXPERTS, "topk_method": "group_limited_greedy"}),
    "deepseek_v3": ("deepseek_v3", {"rms_norm_eps": 1e-2}),
    "deepseek_v3 experts": ("deepseek_v3", EXPERTS),
    "deepseek_v3 experts, not normalised": ("deepseek_v3", {**EXPERTS, "norm_topk_prob": False}),
    "deepseek_v3 whole queries, yarn": ("deepseek_v3", {"q_lora_rank": None, "rope_parameters": LATENT_YARN}),
    "deepseek_v3 not interleaved, odd sizes, yarn": (
        "deepseek_v3",
        {"rope_interleave": False, "rope_parameters": YARN, **ODD_SIZES},
    ),
}
PROMPT_LENGTHS = (37, 1, 48, 18)


class PagedRun:
    """Feeds requests to a decoder in steps, their pages scattered over the cache."""

    def __init__(self, decoder: Decoder, num_requests: int, max_tokens: int) -> None:
        config = decoder.config
        self.decoder = decoder
        pages_each = -(-max_tokens // PAGE_SIZE)
        self.page_table = torch.randperm(num_requests * pages_each).view(num_requests, pages_each).to(torch.int32)
        self.kv_caches = new_layer_caches(config.caches, num_requests * pages_each, PAGE_SIZE, torch.float32, "cpu")
        self.kv_lens = [0] * num_requests

    def step(self, rows: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """rows: request -> its next tokens. Returns request -> logits of those tokens."""
        positions, slots, row_counts = [], [], [0]
        for request, tokens in rows.items():
            start = self.kv_lens[request]
            self.kv_lens[request] += len(tokens)
            position = torch.arange(start, start + len(tokens))
            page = self.page_table[request, position // PAGE_SIZE].long()
            positions.append(position)
            slots.append(page * PAGE_SIZE + position % PAGE_SIZE)
            row_counts.append(row_counts[-1] + len(tokens))
        requests = list(rows)
        part = AttentionPart(
            num_rows=row_counts[-1],
            page_table=self.page_table[requests],
            cu_seqlens_q=torch.tensor(row_counts, dtype=torch.int32),
            kv_lens=torch.tensor([self.kv_lens[request] for request in requests], dtype=torch.int32),
        )
        context = AttentionContext(self.kv_caches, torch.cat(slots), (part,))
        with torch.inference_mode():
            hidden = self.decoder(torch.cat(list(rows.values())), torch.cat(positions), context)
            logits = self.decoder.logits(hidden)
        assert logits.dtype == torch.float32
        return dict(zip(requests, logits.split([len(tokens) for tokens in rows.values()]), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, tmp_path):
    family, options = CASES[case]
    reference = make_hf_model(tmp_path, family, seed=3, **options)
    decoder = Decoder(load_model_config(tmp_path), "cpu", torch.float32)
    load_into(decoder, tmp_path)
    torch.manual_seed(5)
    prompts = [torch.randint(0, 131, (length,)) for length in PROMPT_LENGTHS]
    with torch.inference_mode():
        expected = [reference(prompt[None]).logits[0] for prompt in prompts]

    whole = PagedRun(decoder, len(prompts), max(PROMPT_LENGTHS)).step(dict(enumerate(prompts)))
    for request, logits in whole.items():
        assert (logits - expected[request]).abs().max() <= 1e-4

    run = PagedRun(decoder, len(prompts), max(PROMPT_LENGTHS))
    chunks: list[list[torch.Tensor]] = [[] for _ in prompts]
    # Requests join at different steps; after a few prefill chunks each goes on token by token.
    for step in range(4 + max(PROMPT_LENGTHS)):
        rows = {}
        for request, prompt in enumerate(prompts):
            done = run.kv_lens[request]
            chunk = 0 if step < request else 17 if step < request + 2 else 1
            if chunk and done < len(prompt):
                rows[request] = prompt[done : done + chunk]
        if rows:
            for request, logits in run.step(rows).items():
                chunks[request].append(logits)
    for request, parts in enumerate(chunks):
        assert torch.equal(torch.cat(parts), whole[request]), "chunked prefill and decode changed a bit"


@pytest.mark.parametrize("case", CASES)
def test_parameters_are_those_of_the_table(case):
    family, options = CASES[case]
    options = dict(options)
    config = parse_model_config(tiny_config(family, tie_word_embeddings=options.pop("tie", False), **options).to_dict())
    decoder = Decoder(config, "meta", torch.bfloat16)
    parameters = {name: tuple(parameter.shape) for name, parameter in decoder.named_parameters()}
    assert parameters == {entry.megatron: entry.shape for entry in expand(config)}
    assert decoder.state_dict().keys() == parameters.keys()
    assert not any(parameter.requires_grad for parameter in decoder.parameters())


def raw_config(family: str = "llama", **changes) -> dict:
    raw = tiny_config(family).to_dict()
    raw.pop("rope_parameters")
    return {**raw, **changes}


@pytest.mark.parametrize("family", sorted({*FAMILY_NAMES} - {*LATENT_FAMILIES}))
def test_config_fields(family):
    config = parse_model_config(tiny_config(family, num_key_value_heads=1).to_dict())
    assert (config.family, config.num_layers) == (family, 3)
    for layer in config.layers:
        mixer = layer.mixer
        assert (mixer.num_heads, mixer.num_kv_heads) == (4, 1)
        assert mixer.head_dim == (32 if family in ("qwen3", "qwen3_moe") else 16)
        assert mixer.window == (24 if family == "mistral" else None)
        assert mixer.qkv_bias == (family == "qwen2")
        assert mixer.has_qk_norm == (family in ("qwen3", "qwen3_moe"))
        assert isinstance(layer.mlp, Experts if family == "qwen3_moe" else GatedMLP)
    assert config.eos_token_ids == (0,)
    (rope,) = config.ropes.values()
    assert (rope.width, rope.scaling) == (config.layers[0].mixer.head_dim, None)


@pytest.mark.parametrize("family", LATENT_FAMILIES)
def test_config_fields_of_latent_attention(family):
    config = parse_model_config(tiny_config(family, rope_parameters=LATENT_YARN).to_dict())
    assert config.kv_elements_per_token == config.num_layers * (40 + 8)
    mla = config.layers[0].mixer
    assert (config.family, mla.num_heads, config.ropes[mla.rope].width) == (family, 4, 8)
    assert (mla.q_lora_rank, mla.kv_lora_rank, mla.row_width) == (24, 40, 48)
    assert (mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim) == (12, 8, 20)
    assert mla.rope_interleaved
    mscale = 0.1 * LATENT_YARN["mscale_all_dim"] * math.log(LATENT_YARN["factor"]) + 1.0
    assert mla.softmax_scale == 20**-0.5 * mscale * mscale
    without = parse_model_config(tiny_config(family, q_lora_rank=None).to_dict())
    assert without.layers[0].mixer.softmax_scale == pytest.approx(20**-0.5)
    assert mla.has_q_lora
    assert not without.layers[0].mixer.has_q_lora


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ({"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_type": "default"}),
        (
            {"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_theta": 7.0, "rope_type": "linear", "factor": 2.0},
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {key: LLAMA3[key] for key in LLAMA3 if key != "rope_theta"}},
            LLAMA3,
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
        ),
        ({"rope_theta": 3e4, "rope_scaling": None}, {"rope_theta": 3e4}),
        ({}, {"rope_theta": 1e4}),
    ],
)
def test_older_rope_keys(older, newer):
    config = parse_model_config(raw_config(**older))
    assert config == parse_model_config(raw_config(rope_parameters=newer))
    theirs = type(tiny_config("llama")).from_dict(raw_config(**older)).rope_parameters
    (rope,) = config.ropes.values()
    assert rope.theta == theirs["rope_theta"]
    scaling = {key: value for key, value in theirs.items() if key not in ("rope_theta", "type")}
    assert (rope.scaling or {"rope_type": "default"}) == scaling


def test_rope_per_layer_type_is_accepted_when_all_agree():
    same = {"full_attention": YARN, "sliding_attention": YARN}
    (rope,) = parse_model_config(raw_config("qwen3", rope_parameters=same)).ropes.values()
    assert rope.scaling["rope_type"] == "yarn"
    different = {**same, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    with pytest.raises(UnsupportedModelError, match=r"rope_parameters.*layer types with different"):
        parse_model_config(raw_config("qwen3", rope_parameters=different))


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("llama", {"model_type": "gemma2"}, "model_type = 'gemma2'"),
        ("llama", {"model_type": None}, "model_type = None"),
        ("llama", {"architectures": ["LlamaForCausalLMEagle3"]}, "architectures = .'LlamaForCausalLMEagle3'"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type = 'dynamic'"),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type = 'longrope'"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor = None"),
        ("llama", {"rope_parameters": {"rope_type": "default", "factor": 2}}, "rope_parameters.factor = 2"),
        ("llama", {"rope_parameters": {**YARN, "beta": 2}}, "rope_parameters.beta = 2"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("llama", {"rope_theta": "big"}, "rope_theta = 'big'"),
        ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("llama", {"sliding_window": 16}, "sliding_window = 16"),
        ("llama", {"attention_bias": "yes"}, "attention_bias = 'yes'"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads = 3"),
        ("llama", {"head_dim": 15}, "head_dim = 15"),
        ("llama", {"head_dim": None, "hidden_size": 66}, "hidden_size = 66"),
        ("llama", {"vocab_size": None}, "vocab_size = None"),
        ("llama", {"eos_token_id": "</s>"}, "eos_token_id = '</s>'"),
        ("deepseek_v3", {"first_k_dense_replace": None}, "first_k_dense_replace = None"),
        ("deepseek_v2", {**EXPERTS, "topk_method": "noaux_tc"}, "topk_method = 'noaux_tc'"),
        ("deepseek_v2", {**EXPERTS, "norm_topk_prob": True}, "norm_topk_prob = True"),
        ("deepseek_v2", {**EXPERTS, "mlp_bias": True}, "mlp_bias = True"),
        ("deepseek_v3", {**EXPERTS, "scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        ("deepseek_v3", {**EXPERTS, "moe_layer_freq": 2}, "moe_layer_freq = 2"),
        ("deepseek_v3", {**EXPERTS, "n_group": 5}, "n_group = 5"),
        ("deepseek_v3", {**EXPERTS, "num_experts_per_tok": 13}, "num_experts_per_tok = 13"),
        ("deepseek_v2", {"attention_bias": True}, "attention_bias = True"),
        ("deepseek_v3", {"mlp_bias": True}, "mlp_bias = True"),
        ("deepseek_v2", {"rope_interleave": True}, "rope_interleave = True"),
        ("deepseek_v3", {"rope_interleave": "no"}, "rope_interleave = 'no'"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads = 2"),
        ("deepseek_v3", {"head_dim": 20}, "head_dim = 20"),
        ("deepseek_v3", {"qk_rope_head_dim": 7}, "qk_rope_head_dim = 7"),
        ("deepseek_v3", {"q_lora_rank": 0}, "q_lora_rank = 0"),
        ("deepseek_v2", {"kv_lora_rank": "wide"}, "kv_lora_rank = 'wide'"),
        ("deepseek_v2", {"sliding_window": 16}, "sliding_window = 16"),
        ("mistral", {"attention_bias": True}, "attention_bias = True"),
        ("mistral", {"sliding_window": 0}, "sliding_window = 0"),
        ("qwen2", {"mlp_bias": True}, "mlp_bias = True"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types"),
        ("qwen3", {"layer_types": ["full_attention"] * 2 + ["linear_attention"]}, "layer_types = 'linear_attention'"),
        ("qwen3", {"layer_types": ["full_attention"] * 2 + ["sliding_attention"]}, "layer_types = 'sliding_attention'"),
        ("qwen3_moe", {"num_experts_per_tok": 7}, "num_experts_per_tok = 7"),
        ("qwen3_moe", {"num_local_experts": 0}, "num_local_experts = 0"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step = 0"),
        ("qwen3_moe", {"mlp_only_layers": [3]}, r"mlp_only_layers = \[3\]"),
        ("qwen3_moe", {"norm_topk_prob": "yes"}, "norm_topk_prob = 'yes'"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size = 64"),
        ("qwen3_moe", {"layer_types": ["full_attention"] * 3}, "layer_types"),
    ],
)
def test_unsupported_options_are_named(family, changes, named):
    with pytest.raises(UnsupportedModelError, match=named):
        parse_model_config(raw_config(family, **changes))


def test_missing_keys_take_transformers_defaults():
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for family in FAMILY_NAMES:
        raw = {"model_type": family, "vocab_size": 8, "hidden_size": 256, "intermediate_size": 8}
        raw |= {"num_hidden_layers": 40, "num_attention_heads": 32, "use_sliding_window": True}
        if family in ("llama", *LATENT_FAMILIES):
            raw.pop("use_sliding_window")
        if family in LATENT_FAMILIES:
            raw["first_k_dense_replace"] = 40
        if family == "deepseek_v3":
            raw["num_key_value_heads"] = 32
        theirs = type(tiny_config(family)).from_dict(raw).to_dict()
        assert all(theirs[key] == raw[key] for key in sizes)
        assert parse_model_config(raw) == parse_model_config(theirs)


def test_end_tokens_come_from_the_generation_config(tmp_path):
    raw = raw_config(eos_token_id=[5, 6])
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert load_model_config(tmp_path).eos_token_ids == (5, 6)
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    assert load_model_config(tmp_path).eos_token_ids == (5, 6)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    assert load_model_config(tmp_path) == replace(parse_model_config(raw), eos_token_ids=(9,))


def test_directory_without_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_model_config(tmp_path)
