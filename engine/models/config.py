"""The shape of a model as the engine and the trainer see it, read from a transformers directory's config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lockstep.engine.foreign_files import MissingFileError, has_file, read_json
from lockstep.engine.models.families import FAMILIES
from lockstep.engine.models.families.family import (
    MAX_EXPERT_MLPS,
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_SIZE,
    Family,
    UnsupportedModelError,
    is_number,
    read_flag,
    read_number,
    read_size,
    shown,
    unsupported,
)
from lockstep.engine.models.families.latent import MLAConfig, with_mscale
from lockstep.engine.models.moe import MoEConfig

__all__ = [
    "Head",
    "MLAConfig",
    "MoEConfig",
    "ModelConfig",
    "UnsupportedModelError",
    "as_scalar_model",
    "load_model_config",
    "parse_model_config",
]

Head = Literal["lm", "scalar"]

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
# What other tools read in a directory's place, by pattern, and what to do.
OTHER_FORMATS = {
    "*.gguf": "GGUF files are not read: take the model's safetensors",
    "params.json": "this is a vendor's own format: take the model's transformers format",
    "adapter_config.json": "this is an adapter: merge it into its model first",
    "metrics.jsonl": "this is a run: its model is the folder model in it, or lockstep convert makes it of a checkpoint",
    "checkpoint.json": "this is a training checkpoint: lockstep convert makes a model directory of it",
}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of a decoder. Sizes are numbers of elements; windows are in tokens.

    rope_scaling:  None, or transformers' `rope_parameters` without rope_theta, with rope_type and (where the type needs
                   it) original_max_position_embeddings always present.
    layer_windows: one per layer: the number of positions that a query sees, itself included; None for all before it.
    eos_token_ids: generation_config.json's where it names any, else config.json's.
    moe:           the layers whose MLP is a mixture of experts; None where all have one of ffn_hidden_size.
    mla:           multi-head latent attention; num_kv_heads is then 1, the latent, and head_dim its rotated elements.
    num_mtp_layers: layers behind the last one for multi-token prediction, which a checkpoint may hold; they are neither
                   read nor exported.
    head:          "lm", logits over the vocabulary; or "scalar", a number per token: a reward model's score, which is
                   its last token's, or a critic's values. tie_word_embeddings is false then.
    pad_token_id:  of config.json; a reward model's score is that of the last token that is another.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    proj_bias: bool
    mlp_bias: bool
    qk_norm: bool
    layer_windows: tuple[int | None, ...]
    eos_token_ids: tuple[int, ...]
    moe: MoEConfig | None = None
    mla: MLAConfig | None = None
    num_mtp_layers: int = 0
    head: Head = "lm"
    pad_token_id: int | None = None

    @property
    def has_output_matrix(self) -> bool:
        """Whether the logits have a matrix of their own."""
        return self.head == "lm" and not self.tie_word_embeddings

    @property
    def has_q_lora(self) -> bool:
        """Whether latent attention projects its queries down and up again."""
        return self.mla is not None and self.mla.q_lora_rank is not None

    @property
    def kv_elements_per_token(self) -> int:
        """What the KV cache holds for a token in one layer."""
        return 2 * self.num_kv_heads * self.head_dim if self.mla is None else self.mla.row_width

    def with_scalar_head(self) -> "ModelConfig":
        return replace(self, head="scalar", tie_word_embeddings=False)


def as_scalar_model(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the model with a scalar head and otherwise of the same shape."""
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return {**raw, "architectures": [architecture(FAMILIES[raw["model_type"]], "scalar")], **labels}


def architecture(family: Family, head: Head) -> str:
    """transformers' class."""
    name = family.architecture
    return name if head == "lm" else name.removesuffix("ForCausalLM") + "ForSequenceClassification"


def load_model_config(path: str | Path) -> ModelConfig:
    """Reads config.json and, where there is one, generation_config.json of the directory `path`.

    Raises MissingFileError without a config.json, ValueError for one that is no JSON object, and UnsupportedModelError,
    which names the key and its value, for a model that the engine would not compute as transformers does.
    """
    directory = Path(path)
    raw = read_config_json(directory)
    generation = read_json(directory, GENERATION_FILE) if has_file(directory, GENERATION_FILE) else {}
    try:
        return parse_model_config(raw, generation)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{directory}/{error}") from None


