"""Draft directories as others publish them: the same draft, with the same layers of the target, or one line why not."""

import json
import shutil

import pytest
import torch
from drafts import make_draft
from models import make_hf_model, tiny_config
from pickles import payload
from safetensors.torch import load_file, save_file

from lockstep.engine import Engine, EngineConfig, SamplingParams
from lockstep.engine.checkpoints.draft_checkpoint import load_draft, save_draft
from lockstep.engine.checkpoints.draft_config import choose_engine, config_json, layer_ids, load_draft_config
from lockstep.engine.models.config import load_model_config, parse_model_config
from lockstep.recipes.conversion.config import ConvertConfig
from lockstep.recipes.conversion.convert import run as convert

LAYERS = 8
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A target and a draft for it, as we write it for SGLang; and the draft itself."""
    folder = tmp_path_factory.mktemp("draft")
    make_hf_model(folder / "target", "qwen3", seed=3, num_hidden_layers=LAYERS)
    embedding = load_file(folder / "target" / WEIGHTS)["model.embed_tokens.weight"]
    target = load_model_config(folder / "target")
    draft = make_draft(target, draft_vocab_size=60, seed=4, embedding=embedding, aux_layers=(2, 4, 5))
    assert save_draft(folder / "draft", draft, target=target) == "sglang"
    return folder, target, draft


def edit(path, config=lambda c: c, tensors=lambda t: t):
    contents = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config(contents)))
    save_file({k: v.clone() for k, v in tensors(load_file(path / WEIGHTS)).items()}, path / WEIGHTS)


def without(contents, *keys):
    return {key: value for key, value in contents.items() if key not in keys}


def as_layers_0(tensors):
    return {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}


def spec_forge(path):
    """SpecForge and SGLang: numbers of the layers that are left, inside eagle_config."""
    edit(path, lambda c: {**without(c, "lockstep_aux_layers", "fc_norm", "norm_output"), "use_cache": True})


def first_party(path):
    """The authors' own: a plain Llama by name, the length it was trained at, no layer ids (those are the default's)."""
    names = ("lockstep_aux_layers", "eagle_config", "fc_norm", "norm_output", "head_dim", "dtype")
    plain = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 64, "torch_dtype": "float32"}
    edit(path, lambda c: {**without(c, *names), **plain, "head_dim": 32, "bos_token_id": 1, "pad_token_id": -1})


def model_optimizer(path):
    """NVIDIA's: layers.0, and the rotary frequencies in the file."""
    frequencies = {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    edit(path, lambda c: without(c, "lockstep_aux_layers"), lambda t: {**as_layers_0(t), **frequencies})


def vllm_plain(path):
    """Numbers of the layers that are entered, outside."""
    names = ("lockstep_aux_layers", "eagle_config")
    outside = {"eagle_aux_hidden_state_layer_ids": [2, 4, 5], "architectures": ["Eagle3LlamaForCausalLM"]}
    edit(path, lambda c: {**without(c, *names), **outside})


def speculators(path):
    """vLLM's training tool: the layer's config inside, copies of the target's embedding and head in the file."""
    shared = load_file(path.parent / "target" / WEIGHTS)

    def config(c):
        inner = without(c, "lockstep_aux_layers", "eagle_config", "fc_norm", "norm_output", "draft_vocab_size")
        inner |= {"architectures": ["LlamaForCausalLM"], "do_sample": False, "chunk_size_feed_forward": 0}
        return {
            "architectures": ["Eagle3Speculator"],
            "auto_map": {"": "config.Eagle3SpeculatorConfig"},
            "draft_vocab_size": c["draft_vocab_size"],
            "eagle_aux_hidden_state_layer_ids": [2, 4, 5],
            "norm_before_residual": False,
            "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "x"}},
            "speculators_model_type": "eagle3",
            "speculators_version": "0.4.0",
            "target_hidden_size": None,
            "transformer_layer_config": inner,
        }

    copies = {
        "embed_tokens.weight": shared["model.embed_tokens.weight"],
        "verifier_lm_head.weight": shared["lm_head.weight"],
        "verifier_norm.weight": shared["model.norm.weight"],
    }
    edit(path, config, lambda t: {**as_layers_0(t), **copies})


def no_mask(path):
    edit(path, tensors=lambda t: without(t, "t2d"))


def several_files(path):
    tensors = load_file(path / WEIGHTS)
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, path / file)
    index = {"weight_map": {name: file for file, held in files.items() for name in held}}
    (path / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    (path / WEIGHTS).unlink()


LAYOUTS = (spec_forge, first_party, model_optimizer, vllm_plain, speculators, no_mask, several_files)


def copied(base, folder, layout):
    shutil.copytree(base[0] / "draft", folder / "draft")
    shutil.copytree(base[0] / "target", folder / "target")
    layout(folder / "draft")
    return folder / "draft"


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_every_layout_is_the_same_draft(layout, base, tmp_path):
    _, target, draft = base
    again = load_draft(copied(base, tmp_path, layout), target, draft._embedding_weight[0])
    assert again.config == draft.config
    assert torch.equal(again.token_map, draft.token_map)
    for name, parameter in draft.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


def test_every_layout_proposes_the_same_tokens(base, tmp_path):
    """And what it proposes is accepted or not; the tokens that come out are those of the target alone."""
    options = {"kv_cache_tokens": 512, "draft_max_requests": 8, "draft_min_accepted": 0.0, "num_draft_tokens": 3}
    params = SamplingParams(max_tokens=24, temperature=1.0, seed=5)

    def served(draft_model, layer_ids="auto"):
        config = {**options, "draft_model": str(draft_model), "draft_layer_ids": layer_ids}
        engine = Engine(EngineConfig(model=str(base[0] / "target"), **config))
        (output,) = engine.generate([[1, 2, 3, 4]], params)
        counts = {name: value for name, value in engine.stats().items() if name.startswith(("drafted", "accepted_"))}
        drafts = engine.runner.draft.aux_layers
        engine.shutdown()
        return output.token_ids, counts, drafts != ()

    expected = served(base[0] / "draft")
    for layout in (first_party, speculators):
        folder = tmp_path / layout.__name__
        folder.mkdir()
        assert served(copied(base, folder, layout)) == expected
    # The other engine's numbers are other layers, and so another draft; never other tokens.
    other = served(base[0] / "draft", "vllm")
    assert other[0] == expected[0]
    assert load_draft_config(base[0] / "draft", base[1], "vllm").aux_layers == (1, 3, 4)


def test_a_draft_of_all_tokens_may_leave_out_its_vocabulary_and_head(base, tmp_path):
    folder, target, _ = base
    shared = load_file(folder / "target" / WEIGHTS)
    draft = make_draft(target, draft_vocab_size=131, seed=4, embedding=shared["model.embed_tokens.weight"])
    with torch.no_grad():
        draft.output_layer.weight.copy_(shared["lm_head.weight"])
    save_draft(tmp_path / "draft", draft)
    left_out = ("d2t", "t2d", "lm_head.weight")
    edit(tmp_path / "draft", lambda c: {**c, "draft_vocab_size": None}, lambda t: without(t, *left_out))
    again = load_draft(tmp_path / "draft", target, draft._embedding_weight[0], head_weight=shared["lm_head.weight"])
    assert torch.equal(again.output_layer.weight, shared["lm_head.weight"])
    assert torch.equal(again.token_map, torch.arange(131))


def test_a_draft_for_other_words_is_refused(base, tmp_path):
    path = copied(base, tmp_path, lambda p: edit(p, tensors=lambda t: without(t, "d2t", "t2d")))
    with pytest.raises(ValueError, match="missing d2t"):
        load_draft(path, base[1], base[2]._embedding_weight[0])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"speculators_model_type": "eagle"}, "speculators_model_type = 'eagle'"),
        ({"transformer_layer_config": []}, "transformer_layer_config"),
        ({"norm_before_fc": True}, "norm_before_fc"),
        ({"embedding_scale": 2.0}, "embedding_scale = 2.0: unknown key"),
        ({"eagle_aux_hidden_state_layer_ids": [2, 4, 5, 6]}, "expected 3"),
    ],
    ids=str,
)
def test_speculators_that_we_would_not_compute_are_refused(change, named, base, tmp_path):
    path = copied(base, tmp_path, speculators)
    edit(path, lambda c: c | change)
    with pytest.raises(ValueError, match=named) as refused:
        load_draft(path, base[1], base[2]._embedding_weight[0])
    assert "\n" not in str(refused.value)


