"""Checkpoints in the format of earlier versions (torch's and Megatron's "torch_dist"), read to be written anew.

Their metadata is a pickle, and a pickle can name any function to be called. Here a name outside a short list of plain
records is refused, so nothing that the file brings along is run.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lockstep.engine.checkpoints.checkpoint import CheckpointError
from lockstep.engine.files import whole_folder
from lockstep.engine.foreign_files import inner_file, read_bytes
from lockstep.trainer_bridge.megatron.checkpoint import PICKLED_FILES, check_state_hash, write_common, write_rank
from lockstep.trainer_bridge.weight_plan import whole

_METADATA, _COMMON = PICKLED_FILES
_MAX_METADATA_BYTES = 2**28
_LAYERS, _STATE = "decoder.layers.", "optimizer.state."

# What the metadata of torch.distributed.checkpoint is made of: records of sizes, names and offsets.
_RECORDS = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", "float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool"),
    "pathlib": ("PosixPath", "PurePosixPath"),
}  # fmt: skip


def is_pickled(path: Path) -> bool:
    return (path / _METADATA).is_file() and (path / _COMMON).is_file()


def rewrite(path: Path, target: Path) -> None:
    """Writes the checkpoint at `path` to `target`, in today's format, whole or not at all.

    Raises CheckpointError, which names what is damaged or is not a checkpoint's, and FileExistsError.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists")
    old = _PickledCheckpoint(path)
    check_state_hash(path, old.common, old.tensors())
    with whole_folder(target) as folder:
        write_rank(folder, 0, ((whole(name, tensor.shape), tensor) for name, tensor in old.tensors()))
        write_common(folder, 1, old.common)


class _PickledCheckpoint:
    def __init__(self, path: Path):
        self._path = path
        self._metadata = _read_metadata(path)
        try:
            common_file = inner_file(path, _COMMON)
            self.common: dict[str, Any] = dict(torch.load(common_file, map_location="cpu", weights_only=True)["common"])
            self._place = {
                (index.fqn, None if index.offset is None else tuple(index.offset)): info
                for index, info in self._metadata.storage_data.items()
            }
            described = self._metadata.state_dict_metadata
            self._described = {key: value for key, value in described.items() if "._extra_state" not in key}
        except (AttributeError, KeyError, TypeError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise self._damaged(error) from None

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name in today's format, whole tensor), one at a time."""
        for key, described in self._described.items():
            kind, parameter = "weight", key
            if key.startswith(_STATE):
                kind, _, parameter = key.removeprefix(_STATE).partition(".")
            tensor = self._read(key, described)
            rest = parameter.removeprefix(_LAYERS)
            if rest == parameter or rest[:1].isdigit():
                yield f"{kind}/{parameter}", tensor
            else:  # layers that are all alike stand in one tensor
                yield from ((f"{kind}/{_LAYERS}{layer}.{rest}", part) for layer, part in enumerate(tensor))

    def _read(self, key: str, described: Any) -> torch.Tensor:
        try:
            tensor = torch.empty(described.size, dtype=described.properties.dtype, device="cpu")
            filled = 0
            for chunk in described.chunks:
                info = self._place[key, tuple(chunk.offsets)]
                part = self._stored(info)
                box = zip(chunk.offsets, chunk.sizes, strict=True)
                tensor[tuple(slice(start, start + size) for start, size in box)] = part
                filled += part.numel()
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
            raise self._damaged(f"{key}: {error}") from None
        if filled != tensor.numel():
            raise self._damaged(f"{key} is not whole")
        return tensor

    def _stored(self, info: Any) -> torch.Tensor:
        with open(inner_file(self._path, info.relative_path), "rb") as file:
            file.seek(info.offset)
            stored = io.BytesIO(file.read(info.length))
        return torch.load(stored, map_location="cpu", weights_only=True)

    def _damaged(self, reason: object) -> CheckpointError:
        line = str(reason).partition("\n")[0]
        return CheckpointError(f"checkpoint {self._path} cannot be converted: {line}")


class _RecordUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _RECORDS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its pickle asks for {module}.{name}, which no checkpoint needs")


def _read_metadata(path: Path) -> Any:
    contents = io.BytesIO(read_bytes(path, _METADATA, _MAX_METADATA_BYTES))
    try:
        return _RecordUnpickler(contents).load()
    except Exception as error:  # a damaged pickle raises nearly anything
        line = str(error).partition("\n")[0]
        raise CheckpointError(f"checkpoint {path} cannot be converted: {_METADATA}: {line}") from None
