"""Import and export of transformers directories: equal bits both ways, and errors that name the tensors."""

import hashlib
import json
import re
import shutil

import numpy as np
import pytest
import torch
import transformers
from models import FAMILY_NAMES, make_hf_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lockstep.engine.checkpoints import checkpoint
from lockstep.engine.checkpoints.checkpoint import CheckpointError, iterate_weights, load_into
from lockstep.engine.checkpoints.export import save_hf
from lockstep.engine.models.config import load_model_config
from lockstep.engine.models.decoder import Decoder
from lockstep.engine.models.names import expand
from lockstep.engine.weights.dummy_weights import initialize_dummy


def load_decoder(path, dtype=torch.float32):
    decoder = Decoder(load_model_config(path), "cpu", dtype)
    load_into(decoder, path)
    return decoder


def read_config(path):
    return json.loads((path / "config.json").read_text())


def edit_tensors(path, edit):
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_export_loads_in_transformers_and_back(family, tie, tmp_path):
    reference = make_hf_model(tmp_path / "source", family, seed=1, tie=tie)
    decoder = load_decoder(tmp_path / "source")
    config = decoder.config
    save_hf(
        tmp_path / "export",
        read_config(tmp_path / "source"),
        decoder.named_parameters(),
        config,
        source_dir=tmp_path / "source",
    )
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype="auto").eval()
    assert exported.dtype == torch.float32
    tokens = torch.arange(40)[None] * 7 % 131
    with torch.inference_mode():
        assert torch.equal(exported(tokens).logits, reference(tokens).logits)
    assert load_model_config(tmp_path / "export") == config
    again = dict(load_decoder(tmp_path / "export").named_parameters())
    for name, parameter in decoder.named_parameters():
        assert torch.equal(again[name], parameter), name


