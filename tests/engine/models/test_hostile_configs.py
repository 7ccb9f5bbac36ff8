"""Any config.json is read or refused: a ValueError of one line, in bounded time and memory."""

import json
import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import EXPERTS, FAMILY_NAMES, tiny_config

from lockstep.engine.models.config import parse_model_config
from lockstep.engine.models.names import expand
from lockstep.kernels.norm_rope.rope import rope_inv_freq

HOSTILE = (
    None, True, False, 0, -1, 1, 2, 3, 7, 0.5, -0.0, 1e300, float("nan"), float("inf"), 10**9, 2**31, 2**63, 10**400,
    "", "64", "silu", "\ud800", "x" * 10**6, [], [1], [[]], ["full_attention"], [None] * 3, {}, {"a": {}}, {"a": 1},
    {"rope_type": "yarn"}, {"rope_type": ["yarn"]}, {"rope_type": "yarn", "factor": "4"}, {"factor": float("nan")},
    {"rope_type": "yarn", "factor": 0.0}, {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1,
    "high_freq_factor": 1, "original_max_position_embeddings": 0}, {"rope_type": "linear", "factor": 0},
    {"rope_type": "yarn", "factor": 10**400}, {"rope_theta": 10**400},
)  # fmt: skip


def base(family):
    sizes = {"deepseek_v2": EXPERTS, "deepseek_v3": EXPERTS}.get(family, {})
    raw = json.loads(json.dumps(tiny_config(family, **sizes).to_dict()))
    raw |= {"sliding_window": None} if family in ("llama", "qwen2", "qwen3") else {}
    raw |= dict.fromkeys(("quantization_config", "num_labels", "rope_scaling", "original_max_position_embeddings"))
    return {**raw, "rope_theta": 1e4, "layer_types": None, "decoder_sparse_step": 1, "mlp_only_layers": None}


def parse(raw, generation=None):
    """Reads it and lists the parameters, or refuses it."""
    message = ""
    try:
        config = parse_model_config(raw, generation)
        expand(config)
        for rope in config.ropes.values():
            frequencies, factor = rope_inv_freq(min(rope.width, 64), rope.theta, rope.scaling, rope.max_positions)
            assert frequencies.isfinite().all()
            assert math.isfinite(factor)
    except ValueError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 600
    message.encode()


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_key_with_every_value(family):
    raw = base(family)
    parse_model_config(raw)
    started = time.perf_counter()
    for key in raw:
        for value in HOSTILE:
            parse({**raw, key: value})
    assert time.perf_counter() - started < 60


@pytest.mark.parametrize("labels", [None, 1, [1, 2], {"0": "a"}, {"0": "a", "1": "b"}, "ab"])
def test_labels_of_a_reward_model(labels):
    parse({**base("llama"), "architectures": ["LlamaForSequenceClassification"], "id2label": labels, "num_labels": 1})
    raw = {**base("llama"), "architectures": ["LlamaForSequenceClassification"], "id2label": labels}
    parse({key: value for key, value in raw.items() if key != "num_labels"})


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from(HOSTILE),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None, database=None)
@given(st.sampled_from(FAMILY_NAMES), st.data())
def test_several_keys_at_once(family, data):
    raw = base(family)
    keys = data.draw(st.lists(st.sampled_from(sorted(raw)), max_size=3))
    parse({**raw, **{key: data.draw(values) for key in keys}}, {"eos_token_id": data.draw(values)})
