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
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from lockstep.engine.files import TEMPORARY, flush_to_disk, whole_folder, write_whole
from lockstep.recipes.config_schema import to_plain
from lockstep.recipes.runs import content_hashes
from lockstep.recipes.runs.json_lines import fields_of, json_line, read_lines, with_numbers
from lockstep.recipes.runs.run_config import CONFIG_FILE, MAY_DIFFER, completed, differences, read_config
from lockstep.recipes.runs.run_inputs import INPUTS_FILE, RunInputs
from lockstep.recipes.runs.run_place import Advice, check_place, check_unlocked, move_aside, take_lock

# What a run makes before its first step, from its config and inputs; but for the runs of stages that it begins with.
_MADE_FROM_INPUTS = (
    INPUTS_FILE, "new_model", "new_draft", "train_pairs.jsonl", "held_out_pairs.jsonl", "metrics.jsonl", "model",
    "report.html", "trace.json",
)  # fmt: skip


class HeldRun:
    """What a directory holds, for a config that is to run there: its methods raise ValueError, and change nothing."""

    def __init__(self, path: Path, config: Any, may_differ: Iterable[str], advice: Advice):
        self.path = path
        self.inputs = RunInputs(path)
        self.plain = to_plain(config)
        self._config = config
        self._may_differ = tuple(may_differ)
        self._advice = advice

    @property
    def has_finished_a_step(self) -> bool:
        """Whether there is anything that took training to make."""
        if checkpoint_steps(self.path) or rollout_steps(self.path):
            return True
        metrics = self.path / "metrics.jsonl"
        return metrics.exists() and any(record.get("step", 0) > 0 for record in read_lines(metrics))

    def config_differences(self) -> tuple[Mapping[str, Any], list[str]]:
        """The config that it was started with, and a line for each key of it that is another now.

        Refused where a step was made with the other config.
        """
        file = self.path / CONFIG_FILE
        if not file.exists():
            return self.plain, []
        stored = read_config(self.path)
        started = self.inputs.config or stored
        if dataclasses.is_dataclass(self._config):
            stored, started = (completed(type(self._config), held, str(file)) for held in (stored, started))
        lines = differences(started, self.plain, self._may_differ)
        if lines and self.has_finished_a_step:
            was_edited = not differences(stored, self.plain, self._may_differ)
            text = f"{self.path} holds a run with another config; {self._advice.hint}"
            if was_edited:
                text = f"{file} was changed after the run had begun; put it back, or {self._advice.anew}"
            raise ValueError("\n".join([text, *lines]))
        return started, lines

    def input_changes(self, roles: Mapping[str, Mapping[str, str]], made_by_the_run: bool = False) -> list[str]:
        """A line for each file that is not as it was; refused where a step was made from it, or the run made it."""
        changes = [line for role, files in roles.items() for line in self.inputs.changes(role, files)]
        if changes and (made_by_the_run or self.has_finished_a_step):
            text = f"{self.path} was started from files that are not what they were; put them back, or "
            raise ValueError("\n".join([text + self._advice.anew, *changes]))
        return changes

    def check_content(self) -> None:
        """Of what a resumed run keeps: the newest checkpoint, and the rollouts and metrics up to it."""
        steps = checkpoint_steps(self.path)
        for step in _rollout_names(self.path):
            if steps and step <= steps[-1]:
                self._check_rollouts(step)
        if steps:
            self._check_newest(steps)
        if (metrics := self.path / "metrics.jsonl").exists():
            read_lines(metrics)

    def _check_rollouts(self, step: int) -> None:
        file = rollouts_path(self.path, step)
        try:
            content_hashes.check_file(file)
        except ValueError as error:
            raise ValueError(
                f"{error}\nput it back as it was; or go on without the samples of step {step}: "
                f"mkdir -p {_quoted(self.path / 'damaged')} && mv {_quoted(file.with_suffix(''))}.* "
                f"{_quoted(self.path / 'damaged')} && {self._advice.resume}"
            ) from None

    def _check_newest(self, steps: list[int]) -> None:
        try:
            content_hashes.check_folder(checkpoint_path(self.path, steps[-1]))
        except ValueError as error:
            raise ValueError(f"{error}\n{self._way_back(steps)}") from None

    def _way_back(self, steps: list[int]) -> str:
        """How to go on from the newest of the other checkpoints that is whole."""
        for number in range(len(steps) - 2, -1, -1):
            try:
                content_hashes.check_folder(checkpoint_path(self.path, steps[number]))
            except ValueError:
                continue
            damaged = [_quoted(checkpoint_path(self.path, step)) for step in steps[number + 1 :]]
            moves = " && ".join(f"mv {folder} {folder}.damaged" for folder in damaged)
            whole = f"the checkpoint of step {steps[number]} is whole; to go on from it"
            return f"{whole}: {moves} && {self._advice.resume}"
        return f"no other checkpoint is whole: put it back as it was, or {self._advice.anew}"


