"""Runs a function in several processes that form one gloo group, with a deadline."""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(function: Callable, num_ranks: int, folder: Path, *args, timeout_s: float = 600.0) -> list:
    """[function(*args) of rank 0, of rank 1, ...]; function is of a module. Raises what a rank raised, or TimeoutError.

    folder: an empty one, for the ranks' meeting point and results.
    """
    context = mp.spawn(_rank, (function, num_ranks, str(folder), args), nprocs=num_ranks, join=False)
    deadline = time.monotonic() + timeout_s
    try:
        while not context.join(timeout=max(0.0, min(1.0, deadline - time.monotonic()))):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{num_ranks} ranks of {function.__name__} have not ended in {timeout_s} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(folder / f"result{rank}", weights_only=False) for rank in range(num_ranks)]


def _rank(rank: int, function: Callable, num_ranks: int, folder: str, args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=120),
    )
    torch.save(function(*args), f"{folder}/result{rank}")
    dist.barrier()
    dist.destroy_process_group()
