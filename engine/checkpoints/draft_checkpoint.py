"""EAGLE-3 draft directories in the layouts that are published, read and written without tolerance.

    ours, SGLang's, vLLM's    midlayer.*, fc.weight, norm.weight, lm_head.weight, d2t, t2d
    ModelOpt's, speculators'  layers.0.* for midlayer.*, and perhaps copies of the target's weights
    drafts of all tokens      without d2t and t2d; without lm_head.weight where the target's head is theirs

The tensors of all of them are the same model. config.json: see draft_config.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from lockstep.engine.checkpoints.checkpoint import PICKLED_WEIGHTS, SINGLE_FILE, CheckpointError, TensorFiles
from lockstep.engine.checkpoints.draft_config import choose_engine, config_json, load_draft_config
from lockstep.engine.checkpoints.pickled_weights import has_pickled_weights, read_pickled_weights
from lockstep.engine.files import whole_folder
from lockstep.engine.models.config import CONFIG_FILE, ModelConfig
from lockstep.engine.models.eagle3 import Eagle3Config, Eagle3Draft, expand
from lockstep.engine.models.families.reading import printable
from lockstep.engine.models.names import to_hf, to_megatron
from lockstep.engine.speculation.config import LayerIds, ServingEngine

_HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"
# Copies of the target's weights that training tools leave in a file, and the rotary frequencies.
_NOT_READ = ("verifier_norm.weight", "verifier_lm_head.weight", "midlayer.self_attn.rotary_emb.inv_freq")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# The copy of an embedding in another dtype, or of a target that has learned since, is near the target's own.
_NEAR = 0.1


def load_draft(
    path: str | Path,
    target: ModelConfig,
    embedding_weight: torch.Tensor,
    dtype: torch.dtype | None = None,
    *,
    head_weight: torch.Tensor | None = None,
    numbers_of: LayerIds = "auto",
    allow_pickle: bool = False,
) -> Eagle3Draft:
    """The draft of a directory, on the device of the target's embedding. dtype None: the file's.

    head_weight [V, H]: the target's, for a draft without one. numbers_of: see `load_draft_config`. allow_pickle: read
    pytorch_model.bin where there is nothing else.
    Raises MissingFileError, UnsupportedModelError, and CheckpointError that names every tensor which is missing,
    unknown, misshapen or of another dtype, or says how d2t and t2d contradict each other.
    """
    config = load_draft_config(path, target, numbers_of)
    tensors = _completed(Path(path), config, _read_tensors(Path(path), allow_pickle), embedding_weight, head_weight)
    _check(Path(path), config, tensors)
    draft = Eagle3Draft(config, embedding_weight, dtype or tensors["fc.weight"].dtype)
    parameters = dict(draft.named_parameters())
    with torch.no_grad():
        for entry in expand(config):
            parameters[entry.megatron].copy_(to_megatron(entry, [tensors[name] for name in entry.hf_names]))
    token_map = tensors["d2t"] + torch.arange(config.draft_vocab_size, dtype=torch.int64, device="cpu")
    is_proposable = torch.zeros(config.vocab_size, dtype=torch.bool, device="cpu")
    if bool(((token_map >= 0) & (token_map < config.vocab_size)).all()):
        is_proposable[token_map] = True
    if not torch.equal(is_proposable, tensors.get("t2d", is_proposable)) or int(is_proposable.sum()) != len(token_map):
        raise CheckpointError(f"draft {path}: the tokens that d2t names are not those that t2d marks")
    draft.set_vocabulary(token_map)
    return draft


def _read_tensors(path: Path, allow_pickle: bool) -> dict[str, torch.Tensor]:
    """By the names that we write."""
    if has_pickled_weights(path):
        if not allow_pickle:
            raise CheckpointError(
                f"draft {path} has its weights in {PICKLED_WEIGHTS[0]}, a pickle, which is not read here: "
                f"lockstep convert draft={path} model=TARGET output=DIRECTORY allow_pickle=true makes safetensors of it"
            )
        found = dict(read_pickled_weights(path))
    else:
        with TensorFiles(path) as files:
            found = {name: files.read(name) for name in sorted(files.names())}
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in found.items():
        plain = name.removeprefix("model.")
        plain = f"midlayer.{plain.removeprefix('layers.0.')}" if plain.startswith("layers.0.") else plain
        if plain in tensors:
            raise CheckpointError(f"draft {path}: {printable(name)} is there under two names")
        if plain not in _NOT_READ:
            tensors[plain] = tensor
    return tensors


def _completed(
    path: Path,
    config: Eagle3Config,
    tensors: dict[str, torch.Tensor],
    embedding_weight: torch.Tensor,
    head_weight: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """With what some layouts leave out, and without copies of the target's embedding, which are compared with it."""
    if (embedding := tensors.pop(_EMBEDDING, None)) is not None:
        ours = embedding_weight.detach().float().cpu()
        if embedding.shape != ours.shape or (embedding.float() - ours).norm() > _NEAR * ours.norm():
            raise CheckpointError(
                f"draft {path}: its {_EMBEDDING} is not the target's: it is the draft of another model"
            )
    has_all_tokens = config.draft_vocab_size == config.vocab_size
    if has_all_tokens and "d2t" not in tensors and "t2d" not in tensors:
        tensors["d2t"] = torch.zeros(config.vocab_size, dtype=torch.int64, device="cpu")
    if _HEAD not in tensors and head_weight is not None and "d2t" in tensors and "fc.weight" in tensors:
        draft_ids = torch.arange(len(tensors["d2t"]), dtype=torch.int64, device="cpu")
        rows = (tensors["d2t"] + draft_ids).clamp(0, len(head_weight) - 1)
        tensors[_HEAD] = head_weight.detach().cpu()[rows].to(tensors["fc.weight"].dtype)
    return tensors


