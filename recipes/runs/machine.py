"""The machine and the packages that a run has: for its log, its plan and its benchmarks."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import psutil
import torch

import lockstep
from lockstep.recipes import launch

PACKAGES = ("torch", "triton", "numba", "numpy", "transformers", "megatron-core", "ray")
CGROUP = Path("/sys/fs/cgroup")


def versions() -> str:
    """Of Lockstep, Python and the packages that may change a result; those that are not installed are left out."""
    found = [f"lockstep {getattr(lockstep, '__version__', 'not installed')}", f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def hardware() -> str:
    """Processor, CPUs and memory that this process may use, GPUs."""
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    memory = f"{memory_limit() / 2**30:.1f} GiB of memory"
    return ", ".join([processor(), f"{launch.usable_cpus()} CPUs", memory, *gpus, f"Linux {platform.release()}"])


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def gpu() -> str:
    """The first GPU, its driver and torch's CUDA."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "--id=0"]
    try:
        name, driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().split(", ")
    except (OSError, ValueError, subprocess.CalledProcessError):
        return "an NVIDIA GPU (nvidia-smi does not answer)"
    return f"{name}, driver {driver}, CUDA {torch.version.cuda}"


def memory_limit() -> int:
    """Bytes that all processes here may take together: the machine's, or the cgroup's limit where that is smaller."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _cgroup_memory())])


def available_memory() -> int:
    """Bytes that this process could still take without swapping: what the machine has, and the cgroups leave."""
    return min([psutil.virtual_memory().available, *(limit - used for limit, used in _cgroup_memory())])


def _cgroup_memory() -> list[tuple[int, int]]:
    """(limit, use without the page cache) in bytes of this process's cgroup and those above it that have a limit.

    Of version 2, or of version 1's memory controller.
    """
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    paths = {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}
    found = []
    for root, path, limit_file, use_file, cache_key in (
        (CGROUP, paths.get("", "/"), "memory.max", "memory.current", "inactive_file"),
        (
            CGROUP / "memory",
            paths.get("memory", "/"),
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ):
        folder = root / path.lstrip("/")
        for place in [folder, *folder.parents]:
            if not place.is_relative_to(root):
                break
            try:
                limit, use = int((place / limit_file).read_text()), int((place / use_file).read_text())
                statistics = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no such controller, or the limit "max"
                continue
            found.append((limit, max(0, use - int(statistics.get(cache_key, 0)))))
    return found
