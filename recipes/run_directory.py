"""A run on disk, in a state from which it can be resumed whenever it is killed.

    runs/NAME/
        config.yaml                   the resolved config
        metrics.jsonl                 one JSON object a line, with `step` and `stage`
        rollouts/step_000123.jsonl    one sample a line: token ids, log-probs, seed, weight versions, reward, ...
        checkpoints/step_000123/      what the stage put there; `checkpoints/latest` names the newest
        weights.sha256                the final weights' hash, once the run has ended
        report.html
        run.lock                      held by the process that writes the run

Files and checkpoints are written under another name, synced and renamed, so a name that exists is complete. Only
metrics.jsonl grows in place; opening the directory repairs its last line. Rollouts and checkpoints that were changed
since are refused by name: when a run is resumed, and where they are read.
"""

import contextlib
import dataclasses
import fcntl
import fnmatch
import json
import math
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import yaml

from lockstep.engine.files import TEMPORARY, flush_to_disk, whole_folder, write_whole
from lockstep.recipes import content_hashes
from lockstep.recipes.config_schema import to_plain

LOCK_FILE = "run.lock"
# Keys that a resumed run may change: how long it runs and how it is watched, not what it computes.
MAY_DIFFER = (
    "steps",
    "sinks",
    "sinks.*",
    "wandb.*",
    "keep_checkpoints",
    "checkpoint_every",
    "push_to_hub",
    "live",
    "report",
)


