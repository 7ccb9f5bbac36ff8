"""Export of model directories that transformers loads: atomic, with what makes a directory complete.

What is written: config.json with the source's keys, the weights in one set of safetensors, and the source's SIDECARS,
byte for byte. What is not: DROPPED_KEYS, Python files, and any other file.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lockstep.engine.checkpoints.checkpoint import INDEX_FILE, SINGLE_FILE, CheckpointError, extra_tensors, listing
from lockstep.engine.files import whole_folder
from lockstep.engine.foreign_files import has_file, inner_file, read_json
from lockstep.engine.models.config import CONFIG_FILE, ModelConfig, architecture, parse_model_config
from lockstep.engine.models.families import FAMILIES
from lockstep.engine.models.names import expand, to_hf

DEFAULT_SHARD_BYTES = 4 * 1024**3
DTYPE_KEYS = ("dtype", "torch_dtype")
TOKENIZER_CONFIG = "tokenizer_config.json"

# auto_map names classes of Python files, which are not copied: nothing here runs a model directory's code.
# _name_or_path is where the source lay.
DROPPED_KEYS = ("auto_map", "_name_or_path")

# What a directory needs beside config.json and weights to be served, and what must go with a model. By pattern.
SIDECARS = (
    "generation_config.json",
    # the tokenizer, of whatever kind
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "tokenizer.model",
    "tokenizer.model.v*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "*.tiktoken",
    "tekken.json",
    # chat templates
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    # processors of models with other inputs
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    # terms of use
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "COPYING*",
    "USE_POLICY*",
)


def save_hf(
    path: str | Path,
    source_config: Mapping[str, Any],
    named_tensors: Iterable[tuple[str, torch.Tensor]],
    config: ModelConfig,
    *,
    source_dir: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Writes a directory that transformers loads: config.json, safetensors (with an index if sharded), tokenizer files.

    source_config:   the contents of the config.json to write; it must describe the model of `config`.
    named_tensors:   (Megatron name, whole tensor) of every parameter once, on any device and in any order. Each tensor
                     is copied before the next one is asked for, so a producer may reuse its buffers.
    source_dir:      where SIDECARS are copied from, and layers for multi-token prediction; None copies none.
    dtype:           of the file; None keeps each tensor's.
    max_shard_bytes: a file is closed before it would exceed this; it also bounds the memory that is used.

    The directory appears under its name only when it is complete, by one rename; on failure nothing is left behind.
    Raises FileExistsError when `path` exists and is not an empty directory, and CheckpointError for missing,
    unexpected, repeated or misshapen tensors and for a source_config of another model.
    """
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists; an export does not replace a directory that holds files")
    _check_describes(source_config, config)
    with whole_folder(target) as folder:
        tensors = _hf_tensors(named_tensors, config, dtype)
        if source_dir is not None and config.num_mtp_layers:
            extra = extra_tensors(source_dir, config)
            tensors = chain(tensors, ((name, tensor.to(dtype or tensor.dtype)) for name, tensor in extra))
        saved_dtype = _write_shards(folder, tensors, max_shard_bytes)
        _write_config(folder, source_config, config, saved_dtype)
        if source_dir is not None:
            copy_sidecars(Path(source_dir), folder)


def _check_describes(source_config: Mapping[str, Any], config: ModelConfig) -> None:
    # eos_token_ids may come from generation_config.json, which is copied as it is.
    described = dict(_leaves(asdict(replace(parse_model_config(source_config), eos_token_ids=config.eos_token_ids))))
    ours = dict(_leaves(asdict(config)))
    differing = [
        f"{name} ({described.get(name)!r}, the model has {ours.get(name)!r})"
        for name in sorted(described.keys() | ours.keys())
        if described.get(name) != ours.get(name)
    ]
    if differing:
        raise CheckpointError(f"source_config describes another model{listing('differing', differing)}")


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The values in nested dictionaries and tuples, by their dotted names."""
    if not isinstance(value, (dict, tuple)):
        yield name, value
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _leaves(inner, f"{name}.{key}" if name else str(key))


def _hf_tensors(
    named_tensors: Iterable[tuple[str, torch.Tensor]], config: ModelConfig, dtype: torch.dtype | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Copies on the CPU, under transformers' names. Raises CheckpointError unless each parameter comes exactly once."""
    pending = {entry.megatron: entry for entry in expand(config)}
    known = set(pending)
    for name, tensor in named_tensors:
        if name not in pending:
            raise CheckpointError(f"{name}: {'given twice' if name in known else 'not a parameter of the model'}")
        entry = pending.pop(name)
        try:
            parts = to_hf(entry, tensor.detach())
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        for hf_name, part in zip(entry.hf_names, parts, strict=True):
            yield hf_name, torch.empty(part.shape, dtype=dtype or part.dtype, device="cpu").copy_(part)
    if pending:
        raise CheckpointError(f"the export is incomplete{listing('missing', pending)}")


def _write_shards(directory: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int) -> torch.dtype:
    """Writes the files, and the index if there are several. Returns the dtype of the first tensor."""
    shards: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    shard_bytes = total_bytes = 0
    first_dtype = None

    def close_shard() -> None:
        # The number of shards, which is part of their names, is known only at the end.
        save_file(shard, directory / f"{len(shards)}.partial", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        first_dtype = first_dtype or tensor.dtype
        if shard and shard_bytes + tensor.nbytes > max_shard_bytes:
            close_shard()
            shard_bytes = 0
        shard[name] = tensor
        shard_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    close_shard()

    if len(shards) == 1:
        (directory / "0.partial").rename(directory / SINGLE_FILE)
        return first_dtype
    weight_map = {}
    for number, names in enumerate(shards):
        file_name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"{number}.partial").rename(directory / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return first_dtype


def _write_config(directory: Path, source_config: Mapping[str, Any], config: ModelConfig, dtype: torch.dtype) -> None:
    """The source's config.json but for what would be false of the export."""
    # transformers before 4.56 reads torch_dtype, later versions dtype. Where a source has both, both are kept true.
    dtype_keys = [key for key in DTYPE_KEYS if key in source_config] or ["dtype"]
    contents = {
        **{key: value for key, value in source_config.items() if key not in DROPPED_KEYS},
        "architectures": [architecture(FAMILIES[config.family], config.head)],
        **dict.fromkeys(dtype_keys, str(dtype).removeprefix("torch.")),
    }
    (directory / CONFIG_FILE).write_text(json.dumps(contents, indent=2, sort_keys=True) + "\n")


def copy_sidecars(source: Path, folder: Path) -> None:
    """Copies, byte for byte, what SIDECARS names of the model directory `source`; links out of it are refused."""
    for pattern in SIDECARS:
        subfolder, _, name_pattern = pattern.rpartition("/")
        for file in sorted((source / subfolder).glob(name_pattern)):
            checked = inner_file(source / subfolder, file.name)
            (folder / subfolder).mkdir(exist_ok=True)
            shutil.copyfile(checked, folder / subfolder / file.name)
    if has_file(folder, TOKENIZER_CONFIG):
        contents = read_json(folder, TOKENIZER_CONFIG)
        if "auto_map" in contents:
            del contents["auto_map"]
            (folder / TOKENIZER_CONFIG).write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n")
