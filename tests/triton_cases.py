"""What the cases of Triton kernels share: where they run, and the comparison with float64.

test_triton.py runs each file triton_*_cases.py in a process of its own, because the interpreter's
switch must be set before triton is imported; to run one alone, without the switch on a GPU:

    TRITON_INTERPRET=1 python -m pytest tests/triton_conv_cases.py

Memory that a kernel forgets to write holds NaN.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
from tolerance import assert_close_to_truth
from torch import Tensor
from triton.runtime import interpreter

from adagrad_kernels.triton_kernels import (
    common,
)

if triton.__version__.startswith("3.6."):  # it makes loop bounds by int(array of one), once legal
    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


pytestmark = pytest.mark.usefixtures("nan_memory")


@pytest.fixture(autouse=True)
def where_the_kernels_run() -> Iterator[None]:
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    with torch.device("cpu" if common.interpreting() else "cuda"):
        yield
    for setting, value in zip(settings, before, strict=True):
        setting.fp32_precision = value


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def double(argument: Any) -> Any:
    """A copy in float64: of a floating point tensor, of a list of them; anything else as it is."""
    if isinstance(argument, Tensor):
        return argument.double() if argument.is_floating_point() else argument
    if isinstance(argument, (list, tuple)):
        return [double(a) for a in argument]
    return argument


def compare(kernel: Callable[..., Any], plain: Callable[..., Any], *arguments: Any) -> None:
    """Asserts that the kernel's results are as close to the truth as plain PyTorch's."""
    plain_arguments = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    results = kernel(*arguments)
    # The same tensor twice is no result that an op may have.
    assert len({t.untyped_storage()._cdata for t in results}) == len(results)
    truths = plain(*double(plain_arguments))
    plains = plain(*plain_arguments)
    for k, (result, truth, expected) in enumerate(zip(results, truths, plains, strict=True)):
        assert_close_to_truth(result, truth, expected, what=f"result {k}")


LAST2, LAST3 = torch.channels_last, torch.channels_last_3d


def conv_arguments(case: tuple[Any, ...], dtype: torch.dtype) -> list[Any]:
    """Of conv_weight_grad, up to the capacity."""
    shape, rows, size, stride, padding, dilation, groups, memory_format = case
    x = torch.randn(shape, dtype=dtype).to(memory_format=memory_format)
    convolution = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(size)]
    weight = torch.randn(rows, shape[1] // groups, *size, dtype=dtype)
    y = convolution(x, weight, None, stride, padding, dilation, groups)
    g = torch.randn(y.shape, dtype=dtype).to(memory_format=memory_format)
    return [g, x, list(size), list(stride), list(padding), list(dilation), groups, shape[0] + 2]
