"""What the launch shapes depend on besides the problem."""

from functools import cache

import torch


@cache
def is_roomy(device: torch.device) -> bool:
    """Whether a block may use the 227 KB of shared memory that a Hopper has; an A100 gives it 163."""
    if device.type != "cuda":
        return True
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= 227 * 1024
