"""Loads the compiled kernels; where that fails, remembers why instead of raising.

Every op also has a reference in plain PyTorch (`reference.py`), so the package works without
the compiled part, only slower. `show_config()` tells which of the two runs.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

NAMESPACE = "adagrad_kernels"
# ADAGRAD_KERNELS_LIBRARY is for builds that check themselves (`make sanitize`).
_PATH = Path(
    os.environ.get("ADAGRAD_KERNELS_LIBRARY") or Path(__file__).parent / "_C.abi3.so"
).absolute()


def _load() -> tuple[str | None, ctypes.CDLL | None]:
    if os.environ.get("ADAGRAD_KERNELS_BACKEND") == "reference":
        return "turned off by ADAGRAD_KERNELS_BACKEND=reference", None
    if not _PATH.exists():
        return f"{_PATH.name} was not compiled; reinstall with a C++ compiler", None
    try:
        torch.ops.load_library(str(_PATH))
        return None, ctypes.CDLL(str(_PATH))
    except OSError as error:
        return f"{_PATH.name} does not load: {error}", None


load_error, _handle = _load()
"""Why the compiled kernels are not loaded, or None if they are."""


def instruction_set() -> str | None:
    """The instruction set that the compiled CPU kernels use here, None if they are not loaded.

    `ADAGRAD_KERNELS_ISA=baseline|avx2` chooses a lower one than the processor has.
    """
    if _handle is None:
        return None
    function = _handle.adagrad_kernels_isa
    function.restype = ctypes.c_char_p
    return function().decode()
