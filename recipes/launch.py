"""Process set-up: environment, threads, seeds. Outside `kernels/`, only this file reads or sets the environment."""

import os
import platform
import random
import socket
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import urlsplit

# Read by libraries when they are imported. A value that the user has set stays.
ENVIRONMENT_DEFAULTS = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # Bars of seconds' work ("Writing model shards"), which in a log are lines without end. run.log has what is done.
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "WANDB_ERROR_REPORTING": "false",  # wandb's own telemetry, which it sends in offline mode too
    "WANDB_SILENT": "true",
    # By default an OpenMP thread out of work spins for milliseconds, on a core that numba's threads or other processes
    # need. So many rounds are about 50 us.
    "GOMP_SPINCOUNT": "1000",
}
NETWORK_TIMEOUT_S = 1.0
OLDEST_PYTHON = (3, 11)


def check_machine() -> None:
    """Raises ValueError, one sentence, where Lockstep cannot run; before anything is imported that would fail there."""
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        raise ValueError(f"Lockstep needs Python {oldest} or later, and this is {platform.python_version()}")
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise ValueError(
            f"Lockstep runs on Linux on x86-64, with or without an NVIDIA GPU, and this is {platform.system()} on "
            f"{platform.machine()}: use a Linux machine or a Linux container of that architecture"
        )


def drop_output() -> None:
    """Sends what is still buffered for the standard output to nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def prepare_environment() -> None:
    """Set what libraries read when imported: threads, offline mode, verbosity. Call before torch is imported."""
    for name, value in ENVIRONMENT_DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("OMP_NUM_THREADS", str(usable_cpus()))
    # A trainer alone talks to itself: gloo would listen on the machine's address in the network.
    if "TORCHELASTIC_RUN_ID" not in os.environ and "lo" in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if "HF_HUB_OFFLINE" not in os.environ and not _reachable(os.environ.get("HF_ENDPOINT", "https://huggingface.co")):
        os.environ["HF_HUB_OFFLINE"] = "1"
    # What Megatron-core says at import on a machine without Transformer Engine; Lockstep brings its own layers.
    warnings.filterwarnings("ignore", message=r".*Apex (is|are) not installed.*")


def set_environment(variables: Mapping[str, str]) -> None:
    """Set environment variables for libraries that this process has not imported yet, and for its children."""
    os.environ.update(variables)


def set_up_process(seed: int, num_threads: int | None = None) -> None:
    """Seed Python, numpy and torch, and set torch's CPU threads (None: the CPUs that this process may use).

    Rollouts do not depend on these seeds (their draws are coordinates); initial weights and shuffles may. The number of
    threads can change the last bits of a backward pass on the CPU, so a recipe that promises bits pins it.
    """
    import numpy  # here and not above: `lockstep --help` imports this file and must stay fast
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.set_num_threads(num_threads or usable_cpus())


def full_errors_asked() -> bool:
    """Whether the user wants tracebacks in place of one-line errors."""
    return os.environ.get("HYDRA_FULL_ERROR") == "1"


@contextmanager
def hydra_raises() -> Iterator[None]:
    """Within the `with` block Hydra raises its errors, for the caller to report, and does not print and exit."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


def wandb_mode(server: str) -> str:
    """The user's WANDB_MODE, else "online" where the wandb server (a URL) answers and "offline" where it does not."""
    return os.environ.get("WANDB_MODE") or ("online" if _reachable(server) else "offline")


def usable_cpus() -> int:
    """CPUs that this process may use: its affinity, or the cgroup's quota where that is smaller."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        cpus = min(cpus, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or the quota "max"
        pass
    return cpus


def _reachable(url: str) -> bool:
    """Whether the host of url, or the proxy that leads to it, accepts a connection within NETWORK_TIMEOUT_S."""
    proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    target = urlsplit(proxy if proxy and "://" in proxy else f"http://{proxy}" if proxy else url)
    port = target.port or (443 if target.scheme == "https" else 80)
    answers: list[bool] = []

    def connect() -> None:
        try:
            socket.create_connection((target.hostname, port), timeout=NETWORK_TIMEOUT_S).close()
            answers.append(True)
        except OSError:
            answers.append(False)

    # In a thread, since name resolution takes no deadline and hangs for many seconds without a network.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(NETWORK_TIMEOUT_S)
    return bool(answers and answers[0])
