"""Tokenizers of foreign directories: no field and no regular expression hangs, or fails anywhere but at loading."""

import json
import shutil
import time

import pytest
from models import make_hf_model
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from lockstep.engine.text import tokenizer_probe
from lockstep.engine.text.chat_template import MAX_TEMPLATE_CHARACTERS, set_chat_options
from lockstep.engine.text.config import ChatConfig
from lockstep.engine.text.end_of_turn import end_of_turn
from lockstep.engine.text.tokenizer import load_tokenizer
from lockstep.rollout.config import TokenizerConfig
from lockstep.rollout.tokenizer import build_tokenizer, render_prompt

CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
WRONG = (
    None,
    True,
    -1,
    0,
    2**70,
    1e300,
    "long",
    "",
    "a\nb",
    [],
    [1],
    [[]],
    {},
    {"a": 1},
    {"1": {}},
    {"-1": {"content": 3}},
)
# Beside those that a saved tokenizer has; transformers 5 writes fewer than published models hold.
KEYS = {
    CONFIG: (
        "model_max_length",
        "max_length",
        "tokenizer_class",
        "chat_template",
        "padding_side",
        "truncation_side",
        "bos_token",
        "eos_token",
        "unk_token",
        "pad_token",
        "mask_token",
        "image_token",
        "additional_special_tokens",
        "extra_special_tokens",
        "added_tokens_decoder",
        "model_input_names",
        "add_bos_token",
        "add_eos_token",
        "add_prefix_space",
        "clean_up_tokenization_spaces",
        "split_special_tokens",
        "legacy",
        "auto_map",
        "name_or_path",
        "processor_class",
        "tokenizer_file",
        "vocab_file",
        "sp_model_kwargs",
        "errors",
        "backend",
        "is_local",
        "init_inputs",
        "special_tokens_map_file",
        "model_specific_special_tokens",
        "fix_mistral_regex",
        "stride",
        "max_len",
        "pad_to_multiple_of",
        "pad_token_type_id",
        "use_fast",
        "from_slow",
        "gguf_file",
        "revision",
        "local_files_only",
    ),
    MAP: ("bos_token", "eos_token", "unk_token", "additional_special_tokens", "extra_special_tokens", "odd"),
    ADDED: ("<new>", ""),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "base"
    build_tokenizer(["What is 3 + 4?"], TokenizerConfig(vocab_size=270)).save_pretrained(folder)
    return folder


def changed(saved, folder, file, **values):
    shutil.copytree(saved, folder)
    path = folder / file
    contents = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**contents, **values}))
    return folder


def used(folder):
    """Loads a tokenizer and does with it what a run does; the refusal, if it is one."""
    try:
        tokenizer = load_tokenizer(folder)
        set_chat_options(tokenizer, ChatConfig())
        end_of_turn(tokenizer)
        tokenizer.decode(render_prompt(tokenizer, [{"role": "user", "content": "hi <|end|>"}]))
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("file", "key"), [(file, key) for file, keys in KEYS.items() for key in keys])
def test_a_wrong_value_is_a_line_or_does_no_harm(file, key, saved, tmp_path):
    for number, value in enumerate(WRONG):
        folder = changed(saved, tmp_path / str(number), file, **{key: value})
        refusal = used(folder)
        if refusal is not None:
            assert "\n" not in refusal, value
            assert str(folder) in refusal or "nothing says where a turn" in refusal, value


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        (CONFIG, "model_max_length", "long"),
        (CONFIG, "model_max_length", -1),
        (CONFIG, "eos_token", 3),
        (CONFIG, "pad_token", {"content": None}),
        (CONFIG, "mask_token", ["<mask>"]),
        (CONFIG, "additional_special_tokens", [3]),
        (CONFIG, "extra_special_tokens", "x"),
        (CONFIG, "added_tokens_decoder", {"-1": {"content": "x"}}),
        (CONFIG, "added_tokens_decoder", {str(2**40): {"content": "x"}}),
        (CONFIG, "padding_side", "middle"),
        (CONFIG, "tokenizer_class", 5),
        (CONFIG, "clean_up_tokenization_spaces", "no"),
        (MAP, "eos_token", []),
        (MAP, "additional_special_tokens", {}),
        (ADDED, "<new>", "3"),
        (ADDED, "<new>", -3),
    ],
)
def test_a_field_of_another_type_is_named(file, key, value, saved, tmp_path):
    refusal = used(changed(saved, tmp_path / "m", file, **{key: value}))
    assert refusal is not None
    assert f"{file}: " in refusal
    assert key in refusal
    assert "it must be" in refusal


