"""How many samples the present backward pass has, noted by ops that run in Python.

In a compiled model nobody notifies the observer of a layer's call. The probe knows the number of
samples, but reading it makes the host wait for the device. Ops on CUDA devices are launched from
Python inside the compiled graph, too, and there shapes cost nothing. (Not where a CUDA graph is
replayed, and not on the CPU, where reading is free: then nothing is noted.)
"""

from __future__ import annotations

import torch

_noted = (-1, 0)  # the backward pass, by autograd's number of it, and its samples


def note(samples: int) -> None:
    """Called by an op whose operands have this many samples."""
    global _noted
    _noted = torch._C._current_graph_task_id(), samples


def noted() -> int | None:
    """What was noted last in the backward pass that runs now; None if nothing was."""
    task, samples = _noted
    return samples if task == torch._C._current_graph_task_id() != -1 else None
