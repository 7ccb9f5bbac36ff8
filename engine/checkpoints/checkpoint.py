"""Reading of model directories in transformers' format, one tensor at a time.

Of several sets of weights in a directory the one is taken that transformers takes: `model.safetensors`, else the files
that `model.safetensors.index.json` lists. No other file is opened: not `pytorch_model.bin`, which is a pickle, nor
`consolidated.safetensors`, which has the vendor's own names.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from lockstep.engine.foreign_files import MissingFileError, has_file, inner_file, read_json
from lockstep.engine.models.config import ModelConfig
from lockstep.engine.models.families.reading import printable, shown
from lockstep.engine.models.layers.linear import encoded
from lockstep.engine.models.layers.shard import WHOLE, Shard
from lockstep.engine.models.names import Entry, as_stacked, expand, to_megatron
from lockstep.engine.models.sharding import shard_config

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLED_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_MAX_SHARDS = 1 << 12

_FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"


class CheckpointError(ValueError):
    """A model directory does not hold the tensors that its config.json promises; the message names them."""


@contextmanager
def opened_tensors(directory: Path, name: str) -> Iterator[Any]:
    """safetensors' reader of a file of the directory. Raises MissingFileError, ValueError and CheckpointError."""
    path = inner_file(directory, name)
    try:
        opened = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged, fetch or write it again: {error}") from None
    with opened:
        yield opened


class TensorFiles:
    """The tensors of a directory by name, over one file or many, read one at a time through memory maps."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open_files = ExitStack()
        self._file_of: dict[str, Any] = {}

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            if has_file(self._directory, SINGLE_FILE):
                file = self._open(opened, SINGLE_FILE)
                self._file_of = dict.fromkeys(file.keys(), file)
            elif has_file(self._directory, INDEX_FILE):
                self._open_shards(opened, self._weight_map())
            else:
                raise MissingFileError(_no_weights(self._directory))
            self._open_files = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open_files.close()

    def _open(self, opened: ExitStack, name: str) -> Any:
        return opened.enter_context(opened_tensors(self._directory, name))

    def _weight_map(self) -> dict[str, str]:
        """The index: file names by tensor."""
        where = self._directory / INDEX_FILE
        weight_map = read_json(self._directory, INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise CheckpointError(f"{where} has no weight_map from tensors to file names")
        for shard in sorted(set(weight_map.values())):
            if not shard.endswith(".safetensors"):
                raise CheckpointError(f"{where} names {shown(shard)}, which is no safetensors file")
        if len(set(weight_map.values())) > _MAX_SHARDS:
            raise CheckpointError(f"{where} names more than {_MAX_SHARDS} files")
        return weight_map

    def _open_shards(self, opened: ExitStack, weight_map: Mapping[str, str]) -> None:
        promised: dict[str, set[str]] = {}
        for name, shard in weight_map.items():
            promised.setdefault(shard, set()).add(name)
        for shard in sorted(promised):
            try:
                file = self._open(opened, shard)
            except FileNotFoundError:
                raise CheckpointError(
                    f"{self._directory / INDEX_FILE} names {shard}, which does not exist: fetch the whole model again"
                ) from None
            held = set(file.keys())
            if held != promised[shard]:
                raise CheckpointError(
                    f"{self._directory}: {shard} differs from {INDEX_FILE}"
                    f"{listing('missing', promised[shard] - held)}"
                    f"{listing('not in the index', held - promised[shard])}"
                )
            self._file_of.update(dict.fromkeys(held, file))

    def names(self) -> set[str]:
        return set(self._file_of)

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and safetensors' name of the dtype, from the file's header alone."""
        header = self._file_of[name].get_slice(name)
        return tuple(header.get_shape()), header.get_dtype()

    def read(self, name: str) -> torch.Tensor:
        return self._file_of[name].get_tensor(name)

    def read_part(self, entry: Entry, name: str, shard: Shard) -> torch.Tensor:
        """The shard's part of one of the entry's tensors: nothing else is read."""
        if entry.shard_dim is None or shard.size == 1:
            return self.read(name)
        whole = self._file_of[name].get_slice(name)
        part = shard.part_of(whole.get_shape()[entry.shard_dim])
        return whole[(slice(None),) * entry.shard_dim + (part,)]

    def read_experts(self, name: str, experts: range) -> torch.Tensor:
        """These experts of a tensor in which all are stacked."""
        return self._file_of[name].get_slice(name)[experts.start : experts.stop]


def _no_weights(directory: Path) -> str:
    """What to say of a directory without weights that are read."""
    hint = ""
    if any(has_file(directory, name) for name in PICKLED_WEIGHTS):
        hint = f": {PICKLED_WEIGHTS[0]} is a pickle; lockstep convert model={directory} output=DIRECTORY " + (
            "allow_pickle=true makes safetensors of it"
        )
    elif any(directory.glob("consolidated*.safetensors")):
        hint = ": consolidated.safetensors has the vendor's own names; fetch the model's files for transformers"
    elif any(directory.glob("model-*-of-*.safetensors")):
        hint = ": the parts of a model are there without their index; fetch it too"
    elif any(directory.glob("*.safetensors")):
        hint = f": there are other safetensors; if one holds all weights, name it {SINGLE_FILE}"
    return f"neither {SINGLE_FILE} nor {INDEX_FILE} in {directory}{hint}"


