"""Model directories in transformers' format: streaming import, atomic export; and dummy weights."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lockstep.engine.files import whole_folder
from lockstep.engine.foreign_files import inner_file
from lockstep.engine.models.config import ModelConfig, architecture, parse_model_config
from lockstep.engine.models.families import FAMILIES
from lockstep.engine.models.names import Entry, as_stacked, expand, to_hf, to_megatron
from lockstep.engine.models.sharding import WHOLE, ParameterShard, Shard, part_of, shard_config

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DEFAULT_SHARD_BYTES = 4 * 1024**3

# What a directory needs beside weights and config.json to be served: the tokenizer and the generation defaults.
COMPANION_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)

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


class _TensorFiles:
    """The tensors of a directory by name, over one file or many, read one at a time through memory maps."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open_files = ExitStack()
        self._file_of: dict[str, Any] = {}

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            index_path = self._directory / INDEX_FILE
            if index_path.is_file():
                self._open_shards(opened, json.loads(index_path.read_text())["weight_map"])
            elif (self._directory / SINGLE_FILE).is_file():
                file = self._open(opened, SINGLE_FILE)
                self._file_of = dict.fromkeys(file.keys(), file)
            else:
                raise FileNotFoundError(f"neither {SINGLE_FILE} nor {INDEX_FILE} in {self._directory}")
            self._open_files = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open_files.close()

    def _open(self, opened: ExitStack, name: str) -> Any:
        return opened.enter_context(opened_tensors(self._directory, name))

    def _open_shards(self, opened: ExitStack, weight_map: Mapping[str, str]) -> None:
        for shard in sorted(set(weight_map.values())):
            promised = {name for name, file_name in weight_map.items() if file_name == shard}
            if not (self._directory / shard).is_file():
                raise CheckpointError(f"{self._directory}: {INDEX_FILE} names {shard}, which does not exist")
            file = self._open(opened, shard)
            held = set(file.keys())
            if held != promised:
                raise CheckpointError(
                    f"{self._directory}: {shard} differs from {INDEX_FILE}: {_listing('missing', promised - held)}"
                    f"{_listing('not in the index', held - promised)}"
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
        part = part_of(whole.get_shape()[entry.shard_dim], shard)
        return whole[(slice(None),) * entry.shard_dim + (part,)]

    def read_experts(self, name: str, experts: range) -> torch.Tensor:
        """These experts of a tensor in which all are stacked."""
        return self._file_of[name].get_slice(name)[experts.start : experts.stop]


def _listing(title: str, names: Iterable[str], limit: int = 20) -> str:
    ordered = sorted(names)
    if not ordered:
        return ""
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return f"\n  {title}: {', '.join(ordered[:limit])}{more}"


def _check(files: _TensorFiles, path: Path, entries: list[Entry], config: ModelConfig) -> None:
    """Raises CheckpointError, naming every tensor at fault, before any weight has been read."""
    expected = {name: shape for entry in entries for name, shape in zip(entry.hf_names, entry.hf_shapes, strict=True)}
    behind = range(config.num_layers, config.num_layers + config.num_mtp_layers)
    ignored = tuple(f"model.layers.{layer}." for layer in behind)
    found = {name for name in files.names() if not name.startswith(ignored)}
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
        _listing("missing", expected.keys() - found)
        + _listing("unexpected", found - expected.keys())
        + _listing("misshapen", wrong)
    )
    if problems:
        raise CheckpointError(f"{path} does not hold the weights that the model needs:{problems}")
    if (
        config.tie_word_embeddings
        and _HEAD in files.names()
        and not torch.equal(files.read(_HEAD), files.read(_EMBEDDING))
    ):
        raise CheckpointError(f"{path}: tie_word_embeddings is true, but {_HEAD} differs from {_EMBEDDING}")


