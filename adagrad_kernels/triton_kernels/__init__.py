"""Triton kernels, registered for CUDA devices under the names that `ops/` declares.

One module a family; each says what its kernels cost and why their tiles are what they are. Where
the compiled library brings a CUDA kernel of its own, that one stays. Modules are imported, and
kernels compiled, when an op is first called on a CUDA tensor.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .. import _library, backward_rows, reference

FAMILIES = {
    "sample_statistics": "statistics",
    "pool_samples": "statistics",
    "adagrad_": "adagrad",
    "adagrad_norm_": "adagrad",
    "grad_norm_sq": "adagrad",
    "linear_weight_grad": "linear",
    "linear_adagrad_": "linear_update",
    "conv_weight_grad": "conv",
    "embedding_weight_grad": "embedding",
    "scale_weight_grad": "norm",
    "norm_backward": "norm",
}
"""The module that holds each op's kernels."""
NO_DEVICE = "no CUDA device"
"""The `load_error` where only a GPU is missing."""
_OF_SAMPLES = ("_weight_grad", "_backward", "linear_adagrad_")
"""How the names end of ops whose first operand has the samples of a backward pass in dim 0."""


@cache
def _capable(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def suits(*arguments: Any) -> bool:
    """Whether the kernels take an op's first arguments; otherwise the reference does.

    They take float32, bfloat16 and float16, not empty, with less than 2³¹ numbers a sample.
    """
    for argument in arguments:
        for t in [argument] if isinstance(argument, Tensor) else argument or ():
            if isinstance(t, Tensor) and t.dtype == torch.float64:
                return False
            if isinstance(argument, Tensor) and (not t.numel() or t.shape[1:].numel() >= 2**31):
                return False
    return True


def _kernel(name: str) -> Callable[..., Any]:
    of_samples = name.endswith(_OF_SAMPLES)

    def call(*arguments: Any) -> Any:
        tensors = arguments[0]
        if of_samples:
            backward_rows.note(tensors.shape[0])
        device = (tensors if isinstance(tensors, Tensor) else tensors[0]).device
        if not (suits(*arguments[:2]) and _capable(device)):
            return getattr(reference, name)(*arguments)
        module = import_module(f"{__name__}.{FAMILIES[name]}")
        with torch.cuda.device(device):
            return getattr(module, name)(*arguments)

    return call


def register() -> torch.library.Library:
    """Registers every op that has no CUDA kernel yet; the registration lives with the result."""
    library = torch.library.Library(_library.NAMESPACE, "IMPL", "CUDA")
    for name in FAMILIES:
        qualified = f"{_library.NAMESPACE}::{name}"
        if not torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CUDA"):
            library.impl(name, _kernel(name))
    return library


def _load() -> tuple[str | None, torch.library.Library | None]:
    if os.environ.get("ADAGRAD_KERNELS_BACKEND") == "reference":
        return "turned off by ADAGRAD_KERNELS_BACKEND=reference", None
    if not torch.cuda.is_available():
        return NO_DEVICE, None
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton does not import: {error}", None
    return None, register()


load_error, _registration = _load()
"""Why the Triton kernels are not registered, or None if they are."""
