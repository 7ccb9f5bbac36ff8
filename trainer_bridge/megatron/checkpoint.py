"""Checkpoints of a trainer: safetensors and JSON, written whole or not at all. Nothing in them is code.

    checkpoint.json               format, version, number of ranks, and the caller's plain values
    rank_00000.json               of each tensor that rank 0 wrote: its file, the whole tensor's shape, and its pieces
    rank_00000_00000.safetensors  the tensors

Each rank writes what it holds. Any number of ranks reads: each takes the slices that its own part is made of.
"""

import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from lockstep.engine.checkpoints.checkpoint import CheckpointError, opened_tensors
from lockstep.engine.files import TEMPORARY, flush_to_disk, write_whole
from lockstep.engine.foreign_files import MissingFileError, has_file, read_json
from lockstep.engine.models.config import ModelConfig
from lockstep.engine.models.families.reading import printable, shown
from lockstep.engine.models.names import expand
from lockstep.engine.models.sharding import ParameterShard, Piece, slices
from lockstep.engine.weights.checksums import checksum
from lockstep.trainer_bridge.megatron.flat_models import is_flat, with_layer_records
from lockstep.trainer_bridge.megatron.optimizer import state_names as optimizer_state_names
from lockstep.trainer_bridge.weight_plan import plan_transfers, whole

COMMON_FILE = "checkpoint.json"
FORMAT, VERSION = "lockstep-checkpoint", 1
MAX_FILE_BYTES = 4 * 1024**3
MAX_RANKS = 1 << 16
_MAX_LISTED = 5  # in a message
MAX_PIECES = 16  # of a rank's part of a tensor; gates and ups are two
# What torch and Megatron write into theirs, which an older Lockstep wrote: pickles.
PICKLED_FILES = (".metadata", "common.pt")


def save_checkpoint(
    path: str | Path,
    tensors: Iterable[tuple[ParameterShard, torch.Tensor | None]],
    common: Mapping[str, Any],
) -> None:
    """Writes a checkpoint to a hidden sibling of `path` and renames it, so `path` is complete where it exists.

    tensors: (part, tensor of its local shape) of what this rank writes; None where another rank writes the same part.
    One file's tensors are in memory at a time. common: plain JSON values, the same on all ranks.
    Every rank of the world calls this. Raises FileExistsError where `path` is.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"checkpoint {path} exists")
    unfinished = path.with_name(TEMPORARY + path.name)
    rank = dist.get_rank()
    if rank == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    dist.barrier()
    write_rank(unfinished, rank, tensors)
    if rank == 0:
        write_common(unfinished, dist.get_world_size(), common)
    dist.barrier()
    if rank == 0:
        flush_to_disk(unfinished)
        unfinished.rename(path)
        flush_to_disk(path.parent)
    dist.barrier()


def write_common(folder: Path, num_ranks: int, common: Mapping[str, Any]) -> None:
    contents = {"format": FORMAT, "version": VERSION, "num_ranks": num_ranks, "common": common}
    write_whole(folder / COMMON_FILE, json.dumps(contents, indent=1) + "\n")


def write_rank(
    folder: Path,
    rank: int,
    tensors: Iterable[tuple[ParameterShard, torch.Tensor | None]],
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """One rank's files of a checkpoint."""
    listed: dict[str, Any] = {}
    pending: dict[str, torch.Tensor] = {}
    num_files = 0

    def write_pending() -> None:
        nonlocal num_files
        if pending:
            save_file(pending, folder / _file_name(rank, num_files))
            flush_to_disk(folder / _file_name(rank, num_files))
            pending.clear()
            num_files += 1

    for shard, tensor in tensors:
        if tensor is None:
            continue
        if sum(other.nbytes for other in pending.values()) + tensor.nbytes > max_file_bytes:
            write_pending()
        pending[shard.name] = tensor.detach().to("cpu", copy=True).contiguous()
        listed[shard.name] = {
            "file": _file_name(rank, num_files),
            "whole_shape": shard.whole_shape,
            "pieces": [{"whole": piece.whole, "local": piece.local} for piece in shard.pieces],
        }
    write_pending()
    write_whole(folder / f"rank_{rank:05d}.json", json.dumps({"tensors": listed}) + "\n")


def _file_name(rank: int, number: int) -> str:
    return f"rank_{rank:05d}_{number:05d}.safetensors"