def iterate_weights(
    path: str | Path, config: ModelConfig, dtype: torch.dtype | None = None, shard: Shard = WHOLE
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (Megatron name, CPU tensor in Megatron's layout) for each parameter of the model, in the table's order.

    dtype None keeps the dtype of the file. One parameter is in memory at a time; it may alias the memory-mapped file,
    so copy it and do not write to it. With a shard only its part of each parameter is read. All
    names, shapes and dtypes are checked before the first tensor is yielded.
    Raises FileNotFoundError and CheckpointError, on the first `next`.
    """
    directory = Path(path)
    with _TensorFiles(directory) as files:
        held = files.names()
        entries = [as_stacked(entry) if entry.hf_stacked in held else entry for entry in expand(config)]
        _check(files, directory, entries, config)
        # A parameter's part is made of the same part of each of its tensors: see sharding.parameter_shards.
        local_config = shard_config(config, shard)
        for entry in expand(local_config):
            if entry.hf_stacked in held:
                tensor = files.read_experts(entry.hf_stacked, local_config.moe.held)
            else:
                tensor = to_megatron(entry, [files.read_part(entry, name, shard) for name in entry.hf_names])
            yield entry.megatron, tensor if dtype is None else tensor.to(torch.float32 if entry.fp32 else dtype)


def load_into(model: torch.nn.Module, path: str | Path) -> None:
    """Copies the weights of the directory `path` into the parameters of `model` (a Decoder), in place, in their dtype.

    A rank's model gets its part.

    Raises FileNotFoundError and CheckpointError before any parameter has changed.
    """
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in iterate_weights(path, model.config, shard=model.shard):
            parameters[name].copy_(tensor)


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
    source_dir:      where the tokenizer and generation_config.json are copied from; None copies none.
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
        saved_dtype = _write_shards(folder, _hf_tensors(named_tensors, config, dtype), max_shard_bytes)
        _write_config(folder, source_config, config, saved_dtype)
        if source_dir is not None:
            for name in COMPANION_FILES:
                if (Path(source_dir) / name).is_file():
                    shutil.copyfile(Path(source_dir) / name, folder / name)


def _check_describes(source_config: Mapping[str, Any], config: ModelConfig) -> None:
    # eos_token_ids may come from generation_config.json, which is copied as it is.
    described = asdict(replace(parse_model_config(source_config), eos_token_ids=config.eos_token_ids))
    differing = [
        f"{name} ({described[name]!r}, the model has {value!r})"
        for name, value in asdict(config).items()
        if described[name] != value
    ]
    if differing:
        raise CheckpointError(f"source_config describes another model:{_listing('differing', differing)}")


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
            yield hf_name, torch.empty(part.shape, dtype=dtype or part.dtype).copy_(part)
    if pending:
        raise CheckpointError(f"the export is incomplete:{_listing('missing', pending)}")


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
    # transformers before 4.56 reads torch_dtype, later versions dtype; a file has one of them.
    dtype_key = "torch_dtype" if "torch_dtype" in source_config else "dtype"
    contents = {
        **source_config,
        "architectures": [architecture(FAMILIES[config.family], config.head)],
        dtype_key: str(dtype).removeprefix("torch."),
    }
    (directory / "config.json").write_text(json.dumps(contents, indent=2, sort_keys=True) + "\n")


def initialize_dummy(model: torch.nn.Module, seed: int, shards: Iterable[ParameterShard] = ()) -> None:
    """Fills the parameters in place with reproducible random values of a trained model's scale (load_format="dummy").

    A value is a pure function of (seed, parameter name, index), the same on every device: matrices (also
    those stacked in a tensor of experts) are uniform with standard deviation 1/sqrt(columns), norm weights uniform in
    [0.9, 1.1], biases uniform in [-0.1, 0.1]. In a dtype of less than fp32 the fp32 values are rounded.

    shards: what `model` holds of parameters that are split over ranks: it gets its part of the whole ones' values.
    """
    split = {held.name: held for held in shards if held.is_split}
    with torch.no_grad():
        for name, local in model.named_parameters():
            parameter = local.new_empty(split[name].whole_shape) if name in split else local
            fill_dummy(name, parameter, seed)
            if name in split:
                split[name].copy_from_whole(local, parameter)


def fill_dummy(name: str, tensor: torch.Tensor, seed: int) -> None:
    """initialize_dummy of one whole parameter."""
    if name.endswith("layernorm.weight"):
        center, half_width = 1.0, 0.1
    elif tensor.dim() == 1:
        center, half_width = 0.0, 0.1
    else:
        center, half_width = 0.0, (3.0 / tensor.shape[-1]) ** 0.5
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    _fill_uniform(tensor, int.from_bytes(digest[:4], "little"), center, half_width)


def _fill_uniform(parameter: torch.Tensor, key: int, center: float, half_width: float) -> None:
    """Uniform values in center +- half_width from a 32-bit counter hash ("lowbias32", https://nullprogram.com/blog/2018/07/31/).

    Integer arithmetic, and float steps that are each rounded once, so that the CPU and the GPU give the same bits.
    """
    flat = parameter.view(-1)
    mask = 0xFFFFFFFF
    chunk = 1 << 22
    for start in range(0, flat.numel(), chunk):
        stop = min(start + chunk, flat.numel())
        x = torch.arange(start, stop, device=flat.device, dtype=torch.int64).bitwise_and_(mask).bitwise_xor_(key)
        x.bitwise_xor_(x >> 16).mul_(0x7FEB352D).bitwise_and_(mask)
        x.bitwise_xor_(x >> 15).mul_(0x846CA68B).bitwise_and_(mask)
        x.bitwise_xor_(x >> 16)
        # The top 24 bits are exact in fp32, and so is the map onto [-1, 1).
        unit = (x >> 8).to(torch.float32).mul_(2.0**-23).sub_(1.0)
        flat[start:stop].copy_(unit.mul_(half_width).add_(center))
