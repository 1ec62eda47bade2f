"""Host to device copies that the host does not wait for."""

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """`values`, which are in the host's memory, on the device.

    On a GPU they go through page-locked memory, in the order of the current stream. From ordinary
    memory the copy would make the host wait until the GPU has done all that it was given before.
    """
    if device.type == "cpu":
        return values
    return values.pin_memory().to(device, non_blocking=True)
