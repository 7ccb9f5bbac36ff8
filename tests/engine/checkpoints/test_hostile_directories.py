"""Model directories from anywhere: each fault is a ValueError of one line that names the file, and nothing hangs."""

import json
import os
import shutil
import struct
import time

import pytest
import torch
from models import make_hf_model
from pickles import payload
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from lockstep.engine import Engine, EngineConfig
from lockstep.engine.text.tokenizer import load_tokenizer
from lockstep.recipes.conversion.config import ConvertConfig
from lockstep.recipes.conversion.convert import run as convert
from lockstep.trainer_bridge import MegatronTrainer, TrainerConfig

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A model in one file, and the same in several; both with a tokenizer."""
    folder = tmp_path_factory.mktemp("bases")
    vocabulary = {f"w{i}": i for i in range(130)} | {"<unk>": 130}
    for name, size in (("one", "1GB"), ("many", "60KB")):
        make_hf_model(folder / name, "qwen3", seed=0, max_shard_size=size, num_hidden_layers=2)
        words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0").save_pretrained(folder / name)
    return folder


def write(name, contents):
    return lambda path: (path / name).write_bytes(contents if isinstance(contents, bytes) else contents.encode())


def put(name, **changes):
    def change(path):
        contents = json.loads((path / name).read_text()) if (path / name).exists() else {}
        (path / name).write_text(json.dumps({**contents, **changes}))

    return change


def drop(*names):
    return lambda path: [(path / name).unlink() for name in names]


def replaced_by(name, make):
    """Something else in the place of a file."""

    def change(path):
        (path / name).unlink(missing_ok=True)
        make(path / name)

    return change


def tensors(edit):
    def change(path):
        held = load_file(path / WEIGHTS)
        edit(held)
        save_file(held, path / WEIGHTS)

    return change


def header(contents, size=None, tail=b""):
    """A safetensors file with this header."""
    text = contents if isinstance(contents, bytes) else json.dumps(contents).encode()
    return write(WEIGHTS, struct.pack("<Q", len(text) if size is None else size) + text + tail)


def weight_map(edit):
    def change(path):
        contents = json.loads((path / INDEX).read_text())
        edit(contents["weight_map"])
        (path / INDEX).write_text(json.dumps(contents))

    return change


def first_shard(path):
    return sorted(path.glob("model-0*.safetensors"))[0]


def outside(target):
    """A link out of the directory, to a good file."""

    def make(link):
        shutil.copy(link.parent.parent / "copy" / target, link.parent.parent / "outside")
        link.symlink_to(link.parent.parent / "outside")

    return make


def of(offsets, dtype="F32", shape=(64,)):
    return {NORM: {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}}


# What is wrong: (change of a copy of the base "one", what the message says).
MODEL_FAULTS = {
    "no config": (drop(CONFIG), "no config.json"),
    "empty config": (write(CONFIG, ""), "config.json is empty"),
    "half a config": (write(CONFIG, '{"model_type": "qwen3", '), "config.json is not valid JSON"),
    "a list": (write(CONFIG, "[]"), "config.json holds a list"),
    "binary config": (write(CONFIG, b"\xff\xfe{\x00}"), "config.json is not UTF-8"),
    "deep config": (write(CONFIG, '{"a":' * 200_000), "config.json is nested too deeply"),
    "a key twice": (write(CONFIG, '{"hidden_size": 64, "hidden_size": 32}'), "key 'hidden_size' is there twice"),
    "huge integer": (write(CONFIG, '{"model_type": "qwen3", "vocab_size": ' + "9" * 5000 + "}"), "config.json"),
    "pickled config": (write(CONFIG, payload("/nowhere")), "config.json"),
    "large config": (write(CONFIG, b" " * (64 * 2**20 + 1)), "config.json is larger than"),
    "no model_type": (put(CONFIG, model_type=None), "model_type = None"),
    "unknown model_type": (put(CONFIG, model_type="gpt_neo"), "model_type = 'gpt_neo'"),
    "other architecture": (put(CONFIG, architectures=["Qwen3Evil"]), "architectures"),
    "negative size": (put(CONFIG, hidden_size=-64), "hidden_size = -64"),
    "size as text": (put(CONFIG, intermediate_size="96"), "intermediate_size = '96'"),
    "no layers": (put(CONFIG, num_hidden_layers=0), "num_hidden_layers = 0"),
    "a billion layers": (put(CONFIG, num_hidden_layers=10**9), "num_hidden_layers = 1000000000"),
    "a billion positions": (put(CONFIG, max_position_embeddings=10**9), "max_position_embeddings"),
    "a million wide": (put(CONFIG, hidden_size=2**20, intermediate_size=2**22), "does not hold the weights"),
    "no heads": (put(CONFIG, num_attention_heads=0), "num_attention_heads = 0"),
    "heads that do not divide": (put(CONFIG, num_key_value_heads=3), "num_key_value_heads = 3"),
    "another head_dim": (put(CONFIG, head_dim=64), "does not hold the weights"),
    "odd head_dim": (put(CONFIG, head_dim=33), "head_dim = 33"),
    "epsilon NaN": (write("x", ""), "rms_norm_eps = nan"),
    "epsilon as text": (put(CONFIG, rms_norm_eps="1e-6"), "rms_norm_eps = '1e-6'"),
    "theta infinite": (put(CONFIG, rope_parameters={"rope_theta": 1e999}), "rope_theta = inf"),
    "unknown rope": (put(CONFIG, rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}), "longrope"),
    "quantised": (put(CONFIG, quantization_config={"quant_method": "awq"}), "quantization_config"),
    "one layer more": (put(CONFIG, num_hidden_layers=3, layer_types=None), "missing: model.layers.2."),
    "generation garbage": (write("generation_config.json", "{"), "generation_config.json is not valid JSON"),
    "generation eos": (put("generation_config.json", eos_token_id="end"), "generation_config.json: eos_token_id"),
    "no weights": (drop(WEIGHTS), "neither model.safetensors nor"),
    "weights of torch": (replaced_by(WEIGHTS, lambda p: torch.save({}, p.with_name("pytorch_model.bin"))), "a pickle"),
    "weights of a vendor": (lambda p: (p / WEIGHTS).rename(p / "consolidated.safetensors"), "vendor's own names"),
    "empty weights": (write(WEIGHTS, ""), "model.safetensors is damaged"),
    "pickled weights": (write(WEIGHTS, payload("/nowhere")), "model.safetensors is damaged"),
    "cut weights": (lambda p: os.truncate(p / WEIGHTS, (p / WEIGHTS).stat().st_size - 4), "is damaged"),
    "header of 2^60": (header({}, size=2**60), "is damaged"),
    "header of -1": (header({}, size=2**64 - 1), "is damaged"),
    "header garbage": (header(b"{not json"), "is damaged"),
    "header deep": (header(b'{"a":' * 10**5), "is damaged"),
    "offsets beyond": (header(of([0, 2**40]), tail=bytes(256)), "is damaged"),
    "offsets negative": (header(of([-256, 0]), tail=bytes(256)), "is damaged"),
    "offsets turned": (header(of([256, 0]), tail=bytes(256)), "is damaged"),
    "shape beyond": (header(of([0, 256], shape=(2**40, 2**40)), tail=bytes(256)), "is damaged"),
    "unknown dtype": (header(of([0, 256], dtype="F3"), tail=bytes(256)), "is damaged"),
    "a tensor less": (tensors(lambda t: t.pop(NORM)), "missing: model.norm.weight"),
    "a tensor more": (tensors(lambda t: t.update({"model.evil": torch.ones(1)})), "unexpected: model.evil"),
    "an ugly name": (tensors(lambda t: t.update({"a\n\x1b[2J": torch.ones(1)})), "unexpected: 'a"),
    "a shape": (tensors(lambda t: t.update({NORM: torch.ones(65)})), "misshapen: model.norm.weight"),
    "a dtype": (tensors(lambda t: t.update({NORM: torch.ones(64, dtype=torch.int32)})), "dtype I32"),
    "a folder as config": (replaced_by(CONFIG, lambda p: p.mkdir()), "config.json is a directory"),
    "a pipe as config": (replaced_by(CONFIG, os.mkfifo), "config.json is a pipe"),
    "a pipe as weights": (replaced_by(WEIGHTS, os.mkfifo), "model.safetensors is a pipe"),
    "a pipe as defaults": (replaced_by("generation_config.json", os.mkfifo), "generation_config.json is a pipe"),
    "a folder as weights": (replaced_by(WEIGHTS, lambda p: p.mkdir()), "model.safetensors is a directory"),
    "a device as config": (replaced_by(CONFIG, lambda p: p.symlink_to("/dev/zero")), "link out of its directory"),
    "a link to itself": (replaced_by(CONFIG, lambda p: p.symlink_to(p)), "config.json cannot be read"),
    "a link to nothing": (replaced_by(WEIGHTS, lambda p: p.symlink_to("gone")), "is a link to nothing"),
    "weights outside": (replaced_by(WEIGHTS, outside(CONFIG)), "link out of its directory"),
}
# The same for the base "many".
INDEX_FAULTS = {
    "no map": (put(INDEX, weight_map=None), "has no weight_map"),
    "a list as map": (put(INDEX, weight_map=["a"]), "has no weight_map"),
    "numbers as files": (weight_map(lambda m: m.update({NORM: 3})), "has no weight_map"),
    "index garbage": (write(INDEX, "{"), "not valid JSON"),
    "a path upwards": (weight_map(lambda m: m.update({NORM: "../one/model.safetensors"})), "not followed"),
    "an absolute path": (weight_map(lambda m: m.update({NORM: "/etc/x.safetensors"})), "not followed"),
    "a path downwards": (weight_map(lambda m: m.update({NORM: "a/x.safetensors"})), "not followed"),
    "another kind of file": (weight_map(lambda m: m.update({NORM: "pytorch_model.bin"})), "no safetensors file"),
    "a zero byte": (weight_map(lambda m: m.update({NORM: "a\0.safetensors"})), "not the name of a file"),
    "an empty map": (put(INDEX, weight_map={}), "missing: "),
    "a file that is not there": (lambda p: first_shard(p).unlink(), "does not exist"),
    "a tensor elsewhere": (weight_map(lambda m: m.update({NORM: min(m.values())})), "differs from model.safetensors"),
    "a tensor twice": (weight_map(lambda m: m.pop(NORM)), "not in the index: model.norm.weight"),
    "a link out": (lambda p: replaced_by(first_shard(p).name, outside(CONFIG))(p), "link out of its directory"),
    "a pipe": (lambda p: replaced_by(first_shard(p).name, os.mkfifo)(p), "is a pipe"),
    "parts alone": (drop(INDEX), "without their index"),
}


def growing(path):
    twice = normalizers.Replace("a", "aaaa")
    words = Tokenizer.from_file(str(path / "tokenizer.json"))
    words.normalizer = normalizers.Sequence([twice] * 4)
    words.save(str(path / "tokenizer.json"))


def remote_code(path):
    put("tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]})(path)
    (path / "evil.py").write_text(f"import os\nos.mkdir({str(path / 'ran')!r})\nclass Evil: pass\n")
    (path / "tokenizer.json").unlink()


TOKENIZER_FAULTS = {
    "garbage": (write("tokenizer.json", "{"), "the tokenizer of"),
    "empty": (write("tokenizer.json", ""), "the tokenizer of"),
    "a list": (write("tokenizer.json", "[]"), "the tokenizer of"),
    "deep": (write("tokenizer.json", '{"a":' * 10**5), "the tokenizer of"),
    "a pickle": (write("tokenizer.json", payload("/nowhere")), "the tokenizer of"),
    "config garbage": (write("tokenizer_config.json", "{"), "tokenizer_config.json is not valid JSON"),
    "config a list": (write("tokenizer_config.json", "[]"), "tokenizer_config.json holds a list"),
    "a pipe": (replaced_by("tokenizer.json", os.mkfifo), "tokenizer.json is a pipe"),
    "a pipe as template": (replaced_by("chat_template.jinja", os.mkfifo), "chat_template.jinja is a pipe"),
    "a folder": (replaced_by("tokenizer.json", lambda p: p.mkdir()), "tokenizer.json is a directory"),
    "a link out": (replaced_by("tokenizer.json", outside(CONFIG)), "link out of its directory"),
    "growth": (growing, "makes up to 256 characters of one"),
    "code": (remote_code, "the tokenizer of"),
}
FAULTS = [
    *(("one", name, *fault) for name, fault in MODEL_FAULTS.items()),
    *(("many", name, *fault) for name, fault in INDEX_FAULTS.items()),
]


def refusals(folder, directory):
    """What each reader of a model directory says."""
    options = {"device": "cpu", "dtype": "float32", "kv_cache_tokens": 64}
    readers = {
        "engine": lambda: Engine(EngineConfig(model=str(directory), **options)),
        "trainer": lambda: MegatronTrainer(TrainerConfig(model=str(directory))),
        "convert": lambda: convert(ConvertConfig(model=str(directory), output=str(folder / "out"))),
    }
    for name, read in readers.items():
        started = time.monotonic()
        with pytest.raises(ValueError, match=r".") as refused:
            read()
        assert time.monotonic() - started < 20, name
        yield str(refused.value)


def copied(bases, base, folder):
    shutil.copytree(bases / base, folder / "model")
    shutil.copytree(bases / base, folder / "copy")
    return folder / "model"


@pytest.mark.parametrize(("base", "name", "fault", "message"), FAULTS, ids=[f"{f[0]}: {f[1]}" for f in FAULTS])
def test_a_fault_of_the_model_is_one_line(base, name, fault, message, bases, tmp_path):
    directory = copied(bases, base, tmp_path)
    fault(directory)
    if name == "epsilon NaN":
        text = (directory / CONFIG).read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": NaN')
        (directory / CONFIG).write_text(text)
    for refusal in refusals(tmp_path, directory):
        assert message in refusal
        assert str(directory) in refusal
        assert "\n" not in refusal
        assert refusal.isprintable()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", TOKENIZER_FAULTS)
def test_a_fault_of_the_tokenizer_is_one_line(name, bases, tmp_path):
    directory = copied(bases, "one", tmp_path)
    fault, message = TOKENIZER_FAULTS[name]
    fault(directory)
    options = {"device": "cpu", "dtype": "float32", "kv_cache_tokens": 64}
    for read in (
        lambda: load_tokenizer(directory),
        lambda: Engine(EngineConfig(model=str(directory), **options)),
    ):
        with pytest.raises(ValueError, match=r".") as refused:
            read()
        assert message in str(refused.value)
        assert str(directory) in str(refused.value)
        assert "\n" not in str(refused.value)
    assert not (directory / "ran").exists()


def test_files_that_may_not_be_read_are_named(bases, tmp_path):
    directory = copied(bases, "one", tmp_path)
    (directory / CONFIG).chmod(0)
    if os.access(directory / CONFIG, os.R_OK):
        pytest.skip("this user may read everything")
    assert all("config.json cannot be read: permission denied" in text for text in refusals(tmp_path, directory))


@pytest.mark.parametrize("base", ["one", "many"])
def test_links_as_the_hub_cache_has_them_are_followed(base, bases, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1234", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(bases / base, blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    trainer = MegatronTrainer(TrainerConfig(model=str(snapshot)))
    assert trainer.weights_hash() == MegatronTrainer(TrainerConfig(model=str(bases / base))).weights_hash()
    assert load_tokenizer(snapshot).encode("w3") == [3]


def test_of_several_sets_of_weights_the_one_of_transformers_is_taken(bases, tmp_path):
    directory = copied(bases, "many", tmp_path)
    shutil.copy(bases / "one" / WEIGHTS, directory)
    tensors(lambda t: t[NORM].add_(1))(directory)
    for other in ("pytorch_model.bin", "consolidated.safetensors", "model.fp16.safetensors"):
        write(other, payload(tmp_path / "ran"))(directory)
    trainer = MegatronTrainer(TrainerConfig(model=str(directory)))
    norm = dict(trainer.named_weights())["decoder.final_layernorm.weight"]
    assert torch.equal(norm, load_file(bases / "one" / WEIGHTS)[NORM] + 1)
    (directory / WEIGHTS).unlink()
    trainer = MegatronTrainer(TrainerConfig(model=str(directory)))
    norm = dict(trainer.named_weights())["decoder.final_layernorm.weight"]
    assert torch.equal(norm, load_file(bases / "one" / WEIGHTS)[NORM])
    assert not (tmp_path / "ran").exists()
