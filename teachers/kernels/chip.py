"""What the launch shapes depend on besides the problem."""

from functools import cache

import torch


@cache
def is_roomy(device: torch.device) -> bool:
    """Whether a block may use 227 KB of shared memory, and tiles come through a copy engine: a Hopper or its successor.

    An A100 gives a block 163 KB.
    """
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)
