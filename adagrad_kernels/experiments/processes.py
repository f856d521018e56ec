"""Several processes of the command line: `torchrun --nproc-per-node 2 -m adagrad_kernels train`."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from .errors import UsageError


def launched() -> bool:
    """Whether torchrun has started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def speaks() -> bool:
    """Whether this process writes to the terminal: the first on its machine."""
    return not launched() or os.environ["LOCAL_RANK"] == "0"


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Joins the processes that torchrun has started, each on a device of its own.

    Raises:
        UsageError: fewer devices than processes.
    """
    if not launched():
        yield
        return
    own_device = None
    if device.partition(":")[0] == "cuda":
        local_rank, devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if ":" in device:
            raise UsageError(f"device {device!r}: torchrun gives each process its own; say cuda")
        if local_rank >= devices:
            raise UsageError(f"device 'cuda': more processes than the {devices} GPUs")
        own_device = torch.device("cuda", local_rank)
        torch.cuda.set_device(own_device)
    dist.init_process_group("gloo" if own_device is None else "nccl", device_id=own_device)
    try:
        yield
    finally:
        gc.collect()  # models hold the group: gloo's threads would live on, and abort the process
        dist.destroy_process_group()
