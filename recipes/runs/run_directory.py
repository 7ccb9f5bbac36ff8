"""A run on disk, in a state from which it can be resumed whenever it is killed.

    runs/NAME/
        config.yaml                   the resolved config
        inputs.json                   what the run was started from, see run_inputs.py
        metrics.jsonl                 one JSON object a line, with `step` and `stage`
        rollouts/step_000123.jsonl    one sample a line: token ids, log-probs, seed, weight versions, reward, ...
        checkpoints/step_000123/      what the stage put there; `checkpoints/latest` names the newest
        weights.sha256                the final weights' hash, once the run has ended
        report.html
        run.lock                      held by the process that writes the run

Files and checkpoints are written under another name, synced and renamed, so a name that exists is complete. Only
metrics.jsonl grows in place; opening the directory repairs its last line. Rollouts and checkpoints that were changed
since are refused by name: when a run is resumed, and where they are read. Files beside them with other names are left
alone. The directory can be read by its owner alone.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import math
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import yaml

from lockstep.engine.files import TEMPORARY, flush_to_disk, whole_folder, write_whole
from lockstep.recipes.config_schema import to_plain
from lockstep.recipes.runs import content_hashes
from lockstep.recipes.runs.run_config import CONFIG_FILE, MAY_DIFFER, completed, differences, read_config
from lockstep.recipes.runs.run_inputs import INPUTS_FILE, RunInputs

LOCK_FILE = "run.lock"
# What a run makes before its first step, from its config and inputs; but for the runs of stages that it begins with.
_MADE_FROM_INPUTS = (
    INPUTS_FILE, "new_model", "new_draft", "train_pairs.jsonl", "held_out_pairs.jsonl", "metrics.jsonl", "model",
    "report.html", "trace.json",
)  # fmt: skip


class RunDirectory:
    """The writer of one run directory; holds its lock until `close`, or the end of the `with` block.

    Opening a directory that holds a run resumes it: what was written after the newest complete checkpoint is dropped
    (metrics and rollouts of later steps, or all of them without a checkpoint), since the run makes it again.

    Args:
        path: the directory, made if it is not there.
        config: the resolved config, a dataclass or a mapping. A run of another one that has not finished a step, such
            as one that could not start, is replaced.
        may_differ: patterns (fnmatch) of dotted config keys that may differ from the run that is resumed.
        keep_checkpoints: how many of the newest checkpoints stay; 0 keeps all.
        overwrite: a run that is there is moved to `NAME.old-1` (or 2, ...) beside it, whole.
        inputs: gives the hashes of the files that the config names, by config key; see `settle_inputs`.
        hint: what an error says last: how to go on. anew: the same where the run that is there cannot go on.
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
        overwrite: bool = False,
        inputs: Callable[[], Mapping[str, Mapping[str, str]]] = dict,
        hint: str = "resume that, or name another run",
        anew: str = "name another run",
    ) -> None:
        self.path = Path(path)
        if keep_checkpoints < 0:
            raise ValueError(f"keep_checkpoints must be at least 0 (all), got {keep_checkpoints}")
        self.keep_checkpoints = keep_checkpoints
        self._hint, self._anew = hint, anew
        _require_run_or_empty(self.path)
        self.moved_to = _move_aside(self.path) if overwrite else None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.mkdir(mode=0o700, exist_ok=True)
        self._lock = _take_lock(self.path / LOCK_FILE)
        try:
            self.inputs = RunInputs(self.path)
            self._settle_config(config, tuple(may_differ))
            self.settle_inputs(self.inputs.with_recorded(inputs()))
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

    @property
    def has_finished_a_step(self) -> bool:
        """Whether there is anything that took training to make."""
        if checkpoint_steps(self.path) or rollout_steps(self.path):
            return True
        metrics = self.path / "metrics.jsonl"
        return metrics.exists() and any(record.get("step", 0) > 0 for record in _read_lines(metrics))

    def settle_inputs(self, roles: Mapping[str, Mapping[str, str]], made_by_the_run: bool = False) -> None:
        """Records the files that the run starts from, or compares them with what was recorded.

        roles: hashes by file, by role, see RunInputs. A run that has not finished a step starts again from new ones,
        unless they are files that it made itself.
        Raises ValueError that names the files which are not as they were.
        """
        changes = [line for role, files in roles.items() for line in self.inputs.changes(role, files)]
        if changes and (made_by_the_run or self.has_finished_a_step):
            text = f"{self.path} was started from files that are not what they were; put them back, or {self._anew}"
            raise ValueError("\n".join([text, *changes]))
        if changes:
            self._start_again(self._plain_config)
        self.inputs.record(roles)

    def _settle_config(self, config: Any, may_differ: tuple[str, ...]) -> None:
        """Writes config.yaml; where there is one, refuses a config that differs in other keys than may_differ's."""
        self._plain_config = plain = to_plain(config)
        file = self.path / CONFIG_FILE
        lines, started = [], plain
        if file.exists():
            stored = read_config(self.path)
            started = self.inputs.config or stored
            if dataclasses.is_dataclass(config):
                stored, started = (completed(type(config), held, str(file)) for held in (stored, started))
            lines = differences(started, plain, may_differ)
            if lines and self.has_finished_a_step:
                was_edited = not differences(stored, plain, may_differ)
                text = f"{self.path} holds a run with another config; {self._hint}"
                if was_edited:
                    text = f"{file} was changed after the run had begun; put it back, or {self._anew}"
                raise ValueError("\n".join([text, *lines]))
        if lines:
            self._start_again(plain)
        elif self.inputs.config is None or not file.exists():
            self.inputs.start(started)
        write_whole(file, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))

    def _start_again(self, plain: Mapping[str, Any]) -> None:
        """Removes what was made from another config or other files. Runs of earlier stages look after themselves."""
        for name in _MADE_FROM_INPUTS:
            _delete(self.path / name)
        self.inputs.start(plain)

    def _recover(self) -> None:
        """Remove what a killed run left unfinished, and what it wrote after its newest checkpoint."""
        for folder in (self.path, self.path / "rollouts", self.path / "checkpoints"):
            for leftover in folder.glob(TEMPORARY + "*"):
                _delete(leftover)
        (self.path / "weights.sha256").unlink(missing_ok=True)
        self._point_to_latest()
        self._drop_old_checkpoints()
        last_step = -1 if self.resume_step is None else self.resume_step
        rollouts = self.path / "rollouts"
        for suffix in (".jsonl", content_hashes.SUFFIX):
            for step in _steps(rollouts, suffix):
                if step > last_step:
                    (rollouts / f"{_step_name(step)}{suffix}").unlink()
                else:
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
    return _steps(Path(path) / "rollouts", ".jsonl")


