"""`show_config()`: what is compiled, what is loaded, and why the rest is not."""

from __future__ import annotations

import platform

import torch

from . import _library, ops
from ._version import __version__


def show_config() -> str:
    """A report for people: versions, instruction sets, and the kernel behind every op.

    Example:
        >>> print(show_config())  # doctest: +ELLIPSIS
        adagrad_kernels ...
    """
    lines = [
        f"adagrad_kernels {__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()} on {platform.machine()}",
        f"threads: {torch.get_num_threads()}",
    ]
    lines += _compiled()
    lines.append("ops:")
    for name in ops.NAMES:
        lines.append(f"  {name:20} CPU: {_kernel(name, 'CPU'):22} CUDA: {_kernel(name, 'CUDA')}")
    return "\n".join(lines)


def _compiled() -> list[str]:
    try:
        from . import _build
    except ImportError as error:
        return [f"compiled part: none ({error})"]
    archs = ", ".join(_build.cuda_archs) or "none"
    lines = [
        f"compiled by {_build.compiler} for torch {_build.torch_version}: CPU instruction sets "
        f"{', '.join(_build.instruction_sets)}; CUDA architectures: {archs}"
    ]
    if _library.load_error is None:
        lines.append(f"compiled library: loaded, uses {_library.instruction_set()}")
    else:
        lines.append(f"compiled library: not loaded, {_library.load_error}")
    return lines


def _kernel(name: str, device: str) -> str:
    qualified = f"{_library.NAMESPACE}::{name}"
    if torch._C._dispatch_has_kernel_for_dispatch_key(qualified, device):
        return "compiled"
    if device == "CUDA" and not torch.cuda.is_available():
        return "reference (no CUDA device here)"
    return "reference (no kernel compiled)"
