"""The cost model: what the statistics of a layer add to its own forward and backward pass.

A kernel that measures a layer replaces the kernel that would form the weight gradient, and does
the same multiply-adds. Counted here is what it does beyond them. One multiplication or addition is
one operation; bytes are those of an ideal cache: every operand of a kernel is read once, every
result written once, and what a tile of the weight needs stays in the cache meanwhile.

For b samples of T positions and a weight [O, I] (of a convolution [O, C·kernel elements], for each
of its G groups; of a transposed one with the roles of input and output exchanged), with X, Y and W
the numbers in the input, in the output and in the weight:

    layer itself     2·b·T·O·I operations and X + Y + W numbers for each of its products: the
                     forward one, the weight gradient's, and, where it is wanted, the input
                     gradient's
    outer product    T = 1: ‖c_i‖² = ‖g_i‖² ‖x_i‖², that is b(2(O + I) + 1) operations in one more
                     reading of X and Y. Coordinate sums are one more product, of the squares:
                     2·b·O·I + b(O + I) operations, and W numbers are written
    Gram             few positions, norms only: ‖c_i‖² = Σ_{t,t'} ⟨g_t, g_t'⟩ ⟨x_t, x_t'⟩, that is
                     b·T(T + 1)(O + I + 1) operations in one more reading of X and Y
    direct           c_i is formed in registers; adding it to the sum, squaring and summing it are
                     3·b·O·I operations, 4 with coordinate sums, of which W numbers are written
    bias             3·b·O operations, 4 with coordinate sums (outer product: b, and 2·b·O)
    reference        without compiled kernels c_i is written: as direct, and 5·b·W numbers (6)

Which of them is chosen is asked of the kernels themselves. Scales and shifts of C channels
(normalisations, PReLU) take 3·b·C operations each, 4 with coordinate sums, against 1 to 3 for each
number of the layer's input; the normalisation is not counted. An embedding takes 2·b·T·D, 3 with
coordinate sums, at most: repeated tokens of a sample count once; for an EmbeddingBag its rows and
their gradients are written and read, too. 16-bit operands are converted to float32 on the CPU.

Inner products take one more forward pass and 2·Y operations. Where c_i is small, of
normalisations and on the CPU of convolutions with many pixels, it is kept instead: 2 operations for
each of its b·W numbers, which are written once and read once, of convolutions twice. Linear layers
of few samples with one position take 2·b²(O + I), if the batch is one micro-batch.

Left out: the samples' norms themselves, cross terms of tied weights, all but the last call of a
layer that is called several times, autocast, Python.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from . import _library, triton_kernels

METHODS = {
    "outer": "outer product",
    "gram": "Gram",
    "direct": "direct",
    "reference": "per-sample gradients",
}
"""The names that people are shown."""


@dataclass(frozen=True)
class Cost:
    """What a layer costs by itself, and what its statistics add.

    Attributes:
        method: how they are computed.
        flops: operations of the layer's own forward and backward pass.
        bytes: of memory that it reads and writes.
        extra_flops: operations that the statistics add.
        extra_bytes: likewise.
    """

    method: str
    flops: int
    bytes: int
    extra_flops: int
    extra_bytes: int

    def __add__(self, other: Cost) -> Cost:
        """Of two calls."""
        methods = dict.fromkeys((self.method, other.method))
        return Cost(
            ", ".join(methods),
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.extra_flops + other.extra_flops,
            self.extra_bytes + other.extra_bytes,
        )

    @property
    def flops_ratio(self) -> float:
        """Extra operations over the layer's own."""
        return self.extra_flops / max(1, self.flops)

    @property
    def bytes_ratio(self) -> float:
        """Extra bytes over the layer's own."""
        return self.extra_bytes / max(1, self.bytes)


class Call(NamedTuple):
    """What is common to all layers.

    Attributes:
        samples: b.
        inputs: X, numbers in the input.
        outputs: Y, numbers in the output.
        dtype: of the operands.
        device: where they are.
        input_grad: whether the gradient of the input is wanted.
        weight: whether that of the weight is.
        bias: elements of a trainable bias, 0 without one.
        coordinates: whether coordinate sums are measured.
        inner_products: whether these are.
        keeps_sample_grads: whether c_i is kept for them, instead of the operands.
    """

    samples: int
    inputs: int
    outputs: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    input_grad: bool = True
    weight: bool = True
    bias: int = 0
    coordinates: bool = False
    inner_products: bool = False
    keeps_sample_grads: bool = False

    @property
    def size(self) -> int:
        """Bytes of an operand's number."""
        return self.dtype.itemsize

    @property
    def computed_size(self) -> int:
        """Bytes of a number in the kernel and in its results."""
        return max(4, self.size)

    @property
    def statistics(self) -> int:
        """Operations on one element of c_i: add to the sum, square, sum, and sum by coordinate."""
        return 3 + self.coordinates

    def converted(self, weight: int) -> int:
        """Bytes of converting the operands, and the gradient back, where they have 16 bits."""
        if self.size >= 4 or self.device != "cpu":
            return 0
        return (self.inputs + self.outputs + weight) * (self.size + 4)