SLOW = {
    "exponential": r"^(([a-z])+.)+[A-Z]([a-z])+$",
    "runs of runs": r"(x+x+)+y",
    "of a character that it names": "(\u2764|\u2764\u2764)*(\u2764|\u2764\u2764)*(\u2764|\u2764\u2764)*[^\u2764]$",
    "of two characters": r"((qz)+(qz)+)+w",
    "of spaces": r"(\s+\s+)+\d",
    "polynomial": r"(\d*){1}(\d*)(\d*)(\d*)(\d*)(\d*)x",
}


@pytest.mark.parametrize("where", ["pre-tokenizer", "normalizer"])
@pytest.mark.parametrize("name", SLOW)
def test_a_slow_regular_expression_is_refused_in_time(name, where, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_probe, "DEADLINE_S", 3.0)
    tokenizer_probe._fault.cache_clear()
    folder = changed(saved, tmp_path / "m", CONFIG)
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if where == "normalizer":
        made.normalizer = normalizers.Sequence([normalizers.Replace(Regex(SLOW[name]), "")])
    else:
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SLOW[name]), "isolated")])
    made.save(str(folder / "tokenizer.json"))
    started = time.monotonic()
    refusal = used(folder)
    assert refusal is not None
    assert time.monotonic() - started < 20
    assert f"{folder}/tokenizer.json: it " in refusal
    assert "its regular expressions are" in refusal
    assert "\n" not in refusal


# Llama 3's, Qwen 2's, GPT-2's written out, DeepSeek's parts, and what SmolLM has.
PUBLISHED = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
)


@pytest.mark.parametrize("pattern", PUBLISHED, ids=range(len(PUBLISHED)))
def test_published_regular_expressions_are_taken(pattern, saved, tmp_path):
    folder = changed(saved, tmp_path / "m", CONFIG)
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    made.save(str(folder / "tokenizer.json"))
    assert used(folder) is None


@pytest.mark.parametrize("where", ["file", "config", "option"])
def test_a_chat_template_of_megabytes_is_refused(where, saved, tmp_path):
    folder, large = changed(saved, tmp_path / "m", CONFIG), "x" * (MAX_TEMPLATE_CHARACTERS + 1)
    options = ChatConfig()
    if where == "config":
        (folder / "chat_template.jinja").unlink()
        (folder / CONFIG).write_text(json.dumps({**json.loads((folder / CONFIG).read_text()), "chat_template": large}))
    else:
        (folder / "chat_template.jinja").write_text(large)
    if where == "option":
        options = ChatConfig(template=str(folder / "chat_template.jinja"))
    with pytest.raises(ValueError, match=r"chat template .*characters; give another with chat.template=FILE"):
        set_chat_options(load_tokenizer(saved if where == "option" else folder), options)


DIRECTORIES = {
    "nothing": ({}, "no config.json in"),
    "an adapter": ({"adapter_config.json": "{}", "adapter_model.safetensors": ""}, "this is an adapter"),
    "an adapter with a tokenizer's config": ({"adapter_config.json": "{}", CONFIG: "{}"}, "this is an adapter"),
    "a run": ({"config.yaml": "", "metrics.jsonl": ""}, "this is a run"),
    "a checkpoint": ({"checkpoint.json": "{}"}, "this is a training checkpoint"),
    "GGUF": ({"a.gguf": ""}, "GGUF"),
    "weights alone": ({"model.safetensors": ""}, "no config.json in"),
    "config garbage": ({"config.json": "{"}, "config.json is not valid JSON"),
    "config of another family": ({"config.json": '{"model_type": "bert"}'}, "model_type = 'bert'"),
    "config of another type": ({"config.json": '{"model_type": 3}', CONFIG: "{}"}, "model_type = 3"),
    "config without a tokenizer": (None, "holds no tokenizer: fetch tokenizer.json"),
}


@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_directory_without_a_tokenizer_is_called_what_it_is(name, tmp_path):
    files, message = DIRECTORIES[name]
    if files is None:
        make_hf_model(tmp_path, "llama", seed=0)
    for file, text in (files or {}).items():
        (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=r".") as refused:
        load_tokenizer(tmp_path)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "the tokenizer of" not in str(refused.value)