def listing(title: str, names: Iterable[str], limit: int = 20) -> str:
    ordered = sorted(names)
    if not ordered:
        return ""
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return f"; {title}: {', '.join(map(printable, ordered[:limit]))}{more}"


def _check(files: TensorFiles, path: Path, entries: list[Entry], config: ModelConfig) -> None:
    """Raises CheckpointError, naming every tensor at fault, before any weight has been read."""
    expected = {name: shape for entry in entries for name, shape in zip(entry.hf_names, entry.hf_shapes, strict=True)}
    found = {name for name in files.names() if not name.startswith(_behind(config))}
    # Checkpoints written by transformers before 4.32 hold the rotary frequencies, which are a function of config.json.
    found = {name for name in found if not name.endswith(".rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        found -= {_HEAD}
    wrong = []
    for name in found & expected.keys():
        shape, dtype = files.shape_and_dtype(name)
        if shape != expected[name]:
            wrong.append(f"{name} (shape {shape}, expected {expected[name]})")
        elif dtype not in _FLOAT_DTYPES:
            wrong.append(f"{name} (dtype {dtype}, expected one of {_FLOAT_DTYPES})")
    problems = (
        listing("missing", expected.keys() - found)
        + listing("unexpected", found - expected.keys())
        + listing("misshapen", wrong)
    )
    if problems:
        raise CheckpointError(f"{path} does not hold the weights that the model needs{problems}")


def _check_tied(files: TensorFiles, path: Path, config: ModelConfig) -> None:
    if not config.tie_word_embeddings or _HEAD not in files.names():
        return
    head, embedding = files.read(_HEAD), files.read(_EMBEDDING)
    if head.shape != embedding.shape or not torch.equal(head, embedding):
        raise CheckpointError(f"{path}: tie_word_embeddings is true, but {_HEAD} differs from {_EMBEDDING}")


def check_weights(path: str | Path, config: ModelConfig) -> None:
    """Raises what `iterate_weights` raises, from the files' headers alone: before memory is taken for the model."""
    directory = Path(path)
    with TensorFiles(directory) as files:
        _check(files, directory, _entries(files, config), config)


def extra_tensors(path: str | Path, config: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """(transformers' name, tensor) of what a directory holds beside the model: layers that predict further tokens."""
    with TensorFiles(Path(path)) as files:
        yield from ((name, files.read(name)) for name in sorted(files.names()) if name.startswith(_behind(config)))


def _entries(files: TensorFiles, config: ModelConfig) -> list[Entry]:
    held = files.names()
    return [as_stacked(entry) if entry.hf_stacked in held else entry for entry in expand(config)]


def _behind(config: ModelConfig) -> tuple[str, ...]:
    """What names of layers behind the model's last one begin with."""
    behind = range(config.num_layers, config.num_layers + config.num_mtp_layers)
    return tuple(f"model.layers.{layer}." for layer in behind)


def iterate_weights(
    path: str | Path, config: ModelConfig, dtype: torch.dtype | None = None, shard: Shard = WHOLE
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (Megatron name, CPU tensor in Megatron's layout) for each parameter of the model, in the table's order.

    dtype None keeps the dtype of the file. One parameter is in memory at a time; it may alias the memory-mapped file,
    so copy it and do not write to it. With a shard only its part of each parameter is read. All
    names, shapes and dtypes are checked before the first tensor is yielded.
    Raises MissingFileError, CheckpointError and ValueError, on the first `next`.
    """
    directory = Path(path)
    with TensorFiles(directory) as files:
        held = files.names()
        _check(files, directory, _entries(files, config), config)
        _check_tied(files, directory, config)
        # A parameter's part is made of the same part of each of its tensors: see sharding.parameter_shards.
        local_config = shard_config(config, shard)
        for entry in expand(local_config):
            if entry.hf_stacked in held:
                tensor = files.read_experts(entry.hf_stacked, entry.experts.held)
            else:
                tensor = to_megatron(entry, [files.read_part(entry, name, shard) for name in entry.hf_names])
            yield entry.megatron, tensor if dtype is None else tensor.to(torch.float32 if entry.fp32 else dtype)


def load_into(model: torch.nn.Module, path: str | Path) -> None:
    """Copies the weights of the directory `path` into the parameters of `model` (a Decoder), in place, in their dtype.

    A rank's model gets its part.

    Raises as `iterate_weights` does, before any parameter has changed.
    """
    parameters, places = dict(model.named_parameters()), encoded(model)
    with torch.no_grad():
        for name, tensor in iterate_weights(path, model.config, shard=model.shard):
            if name in places:
                places[name].store(tensor)
            else:
                parameters[name].copy_(tensor)
