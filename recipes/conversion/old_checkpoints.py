"""Checkpoints that an earlier version saved, rewritten in today's format: one, or all of a run, in their place."""

from __future__ import annotations

import shutil
from pathlib import Path

from lockstep.engine.files import TEMPORARY, whole_folder
from lockstep.recipes.runs import content_hashes
from lockstep.recipes.runs.run_directory import checkpoint_path, checkpoint_steps
from lockstep.trainer_bridge.megatron.pickled_checkpoint import is_pickled, rewrite


def rewrite_checkpoint(checkpoint: Path, target: Path) -> None:
    """Writes one trainer's checkpoint anew, to `target`. Raises ValueError that says why it cannot."""
    if not is_pickled(checkpoint):
        raise ValueError(f"convert: {checkpoint} is no trainer's checkpoint of an earlier version")
    if target.exists():
        raise ValueError(f"convert: {target} exists; choose another new_checkpoint")
    rewrite(checkpoint, target)


def rewrite_run(run: Path) -> list[int]:
    """Rewrites the checkpoints of the run, each step's whole or not at all. Returns the steps that were rewritten.

    Raises ValueError for a run without checkpoints, or one that was changed since it was written.
    """
    steps = checkpoint_steps(run)
    if not steps:
        raise ValueError(f"convert: run={run} holds no checkpoints")
    return [step for step in steps if _rewrite_step(checkpoint_path(run, step))]


def _rewrite_step(folder: Path) -> bool:
    content_hashes.check_folder(folder)
    old = [path.parent for path in folder.rglob("common.pt") if is_pickled(path.parent)]
    if not old:
        return False
    new = folder.with_name(f"{TEMPORARY}new-{folder.name}")
    shutil.rmtree(new, ignore_errors=True)
    with whole_folder(new) as unfinished:
        shutil.copytree(folder, unfinished, dirs_exist_ok=True, ignore=lambda at, _: _entries(Path(at), old))
        for path in old:
            rewrite(path, unfinished / path.relative_to(folder))
        (unfinished / content_hashes.FOLDER_LIST).unlink()
        content_hashes.write_folder_list(unfinished)
    doomed = folder.rename(folder.with_name(TEMPORARY + folder.name))
    new.rename(folder)
    shutil.rmtree(doomed)
    return True


def _entries(folder: Path, left_out: list[Path]) -> list[str]:
    return [path.name for path in left_out if path.parent == folder]
