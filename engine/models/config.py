"""The shape of a model as the engine and the trainer see it, read from a transformers directory's config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lockstep.engine.foreign_files import MissingFileError, has_file, read_json
from lockstep.engine.memory.layer_caches import CacheSpec
from lockstep.engine.models.families import FAMILIES
from lockstep.engine.models.families.family import Family
from lockstep.engine.models.families.reading import (
    MAX_EXPERT_MLPS,
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_SIZE,
    UnsupportedModelError,
    read_flag,
    read_norm,
    read_size,
    shown,
    unsupported,
)
from lockstep.engine.models.layers.context import PlanKey
from lockstep.engine.models.layers.layer import LayerSpec
from lockstep.engine.models.layers.moe import Experts
from lockstep.engine.models.layers.norm import NormSpec
from lockstep.engine.models.layers.rope import RopeSpec

__all__ = [
    "Head",
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
    """A decoder: its layers, one record each, and what is around them. Sizes are numbers of elements.

    ropes:         the tables of rotary embeddings by the names that the layers' mixers call them by.
    eos_token_ids: generation_config.json's where it names any, else config.json's.
    num_mtp_layers: layers behind the last one for multi-token prediction, which a checkpoint may hold; they are neither
                   read nor exported.
    head:          "lm", logits over the vocabulary; or "scalar", a number per token: a reward model's score, which is
                   its last token's, or a critic's values. tie_word_embeddings is false then.
    pad_token_id:  of config.json; a reward model's score is that of the last token that is another.
    """

    family: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec
    ropes: dict[str, RopeSpec]
    max_position_embeddings: int
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    num_mtp_layers: int = 0
    head: Head = "lm"
    pad_token_id: int | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def has_output_matrix(self) -> bool:
        """Whether the logits have a matrix of their own."""
        return self.head == "lm" and not self.tie_word_embeddings

    @property
    def caches(self) -> list[CacheSpec]:
        """What each layer keeps of a token."""
        return [layer.mixer.cache for layer in self.layers]

    @property
    def plan_keys(self) -> set[PlanKey | None]:
        """See Mixer.plan_key."""
        return {layer.mixer.plan_key for layer in self.layers}

    @property
    def kv_elements_per_token(self) -> int:
        """What the KV cache holds for a token, in all layers."""
        return sum(cache.elements for cache in self.caches)

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
    read_size(raw, "num_hidden_layers", MAX_LAYERS)
    max_positions = read_size(raw, "max_position_embeddings", MAX_POSITIONS)
    parts = family.parse(raw)
    _check_num_experts([layer.mlp for layer in parts.layers if isinstance(layer.mlp, Experts)])
    return ModelConfig(
        family=model_type,
        vocab_size=read_size(raw, "vocab_size"),
        hidden_size=read_size(raw, "hidden_size"),
        layers=parts.layers,
        final_norm=read_norm(raw),
        ropes=parts.ropes,
        max_position_embeddings=max_positions,
        tie_word_embeddings=head == "lm" and read_flag(raw, "tie_word_embeddings"),
        eos_token_ids=_token_ids(eos_token_id, eos_file),
        head=head,
        pad_token_id=_pad_token_id(raw),
        num_mtp_layers=parts.num_mtp_layers,
    )


def _check_num_experts(experts: list[Experts]) -> None:
    if experts and len(experts) * experts[0].num_experts > MAX_EXPERT_MLPS:
        number = experts[0].num_experts
        raise unsupported("num_experts", number, f"{len(experts)} layers have {MAX_EXPERT_MLPS} at most")


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