class CheckpointFiles:
    """A checkpoint that is read, as a context manager.

    common: the plain values that were saved. Raises MissingFileError where there is no checkpoint, and CheckpointError,
    which names the file, for one in an older format or with contents that contradict each other.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.common: dict[str, Any] = {}
        self._sources: dict[str, dict[int, ParameterShard]] = {}  # by name and rank
        self._files: dict[tuple[str, int], Any] = {}
        self._open_files = ExitStack()

    def __enter__(self) -> Self:
        contents = self._read_common()
        with ExitStack() as opened:
            for rank in range(contents["num_ranks"]):
                self._open_rank(opened, rank)
            self._open_files = opened.pop_all()
        self.common = contents["common"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open_files.close()

    def names(self) -> set[str]:
        return set(self._sources)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return next(iter(self._sources[name].values())).whole_shape

    def read_whole(self, name: str) -> torch.Tensor:
        """The whole tensor, on the CPU, in the file's dtype."""
        return self.read(whole(name, self.shape(name)))

    def read(self, wanted: ParameterShard) -> torch.Tensor:
        """A part of the tensor of that name, on the CPU, in the file's dtype. Raises CheckpointError."""
        held = self._sources[wanted.name]
        try:
            transfers = plan_transfers({rank: [shard] for rank, shard in held.items()}, {0: [wanted]})
        except ValueError as error:
            raise CheckpointError(f"checkpoint {self.path} is damaged: {error}") from None
        part = None
        for transfer in transfers:
            source = self._files[wanted.name, transfer.source_rank].get_slice(wanted.name)[slices(transfer.source)]
            if part is None:
                part = torch.empty(wanted.local_shape, dtype=source.dtype, device="cpu")
            part[slices(transfer.target)].copy_(source)
        return part

    def require(self, model: ModelConfig) -> None:
        """Raises CheckpointError unless it is a trainer's, of this model, and has all of its tensors and no other."""
        common, expected = self.common, plain_json(asdict(model))
        saved = common.get("model")
        if not isinstance(saved, dict) or "family" not in saved:
            raise CheckpointError(f"checkpoint {self.path} is damaged: {COMMON_FILE} has no model")
        if is_flat(saved):
            try:
                saved = with_layer_records(saved)
            except ValueError as error:
                raise CheckpointError(f"checkpoint {self.path} is damaged: in {COMMON_FILE} {error}") from None
        if different := list(_differences(saved, expected)):
            listed = [f"{printable(name)} {shown(old)} (wanted: {shown(wanted)})" for name, old, wanted in different]
            raise CheckpointError(f"checkpoint {self.path} is of another model, with {', '.join(_first(listed))}")
        kinds = {"step_count": int, "metadata": dict, "state_hash": str}
        if wrong := [name for name, kind in kinds.items() if type(common.get(name)) is not kind]:
            raise CheckpointError(f"checkpoint {self.path} is damaged: {COMMON_FILE} has no {', '.join(wrong)}")
        if common.get("dtype") not in ("float32", "bfloat16"):
            raise CheckpointError(f"checkpoint {self.path} is damaged: dtype is {common.get('dtype')!r}")
        names = _tensor_names(model, getattr(torch, common["dtype"]))
        if different := sorted(self.names() ^ set(names)):
            raise CheckpointError(
                f"checkpoint {self.path} is of another model: only one side has {', '.join(_first(different))}"
            )

    def check_hash(self) -> None:
        """Raises CheckpointError unless all tensors are as they were saved."""
        check_state_hash(self.path, self.common, ((name, self.read_whole(name)) for name in sorted(self.names())))

    def _read_common(self) -> dict[str, Any]:
        if not has_file(self.path, COMMON_FILE):
            refuse_pickled(self.path)
            raise MissingFileError(f"no checkpoint in {self.path}: it has no {COMMON_FILE}")
        contents = read_json(self.path, COMMON_FILE)
        where = self.path / COMMON_FILE
        if (contents.get("format"), contents.get("version")) != (FORMAT, VERSION):
            raise CheckpointError(f"{where} is not of format {FORMAT}, version {VERSION}, which this Lockstep reads")
        num_ranks = contents.get("num_ranks")
        if type(num_ranks) is not int or not 1 <= num_ranks <= MAX_RANKS:
            raise CheckpointError(f"{where} is damaged: num_ranks is {num_ranks!r}")
        if not isinstance(contents.get("common"), dict):
            raise CheckpointError(f"{where} is damaged: common is not an object")
        return contents

    def _open_rank(self, opened: ExitStack, rank: int) -> None:
        index = f"rank_{rank:05d}.json"
        listed = read_json(self.path, index).get("tensors")
        if not isinstance(listed, dict):
            raise CheckpointError(f"{self.path / index} is damaged: tensors is not an object")
        files: dict[str, Any] = {}
        for name, entry in listed.items():
            try:
                file_name, shape = entry["file"], _sizes(entry["whole_shape"])
                pieces = tuple(Piece(_box(piece["whole"]), _box(piece["local"])) for piece in entry["pieces"])
                if not re.fullmatch(rf"rank_{rank:05d}_\d+\.safetensors", file_name) or len(pieces) > MAX_PIECES:
                    raise ValueError
            except (KeyError, TypeError, ValueError):
                raise CheckpointError(f"{self.path / index} is damaged: {name!r} is not a tensor's entry") from None
            if file_name not in files:
                files[file_name] = opened.enter_context(opened_tensors(self.path, file_name))
            file = files[file_name]
            if name not in file.keys():  # noqa: SIM118  it is no mapping
                raise CheckpointError(f"{self.path / file_name} is damaged: it has no tensor {name!r}")
            local_shape = tuple(file.get_slice(name).get_shape())
            self._sources.setdefault(name, {})[rank] = ParameterShard(name, shape, local_shape, pieces)
            self._files[name, rank] = file