class RunDirectory:
    """The writer of one run directory; holds its lock until `close`, or the end of the `with` block.

    Opening a directory that holds a run resumes it: what was written after the newest complete checkpoint is dropped
    (metrics and rollouts of later steps, or all of them without a checkpoint), since the run makes it again.

    Args:
        path: the directory, made if it is not there.
        config: the resolved config, a dataclass or a mapping.
        may_differ: patterns (fnmatch) of dotted config keys that may differ from the run that is resumed.
        keep_checkpoints: how many of the newest checkpoints stay; 0 keeps all.
    Raises:
        ValueError: another process runs here; or the directory holds something else, or a run with another config, or
            a rollout file or newest checkpoint that was changed since it was written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: Any,
        *,
        may_differ: Iterable[str] = MAY_DIFFER,
        keep_checkpoints: int = 2,
    ) -> None:
        self.path = Path(path)
        self.keep_checkpoints = keep_checkpoints
        _require_run_or_empty(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _take_lock(self.path / LOCK_FILE)
        try:
            _settle_config(self.path / "config.yaml", to_plain(config), tuple(may_differ))
            for folder in (self.path / "rollouts", self.path / "checkpoints"):
                folder.mkdir(exist_ok=True)
            self._recover()
            self._metrics = open(self.path / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115  closed in close()
            flush_to_disk(self.path)
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock. May be called again."""
        self._metrics.close()
        self._lock.close()

    @property
    def resume_step(self) -> int | None:
        """Step of the newest complete checkpoint; None if the run starts from its beginning."""
        return max(checkpoint_steps(self.path), default=None)

    @property
    def resume_checkpoint(self) -> Path | None:
        """Folder of the newest complete checkpoint."""
        step = self.resume_step
        return None if step is None else self.checkpoint_path(step)

    def checkpoint_path(self, step: int) -> Path:
        return checkpoint_path(self.path, step)

    def rollouts_path(self, step: int) -> Path:
        return self.path / "rollouts" / f"{_step_name(step)}.jsonl"

    def record_metrics(self, step: int, stage: str, metrics: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl. Numbers that JSON lacks are written "NaN", "Infinity", "-Infinity"."""
        self._metrics.write(_json_line({"step": step, "stage": stage, **metrics}))
        self._metrics.flush()
        os.fsync(self._metrics.fileno())

    def write_rollouts(self, step: int, samples: Iterable[Any]) -> Path:
        """Write the step's samples (mappings or dataclass instances), one a line, in place of an earlier file."""
        target = self.rollouts_path(step)
        text = "".join(_json_line(_fields(sample)) for sample in samples)
        # First the hash: rollouts that are there have theirs.
        write_whole(target.with_suffix(content_hashes.SUFFIX), content_hashes.hash_line(text.encode(), target.name))
        write_whole(target, text)
        return target

    @contextlib.contextmanager
    def checkpoint(self, step: int) -> Iterator[Path]:
        """The `with` block writes the checkpoint into the folder it gets; the checkpoint counts once the block ends.

        Raises:
            ValueError: the step has a checkpoint already.
        """
        target = self.checkpoint_path(step)
        if target.exists():
            raise ValueError(f"{target} exists")
        with whole_folder(target) as folder:
            yield folder
            content_hashes.write_folder_list(folder)
        self._point_to_latest()
        self._drop_old_checkpoints()

    def write_weights_hash(self, digest: str) -> None:
        """Record the final weights' SHA-256 (hex). Opening the directory again removes it, until the next end."""
        write_whole(self.path / "weights.sha256", digest + "\n")

    def _recover(self) -> None:
        """Remove what a killed run left unfinished, and what it wrote after its newest checkpoint."""
        for folder in (self.path, self.path / "rollouts", self.path / "checkpoints"):
            for leftover in folder.glob(TEMPORARY + "*"):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        (self.path / "weights.sha256").unlink(missing_ok=True)
        self._point_to_latest()
        self._drop_old_checkpoints()
        last_step = -1 if self.resume_step is None else self.resume_step
        rollouts = self.path / "rollouts"
        for file in rollouts.glob("step_*"):
            if _step_of(file) > last_step:
                file.unlink()
        for step in _steps(rollouts.glob("step_*")):
            content_hashes.check_file(self.rollouts_path(step))
        if self.resume_checkpoint is not None:
            content_hashes.check_folder(self.resume_checkpoint)
        metrics = self.path / "metrics.jsonl"
        if metrics.exists():
            kept = [record for record in _read_lines(metrics) if record["step"] <= last_step]
            write_whole(metrics, "".join(_json_line(record) for record in kept))

    def _drop_old_checkpoints(self) -> None:
        if self.keep_checkpoints:
            for old in checkpoint_steps(self.path)[: -self.keep_checkpoints]:
                _remove(self.checkpoint_path(old))

    def _point_to_latest(self) -> None:
        """`latest` is for people and other tools: a folder's name is the truth, and this follows it."""
        pointer = self.path / "checkpoints" / "latest"
        if self.resume_step is None:
            pointer.unlink(missing_ok=True)
            return
        write_whole(pointer, _step_name(self.resume_step) + "\n")


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The resolved config of the run at path."""
    return yaml.safe_load((Path(path) / "config.yaml").read_text(encoding="utf-8"))


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of the run at path, in order; a line that is being written, or was torn by a kill, is left out."""
    file = Path(path) / "metrics.jsonl"
    return [_with_numbers(record) for record in _read_lines(file)] if file.exists() else []


def read_rollouts(path: str | os.PathLike[str], step: int) -> list[dict[str, Any]]:
    """The samples of one step of the run at path. Raises ValueError for a file without its content's hash."""
    file = Path(path) / "rollouts" / f"{_step_name(step)}.jsonl"
    content_hashes.check_file(file)
    with open(file, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def rollout_steps(path: str | os.PathLike[str]) -> list[int]:
    """Steps of the run at path that have rollouts, ascending."""
    return _steps((Path(path) / "rollouts").glob("step_*.jsonl"))


def checkpoint_steps(path: str | os.PathLike[str]) -> list[int]:
    """Steps of the run at path that have a complete checkpoint, ascending."""
    return _steps((Path(path) / "checkpoints").glob("step_*"))


def checkpoint_path(path: str | os.PathLike[str], step: int) -> Path:
    """Folder of a step's checkpoint in the run at path."""
    return Path(path) / "checkpoints" / _step_name(step)


def _steps(paths: Iterable[Path]) -> list[int]:
    return sorted({_step_of(path) for path in paths})


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def _step_name(step: int) -> str:
    return f"step_{step:06d}"


def _require_run_or_empty(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is not a directory")
    if path.is_dir() and not (path / "config.yaml").exists():
        # A run that was killed while it began has its lock, and perhaps half a config.
        foreign = [name for name in os.listdir(path) if name != LOCK_FILE and not name.startswith(TEMPORARY)]
        if foreign:
            raise ValueError(f"{path} is not a run directory: it has no config.yaml but holds {sorted(foreign)[0]}")


def _take_lock(path: Path) -> IO[str]:
    """The open, locked file. The kernel drops a lock with its holder: a dead process's is never in the way."""
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  its closing is the unlocking
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise ValueError(f"{path.parent} is in use by {holder}") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def _settle_config(path: Path, config: Mapping[str, Any], may_differ: tuple[str, ...]) -> None:
    """Write config.yaml; where there is one, refuse a config that differs in other keys than may_differ's."""
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    if path.exists():
        before, after = _flat(yaml.safe_load(path.read_text(encoding="utf-8"))), _flat(yaml.safe_load(text))
        differing = [
            f"  {key}: {_shown(before, key)} -> {_shown(after, key)}"
            for key in sorted(before.keys() | after.keys())
            if _shown(before, key) != _shown(after, key) and not any(fnmatch.fnmatch(key, p) for p in may_differ)
        ]
        if differing:
            lines = "\n".join(differing)
            raise ValueError(
                f"{path.parent} holds a run with another config; resume that, or name another run\n{lines}"
            )
    write_whole(path, text)


def _flat(config: Mapping[str, Any] | None, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in (config or {}).items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _shown(flat: Mapping[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else "(absent)"


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file that grows by lines, without a torn last one.

    Raises:
        ValueError: a line other than the last is no JSON object: the file was damaged by something else than a kill.
    """
    lines = path.read_bytes().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif number < len(lines):
            raise ValueError(f"{path}, line {number} is not a JSON object")
    return records


def _json_line(record: Mapping[str, Any]) -> str:
    plain = {key: _json_value(value) for key, value in record.items()}
    return json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n"


def _json_value(value: Any) -> Any:
    if isinstance(value, str | bool | int | None):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_json_value(item) for item in value]
    if hasattr(value, "tolist"):  # torch tensors, numpy arrays and scalars
        return _json_value(value.tolist())
    return str(value)


def _with_numbers(record: dict[str, Any]) -> dict[str, Any]:
    return {key: float(value) if value in ("NaN", "Infinity", "-Infinity") else value for key, value in record.items()}


def _fields(sample: Any) -> Mapping[str, Any]:
    if dataclasses.is_dataclass(sample):
        return {field.name: getattr(sample, field.name) for field in dataclasses.fields(sample)}
    return sample


def _remove(folder: Path) -> None:
    """Remove a complete checkpoint: first its name, so that a kill leaves no incomplete one under it."""
    doomed = folder.rename(folder.with_name(TEMPORARY + folder.name))
    shutil.rmtree(doomed)
