"""kernels/norm_rope/rope.py: frequencies against transformers, the table's entries, the rotation and its gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding, apply_rotary_pos_emb

from lockstep.kernels.norm_rope.rope import (
    _apply_rope_triton,
    apply_rope,
    apply_rope_reference,
    rope_cos_sin,
    rope_inv_freq,
)

SCALINGS = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    {
        "rope_type": "yarn",
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 0.8,
        "beta_fast": 24,
        "beta_slow": 2,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    },
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.7, "original_max_position_embeddings": 4096},
]


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _transformers_config(head_dim, theta, scaling):
    return Qwen3Config(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=40960,
        rope_parameters={**scaling, "rope_theta": theta},
    )


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling["rope_type"])
@pytest.mark.parametrize(("head_dim", "theta"), [(128, 1_000_000.0), (64, 500_000.0), (32, 10_000.0), (6, 10_000.0)])
def test_frequencies_have_the_bits_of_transformers(scaling, head_dim, theta):
    config = _transformers_config(head_dim, theta, scaling)
    if scaling["rope_type"] == "default":
        expected, factor = Qwen3RotaryEmbedding.compute_default_rope_parameters(config)
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu")
    inv_freq, attention_factor = rope_inv_freq(head_dim, theta, config.rope_parameters, 40960)
    assert inv_freq.dtype == torch.float32
    assert torch.equal(inv_freq, expected)
    assert attention_factor == factor


def test_no_scaling_is_the_default_type():
    assert torch.equal(rope_inv_freq(64, 1e4, None, 2048)[0], rope_inv_freq(64, 1e4, {"rope_type": "default"}, 2048)[0])


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "longrope"}, "longrope"),
        ({"type": "su"}, "su"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_unknown_or_incomplete_scaling_is_refused(scaling, message):
    with pytest.raises(ValueError, match=message):
        rope_inv_freq(64, 1e4, scaling, 2048)


@pytest.mark.parametrize("scaling", [SCALINGS[0], SCALINGS[3]], ids=["default", "yarn"])
def test_table_and_rotation_match_transformers(scaling):
    config = _transformers_config(64, 10_000.0, scaling)
    q, k = _random(1, 4, 50, 64), _random(1, 2, 50, 64, seed=1)
    positions = torch.arange(3000, 3050)
    cos, sin = Qwen3RotaryEmbedding(config)(q, positions[None])
    table = rope_cos_sin(*rope_inv_freq(64, 10_000.0, scaling, 40960), 3050)
    torch.testing.assert_close(table[positions], torch.cat([cos[0, :, :32], sin[0, :, :32]], -1), rtol=3e-7, atol=1e-7)
    expected_q, expected_k = apply_rotary_pos_emb(q, k, cos, sin)
    for x, expected in [(q, expected_q), (k, expected_k)]:
        y = apply_rope(x[0].transpose(0, 1), table, positions)
        torch.testing.assert_close(y, expected[0].transpose(0, 1), rtol=1e-5, atol=1e-6)


def test_table_entries_are_rounded_fp64_and_do_not_depend_on_the_length():
    inv_freq, _ = rope_inv_freq(100, 10_000.0, None, 4096)
    table = rope_cos_sin(inv_freq, 1.25, 4000)
    angles = (torch.arange(4000).float()[:, None] * inv_freq).double()
    expected = torch.cat([angles.cos(), angles.sin()], -1) * 1.25
    torch.testing.assert_close(table.double(), expected, rtol=6e-8, atol=0)
    for length in (1, 17, 1001):
        assert torch.equal(rope_cos_sin(inv_freq, 1.25, length), table[:length])


@pytest.mark.parametrize("head_dim", [2, 50, 128])
def test_value_and_gradient_match_fp64(head_dim):
    table = rope_cos_sin(*rope_inv_freq(head_dim, 10_000.0, None, 512), 512)
    positions = torch.randint(512, (33,), generator=torch.Generator().manual_seed(0))
    ours, oracle = _random(33, 3, head_dim).requires_grad_(), _random(33, 3, head_dim).double().requires_grad_()
    y, expected = apply_rope(ours, table, positions), apply_rope_reference(oracle, table, positions)
    dy = _random(33, 3, head_dim, seed=1)
    y.backward(dy)
    expected.backward(dy.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.grad.double(), oracle.grad, rtol=1e-6, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    heads=st.sampled_from([(1, 128), (3, 50), (8, 64)]),
    num_tokens=st.integers(1, 3000),
    size=st.integers(1, 300),
    seed=st.integers(0, 99),
)
def test_row_contract(heads, num_tokens, size, seed):
    num_heads, head_dim = heads
    table = rope_cos_sin(*rope_inv_freq(head_dim, 10_000.0, None, 512), 512)
    generator = torch.Generator().manual_seed(seed)
    x, positions = (
        _random(num_tokens, num_heads, head_dim, seed=seed),
        torch.randint(512, (num_tokens,), generator=generator),
    )
    rows = torch.randint(num_tokens, (size,), generator=generator)
    together = apply_rope(x, table, positions)
    assert torch.equal(apply_rope(x[rows], table, positions[rows]), together[rows])
    assert torch.equal(apply_rope(x[rows[:1]], table, positions[rows[:1]]), together[rows[:1]])


def test_layout_and_gradients_do_not_change_the_value():
    table = rope_cos_sin(*rope_inv_freq(50, 10_000.0, None, 64), 64)
    positions = torch.arange(20)
    qkv = _random(20, 8 * 50)
    keys = qkv[:, 4 * 50 : 6 * 50].view(20, 2, 50)
    expected = apply_rope(keys.contiguous(), table, positions)
    assert torch.equal(apply_rope(keys, table, positions), expected)
    assert torch.equal(apply_rope(keys.transpose(1, 2).contiguous().transpose(1, 2), table, positions), expected)
    assert torch.equal(apply_rope(keys.clone().requires_grad_(), table, positions).detach(), expected)
    assert apply_rope(keys[:0], table, positions[:0]).shape == (0, 2, 50)


def test_bad_inputs_are_refused():
    table = rope_cos_sin(*rope_inv_freq(8, 10_000.0, None, 64), 16)
    x = _random(2, 1, 8)
    for position in (-1, 16):
        with pytest.raises(IndexError, match="position"):
            apply_rope(x, table, torch.tensor([0, position]))
    with pytest.raises(ValueError, match=r"\(3,\)"):
        apply_rope(x, table, torch.arange(3))
    with pytest.raises(ValueError, match="bfloat16"):
        apply_rope(x.bfloat16(), table, torch.arange(2))


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("num_heads", "head_dim"), [(3, 50), (12, 64)])
def test_triton_matches_the_reference_and_keeps_rows(dtype, num_heads, head_dim):
    table = rope_cos_sin(*rope_inv_freq(head_dim, 10_000.0, None, 64), 64)
    positions = torch.arange(11, 22)
    x = _random(11, num_heads + 2, head_dim).to(dtype)[:, 1:-1]
    y = _apply_rope_triton(x, table, positions)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-3
    torch.testing.assert_close(y, apply_rope_reference(x, table, positions), rtol=tolerance, atol=tolerance)
    assert torch.equal(_apply_rope_triton(x[4:7], table, positions[4:7]), y[4:7])
    back = _apply_rope_triton(y.float(), table, positions, -1.0)
    torch.testing.assert_close(back, x.float(), rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4},
        {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4},
        {"rope_type": "yarn", "factor": 4, "beta_fast": 32, "beta_slow": 1, "mscale": 1, "mscale_all_dim": 1},
        {"rope_type": "yarn", "factor": 4, "attention_factor": 1},
    ],
    ids=lambda scaling: "-".join(scaling),
)
def test_whole_numbers_in_a_config_are_floats(scaling):
    of_length = {"original_max_position_embeddings": 64}
    as_floats = {name: float(value) if isinstance(value, int) else value for name, value in scaling.items()}
    tables = [
        rope_cos_sin(*rope_inv_freq(64, theta, {**numbers, **of_length}, 256), 200)
        for theta, numbers in ((10000, scaling), (10000.0, as_floats))
    ]
    assert torch.equal(*tables)
