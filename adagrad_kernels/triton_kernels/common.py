"""What the launchers share: precision, splits, the sums of splits.

Kernels name things as in flash-linear-attention: i_ program index, o_ offsets, m_ mask, p_ pointer,
b_ block in registers. Nothing is summed by atomics: programs write partial sums, and a second
kernel adds them in a fixed order, so the same call gives the same bits twice.

The same launchers run in Triton's interpreter on CPU tensors (TRITON_INTERPRET=1). Its bf16
`tl.dot` is wrong, so `operand` widens bf16 there; the values are the same.

Tile shapes follow the register budget: an fp32 accumulator of M×N takes M·N/threads registers of
a thread, which has 255. Not measured on a GPU.
"""

# Kernels are written in Triton's language, not in Python's types.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}
"""Given to every kernel: Triton's default for multiply-add fusion differs between versions."""
BATCH = ["samples", "capacity", "rows", "columns", "splits", "split_samples", "chunks"]
BATCH += ["whole", "rest", "size", "count"]
"""Arguments that grow with the batch; Triton compiles no variants for 1 and multiples of 16."""
MAGIC = ["magic", "w_magic", "hw_magic", "c_magic", "kw_magic", "khw_magic"]
"""Arguments of which such variants would be of no use, see patches.py."""

_MULTIPROCESSORS = 132  # of an H100, where there is no device to ask
_PARTIAL_BYTES = 1 << 26  # what the partial sums of split samples may take


@triton.jit(do_not_specialize=BATCH)
def sum_splits_kernel(
    p_parts, p_sum, p_square, n, splits, SQUARES: tl.constexpr, BLOCK: tl.constexpr
):
    """sum[j] = Σ_s parts[s, 0, j] and square[j] = Σ_s parts[s, 1, j], s ascending."""
    o_j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_j = o_j < n
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    b_square = tl.zeros([BLOCK], dtype=tl.float32)
    for _ in range(splits):
        b_sum += tl.load(p_parts + o_j, mask=m_j, other=0.0)
        if SQUARES:
            b_square += tl.load(p_parts + n + o_j, mask=m_j, other=0.0)
            p_parts += n
        p_parts += n
    tl.store(p_sum + o_j, b_sum, mask=m_j)
    if SQUARES:
        tl.store(p_square + o_j, b_square, mask=m_j)


def nothing(like: Tensor, count: int) -> list[Tensor]:
    """So many results [0] that are not wanted; no two are one tensor, which ops may not return."""
    return [torch.empty(0, dtype=torch.float32, device=like.device) for _ in range(count)]


def cdiv(a: int, b: int) -> int:
    """⌈a/b⌉; `triton.cdiv` takes more than a microsecond."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest that is no less than n ≥ 1."""
    return 1 << (n - 1).bit_length()


def interpreting() -> bool:
    """Whether kernels run in the interpreter."""
    return knobs.runtime.interpret


def operand(t: Tensor) -> Tensor:
    """A tensor that a kernel may multiply."""
    return t.float() if interpreting() and t.dtype == torch.bfloat16 else t


def precision(setting: Any) -> str:
    """`tl.dot`'s precision for float32 operands, from a `torch.backends` entry.

    "tf32" where PyTorch may use it, otherwise "tf32x3": three tf32 products of the operands' upper
    and lower halves, 22 bits of 24, on the tensor cores.
    """
    chosen = setting.fp32_precision
    if chosen == "none":
        chosen = torch.backends.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if chosen == "tf32" else "tf32x3"


@cache
def multiprocessors(device: torch.device) -> int:
    """Of the device; those of an H100 where there is none."""
    if device.type != "cuda":
        return _MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """The device's compute capability; an H100's where there is none."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def choose_splits(device: torch.device, tiles: int, steps: int, output_bytes: int) -> int:
    """Into how many parts to split the samples, so that a small output fills the device.

    Args:
        device: where the kernel runs.
        tiles: programs without splitting.
        steps: passes through a program's loop without splitting.
        output_bytes: of one part.
    """
    if output_bytes == 0:
        return 1
    wanted = cdiv(2 * multiprocessors(device), max(1, tiles))
    return max(1, min(wanted, steps // 4, _PARTIAL_BYTES // output_bytes, 256))


class SplitSums:
    """Σ_i c_i and Σ_i c_i² of one shape, written whole or in parts.

    Attributes:
        sum: the first, complete after `finish`.
        square: the second, of shape [0] if not wanted.
        arguments: (p_sum, p_square, stride of a split) for the kernel.
    """

    def __init__(self, like: Tensor, shape: tuple[int, ...], splits: int, squares: bool) -> None:
        def empty(*size: int) -> Tensor:
            return torch.empty(size, dtype=torch.float32, device=like.device)

        self.splits, self.squares = splits, squares
        self.sum = empty(*shape)
        self.square = empty(*shape) if squares else empty(0)
        self.arguments = (self.sum, self.square, 0)
        if splits > 1:
            n = self.sum.numel()
            self._parts = empty(splits, 1 + squares, n)
            self.arguments = (self._parts, self._parts[:, -1], (1 + squares) * n)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Adds the parts up, in order, and returns (sum, square)."""
        n = self.sum.numel()
        if self.splits > 1 and n:
            sum_splits_kernel[(cdiv(n, 512),)](
                self._parts, self.sum, self.square, n, self.splits,
                SQUARES=self.squares, BLOCK=512, num_warps=4, **OPTIONS,
            )  # fmt: skip
        return self.sum, self.square