def choose(call: Call, positions: int, rows: int, columns: int, linear: bool) -> str:
    """Which method the kernels choose for these sizes: a key of `METHODS`."""
    if call.device == "cpu":
        return _library.method(rows, columns, positions, call.coordinates, linear)
    if triton_kernels.load_error or call.dtype == torch.float64:
        return "reference"
    from .triton_kernels import conv  # they import triton
    from .triton_kernels import linear as linear_kernels

    if linear:
        return linear_kernels.method_of(positions, rows, columns, call.coordinates)
    return conv.method_of(positions, rows, columns, call.coordinates, call.size)


def product(
    call: Call, positions: int, rows: int, columns: int, groups: int = 1, linear: bool = True
) -> Cost:
    """Of linear layers and convolutions: O = rows and I = columns of each of the groups."""
    b, coordinates, wide = call.samples, call.coordinates, call.computed_size
    weight = groups * rows * columns
    one = 2 * b * positions * weight
    numbers = call.inputs + call.outputs + weight
    products = 1 + call.weight + call.input_grad
    method = choose(call, positions, rows, columns, linear)
    operands = (call.inputs + call.outputs) * wide
    flops = moved = 0
    if call.weight:
        moved = coordinates * weight * wide + call.converted(weight)
        if method == "outer":
            flops = b * (2 * (rows + columns) + 1)
            flops += coordinates * b * (2 * rows * columns + rows + columns)
            moved += operands
        elif method == "gram":
            flops = groups * b * positions * (positions + 1) * (rows + columns + 1)
            moved += operands
        else:
            flops = b * weight * call.statistics
            if method == "reference":
                moved += (5 + coordinates) * b * weight * wide
    if call.bias:
        outer = 1 + 2 * coordinates * call.bias
        flops += b * (outer if method == "outer" else call.bias * call.statistics)
        moved += coordinates * call.bias * wide
    if call.inner_products and call.keeps_sample_grads:
        flops += 2 * b * (weight + call.bias)
        moved += 3 * b * (weight + call.bias) * wide
    elif call.inner_products and linear and positions == 1 and 2 * b * (rows + columns) <= weight:
        flops += 2 * b * b * (rows + columns)
        moved += (call.inputs + call.outputs) * wide
    elif call.inner_products:
        flops += one + 2 * call.outputs
        moved += (numbers + 2 * call.outputs) * wide
    return Cost(METHODS[method], products * one, products * numbers * call.size, flops, moved)


def embedding(call: Call, tokens: int, rows: int, width: int, bags: bool = False) -> Cost:
    """Of an embedding [rows, width]; tokens in all samples; `bags`: of which sums are returned."""
    wide, numbers, table = call.computed_size, tokens * width, rows * width
    flops = (call.statistics - 1) * numbers
    moved = 24 * tokens  # sorting: token, position and order are read and written
    moved += call.coordinates * (table + 2 * numbers) * wide
    moved += 4 * bags * numbers * call.size  # rows and their gradients are written and read
    if call.inner_products:
        flops += 2 * numbers
        moved += 3 * numbers * wide
    return Cost("sorted tokens", numbers, (5 * numbers + table) * call.size, flops, moved)


def scale(call: Call, channels: int, has_bias: bool, extra_passes: int = 0) -> Cost:
    """Of a scale and a shift by channel.

    Args:
        call: see `Call`; inputs counts the numbers that are scaled.
        channels: C.
        has_bias: whether there is a shift, trainable or not.
        extra_passes: over the input, where the layer runs in more kernels than plain PyTorch's.
    """
    b, n, wide = call.samples, call.inputs, call.computed_size
    flops = n * (1 + has_bias + 2 * call.weight + bool(call.bias) + call.input_grad)
    extra = (call.weight * channels + call.bias) * b * call.statistics
    moved = (call.weight * channels + call.bias) * call.coordinates * wide
    moved += extra_passes * n * call.size + call.converted(0)
    if call.inner_products and call.keeps_sample_grads:
        extra += 2 * b * (call.weight * channels + call.bias)
        moved += 4 * b * channels * wide  # of both, trained or not
    elif call.inner_products:
        extra += (1 + has_bias) * n + 2 * n
        moved += 4 * n * wide
    own = n * (4 + call.input_grad) * call.size
    return Cost("sums by channel", flops, own, extra, moved)