def checkpoint_steps(path: str | os.PathLike[str]) -> list[int]:
    """Steps of the run at path that have a complete checkpoint, ascending."""
    return [step for step in _steps(Path(path) / "checkpoints", "") if checkpoint_path(path, step).is_dir()]


def checkpoint_path(path: str | os.PathLike[str], step: int) -> Path:
    """Folder of a step's checkpoint in the run at path."""
    return Path(path) / "checkpoints" / _step_name(step)


def _steps(folder: Path, suffix: str) -> list[int]:
    """Of the names that a run writes; backups and archives beside them have others."""
    numbers = (re.fullmatch(rf"step_(\d{{6,}}){re.escape(suffix)}", path.name) for path in folder.glob("step_*"))
    steps = sorted(int(match[1]) for match in numbers if match)
    return [step for step in steps if (folder / f"{_step_name(step)}{suffix}").exists()]


def _step_name(step: int) -> str:
    return f"step_{step:06d}"


def _require_run_or_empty(path: Path) -> None:
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            raise ValueError(f"{path}: {place} is not a directory" if place != path else f"{path} is not a directory")
    if path.is_dir() and not (path / "config.yaml").exists():
        # A run that was killed while it began has its lock, and perhaps half a config.
        own = (LOCK_FILE, INPUTS_FILE)
        foreign = [name for name in os.listdir(path) if name not in own and not name.startswith(TEMPORARY)]
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


def _move_aside(path: Path) -> Path | None:
    """Gives a run that is there another name, and returns that. Raises ValueError where a process is at work in it."""
    if not (path / CONFIG_FILE).exists():
        return None
    with _take_lock(path / LOCK_FILE):
        number = next(n for n in itertools.count(1) if not path.with_name(f"{path.name}.old-{n}").exists())
        return path.rename(path.with_name(f"{path.name}.old-{number}"))


def _delete(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file that grows by lines, without a torn last one.

    Raises:
        ValueError: a line other than the last is no JSON object with a step: something else than a kill damaged it.
    """
    lines = path.read_bytes().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        elif number < len(lines):
            raise ValueError(f"{path}, line {number} is not a JSON object with a step")
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
