"""Weights in torch's own files, which are pickles: read where the user allows it, to be written as safetensors.

torch's restricted reader is used, which builds tensors and refuses everything else that a pickle can ask for.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from lockstep.engine.checkpoints.checkpoint import INDEX_FILE, PICKLED_WEIGHTS, CheckpointError
from lockstep.engine.checkpoints.export import SIDECARS
from lockstep.engine.files import whole_folder
from lockstep.engine.foreign_files import has_file, inner_file, read_json
from lockstep.engine.models.config import CONFIG_FILE


def has_pickled_weights(directory: Path) -> bool:
    """Whether the directory's weights are pickles alone."""
    return any(has_file(directory, name) for name in PICKLED_WEIGHTS) and not any(directory.glob("*.safetensors*"))


def read_pickled_weights(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of pytorch_model.bin, or of the files that its index names. Raises ValueError."""
    for name in _files(directory):
        yield from _read_file(directory, name)


def rewrite_pickled_model(directory: Path, target: Path) -> None:
    """Writes the model directory with the same tensors as safetensors, a file for a file, whole or not at all."""
    if target.exists():
        raise ValueError(f"{target} exists; choose another output")
    names = _files(directory)
    weight_map: dict[str, str] = {}
    with whole_folder(target) as folder:
        for number, name in enumerate(names, start=1):
            # A tensor may be a view of another, which a safetensors file cannot hold.
            tensors = {key: tensor.contiguous().clone() for key, tensor in _read_file(directory, name)}
            if repeated := weight_map.keys() & tensors.keys():
                raise CheckpointError(f"{directory}: {min(repeated)} is in two files")
            file = f"model-{number:05d}-of-{len(names):05d}.safetensors"
            save_file(tensors, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
        (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2) + "\n")
        for pattern in (CONFIG_FILE, *SIDECARS):
            for file in directory.glob(pattern):
                place = folder / file.relative_to(directory)
                place.parent.mkdir(exist_ok=True)
                shutil.copyfile(inner_file(file.parent, file.name), place)


def _files(directory: Path) -> list[str]:
    single, index = PICKLED_WEIGHTS
    if has_file(directory, single):
        return [single]
    weight_map = read_json(directory, index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{directory / index} has no weight_map from tensors to file names")
    return sorted(set(weight_map.values()))


def _read_file(directory: Path, name: str) -> list[tuple[str, torch.Tensor]]:
    path = inner_file(directory, name)
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} cannot be converted: {reason}") from None
    if not isinstance(contents, dict) or not all(isinstance(value, torch.Tensor) for value in contents.values()):
        raise CheckpointError(f"{path} cannot be converted: it is not a dictionary of tensors")
    return [(str(key), tensor) for key, tensor in contents.items()]
