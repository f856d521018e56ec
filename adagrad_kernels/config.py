"""`show_config()`: what is compiled, what is loaded, and why the rest is not."""

from __future__ import annotations

import platform
from importlib.util import find_spec

import torch

from . import _library, ops, triton_kernels
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
    lines.append(f"Triton kernels: {_triton()}")
    lines.append("ops:")
    for name in ops.NAMES:
        lines.append(f"  {name:22} CPU: {_kernel(name, 'CPU'):10} CUDA: {_kernel(name, 'CUDA')}")
    return "\n".join(lines)


def _compiled() -> list[str]:
    try:
        from . import _build
    except ImportError as error:
        return [f"compiled part: none ({error})"]
    archs = f" for {', '.join(_build.cuda_archs)}" if _build.cuda_archs else ""
    lines = [
        f"compiled by {_build.compiler} for torch {_build.torch_version}: CPU instruction sets "
        f"{', '.join(_build.instruction_sets)}",
        f"CUDA kernels: {_build.cuda}{archs}",
    ]
    if _library.load_error is None:
        lines.append(f"compiled library: loaded, uses {_library.instruction_set()}")
    else:
        lines.append(f"compiled library: not loaded, {_library.load_error}")
    if torch.cuda.is_available():
        lines.append(f"CUDA device: {torch.cuda.get_device_name()}")
    else:
        built = "no device found" if torch.backends.cuda.is_built() else "this torch has no CUDA"
        lines.append(f"CUDA device: none, {built}")
    return lines


def _triton() -> str:
    reason = triton_kernels.load_error
    if reason is None:
        return "loaded"
    if reason != triton_kernels.NO_DEVICE:
        return f"not loaded, {reason}"
    needs = "" if find_spec("triton") else ", and triton, which is not installed"
    return (
        f"not loaded, {reason}; the ops marked so have Triton kernels for one (compute capability "
        f"8.0 or later{needs})"
    )


def _kernel(name: str, device: str) -> str:
    """What runs: a compiled kernel, a Triton kernel, or the reference in plain PyTorch."""
    dump = torch._C._dispatch_dump(f"{_library.NAMESPACE}::{name}")
    for line in dump.splitlines():
        if line.startswith(f"{device}: "):
            return "compiled" if "csrc/" in line else "Triton"
    would_be = triton_kernels.load_error == triton_kernels.NO_DEVICE
    if device == "CUDA" and would_be and name in triton_kernels.FAMILIES:
        return "Triton, where there is a GPU"
    return "reference"
