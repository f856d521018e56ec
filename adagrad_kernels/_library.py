"""Loads the compiled kernels; where that fails, remembers why instead of raising.

Every op also has a reference in plain PyTorch (`reference/`), so the package works without
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


def method(rows: int, columns: int, positions: int, coordinates: bool, linear: bool) -> str:
    """How the compiled CPU kernels find the norms of samples; they choose by the same function.

    Args:
        rows: of the weight as a matrix, O; for a convolution those of one group.
        columns: I, or C · kernel elements of one group.
        positions: T of a sample.
        coordinates: whether the sums of squares are wanted.
        linear: of a linear layer, not of a convolution.

    Returns:
        "outer", "gram" or "direct"; "reference" if the compiled kernels are not loaded.
    """
    if _handle is None:
        return "reference"
    function = _handle.adagrad_kernels_method
    sizes = (ctypes.c_int64(n) for n in (rows, columns, positions))
    return ("outer", "gram", "direct")[
        function(*sizes, ctypes.c_bool(coordinates), ctypes.c_bool(linear))
    ]
