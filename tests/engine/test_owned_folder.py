"""Temporary folders go with their process, however it ends, and nothing else goes with them."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lockstep.engine.owned_folder import LOCK, OwnedFolder, remove_left
from lockstep.recipes import cli
from lockstep.rollout.rewards.isolated_main import remove_tree

KINDS = ("verifier", "reward", "ranks", "ray", "weights")
OWNER = """
import os, signal, sys
from lockstep.engine.owned_folder import OwnedFolder
owned = [OwnedFolder(kind) for kind in sys.argv[2:]]
for each in owned:
    (each.path / "work").mkdir()
if sys.argv[1] == "fork" and os.fork() == 0:
    sys.exit(0)
os.wait() if sys.argv[1] == "fork" else None
print(all(each.path.exists() for each in owned), flush=True)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """In the place of /tmp."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def run_owner(end, *kinds):
    return subprocess.run([sys.executable, "-c", OWNER, end, *kinds], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("end", ["ended", "fork"])
def test_a_folder_goes_with_its_process(end, folder):
    done = run_owner(end, *KINDS)
    assert done.stdout == "True\n", "a fork's end is not its parent's"
    assert done.stderr == ""
    assert list(folder.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_no_other(folder):
    done = run_owner("killed", *KINDS)
    assert done.returncode == -signal.SIGKILL
    left = sorted(path.name.split("-")[1] for path in folder.iterdir())
    assert left == sorted(KINDS), "nothing was left to remove"
    with_owner = OwnedFolder("verifier")
    others = ["lockstep-mine", "lockstep-verifier-mine", "lockstep-verifier-1234567", "other-verifier-12345678"]
    for name in others:
        (folder / name).mkdir()
        (folder / name / LOCK).touch()
    (folder / "lockstep-ranks-abcdefgh").mkdir()  # is just being made
    outside = folder / "outside"
    outside.mkdir()
    (outside / LOCK).touch()
    (folder / "lockstep-ray-abcdefgh").symlink_to(outside)
    os.makedirs(folder / "lockstep-weights-abcdefgh")
    (folder / "lockstep-weights-abcdefgh" / LOCK).symlink_to(outside / LOCK)
    os.makedirs(folder / "lockstep-reward-abcdefgh")
    os.mkfifo(folder / "lockstep-reward-abcdefgh" / LOCK)
    remove_left(folder, remove_tree)
    kept = {path.name for path in folder.iterdir()}
    odd = {"lockstep-ranks-abcdefgh", "outside", "lockstep-ray-abcdefgh", "lockstep-weights-abcdefgh"}
    assert kept - {"lockstep-reward-abcdefgh"} == {with_owner.path.name, *others, *odd}
    assert (outside / LOCK).exists()
    os.utime(folder / "lockstep-ranks-abcdefgh", (0, 0))  # was never finished
    remove_left(folder, remove_tree)
    assert not (folder / "lockstep-ranks-abcdefgh").exists()
    with_owner.close()
    assert not with_owner.path.exists()


def test_a_run_begins_with_the_removal(folder, monkeypatch):
    run_owner("killed", "verifier", "reward")
    left = [Path(path) for path in folder.iterdir()]
    deep = os.open(left[0], os.O_RDONLY)
    for _ in range(1500):  # deeper than shutil.rmtree goes
        os.mkdir("d", dir_fd=deep)
        below = os.open("d", os.O_RDONLY, dir_fd=deep)
        os.close(deep)
        deep = below
    os.close(deep)
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit):
        cli.main(["eval", "engine.model=nothing"])
    assert [path for path in left if path.exists()] == []


def test_a_folder_is_of_its_user_alone(folder):
    owned = OwnedFolder("ranks")
    assert owned.path.parent == folder
    assert owned.path.stat().st_mode & 0o077 == 0


def test_what_cannot_be_removed_is_said(folder):
    def remove(path):
        raise OSError("no")

    owned = OwnedFolder("reward", remove=remove)
    with pytest.raises(OSError, match="no"):
        owned.close()
    shutil.rmtree(owned.path)