def test_sharded_files_hold_the_same_weights(tmp_path):
    make_hf_model(tmp_path / "one", "qwen2", seed=2)
    make_hf_model(tmp_path / "many", "qwen2", seed=2, max_shard_size="60KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one = load_decoder(tmp_path / "one")
    many = dict(load_decoder(tmp_path / "many").named_parameters())
    for name, parameter in one.named_parameters():
        assert torch.equal(many[name], parameter), name

    save_hf(
        tmp_path / "export",
        read_config(tmp_path / "one"),
        one.named_parameters(),
        one.config,
        dtype=torch.bfloat16,
        max_shard_bytes=30_000,
    )
    files = sorted(file.name for file in (tmp_path / "export").glob("*.safetensors"))
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    sizes = [sum(t.nbytes for t in load_file(tmp_path / "export" / file).values()) for file in files]
    assert len(files) > 2
    assert max(sizes) <= 30_000
    index = json.loads((tmp_path / "export" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    back = dict(load_decoder(tmp_path / "export").named_parameters())
    for name, parameter in one.named_parameters():
        assert torch.equal(back[name], parameter.bfloat16().float()), name
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype="auto")
    assert exported.dtype == torch.bfloat16
    assert torch.equal(exported.lm_head.weight, one.output_layer.weight.bfloat16())


def test_stacked_experts_in_the_file(tmp_path):
    """transformers can also save the experts as it holds them in memory: one tensor per layer and projection."""
    model = make_hf_model(tmp_path / "each", "qwen3_moe", seed=2, mlp_only_layers=[1])
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    names = load_file(tmp_path / "stacked" / "model.safetensors").keys()
    assert "model.layers.0.mlp.experts.gate_up_proj" in names
    assert not any("experts.0." in name for name in names)
    each, stacked = (dict(load_decoder(tmp_path / kind).named_parameters()) for kind in ("each", "stacked"))
    assert each.keys() == stacked.keys()
    assert all(torch.equal(tensor, stacked[name]) for name, tensor in each.items())
    edit_tensors(
        tmp_path / "stacked", lambda t: t.update({"model.layers.0.mlp.experts.3.up_proj.weight": torch.ones(1)})
    )
    with pytest.raises(CheckpointError, match=r"unexpected: model\.layers\.0\.mlp\.experts\.3\.up_proj\.weight"):
        load_decoder(tmp_path / "stacked")


def test_a_missing_expert_is_named(tmp_path):
    make_hf_model(tmp_path, "qwen3_moe", seed=2)
    edit_tensors(tmp_path, lambda t: t.pop("model.layers.2.mlp.experts.4.down_proj.weight"))
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.2\.mlp\.experts\.4\.down_proj\.weight"):
        load_decoder(tmp_path)


def test_loading_converts_and_stays_in_place(tmp_path):
    make_hf_model(tmp_path, "qwen3", seed=4)
    full = dict(load_decoder(tmp_path).named_parameters())
    decoder = Decoder(load_model_config(tmp_path), "cpu", torch.bfloat16)
    addresses = [parameter.data_ptr() for parameter in decoder.parameters()]
    load_into(decoder, tmp_path)
    assert addresses == [parameter.data_ptr() for parameter in decoder.parameters()]
    for name, parameter in decoder.named_parameters():
        assert torch.equal(parameter, full[name].bfloat16()), name
    converted = dict(iterate_weights(tmp_path, decoder.config, torch.float64))
    assert list(converted) == [entry.megatron for entry in expand(decoder.config)]
    assert all(torch.equal(tensor, full[name].double()) for name, tensor in converted.items())


def test_one_parameter_is_read_at_a_time(tmp_path, monkeypatch):
    make_hf_model(tmp_path, "llama", seed=0)
    config = load_model_config(tmp_path)
    read = []
    original = checkpoint.TensorFiles.read
    monkeypatch.setattr(
        checkpoint.TensorFiles, "read", lambda self, name, *part: read.append(name) or original(self, name, *part)
    )
    weights = iterate_weights(tmp_path, config)
    seen = 0
    for entry in expand(config):
        assert next(weights)[0] == entry.megatron
        seen += len(entry.hf_names)
        assert len(read) == seen


def test_tied_head_in_the_file(tmp_path):
    make_hf_model(tmp_path, "llama", seed=0, tie=True)
    config = load_model_config(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert "output_layer.weight" not in dict(iterate_weights(tmp_path, config))
    edit_tensors(tmp_path, lambda t: t["lm_head.weight"][3, 5].add_(1))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        next(iterate_weights(tmp_path, config))


def remove(name):
    return lambda tensors: tensors.pop(name)


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (remove("model.layers.1.self_attn.k_proj.weight"), r"missing: model\.layers\.1\.self_attn\.k_proj\.weight"),
        (remove("lm_head.weight"), r"missing: lm_head\.weight"),
        (put("model.layers.3.mlp.up_proj.weight", torch.zeros(2)), r"unexpected: model\.layers\.3\.mlp\.up_proj"),
        (put("model.layers.0.self_attn.q_proj.bias", torch.zeros(64)), r"unexpected: model\.layers\.0.*q_proj\.bias"),
        (
            put("model.norm.weight", torch.zeros(63)),
            r"misshapen: model\.norm\.weight \(shape \(63,\), expected \(64,\)",
        ),
        (
            put("model.embed_tokens.weight", torch.zeros(131, 64, dtype=torch.int8)),
            r"model\.embed_tokens\.weight \(dtype I8",
        ),
    ],
)
def test_wrong_tensors_are_named_before_anything_changes(edit, message, tmp_path):
    make_hf_model(tmp_path, "llama", seed=0)
    decoder = load_decoder(tmp_path)
    before = {name: parameter.clone() for name, parameter in decoder.named_parameters()}
    edit_tensors(tmp_path, lambda tensors: [tensor.add_(1) for tensor in tensors.values()])
    edit_tensors(tmp_path, edit)
    with pytest.raises(CheckpointError, match=message):
        load_into(decoder, tmp_path)
    for name, parameter in decoder.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_rotary_buffers_of_old_checkpoints_are_ignored(tmp_path):
    make_hf_model(tmp_path, "llama", seed=0)
    edit_tensors(tmp_path, put("model.layers.0.self_attn.rotary_emb.inv_freq", torch.zeros(8)))
    load_decoder(tmp_path)


def test_layers_that_predict_further_tokens_are_ignored(tmp_path):
    make_hf_model(tmp_path, "deepseek_v3", seed=0, num_nextn_predict_layers=1)
    edit_tensors(tmp_path, put("model.layers.3.eh_proj.weight", torch.zeros(8)))
    load_decoder(tmp_path)
    edit_tensors(tmp_path, put("model.layers.4.eh_proj.weight", torch.zeros(8)))
    with pytest.raises(CheckpointError, match=r"unexpected: model.layers.4.eh_proj.weight$"):
        load_decoder(tmp_path)


def test_directories_without_weights(tmp_path):
    make_hf_model(tmp_path / "many", "llama", seed=0, max_shard_size="60KB")
    config = load_model_config(tmp_path / "many")
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    shutil.copy(shards[1], shards[0])
    with pytest.raises(CheckpointError, match=rf"{shards[0].name} differs from .*index.json; missing: "):
        next(iterate_weights(tmp_path / "many", config))
    shards[0].write_bytes(shards[1].read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=f"{shards[0].name} is damaged"):
        next(iterate_weights(tmp_path / "many", config))
    shards[0].unlink()
    with pytest.raises(CheckpointError, match=f"names {shards[0].name}, which does not exist"):
        next(iterate_weights(tmp_path / "many", config))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        next(iterate_weights(tmp_path / "empty", config))


def test_failed_exports_leave_nothing_behind(tmp_path):
    make_hf_model(tmp_path / "source", "qwen2", seed=0)
    config = load_model_config(tmp_path / "source")
    raw = read_config(tmp_path / "source")
    weights = list(iterate_weights(tmp_path / "source", config))
    first, norm = weights[0], torch.ones(64)

    def assert_refused(match, named_tensors, source_config=raw):
        with pytest.raises(CheckpointError, match=match):
            save_hf(tmp_path / "export", source_config, named_tensors, config, max_shard_bytes=20_000)
        assert [file.name for file in tmp_path.iterdir()] == ["source"]

    assert_refused(r"missing: output_layer\.weight", weights[:-1])
    assert_refused(r"decoder\.extra\.weight: not a parameter", [*weights, ("decoder.extra.weight", norm)])
    assert_refused(rf"{re.escape(first[0])}: given twice", [*weights, first])
    assert_refused(
        r"word_embeddings\.weight: expected shape \(131, 64\), got \(64,\)", [(first[0], norm), *weights[1:]]
    )
    assert_refused(r"final_norm.eps \(0.5, the model has 1e-06\)", weights, {**raw, "rms_norm_eps": 0.5})

    def failing():
        yield from weights[:5]
        raise RuntimeError("the producer stopped")

    with pytest.raises(RuntimeError, match="the producer stopped"):
        save_hf(tmp_path / "export", raw, failing(), config, max_shard_bytes=20_000)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]

    with pytest.raises(FileExistsError, match="source exists"):
        save_hf(tmp_path / "source", raw, weights, config)


