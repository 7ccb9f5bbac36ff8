"""GGUF files: equal bits to transformers' own reading of them, on written files and on a real model."""

import json
import random

import gguf
import numpy as np
import pytest
import torch
import transformers
from models import make_hf_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from lockstep.engine.checkpoints.gguf import GGUFError, convert_gguf
from lockstep.engine.models.config import load_model_config

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}
TEXTS = [
    "Hello world, it's 12345 things.",
    "  two  spaces\n\n\tand a tab",
    "日本語 🙂 é e\u0301",
    "<|im_start|>user\nhi<|im_end|>",
]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture(scope="module")
def vocabulary():
    """A byte-level BPE tokenizer of 512 tokens with two control tokens, and what a file holds of it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    contents = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(contents["vocab"], key=contents["vocab"].get)
    return tokenizer, tokens, [" ".join(merge) for merge in contents["merges"]]


def neighbours(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp's converter orders them: a rotated pair's members become neighbours."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def add(writer, name, values, kind):
    """Vectors are never quantised."""
    kind = gguf.GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
    writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)


def write_gguf(path, model, vocabulary, kind, extra=None, pre="gpt-2", tensors=None):
    """The model as a file whose matrices are quantised to `kind`."""
    config, (_, tokens, merges) = model.config, vocabulary
    name = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if name == "llama":
        writer.add_rope_dimension_count(config.head_dim)
    elif name != "qwen2":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if name == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    for key, value in (extra or {}).items():
        writer.add_key_value(
            key, value, gguf.GGUFValueType.STRING if isinstance(value, str) else gguf.GGUFValueType.FLOAT32
        )
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[name.upper()], config.num_hidden_layers)
    for hf_name, tensor in model.state_dict().items():
        if hf_name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, suffix = hf_name.rpartition(".")
        layer = hf_name.split(".")[2] if hf_name.startswith("model.layers.") else None
        values = tensor.float().numpy()
        if suffix == "gate_up_proj":  # [experts, gate then up, hidden]
            gate, up = np.split(values, 2, axis=1)
            add(writer, f"blk.{layer}.ffn_gate_exps.weight", np.ascontiguousarray(gate), kind)
            add(writer, f"blk.{layer}.ffn_up_exps.weight", np.ascontiguousarray(up), kind)
        elif suffix == "down_proj":
            add(writer, f"blk.{layer}.ffn_down_exps.weight", values, kind)
        else:
            if name == "llama" and stem.endswith(("q_proj", "k_proj")):
                heads = config.num_attention_heads if stem.endswith("q_proj") else config.num_key_value_heads
                values = neighbours(values, heads)
            add(writer, f"{names.get_name(stem)}.{suffix}", values, kind)
    for tensor_name, values in (tensors or {}).items():
        add(writer, tensor_name, values, "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def converted(tmp_path, model, vocabulary, kind="F32", **options):
    path, output = tmp_path / "model.gguf", tmp_path / "out"
    write_gguf(path, model, vocabulary, kind, **options)
    convert_gguf(path, output)
    return path, output


def small_model(tmp_path, family, vocabulary, **overrides):
    sizes = {"vocab_size": len(vocabulary[1]), "eos_token_id": 1, "num_hidden_layers": 2, **overrides}
    if family == "qwen3_moe":
        sizes["norm_topk_prob"] = True  # as all published models
    return make_hf_model(tmp_path / "source", family, seed=3, **sizes)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_weights_are_those_that_transformers_reads(family, kind, tmp_path, vocabulary):
    model = small_model(tmp_path, family, vocabulary)
    path, output = converted(tmp_path, model, vocabulary, kind)
    theirs = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    ours = transformers.AutoModelForCausalLM.from_pretrained(output).state_dict()
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor.float()), name
    if kind == "F32":
        tokens = torch.arange(40)[None] * 7 % model.config.vocab_size
        loaded = transformers.AutoModelForCausalLM.from_pretrained(output)
        with torch.inference_mode():
            assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_tied_embeddings_and_dtype(tmp_path, vocabulary):
    model = small_model(tmp_path, "llama", vocabulary, tie=True)
    write_gguf(tmp_path / "model.gguf", model, vocabulary, "Q8_0")
    convert_gguf(tmp_path / "model.gguf", tmp_path / "out", torch.bfloat16)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert load_model_config(tmp_path / "out").tie_word_embeddings


def test_tokenizer_and_template_survive(tmp_path, vocabulary):
    _, output = converted(tmp_path, small_model(tmp_path, "llama", vocabulary), vocabulary)
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    for text in TEXTS:
        assert tokenizer.encode(text) == vocabulary[0].encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template) == (
        "<|im_start|>",
        "<|im_end|>",
        TEMPLATE,
    )
    assert json.loads((output / "generation_config.json").read_text())["eos_token_id"] == 1


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_rope_is_found_again(factor, tmp_path, vocabulary):
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = small_model(
        tmp_path, "llama", vocabulary, head_dim=64, rope_parameters=scaling, max_position_embeddings=16384
    )
    frequencies = model.model.rotary_emb.inv_freq
    plain = 1.0 / 500000.0 ** (torch.arange(0, 64, 2) / 64)
    path = tmp_path / "model.gguf"  # llama.cpp's converter stores what the frequencies are divided by
    write_gguf(path, model, vocabulary, "F32", tensors={"rope_freqs.weight": (plain / frequencies).numpy()})
    convert_gguf(path, tmp_path / "out")
    (rope,) = load_model_config(tmp_path / "out").ropes.values()
    found = rope.scaling
    assert found == {name: value for name, value in scaling.items() if name != "rope_theta"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"GGUX" + data[4:], "no readable GGUF"),
        (lambda data: data[:200], "no readable GGUF"),
        (lambda data: b"", "no readable GGUF"),
        (lambda data: data.replace(b"general.architecture", b"general.architectura"), "has no general.architecture"),
        (lambda data: data.replace(b"blk.1.ffn_up.weight", b"blk.9.ffn_up.weight"), "no tensor blk.1.ffn_up.weight"),
        (lambda data: data.replace(b"llama.block_count", b"llama.block_kount"), "llama.block_kount"),
    ],
)
def test_damaged_files_are_named(change, message, tmp_path, vocabulary):
    path = tmp_path / "model.gguf"
    write_gguf(path, small_model(tmp_path, "llama", vocabulary), vocabulary, "F32")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(GGUFError, match=message):
        convert_gguf(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_random_damage_is_an_error_or_a_model(tmp_path, vocabulary):
    """A file whose header bytes are changed at random never ends in another exception than GGUFError or ValueError."""
    path = tmp_path / "model.gguf"
    write_gguf(path, small_model(tmp_path, "llama", vocabulary), vocabulary, "Q8_0")
    whole, rng = path.read_bytes(), random.Random(0)
    refused = 0
    for trial in range(60):
        data = bytearray(whole)
        for _ in range(3):
            data[rng.randrange(min(len(data), 12000))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            convert_gguf(path, tmp_path / f"out{trial}")
        except ValueError:
            refused += 1
    assert refused > 0


def test_other_tokenizers_and_scalings_are_refused_by_name(tmp_path, vocabulary):
    model = small_model(tmp_path, "llama", vocabulary)
    write_gguf(tmp_path / "a.gguf", model, vocabulary, "F32", pre="unheard-of")
    with pytest.raises(ValueError, match="unheard-of"):
        convert_gguf(tmp_path / "a.gguf", tmp_path / "out")
    write_gguf(tmp_path / "b.gguf", model, vocabulary, "F32", extra={"llama.rope.scaling.type": "longrope"})
    with pytest.raises(GGUFError, match="longrope"):
        convert_gguf(tmp_path / "b.gguf", tmp_path / "out")