def test_the_kind_of_residual_is_never_guessed(base, tmp_path):
    path = copied(base, tmp_path, speculators)
    edit(path, lambda c: {**c, "norm_before_residual": True})
    assert load_draft_config(path, base[1]).norm_before_residual
    edit(path, lambda c: without(c, "norm_before_residual"))
    with pytest.raises(ValueError, match="norm_before_residual = None"):
        load_draft_config(path, base[1])


def test_numbers_that_contradict_each_other_are_asked_about(base, tmp_path):
    path = copied(base, tmp_path, spec_forge)
    edit(path, lambda c: {**c, "eagle_aux_hidden_state_layer_ids": [2, 4, 5]})
    with pytest.raises(ValueError, match="draft_layer_ids"):
        load_draft_config(path, base[1])
    assert load_draft_config(path, base[1], "sglang").aux_layers == (2, 4, 5)
    assert load_draft_config(path, base[1], "vllm").aux_layers == (2, 4, 5)
    with pytest.raises(ValueError, match="draft_layer_ids must be one of"):
        load_draft_config(path, base[1], "trt")


def _raw(family):
    return json.loads(json.dumps(tiny_config(family).to_dict()))


@pytest.mark.parametrize(
    ("family", "engine", "aux_layers", "ids"),
    [
        ("qwen3", "sglang", (2, 4, 5), [1, 3, 4]),
        ("qwen3", "vllm", (2, 4, 5), [2, 4, 5]),
        ("llama", "sglang", (1, 2, 3), [0, 1, 2]),
        ("llama", "sglang", (0, 1, 2), None),
        ("llama", "sglang", (2, 4, 8), None),
        ("llama", "vllm", (0, 1, 8), [0, 1, 8]),
        ("deepseek_v2", "sglang", (2, 4, 5), [1, 3, 4]),
        ("deepseek_v2", "sglang", (3, 4, 5), [3, 4, 5]),
        ("deepseek_v2", "sglang", (0, 4, 5), [0, 4, 5]),
        ("deepseek_v2", "sglang", (1, 4, 5), None),
        ("deepseek_v2", "vllm", (1, 4, 5), [1, 4, 5]),
    ],
)
def test_layer_ids_of_each_engine(family, engine, aux_layers, ids, tmp_path):
    sizes = {"num_hidden_layers": 8, "layer_types": None, "first_k_dense_replace": 8}
    target = parse_model_config({**_raw(family), **sizes})
    assert layer_ids(engine, aux_layers, target) == ids
    if ids is None:
        assert choose_engine(None, aux_layers, target) == "vllm"
        with pytest.raises(ValueError, match="has no numbers for; export_for=vllm has"):
            choose_engine(engine, aux_layers, target)
        return
    assert min(ids) >= 0
    # What we write for an engine we read back by that engine's rule, without our own key too.
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 32}
    draft = make_draft(target, aux_layers=aux_layers, **heads)
    (tmp_path / "config.json").write_text(json.dumps(config_json(draft.config, torch.float32, engine, target)))
    for numbers_of in ("auto", engine):
        assert load_draft_config(tmp_path, target, numbers_of).aux_layers == aux_layers


