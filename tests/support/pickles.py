"""Files that earlier versions wrote with pickle, and pickles that show when they are read."""

import os
import pickle
from pathlib import Path

import torch
import torch.distributed.checkpoint as torch_checkpoint


class Payload:
    """Unpickling it makes the file `marker`."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def payload(marker: Path) -> bytes:
    return pickle.dumps(Payload(marker))


def write_old_checkpoint(path: Path, common: dict, tensors: dict[str, torch.Tensor], num_layers: int) -> None:
    """The format "torch_dist" of `tensors` by name as in today's checkpoints; layers that are alike are stacked."""
    stacked: dict[str, list[torch.Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, parameter = name.partition("/")
        prefix = "" if kind == "weight" else f"optimizer.state.{kind}."
        head, layers, rest = parameter.partition("decoder.layers.")
        key = f"{prefix}{head}{layers}{rest.partition('.')[2]}" if layers else prefix + parameter
        stacked.setdefault(key, []).append(tensor)
    plain = {key: torch.stack(held) if len(held) == num_layers else held[0] for key, held in stacked.items()}
    torch_checkpoint.save(plain, storage_writer=torch_checkpoint.FileSystemWriter(path), no_dist=True)
    torch.save({"common": common}, path / "common.pt")
    (path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
