"""The memory that this process needed at most so far, as its metrics and the summary state it."""

import resource

import torch


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that this rank held so far: allocated on its GPU, or resident in its process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
