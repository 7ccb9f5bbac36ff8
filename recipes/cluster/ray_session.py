"""The Ray cluster that a run works on: one that it starts for itself on this machine, or one that is running.

A cluster of the run's own is beside any other: it is not the one that RAY_ADDRESS or `ray start` name, and its files
are in a folder that only this user can enter. Who may speak to its ports is Ray's to say, by its token (see
docs/security.md).
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import ray

from lockstep.engine.owned_folder import OwnedFolder
from lockstep.recipes.cluster.config import RayClusterConfig

_LOG = logging.getLogger(__name__)

# Of a cluster that is started here. Ray would make its workers as nice as 15: what else runs would come before them.
_OWN_CLUSTER = {
    "object_store_memory": 200 * 2**20,
    "_system_config": {"worker_niceness": 0},
    "include_dashboard": False,
}
# Libraries read these when they are imported, which in an actor may be before our code runs.
_ENVIRONMENT = {"MKL_CBWR": "AUTO,STRICT", "TOKENIZERS_PARALLELISM": "false"}
_ON_ONE_MACHINE = {"GLOO_SOCKET_IFNAME": "lo"}
_HEAD_ANSWERS_WITHIN_S = 5.0
_LONGEST_FOLDER = 40  # names of Unix sockets below it must stay under 108 bytes


class RaySession:
    """Joins the cluster at cluster.address, or starts one. A cluster that this process has joined before is taken as
    it is, and left open.

    directory: of files that all processes of a cluster on one machine can share, and no other user; None where there
    may be several machines.
    Raises ValueError for an address at which no cluster answers.
    """

    def __init__(self, config: RayClusterConfig):
        self.directory: Path | None = None
        self._is_ours = not ray.is_initialized()
        self._folder: OwnedFolder | None = None
        if not self._is_ours:
            return
        if config.address is not None:
            self._join(config.address)
        else:
            base = tempfile.gettempdir()
            self._folder = OwnedFolder("ray", base if len(base) < _LONGEST_FOLDER else "/tmp")
            self.directory = self._folder.path
            self._start(config.start_timeout_s)

    @property
    def head_answers(self) -> bool:
        """Whether the cluster's head (its GCS) still takes connections."""
        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_HEAD_ANSWERS_WITHIN_S).close()
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Leaves the cluster; one that was started here ends."""
        if self._is_ours:
            ray.shutdown()
        if self._folder is not None:
            with contextlib.suppress(OSError):
                self._folder.close()

    def abandon(self) -> None:
        """In place of `close`, without a head: Ray's own clean-up would wait for it for a minute, and then end this
        process as failed. So it is left out, and the process ends by itself when all else is done."""
        _LOG.warning("Ray's head is gone; its processes are left to themselves")
        atexit.register(_end_process, self.directory)

    def _join(self, address: str) -> None:
        try:
            ray.init(address=address, log_to_driver=False, configure_logging=False, runtime_env=_runtime_env({}))
        except ConnectionError as error:
            raise ValueError(f"cluster.address={address}: no Ray cluster answers there ({error})") from error

    def _start(self, timeout_s: float) -> None:
        """Ray allows itself 30 s for it: too few on a busy machine, so then again."""
        deadline = time.monotonic() + timeout_s
        while not ray.is_initialized():
            try:
                with _private_files():
                    ray.init(
                        address="local",
                        log_to_driver=False,
                        configure_logging=False,
                        runtime_env=_runtime_env(_ON_ONE_MACHINE),
                        _temp_dir=str(self.directory / "ray"),
                        **_OWN_CLUSTER,
                    )
            except Exception as error:  # Ray has no class of its own for this
                if "timed out during startup" not in str(error) or time.monotonic() > deadline:
                    raise
                ray.shutdown()


@contextlib.contextmanager
def _private_files() -> Iterator[None]:
    """New files, also of processes that are started meanwhile, are their owner's alone."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def _runtime_env(variables: dict[str, str]) -> dict[str, dict[str, str]]:
    paths = os.pathsep.join(os.path.abspath(entry or ".") for entry in sys.path)
    return {"env_vars": _ENVIRONMENT | variables | {"PYTHONPATH": paths}}


def _end_process(directory: Path | None) -> None:
    """The last that this process does: at its exit Ray's threads would crash it, or wait."""
    if directory is not None:
        own = [child for child in psutil.Process().children() if str(directory) in " ".join(_command(child))]
        for process in [*own, *(below for child in own for below in child.children(recursive=True))]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    failed = getattr(sys, "last_type", None) is not None
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(failed))


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