def test_export_takes_a_reused_buffer_and_companion_files(tmp_path):
    make_hf_model(tmp_path / "source", "mistral", seed=0)
    source = tmp_path / "source"
    (source / "tokenizer.json").write_text("{}")
    (source / "notes.txt").write_text("not part of a model")
    config = load_model_config(source)
    buffer = torch.empty(max(entry.num_elements for entry in expand(config)))

    def through_one_buffer():
        for name, tensor in iterate_weights(source, config):
            yield name, buffer[: tensor.numel()].view(tensor.shape).copy_(tensor)

    (tmp_path / "export").mkdir()
    save_hf(tmp_path / "export", read_config(source), through_one_buffer(), config, source_dir=source)
    names = {file.name for file in (tmp_path / "export").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    ours, theirs = load_file(tmp_path / "export/model.safetensors"), load_file(source / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with safe_open(tmp_path / "export/model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_dummy_weights(tmp_path):
    make_hf_model(tmp_path, "qwen2", seed=0, vocab_size=4000)
    config = load_model_config(tmp_path)
    first, second, other, half = (Decoder(config, "cpu", dtype) for dtype in [torch.float32] * 3 + [torch.bfloat16])
    for decoder, seed in ((first, 7), (second, 7), (other, 8), (half, 7)):
        initialize_dummy(decoder, seed)
    weights = dict(first.named_parameters())
    for name, parameter in weights.items():
        assert torch.equal(parameter, second.get_parameter(name)), name
        assert torch.equal(parameter.bfloat16(), half.get_parameter(name)), name
        assert not torch.equal(parameter, other.get_parameter(name)), name
    embedding = weights["embedding.word_embeddings.weight"]
    assert abs(float(embedding.mean())) < 1e-3
    assert float(embedding.std()) == pytest.approx(64**-0.5, rel=0.01)
    assert embedding.unique().numel() > 0.95 * embedding.numel()
    rows = torch.corrcoef(embedding[:32])
    assert float((rows - torch.eye(32)).abs().max()) < 0.6
    assert float(weights["decoder.final_layernorm.weight"].mean()) == pytest.approx(1.0, abs=0.05)
    assert embedding[1, :3].tolist() == [dummy_value(7, "embedding.word_embeddings.weight", 64 + i) for i in range(3)]


def dummy_value(seed, name, index):
    """A matrix element of `initialize_dummy` in plain Python, for 64 columns."""
    x = index ^ int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "little")
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    x = x ^ x >> 16
    return float(np.float32((x >> 8) / 2**23 - 1) * np.float32((3 / 64) ** 0.5))
