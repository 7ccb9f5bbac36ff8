"""Exported model directories: what is kept byte for byte, what is made true, and what is left behind."""

import json
import os

import pytest
import torch
import transformers
from models import EXPERTS, make_hf_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from lockstep.engine.checkpoints.checkpoint import extra_tensors
from lockstep.engine.checkpoints.export import SIDECARS
from lockstep.engine.models.config import load_model_config
from lockstep.recipes.conversion.config import ConvertConfig
from lockstep.recipes.conversion.convert import run as convert
from lockstep.trainer_bridge import MegatronTrainer, TrainerConfig

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
# (file of the source, whether the export has the same bytes); False: it has none.
FILES = {
    "generation_config.json": True,
    "tokenizer.json": True,
    "tokenizer_config.json": True,
    "tokenizer.model": True,
    "tokenizer.model.v3": True,
    "special_tokens_map.json": True,
    "added_tokens.json": True,
    "vocab.json": True,
    "vocab.txt": True,
    "merges.txt": True,
    "spiece.model": True,
    "sentencepiece.bpe.model": True,
    "qwen.tiktoken": True,
    "tekken.json": True,
    "chat_template.jinja": True,
    "chat_template.json": True,
    "additional_chat_templates/tool_use.jinja": True,
    "additional_chat_templates/rag.jinja": True,
    "preprocessor_config.json": True,
    "processor_config.json": True,
    "video_preprocessor_config.json": True,
    "LICENSE": True,
    "LICENSE.txt": True,
    "NOTICE": True,
    "USE_POLICY.md": True,
    "README.md": False,
    "notes.txt": False,
    "modeling_evil.py": False,
    "pytorch_model.bin": False,
    "consolidated.safetensors": False,
    "model.fp16.safetensors": False,
    "training_args.bin": False,
    "additional_chat_templates/notes.txt": False,
    ".gitattributes": False,
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A source with all that such directories hold, and what a trainer exports of it."""
    folder = tmp_path_factory.mktemp("export")
    source = folder / "source"
    make_hf_model(source, "llama", seed=1, tie=True)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(130)}, unk_token="w0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", chat_template=TEMPLATE)
    tokenizer.save_pretrained(source)
    (source / "additional_chat_templates").mkdir()
    for name in FILES:
        if not (source / name).exists():
            (source / name).write_text(TEMPLATE if name.endswith("jinja") else "{}")
    config = json.loads((source / "config.json").read_text())
    stale = {
        "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"},
        "dtype": "bfloat16",
        "torch_dtype": "float16",
        "_name_or_path": "/home/someone/model",
        "a_key_of_their_own": [1, {"x": 2}],
    }
    (source / "config.json").write_text(json.dumps(config | stale))
    MegatronTrainer(TrainerConfig(model=str(source))).export_hf(folder / "export")
    return source, folder / "export"


def test_the_table_of_kept_files(exported):
    source, export = exported
    for name, is_kept in FILES.items():
        if is_kept:
            assert (export / name).read_bytes() == (source / name).read_bytes(), name
        else:
            assert not (export / name).exists(), name
    present = {path.relative_to(export).as_posix() for path in export.rglob("*") if path.is_file()}
    assert present == {"config.json", "model.safetensors"} | {name for name, is_kept in FILES.items() if is_kept}
    assert not [path for path in export.parent.iterdir() if path not in (source, export)]


def test_the_config_differs_where_it_must(exported):
    source, export = (json.loads((path / "config.json").read_text()) for path in exported)
    must_differ = {"dtype": "float32", "torch_dtype": "float32"}
    dropped = ("auto_map", "_name_or_path")
    assert export == {key: value for key, value in (source | must_differ).items() if key not in dropped}
    assert "dtype" in export


def test_it_loads_in_transformers_and_here(exported):
    source, export = exported
    model = transformers.AutoModelForCausalLM.from_pretrained(export, dtype="auto")
    assert model.dtype == torch.float32
    held = load_file(source / "model.safetensors")
    assert all(torch.equal(tensor, held[name]) for name, tensor in load_file(export / "model.safetensors").items())
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    assert set(tokenizer.chat_template) == {"default", "tool_use", "rag"}
    assert load_model_config(export) == load_model_config(source)


def test_every_sidecar_is_in_the_table():
    from fnmatch import fnmatch

    kept = [name for name, is_kept in FILES.items() if is_kept]
    unused = [pattern for pattern in SIDECARS if not any(fnmatch(name, pattern) for name in kept)]
    assert unused == ["LICENCE*", "COPYING*"]


@pytest.mark.parametrize(
    ("keys", "written"),
    [((), ("dtype",)), (("dtype",), ("dtype",)), (("torch_dtype",), ("torch_dtype",)), (("dtype", "torch_dtype"),) * 2],
)
def test_the_dtype_is_that_of_the_file_under_the_sources_names(keys, written, tmp_path):
    make_hf_model(tmp_path / "source", "qwen2", seed=1)
    file = tmp_path / "source" / "config.json"
    config = {k: v for k, v in json.loads(file.read_text()).items() if k not in ("dtype", "torch_dtype")}
    file.write_text(json.dumps(config | dict.fromkeys(keys, "float16")))
    convert(ConvertConfig(model=str(tmp_path / "source"), output=str(tmp_path / "out")))
    out = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: out[key] for key in ("dtype", "torch_dtype") if key in out} == dict.fromkeys(written, "float32")


def test_a_tokenizer_keeps_all_but_the_code_that_is_not_copied(tmp_path):
    make_hf_model(tmp_path / "source", "qwen2", seed=1)
    contents = {"auto_map": {"AutoTokenizer": ["evil.E", None]}, "eos_token": "½", "b": 1}
    (tmp_path / "source" / "tokenizer_config.json").write_text(json.dumps(contents))
    convert(ConvertConfig(model=str(tmp_path / "source"), output=str(tmp_path / "out")))
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {"eos_token": "½", "b": 1}


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer_config.json", "additional_chat_templates/a.jinja"])
def test_no_secret_is_copied_through_a_link(name, tmp_path):
    make_hf_model(tmp_path / "source", "qwen2", seed=1)
    (tmp_path / "secret").write_text("key")
    (tmp_path / "source" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "source" / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="is a link out of its directory"):
        convert(ConvertConfig(model=str(tmp_path / "source"), output=str(tmp_path / "out")))
    assert sorted(os.listdir(tmp_path)) == ["secret", "source"]


def test_layers_for_further_tokens_are_passed_on(tmp_path):
    """They are not trained; a directory whose config promises them holds them."""
    make_hf_model(tmp_path / "source", "deepseek_v3", seed=0, num_nextn_predict_layers=1, **EXPERTS)
    file = tmp_path / "source" / "model.safetensors"
    extra = {"model.layers.3.eh_proj.weight": torch.randn(64, 128), "model.layers.3.enorm.weight": torch.randn(64)}
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    convert(ConvertConfig(model=str(tmp_path / "source"), output=str(tmp_path / "out")))
    held = dict(extra_tensors(tmp_path / "out", load_model_config(tmp_path / "out")))
    assert held.keys() == extra.keys()
    assert all(torch.equal(tensor, extra[name]) for name, tensor in held.items())


def test_weights_of_torch_are_converted_where_that_is_allowed(tmp_path):
    make_hf_model(tmp_path / "source", "qwen2", seed=1, tie=True)
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    tied = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    torch.save(tied, tmp_path / "source" / "pytorch_model.bin")
    options = {"model": str(tmp_path / "source"), "output": str(tmp_path / "out")}
    with pytest.raises(ValueError, match=r"lockstep convert model=.* output=DIRECTORY allow_pickle=true"):
        convert(ConvertConfig(**options))
    convert(ConvertConfig(**options, allow_pickle=True))
    trainer = MegatronTrainer(TrainerConfig(model=str(tmp_path / "out")))
    norm = dict(trainer.named_weights())["decoder.final_layernorm.weight"]
    assert torch.equal(norm, tensors["model.norm.weight"])