def check_start(
    path: str | os.PathLike[str],
    config: Any,
    *,
    may_differ: Iterable[str] = MAY_DIFFER,
    overwrite: bool = False,
    inputs: Callable[[], Mapping[str, Mapping[str, str]]] = dict,
    advice: Advice = Advice(),  # noqa: B008  frozen
) -> None:
    """Raises ValueError for what RunDirectory would refuse, with the same arguments. Changes nothing."""
    path = Path(path)
    check_place(path)
    check_unlocked(path)
    if overwrite or not (path / CONFIG_FILE).exists():
        return
    held = HeldRun(path, config, may_differ, advice)
    _, lines = held.config_differences()
    if not lines and not held.input_changes(held.inputs.with_recorded(inputs())):
        held.check_content()


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
        advice: what an error says last.
    Raises:
        ValueError: another process runs here; or the directory holds something else, or a run with another config, or
            files that were changed since they were written; or it cannot be written.
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
        advice: Advice = Advice(),  # noqa: B008  frozen
    ) -> None:
        self.path = Path(path)
        if keep_checkpoints < 0:
            raise ValueError(f"keep_checkpoints must be at least 0 (all), got {keep_checkpoints}")
        self.keep_checkpoints = keep_checkpoints
        check_place(self.path)
        self.moved_to = move_aside(self.path) if overwrite else None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.mkdir(mode=0o700, exist_ok=True)
        self._lock = take_lock(self.path)
        try:
            self._held = HeldRun(self.path, config, may_differ, advice)
            self.inputs = self._held.inputs
            self.lost_inputs = not self.inputs.is_known and self._held.has_finished_a_step
            self._settle_config()
            self.settle_inputs(self.inputs.with_recorded(inputs()))
            self._held.check_content()
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

    def record_metrics(self, step: int, stage: str, metrics: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl. Numbers that JSON lacks are written "NaN", "Infinity", "-Infinity"."""
        self._metrics.write(json_line({"step": step, "stage": stage, **metrics}))
        self._metrics.flush()
        os.fsync(self._metrics.fileno())

    def write_rollouts(self, step: int, samples: Iterable[Any]) -> Path:
        """Write the step's samples (mappings or dataclass instances), one a line, in place of an earlier file."""
        target = rollouts_path(self.path, step)
        text = "".join(json_line(fields_of(sample)) for sample in samples)
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

    def settle_inputs(self, roles: Mapping[str, Mapping[str, str]], made_by_the_run: bool = False) -> None:
        """Records the files that the run starts from, or compares them with what was recorded.

        roles: hashes by file, by role, see RunInputs. A run that has not finished a step starts again from new ones,
        unless they are files that it made itself.
        Raises ValueError that names the files which are not as they were.
        """
        if self._held.input_changes(roles, made_by_the_run):
            self._start_again()
        self.inputs.record(roles)

    def _settle_config(self) -> None:
        """Writes config.yaml; where there is one, refuses a config that differs in other keys than may_differ's."""
        file, plain = self.path / CONFIG_FILE, self._held.plain
        started, lines = self._held.config_differences()
        if lines:
            self._start_again()
        elif self.inputs.config is None or not file.exists():
            self.inputs.start(started)
        write_whole(file, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))

    def _start_again(self) -> None:
        """Removes what was made from another config or other files. Runs of earlier stages look after themselves."""
        for name in _MADE_FROM_INPUTS:
            _delete(self.path / name)
        self.inputs.start(self._held.plain)

    def _recover(self) -> None:
        """Remove what a killed run left unfinished, and what it wrote after its newest checkpoint."""
        for folder in (self.path, self.path / "rollouts", self.path / "checkpoints"):
            for leftover in folder.glob(TEMPORARY + "*"):
                _delete(leftover)
        (self.path / "weights.sha256").unlink(missing_ok=True)
        self._point_to_latest()
        self._drop_old_checkpoints()
        last_step = -1 if self.resume_step is None else self.resume_step
        for step, names in _rollout_names(self.path).items():
            if step > last_step:
                for name in names:
                    (self.path / "rollouts" / name).unlink()
        metrics = self.path / "metrics.jsonl"
        if metrics.exists():
            kept = [record for record in read_lines(metrics) if record["step"] <= last_step]
            write_whole(metrics, "".join(json_line(record) for record in kept))

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
    return [with_numbers(record) for record in read_lines(file)] if file.exists() else []


def read_rollouts(path: str | os.PathLike[str], step: int) -> list[dict[str, Any]]:
    """The samples of one step of the run at path. Raises ValueError for a file without its content's hash."""
    file = rollouts_path(path, step)
    content_hashes.check_file(file)
    with content_hashes.opened(file) as lines:
        return [json.loads(line) for line in lines]


def rollout_steps(path: str | os.PathLike[str]) -> list[int]:
    """Steps of the run at path that have rollouts, ascending. They may have been packed by gzip since."""
    packed = f".jsonl{content_hashes.PACKED}"
    return sorted({step for suffix in (".jsonl", packed) for step in _steps(Path(path) / "rollouts", suffix)})


def rollouts_path(path: str | os.PathLike[str], step: int) -> Path:
    """File of a step's samples in the run at path."""
    return Path(path) / "rollouts" / f"{_step_name(step)}.jsonl"


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


def _rollout_names(path: Path) -> dict[int, list[str]]:
    """By step, ascending: the files of its samples and their hash, packed ones too."""
    names: dict[int, list[str]] = {}
    for suffix in (".jsonl", content_hashes.SUFFIX):
        for ending in (suffix, suffix + content_hashes.PACKED):
            for step in _steps(path / "rollouts", ending):
                names.setdefault(step, []).append(_step_name(step) + ending)
    return dict(sorted(names.items()))


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _step_name(step: int) -> str:
    return f"step_{step:06d}"


def _delete(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    """Remove a complete checkpoint: first its name, so that a kill leaves no incomplete one under it."""
    doomed = folder.rename(folder.with_name(TEMPORARY + folder.name))
    shutil.rmtree(doomed)
