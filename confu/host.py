"""What the host tells the device, and waiting for it. A round waits once, in `verify.walk`, to hear what was
accepted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor


def upload(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Int[Tensor, "..."]:
    """Whole numbers that the host knows. To CUDA they go by way of pinned memory: from no other does a copy begin
    without waiting for all that was launched before."""
    tensor = torch.tensor(values, dtype=torch.int64)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def wait(device: torch.device) -> None:
    """Until all that was launched on a device of its own is done: before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize()
