"""Weights through a directory: for engines that share a file system and nothing else. Both ends.

An update is a directory `weights-VERSION`, which appears by one rename once every sender has written its safetensors
file into it. A receiver reads only the slices that the plan wants. Old versions are removed by the sender.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lockstep.engine.files import flush_to_disk
from lockstep.engine.models.sharding import slices
from lockstep.engine.weights.staging import WeightUpdate
from lockstep.kernels.reductions.content_hash import content_hashes
from lockstep.trainer_bridge.weight_plan import Transfer

_POLL_S = 0.02


@dataclass(frozen=True)
class DiskTransport:
    """One rank's end, of a sender or a receiver; both count from 0.

    directory: shared by all. barrier: of all senders. keep: versions that stay, the newest first. timeout_s: of a wait.
    """

    plan: Sequence[Transfer]
    directory: Path
    rank: int = 0
    barrier: Callable[[], None] = lambda: None
    timeout_s: float = 60.0
    keep: int = 2

    def send(self, tensors: Mapping[str, torch.Tensor], version: int) -> dict[str, float]:
        """Writes this rank's tensors; the last act, rank 0's after the barrier, is the rename.

        A version that is there, of an update that failed or of a run that was killed, is replaced.
        Raises ValueError for a tensor that the plan wants and `tensors` lacks.
        """
        started = time.perf_counter()
        mine = [transfer for transfer in self.plan if transfer.source_rank == self.rank]
        for name in dict.fromkeys(transfer.name for transfer in mine):
            if name not in tensors:
                raise ValueError(f"rank {self.rank} has no tensor {name}, which the plan wants of it")
        final, partial = self._path(version), self.directory / f".weights-{version}.partial"
        partial.mkdir(parents=True, exist_ok=True, mode=0o700)
        held = {name: tensors[name].detach().cpu().contiguous() for name in dict.fromkeys(t.name for t in mine)}
        hashes = content_hashes([held[transfer.name][slices(transfer.source)] for transfer in mine]).tolist()
        save_file(held, partial / f"{self.rank}.safetensors")
        (partial / f"{self.rank}.json").write_text(json.dumps({"version": version, "hashes": hashes}))
        for name in (f"{self.rank}.safetensors", f"{self.rank}.json"):
            flush_to_disk(partial / name)
        self.barrier()
        if self.rank == 0:
            replaced = self.directory / f".weights-{version}.replaced"
            shutil.rmtree(replaced, ignore_errors=True)
            if final.exists():
                final.rename(replaced)
            partial.rename(final)
            shutil.rmtree(replaced, ignore_errors=True)
            flush_to_disk(self.directory)
            self._remove_old(version)
        return {"write_s": time.perf_counter() - started}

    def receive(self, update: WeightUpdate) -> dict[str, float]:
        """Fills this rank's update, once its version is there.

        Raises TimeoutError where it does not appear, and ValueError that names the file, or the tensor that is missing,
        truncated or damaged in it.
        """
        started = time.perf_counter()
        path = self._path(update.version)
        while not path.exists():
            if time.perf_counter() - started > self.timeout_s:
                raise TimeoutError(
                    f"weight update {update.version} did not appear in {self.directory} within {self.timeout_s} s"
                )
            time.sleep(_POLL_S)
        waited = time.perf_counter()
        for source in sorted({t.source_rank for t in self.plan if t.target_rank == self.rank}):
            self._read(path, source, update)
        return {"wait_s": waited - started, "read_s": time.perf_counter() - waited}

    def _read(self, path: Path, source: int, update: WeightUpdate) -> None:
        sent = [transfer for transfer in self.plan if transfer.source_rank == source]
        file = path / f"{source}.safetensors"
        try:
            hashes = json.loads((path / f"{source}.json").read_text())["hashes"]
            with safe_open(file, framework="pt") as held:
                present = set(held.keys())
                for transfer, expected in zip(sent, hashes, strict=True):
                    if transfer.target_rank != self.rank:
                        continue
                    if transfer.name not in present:
                        raise ValueError(f"weight update {update.version}: {file} lacks {transfer.name}")
                    part = held.get_slice(transfer.name)[slices(transfer.source)]
                    if content_hashes([part]).item() != expected:
                        raise ValueError(f"weight update {update.version}: {transfer.name} is damaged in {file}")
                    update.tensors[transfer.name][slices(transfer.target)] = part
                    update.received(transfer.name, transfer.num_elements)
        except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"weight update {update.version}: {file} is damaged: {error}") from error

    def _path(self, version: int) -> Path:
        return self.directory / f"weights-{version}"

    def _remove_old(self, version: int) -> None:
        names = (re.fullmatch(r"weights-(\d+)", path.name) for path in self.directory.glob("weights-*"))
        versions = sorted(int(name[1]) for name in names if name)
        for old in [v for v in versions if v <= version][: -self.keep]:
            shutil.rmtree(self._path(old), ignore_errors=True)
