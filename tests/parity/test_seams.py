"""The seams are real: a format and layer parts of tests/support/toy_parts.py keep the promises, in no other file."""

import json

import pytest
import torch
import toy_parts
from models import EXPERTS, make_hf_model
from safetensors.torch import save_file

from lockstep.engine import Engine, EngineConfig, SamplingParams
from lockstep.engine.models.config import load_model_config
from lockstep.engine.models.layers.linear import encode, encoded
from lockstep.engine.models.names import expand
from lockstep.trainer_bridge import MegatronTrainer, TrainerConfig, publish
from lockstep.trainer_bridge.algorithms.losses import sft_loss
from lockstep.trainer_bridge.packing import TrainSequence, pack

SIZES = {
    "model_type": "toy",
    "architectures": ["ToyForCausalLM"],
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
}


@pytest.fixture(autouse=True)
def _toy_parts(monkeypatch):
    toy_parts.add(monkeypatch)


def random_sequences():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 131, (length,), generator=generator).tolist() for length in (37, 5, 60)]


def check_promises(path, linear_format):
    """The bits of engine and trainer before and after an update; of a batch, chunks and a cached prefix, and alone."""
    sequences = random_sequences()
    engine = Engine(EngineConfig(model=str(path), linear_format=linear_format, max_prefill_tokens=13))
    trainer = MegatronTrainer(TrainerConfig(model=str(path), linear_format=linear_format, learning_rate=1e-2))
    params = SamplingParams(max_tokens=12, seed=3)
    before = engine.score(sequences)
    for version in (1, 2):
        assert engine.score(sequences) == trainer.logprobs(sequences)
        together = engine.generate(sequences, params)
        for sequence, output in zip(sequences, together, strict=True):
            (alone,) = engine.generate([sequence], params)
            assert (alone.token_ids, alone.logprobs) == (output.token_ids, output.logprobs)
        train(trainer, sequences)
        publish(trainer, engine, version=version)
    assert engine.score(sequences) == trainer.logprobs(sequences) != before
    engine.shutdown()
    return before


def train(trainer, sequences):
    batches = pack([TrainSequence(ids, [False] + [True] * (len(ids) - 1)) for ids in sequences], 4096)
    trainer.step(batches, sft_loss)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "deepseek_v3"])
def test_a_format_of_linear_layers_keeps_the_promises(tmp_path, family):
    make_hf_model(tmp_path, family, seed=2, **(EXPERTS if family == "deepseek_v3" else {}))
    plain = Engine(EngineConfig(model=str(tmp_path)))
    rounded = check_promises(tmp_path, "int8_rows")
    exact = plain.score(random_sequences())
    assert rounded != exact
    for ours, theirs in zip(rounded, exact, strict=True):
        off = torch.tensor(ours[1:]) - torch.tensor(theirs[1:])
        assert off.abs().mean() < 0.2  # of 8 bits for rows of 64; a choice of experts may go another way


def test_what_is_stored_of_a_weight_is_its_parts(tmp_path):
    make_hf_model(tmp_path, "qwen3", seed=2)
    engine = Engine(EngineConfig(model=str(tmp_path), linear_format="int8_rows"))
    stored = dict(engine.model.named_parameters())
    names = {entry.megatron for entry in expand(engine.model_config)}
    scales = {name for name in stored if name.endswith("weight_scale")}
    assert stored.keys() == names | scales
    assert len(scales) == 4 * engine.model_config.num_layers  # qkv, proj, fc1, fc2
    for name in scales:
        assert stored[name.removesuffix("_scale")].dtype == torch.int8
    assert stored["embedding.word_embeddings.weight"].dtype == torch.float32


def test_a_random_model_is_the_same_in_every_format(tmp_path):
    make_hf_model(tmp_path, "qwen3", seed=2)
    plain, rounded = (
        Engine(EngineConfig(model=str(tmp_path), load_format="dummy", linear_format=name)).model
        for name in ("plain", "int8_rows")
    )
    expected = dict(plain.named_parameters())
    for name, place in encoded(rounded).items():
        for part_name, part in encode(name, place, expected[name]).items():
            assert torch.equal(rounded.get_parameter(part_name), part)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"linear_format": "int9"}, r"linear_format='int9' is no format.*plain, int8_rows"),
        ({"linear_format": "int8_rows", "tp_size": 2, "row_parallel_splits": 2}, "one tensor-parallel rank so far"),
    ],
)
def test_formats_that_cannot_be_are_refused(tmp_path, options, message):
    make_hf_model(tmp_path, "qwen3", seed=2)
    with pytest.raises(ValueError, match=message):
        Engine(EngineConfig(model=str(tmp_path), **options))


def make_toy_model(path):
    """A directory with random weights; returns them by transformers' names."""
    (path / "config.json").write_text(json.dumps(SIZES))
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for entry in expand(load_model_config(path)):
        for name, shape in zip(entry.hf_names, entry.hf_shapes, strict=True):
            values = torch.randn(shape, generator=generator)
            weights[name] = 1 + 0.1 * values if len(shape) == 1 else values * shape[1] ** -0.5
    save_file(weights, path / "model.safetensors")
    return weights


def toy_logprobs(weights, sequence):
    """The model in fp64, straight from its definition."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    heads, dim = SIZES["num_attention_heads"], SIZES["head_dim"]

    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + SIZES["rms_norm_eps"]).rsqrt() * w[name]

    tokens = torch.tensor(sequence)
    x = w["model.embed_tokens.weight"][tokens]
    seen = torch.ones(len(sequence), len(sequence)).tril().bool()
    for layer in range(SIZES["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        h = norm(x, at + "input_layernorm.weight")
        q, k, v = (
            (h @ w[f"{at}self_attn.{part}_proj.weight"].t()).view(-1, heads, dim).transpose(0, 1) for part in "qkv"
        )
        scores = (q @ k.transpose(1, 2) * dim**-0.5).masked_fill(~seen, -torch.inf)
        out = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + (out * (h @ w[at + "self_attn.gate.weight"].t()).sigmoid()) @ w[at + "self_attn.o_proj.weight"].t()
        h = norm(x, at + "post_attention_layernorm.weight")
        up = h @ w[at + "mlp.up_proj.weight"].t()
        is_last = layer == SIZES["num_hidden_layers"] - 1
        inner = torch.nn.functional.silu(h @ w[at + "mlp.gate_proj.weight"].t()) * up if is_last else up.relu().square()
        x = x + inner @ w[at + "mlp.down_proj.weight"].t()
    logits = norm(x, "model.norm.weight") @ w["lm_head.weight"].t()
    return logits.log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0]


@pytest.mark.parametrize("linear_format", ["plain", "int8_rows"])
def test_layers_of_new_kinds_keep_the_promises(tmp_path, linear_format):
    weights = make_toy_model(tmp_path)
    scores = check_promises(tmp_path, linear_format)
    if linear_format == "plain":
        for sequence, ours in zip(random_sequences(), scores, strict=True):
            expected = toy_logprobs(weights, sequence)
            torch.testing.assert_close(torch.tensor(ours[1:], dtype=torch.float64), expected, rtol=0, atol=1e-4)


def test_a_model_of_new_kinds_is_exported_with_its_names(tmp_path):
    weights = make_toy_model(tmp_path)
    trainer = MegatronTrainer(TrainerConfig(model=str(tmp_path)))
    named = dict(trainer.named_weights())
    for entry in expand(trainer.model_config):
        assert named[entry.megatron].shape == entry.shape
    gate = "decoder.layers.1.self_attention.linear_gate.weight"
    assert torch.equal(named[gate], weights["model.layers.1.self_attn.gate.weight"])
