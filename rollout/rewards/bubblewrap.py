"""How bubblewrap is called: namespaces of its own, everything read-only, one temporary file system to write to."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence

ANY_FILE = "/"
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


def find() -> str | None:
    """The program's path, or None."""
    return shutil.which("bwrap")


def command(readable: Sequence[str], folder: str, disk_bytes: int, filter_descriptor: int) -> list[str]:
    """What stands before the command to run.

    readable: what is there at all, read-only; ANY_FILE alone is every file, with /proc of its own processes only.
    folder: where a file system in memory of disk_bytes is mounted, which vanishes with the last process.
    filter_descriptor: a seccomp filter is read from it.
    """
    made = [find() or "bwrap", "--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    made += ["--unshare-cgroup-try", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    made += ["--hostname", "sandbox", "--seccomp", str(filter_descriptor)]
    if ANY_FILE in readable:
        made += ["--ro-bind", "/", "/", "--dev", "/dev", "--remount-ro", "/dev"]
    else:
        for path in sorted({os.path.normpath(path) for path in readable}):  # what lies within another one comes later
            made += ["--ro-bind-try", path, path]
        for device in _DEVICES:
            made += ["--dev-bind-try", device, device]
    # Our own process, which starts the judged one, reads its number of threads there.
    made += ["--proc", "/proc", "--perms", "0700", "--size", str(disk_bytes), "--tmpfs", folder]
    made += [] if ANY_FILE in readable else ["--remount-ro", "/"]
    return [*made, "--chdir", folder, "--"]