def _check(path: Path, config: Eagle3Config, tensors: Mapping[str, torch.Tensor]) -> None:
    dtype = tensors["fc.weight"].dtype if "fc.weight" in tensors else None
    expected: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {
        name: (shape, dtype)
        for entry in expand(config)
        for name, shape in zip(entry.hf_names, entry.hf_shapes, strict=True)
    }
    expected["d2t"] = ((config.draft_vocab_size,), torch.int64)
    expected["t2d"] = ((config.vocab_size,), torch.bool)
    # What t2d marks is what d2t names.
    problems = [f"missing {name}" for name in sorted(expected.keys() - tensors.keys() - {"t2d"})]
    problems += [f"unknown {printable(name)}" for name in sorted(tensors.keys() - expected.keys())]
    for name in sorted(expected.keys() & tensors.keys()):
        found = (tuple(tensors[name].shape), tensors[name].dtype)
        if found != expected[name] or (dtype not in _FLOATS):
            problems.append(f"{name} is {found[1]} {list(found[0])}, not {expected[name][1]} {list(expected[name][0])}")
    if problems:
        raise CheckpointError(f"draft {path} is not what its config.json promises: {'; '.join(problems[:20])}")


def save_draft(
    path: str | Path,
    draft: Eagle3Draft,
    temperature: float = 1.0,
    dtype: torch.dtype | None = None,
    *,
    export_for: ServingEngine | None = None,
    target: ModelConfig | None = None,
) -> ServingEngine:
    """Writes a draft directory, which appears under its name when it is complete.

    temperature: divides the draft's logits, by way of its head, so that any engine proposes with it. dtype None: the
    draft's. export_for: the engine that is to serve it with the target; None: see `choose_engine`, whose choice is
    returned. Raises FileExistsError for a path that exists, and ValueError for an engine that cannot serve it.
    """
    folder = Path(path)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; an export does not replace it")
    parameters = dict(draft.named_parameters())
    dtype = dtype or draft.fc.weight.dtype
    engine = choose_engine(export_for, draft.config.aux_layers, target)
    tensors = {}
    for entry in expand(draft.config):
        parameter = parameters[entry.megatron].detach()
        if entry.megatron == "output_layer.weight":
            parameter = parameter / temperature
        for name, part in zip(entry.hf_names, to_hf(entry, parameter), strict=True):
            tensors[name] = part.to("cpu", dtype).contiguous().clone()
    token_map = draft.token_map.cpu()
    tensors["d2t"] = token_map - torch.arange(len(token_map), dtype=torch.int64, device="cpu")
    tensors["t2d"] = torch.zeros(draft.config.vocab_size, dtype=torch.bool, device="cpu")
    tensors["t2d"][token_map] = True
    contents = json.dumps(config_json(draft.config, dtype, engine, target), indent=2, sort_keys=True) + "\n"
    with whole_folder(folder) as unfinished:
        save_file(tensors, unfinished / SINGLE_FILE, metadata={"format": "pt"})
        (unfinished / CONFIG_FILE).write_text(contents)
    return engine
