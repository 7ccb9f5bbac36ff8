"""Serving weights that are another owner's tensors: one copy in memory, and nothing to move."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NoReturn

import torch

from lockstep.engine.weights.checksums import checksum
from lockstep.engine.weights.served_weights import ServedWeights, UpdateReport
from lockstep.engine.weights.staging import NamedTensors, Staged, WeightUpdate, stage


class AliasedWeights(ServedWeights):
    """An update of these weights is the owner's word that they are the new version.

    num_changes: how often the owner has written to them. (torch's own counters miss fused optimizers.)
    Making one checks the tensors and changes nothing; `begin` serves them.
    """

    def __init__(
        self,
        named_tensors: NamedTensors,
        targets: Mapping[str, torch.Tensor],
        num_changes: Callable[[], int],
    ):
        """Raises ValueError that names a tensor: as `stage`, and for one on another device or not contiguous."""
        self.targets = targets
        self.version = -1
        self._tensors = stage(named_tensors, targets).parts
        for name, tensor in self._tensors.items():
            if not tensor.is_contiguous() or tensor.device != targets[name].device:
                raise ValueError(f"{name} cannot be shared: it is on {tensor.device} with strides {tensor.stride()}")
        self._num_changes = num_changes
        self._num_served = num_changes()

    def begin(self, version: int) -> None:
        """The model reads the owner's tensors from now on."""
        for name, tensor in self._tensors.items():
            self.targets[name].data = tensor
        self._serve(version)

    def stage(self, named_tensors: NamedTensors, partial: bool = False) -> Staged:
        """Raises ValueError unless these are the shared tensors."""
        tensors = dict(named_tensors)
        known = tensors.keys() <= self._tensors.keys() if partial else tensors.keys() == self._tensors.keys()
        if not known or any(not self._is_shared(name, tensor) for name, tensor in tensors.items()):
            self._refuse()
        return Staged()

    def flip(self, staged: Staged, version: int) -> Callable[[], UpdateReport]:
        """The report has no checksum, since nothing was moved."""
        self._serve(version)
        return lambda: {"copy_s": 0.0, "checksum": ""}

    def checksum(self) -> str:
        return checksum(self.targets.items())

    def room(self, version: int, partial: bool = False, encoded: bool = False) -> WeightUpdate:
        self._refuse()

    def check_arrived(self, update: WeightUpdate) -> None:
        self._refuse()

    def free_room(self) -> None:
        """There is none."""

    def release(self) -> None:
        super().release()
        self._tensors = {}

    def check_current(self) -> None:
        if self._num_changes() != self._num_served:
            raise RuntimeError(
                f"the weights that this engine shares have changed since version {self.version} was published: publish "
                "the new version before the engine's next step"
            )

    def _serve(self, version: int) -> None:
        self.version = version
        self._num_served = self._num_changes()

    def _is_shared(self, name: str, tensor: torch.Tensor) -> bool:
        return tensor is self._tensors[name] or tensor.data_ptr() == self._tensors[name].data_ptr()

    @staticmethod
    def _refuse() -> NoReturn:
        raise ValueError("this engine shares its weights with their owner: it takes no others")