def read_config_json(directory: Path) -> dict[str, Any]:
    """The contents of a model directory's config.json. Raises MissingFileError and ValueError."""
    if not directory.is_dir():
        what = "it is a file" if directory.exists() else "there is no such directory"
        raise MissingFileError(f"no {CONFIG_FILE} in {directory}: {what}")
    if not has_file(directory, CONFIG_FILE):
        other = other_format(directory)
        hint = "" if other is None else f"; {other}"
        raise MissingFileError(f"no {CONFIG_FILE} in {directory}: it is no model directory of transformers{hint}")
    return read_json(directory, CONFIG_FILE)


def missing_config(directory: Path) -> str:
    """Why it is no model directory, where it has no config.json."""
    other = other_format(directory)
    return f"it has no {CONFIG_FILE}{'' if other is None else f'; {other}'}"


def other_format(directory: Path) -> str | None:
    """What a directory without a config.json is, and what to do, where that is known."""
    return next((what for name, what in OTHER_FORMATS.items() if any(directory.glob(name))), None)


def parse_model_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """ModelConfig from the contents of config.json and of generation_config.json. Raises UnsupportedModelError."""
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise unsupported("model_type", model_type, f"known families are {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    head = _head(raw, family)
    raw = {**family.defaults, **raw}
    _refuse_unsupported_options(raw)

    eos_token_id = (generation or {}).get("eos_token_id")
    eos_file = GENERATION_FILE
    if eos_token_id is None:
        eos_token_id, eos_file = raw.get("eos_token_id"), CONFIG_FILE
    num_layers = read_size(raw, "num_hidden_layers", MAX_LAYERS)
    max_positions = read_size(raw, "max_position_embeddings", MAX_POSITIONS)
    num_heads = read_size(raw, "num_attention_heads")
    rope_theta, rope_scaling = _parse_rope(raw)
    family_fields = family.parse(raw)
    if (moe := family_fields.get("moe")) is not None and len(moe.layers) * moe.num_experts > MAX_EXPERT_MLPS:
        raise unsupported("num_experts", moe.num_experts, f"{len(moe.layers)} layers have {MAX_EXPERT_MLPS} at most")
    if (mla := family_fields.get("mla")) is None:
        num_kv_heads, head_dim = _kv_heads_and_head_dim(raw, num_heads)
    else:
        num_kv_heads, head_dim = 1, mla.qk_rope_head_dim
        family_fields["mla"] = with_mscale(mla, rope_scaling)
    return ModelConfig(
        family=model_type,
        vocab_size=read_size(raw, "vocab_size"),
        hidden_size=read_size(raw, "hidden_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        ffn_hidden_size=read_size(raw, "intermediate_size"),
        rms_norm_eps=read_number(raw, "rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_position_embeddings=max_positions,
        tie_word_embeddings=head == "lm" and read_flag(raw, "tie_word_embeddings"),
        eos_token_ids=_token_ids(eos_token_id, eos_file),
        head=head,
        pad_token_id=_pad_token_id(raw),
        **family_fields,
    )


def _head(raw: Mapping[str, Any], family: Family) -> Head:
    architectures = raw.get("architectures")
    if not architectures or architectures == [family.architecture]:
        return "lm"
    if architectures != [architecture(family, "scalar")]:
        known = f"{family.architecture} or {architecture(family, 'scalar')}"
        raise unsupported("architectures", architectures, f"a {family.model_type} model must be a {known}")
    # transformers writes the labels, or nothing where there are two.
    labels = raw.get("id2label") or ("LABEL_0", "LABEL_1")
    if not isinstance(labels, (dict, tuple)):
        raise unsupported("id2label", labels, "expected an object")
    num_labels = raw.get("num_labels", len(labels))
    if num_labels != 1 or isinstance(num_labels, bool):
        raise unsupported("num_labels", num_labels, "a reward model has one score")
    return "scalar"


def _kv_heads_and_head_dim(raw: Mapping[str, Any], num_heads: int) -> tuple[int, int]:
    num_kv_heads = num_heads if raw.get("num_key_value_heads") is None else read_size(raw, "num_key_value_heads")
    if num_heads % num_kv_heads:
        raise unsupported("num_key_value_heads", num_kv_heads, f"it does not divide num_attention_heads = {num_heads}")
    hidden_size = read_size(raw, "hidden_size")
    if raw.get("head_dim") is not None:
        head_dim = read_size(raw, "head_dim")
    elif hidden_size % num_heads == 0:
        head_dim = hidden_size // num_heads
    else:
        raise unsupported(
            "hidden_size", hidden_size, f"without head_dim, num_attention_heads = {num_heads} must divide it"
        )
    if head_dim % 2:
        raise unsupported("head_dim", head_dim, "rotary embeddings need an even number")
    return num_kv_heads, head_dim


def _token_ids(value: object, file: str) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(token_id) is not int or not 0 <= token_id < MAX_SIZE for token_id in ids):
        expected = "expected a token id or a list of token ids"
        raise UnsupportedModelError(f"{file}: eos_token_id = {shown(value)} is not supported: {expected}")
    return tuple(ids)


def _pad_token_id(raw: Mapping[str, Any]) -> int | None:
    token_id = raw.get("pad_token_id")  # -1 in some Llamas, for none
    if token_id is not None and (type(token_id) is not int or abs(token_id) >= MAX_SIZE):
        raise unsupported("pad_token_id", token_id, "expected a token id or null")
    return token_id


# Options that change the arithmetic of some relative of these families: (key, values that mean "off").
_OPTIONS_THAT_MUST_BE_OFF: tuple[tuple[str, tuple[object, ...]], ...] = (
    ("attn_logit_softcapping", (None,)),
    ("final_logit_softcapping", (None,)),
    ("partial_rotary_factor", (None, 1)),
    ("per_layer_config", (None,)),
    ("quantization_config", (None,)),
)


def _refuse_unsupported_options(raw: Mapping[str, Any]) -> None:
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise unsupported("hidden_act", activation, "only silu is computed")
    for key, neutral_values in _OPTIONS_THAT_MUST_BE_OFF:
        if raw.get(key) not in neutral_values:
            raise unsupported(key, raw[key], "the engine does not compute it")


# The keys of each rope type: (required, optional), beside rope_theta and rope_type.
_ROPE_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}


def _parse_rope(raw: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(rope_theta, rope_scaling) from `rope_parameters`, or from the older `rope_theta` and `rope_scaling`.

    The precedence among them, and the default of original_max_position_embeddings, are those of transformers 5.
    """
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    parameters = raw.get(key) or {}
    if not isinstance(parameters, Mapping):
        raise unsupported(key, parameters, "expected an object")
    if parameters and all(isinstance(value, Mapping) for value in parameters.values()):
        per_layer_type = list(parameters.values())
        if any(value != per_layer_type[0] for value in per_layer_type):
            raise unsupported(key, parameters, "layer types with different rotary embeddings")
        parameters = per_layer_type[0]

    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if not isinstance(rope_type, str) or rope_type not in _ROPE_KEYS:
        raise unsupported(f"{key}.rope_type", rope_type, f"known types are {', '.join(_ROPE_KEYS)}")
    if parameters.get("partial_rotary_factor") not in (None, 1):
        raise unsupported(
            f"{key}.partial_rotary_factor", parameters["partial_rotary_factor"], "only whole heads are rotated"
        )
    theta = parameters.get("rope_theta")
    if theta is None:
        theta = raw.get("rope_theta")
    theta = 10000.0 if theta is None else theta
    if not is_number(theta) or theta <= 1:
        raise unsupported("rope_theta", theta, "expected a number above 1")

    required, optional = _ROPE_KEYS[rope_type]
    meta_keys = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
    scaling = {name: value for name, value in parameters.items() if name not in meta_keys and value is not None}
    if "original_max_position_embeddings" in required:
        if raw.get("original_max_position_embeddings") is not None:
            scaling["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
        scaling.setdefault("original_max_position_embeddings", raw["max_position_embeddings"])
    for name, value in scaling.items():
        if name not in required + optional:
            raise unsupported(f"{key}.{name}", value, f"not a parameter of rope type {rope_type}")
        may_be_zero = name in ("mscale", "mscale_all_dim")
        if name == "truncate":
            if not isinstance(value, bool):
                raise unsupported(f"{key}.{name}", value, "expected true or false")
        elif not is_number(value) or (value == 0 and not may_be_zero):
            raise unsupported(f"{key}.{name}", value, "expected a positive number")
    for name in required:
        if name not in scaling:
            raise unsupported(f"{key}.{name}", None, f"rope type {rope_type} needs it")
    if rope_type == "llama3" and not scaling["low_freq_factor"] < scaling["high_freq_factor"]:
        raise unsupported(f"{key}.high_freq_factor", scaling["high_freq_factor"], "it must exceed low_freq_factor")
    return float(theta), None if rope_type == "default" else {"rope_type": rope_type, **scaling}