def _differences(saved: Any, expected: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, saved, expected) of what differs. What an earlier version did not know, it did not save."""
    if isinstance(saved, dict) and isinstance(expected, dict):
        inner = [(key, saved[key], expected.get(key, "nothing")) for key in sorted(saved)]
    elif isinstance(saved, list) and isinstance(expected, list) and len(saved) == len(expected):
        inner = [(str(index), *pair) for index, pair in enumerate(zip(saved, expected, strict=True))]
    else:
        if saved != expected:
            yield name, saved, expected
        return
    for key, old, wanted in inner:
        yield from _differences(old, wanted, f"{name}.{key}" if name else key)


def _first(items: Sequence[str]) -> list[str]:
    """The first items, and how many more there are."""
    return [*items[:_MAX_LISTED], f"and {len(items) - _MAX_LISTED} more"] if len(items) > _MAX_LISTED else list(items)


def _tensor_names(model: ModelConfig, dtype: torch.dtype) -> Iterator[str]:
    """The names of a checkpoint's tensors: of every parameter, its weight and what the optimizer keeps of it."""
    for entry in expand(model):
        for kind in ("weight", *optimizer_state_names(torch.float32 if entry.fp32 else dtype)):
            yield f"{kind}/{entry.megatron}"


def named_shard(shard: ParameterShard, kind: str) -> ParameterShard:
    """The part of one of a parameter's tensors."""
    return replace(shard, name=f"{kind}/{shard.name}")


def check_state_hash(path: Path, common: Mapping[str, Any], tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raises CheckpointError unless a checkpoint's whole tensors have the hash that the trainer saved with them.

    To the trainer, a weight in fp32 is its own master; where others have masters, it counts as one.
    """

    def hashed() -> Iterator[tuple[str, torch.Tensor]]:
        fp32_weights, masters = {}, set()
        for name, tensor in tensors:
            kind, _, parameter = name.partition("/")
            if kind == "master":
                masters.add(parameter)
            if kind == "weight" and tensor.dtype == torch.float32 and common.get("dtype") != "float32":
                fp32_weights[parameter] = tensor
            yield (parameter if kind == "weight" else f"{parameter}/{kind}"), tensor
        yield from ((f"{name}/master", weight) for name, weight in fp32_weights.items() if name not in masters)

    if checksum(hashed()) != common.get("state_hash"):
        raise CheckpointError(
            f"checkpoint {path} is damaged: its tensors do not have the hash that was saved with them"
        )


def plain_json(value: Any) -> Any:
    """What reading `value` from JSON gives: lists for tuples."""
    return json.loads(json.dumps(value))


def refuse_pickled(path: Path) -> None:
    """Raises CheckpointError, with what to do, for a directory in a format that holds pickles."""
    run = next((parent.parent for parent in path.parents if parent.name == "checkpoints"), None)
    what = f"run={run}" if run is not None else f"checkpoint={path} new_checkpoint=DIRECTORY"
    for name in PICKLED_FILES:
        if has_file(path, name):
            raise CheckpointError(
                f"checkpoint {path} is in an older format, in which {name} is a pickle: reading one can run code that "
                f"it holds, so it is not read. If you trust where it comes from: "
                f"lockstep convert {what} allow_pickle=true"
            )


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or any(type(value) is not int or not 0 <= value < 1 << 48 for value in values):
        raise ValueError
    if math.prod(values) >= 1 << 48:
        raise ValueError
    return tuple(values)


def _box(spans: Any) -> tuple[tuple[int, int], ...]:
    if not isinstance(spans, list):
        raise ValueError
    box = tuple(_sizes(span) for span in spans)
    if any(len(span) != 2 for span in box):
        raise ValueError
    return box