def test_convert_writes_a_draft_for_either_engine(base, tmp_path):
    path = copied(base, tmp_path, speculators)
    options = {"model": str(tmp_path / "target"), "draft": str(path)}
    for engine, ids in (("sglang", [1, 3, 4]), ("vllm", [2, 4, 5])):
        summary = convert(ConvertConfig(**options, output=str(tmp_path / engine), export_for=engine))
        assert (summary["layer_ids_for"], summary["aux_layers"]) == (engine, [2, 4, 5])
        written = json.loads((tmp_path / engine / "config.json").read_text())
        assert written["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == ids
        again = load_draft(tmp_path / engine, base[1], base[2]._embedding_weight[0])
        assert all(torch.equal(again.get_parameter(name), p) for name, p in base[2].named_parameters())
    with pytest.raises(ValueError, match="vllm exists"):
        convert(ConvertConfig(**options, output=str(tmp_path / "vllm")))


def test_pickled_weights_are_refused_with_the_command_that_converts_them(base, tmp_path):
    path = copied(base, tmp_path, first_party)
    tensors = load_file(path / WEIGHTS)
    (path / WEIGHTS).unlink()
    torch.save(tensors, path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=rf"lockstep convert draft={path} model=TARGET .*allow_pickle=true"):
        load_draft(path, base[1], base[2]._embedding_weight[0])
    options = {"model": str(tmp_path / "target"), "draft": str(path), "output": str(tmp_path / "new")}
    with pytest.raises(ValueError, match="a pickle"):
        convert(ConvertConfig(**options))
    convert(ConvertConfig(**options, allow_pickle=True))
    again = load_draft(tmp_path / "new", base[1], base[2]._embedding_weight[0])
    assert all(torch.equal(again.get_parameter(name), p) for name, p in base[2].named_parameters())
    (path / "pytorch_model.bin").write_bytes(payload(tmp_path / "ran"))
    with pytest.raises(ValueError, match="cannot be converted"):
        convert(ConvertConfig(**{**options, "output": str(tmp_path / "other")}, allow_pickle=True))
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "other").exists()
