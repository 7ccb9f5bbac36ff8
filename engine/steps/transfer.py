"""Copies between host and device that wait for nothing."""

import numpy as np
import torch


def to_device(values: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """The host's values on the device. From pinned memory, which torch keeps until the copy has been made."""
    tensor = values if isinstance(values, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(values))
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def to_host(values: torch.Tensor) -> torch.Tensor:
    """The values on the host, valid once an event recorded after this call has happened (on a CPU: at once)."""
    if values.device.type == "cpu":
        return values
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True, device="cpu").copy_(values, non_blocking=True)
