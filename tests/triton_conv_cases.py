"""Triton kernels of convolutions against float64."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from triton_cases import (  # noqa: F401
    BF16,
    F16,
    F32,
    LAST2,
    LAST3,
    compare,
    conv_arguments,
    pytestmark,
    where_the_kernels_run,
)

from adagrad_kernels import reference
from adagrad_kernels.triton_kernels import (
    conv,
    patches,
)

CONV: list[tuple[Any, ...]] = [
    # input, O, kernel_size, stride, padding, dilation, groups, memory format
    ((3, 4, 9, 8), 6, (3, 2), (2, 1), (1, 0), (1, 2), 2, torch.contiguous_format),
    ((3, 4, 9, 8), 6, (3, 2), (2, 1), (1, 0), (1, 2), 2, LAST2),
    ((2, 1, 12, 12), 5, (5, 5), (1, 1), (2, 2), (1, 1), 1, torch.contiguous_format),
    ((2, 3, 20), 5, (4,), (2,), (1,), (1,), 1, torch.contiguous_format),
    ((2, 3, 5, 6, 7), 4, (2, 3, 2), (1, 2, 1), (1, 1, 0), (2, 1, 1), 1, torch.contiguous_format),
    ((2, 3, 5, 6, 7), 4, (2, 3, 2), (1, 2, 1), (1, 1, 0), (2, 1, 1), 1, LAST3),
    ((9, 40, 4, 4), 70, (3, 3), (1, 1), (1, 1), (1, 1), 1, LAST2),
    # tiles within one kernel element
    ((2, 64, 5, 4), 20, (3, 2), (1, 2), (1, 0), (1, 1), 1, LAST2),
    ((2, 256, 4, 3), 140, (2, 2), (1, 1), (0, 1), (2, 1), 2, LAST2),
    ((2, 64, 2, 3, 3), 5, (2, 1, 2), (1, 1, 1), (1, 0, 0), (1, 1, 1), 1, LAST3),
    ((2, 64, 5, 4), 20, (3, 2), (1, 2), (1, 0), (1, 1), 1, torch.contiguous_format),
]


@pytest.mark.parametrize(("case", "dtype", "coordinates"), [
    *itertools.product(CONV, [F32], [True]),
    (CONV[0], F32, False), (CONV[1], BF16, True), (CONV[2], F16, False), (CONV[7], BF16, False),
    (CONV[10], F16, False),
])  # fmt: skip
def test_conv(case: tuple[Any, ...], dtype: torch.dtype, coordinates: bool) -> None:
    args = conv_arguments(case, dtype)
    compare(conv.conv_weight_grad, reference.conv_weight_grad, *args, True, True, coordinates)


@pytest.mark.parametrize(("case", "dtype"), [
    *itertools.product(CONV, [F32]), (CONV[0], BF16), (CONV[6], BF16), (CONV[2], F16)
])  # fmt: skip
def test_conv_gram(case: tuple[Any, ...], dtype: torch.dtype) -> None:
    """One tile of 16 to 64 pixels, and the triangle of several (CONV[2], 144 pixels)."""
    args = conv_arguments(case, dtype)

    def kernel(*arguments: Any) -> Any:
        return conv.conv_weight_grad(*arguments, method="gram")

    compare(kernel, reference.conv_weight_grad, *args, True, True, False)


def test_the_gram_form_is_for_convolutions_of_few_pixels_and_many_channels() -> None:
    """The cost rule on a ResNet's stages (channels, pixels, kernel elements)."""

    def method(channels: int, pixels: int, kernel: int, *options: Any) -> str:
        return conv.method_of(pixels, channels, channels * kernel, *(options or [False]))

    assert method(512, 16, 9) == "gram"
    assert method(512, 16, 9, True) == "direct"
    assert method(256, 16, 9) == "gram"
    assert method(512, 64, 9) == "gram"
    assert method(512, 64, 9, False, 2) == "direct"  # 16 bits
    assert method(512, 16, 9, False, 2) == "gram"
    assert method(128, 64, 9) == "direct"
    assert method(64, 1024, 9) == "direct"


@given(st.integers(1, 2**31 - 1), st.integers(0, 2**31 - 1))
@example(1, 2**31 - 1)
@example(2**31 - 1, 2**31 - 2)
@example(7, 2**31 - 1)
def test_division_by_multiplication(d: int, n: int) -> None:
    """What `divide` does in 32 bits."""
    magic, shift = patches.divisor(d)
    assert magic < 2**32
    assert ((2 * n * magic) >> 32) >> shift == n // d


def test_conv_of_strange_strides() -> None:
    x = torch.randn(2, 9, 8, 3).permute(0, 3, 2, 1)[:, :, ::2]
    g = torch.ones(()).expand(2, 5, 2, 7)
    options = [[3, 3], [1, 1], [0, 0], [1, 1], 1, 2, True, True, True]
    compare(conv.conv_weight_grad, reference.conv_weight_grad, g, x, *options)


def test_conv_of_several_images_a_sample() -> None:
    """As a folded layer has them: [b, k, C, …], of which the k are slices of one image."""
    g, x = torch.randn(2, 3, 5, 6, 6).transpose(1, 2), torch.randn(2, 3, 4, 6, 6).transpose(1, 2)
    options = [[1, 3, 3], [1, 1, 1], [0, 1, 1], [1, 1, 1], 1, 2, True, True, True]
    compare(conv.conv_weight_grad, reference.conv_weight_grad, g, x, *options)


@pytest.mark.parametrize(("weight", "bias"), [(True, False), (False, True)])
def test_conv_with_one_frozen(weight: bool, bias: bool) -> None:
    g, x = torch.randn(2, 5, 6, 6), torch.randn(2, 3, 6, 6)
    options = [[3, 3], [1, 1], [1, 1], [1, 1], 1, 2, weight, bias, True]
    compare(conv.conv_weight_grad, reference.conv_weight_grad, g, x, *options)
