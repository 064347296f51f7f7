"""Copies between host and device that do not stop the device: through pinned memory, in the order of the stream."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device that neither waits for it nor keeps it waiting: from pinned memory."""
    host = torch.from_numpy(np.ascontiguousarray(array))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def to_host(packed_AW: Tensor) -> Callable[[], Tensor]:
    """Starts a copy to the host; the function waits for it and gives it."""
    host_AW = torch.empty(packed_AW.shape, dtype=packed_AW.dtype, pin_memory=True)
    host_AW.copy_(packed_AW, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()

    def read() -> Tensor:
        ready.synchronize()
        return host_AW

    return read
