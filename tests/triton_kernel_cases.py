"""Triton kernels against the reference in float64: in Triton's interpreter, or on a GPU.

test_triton.py runs this file in a process of its own, because the interpreter's switch must be set
before triton is imported; to run it alone, without the switch on a GPU:

    TRITON_INTERPRET=1 python -m pytest tests/triton_kernel_cases.py

Memory that a kernel forgets to write holds NaN.
"""

import contextlib
import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
from hypothesis import example, given
from hypothesis import strategies as st
from tolerance import assert_close_to_truth
from torch import Tensor
from triton.runtime import interpreter

from adagrad_kernels import reference, triton_kernels
from adagrad_kernels.triton_kernels import (
    adagrad,
    common,
    conv,
    embedding,
    finish,
    linear,
    linear_update,
    norm,
    patches,
    pieces,
    statistics,
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


# b, T, O, I: one position and several, below and beyond one tile, one split and several
LINEAR = [(5, 1, 7, 9), (40, 1, 130, 70), (3, 5, 17, 20), (4, 70, 33, 140), (9, 65, 20, 1)]


@pytest.mark.parametrize(("shape", "dtype", "coordinates"), [
    *itertools.product(LINEAR, [F32], [False, True]),
    (LINEAR[1], BF16, True), (LINEAR[3], BF16, True), (LINEAR[3], F16, False),
])  # fmt: skip
def test_linear(shape: tuple[int, ...], dtype: torch.dtype, coordinates: bool) -> None:
    b, positions, rows, columns = shape
    g = torch.randn(b, positions, rows, dtype=dtype)
    x = torch.randn(b, positions, columns, dtype=dtype)
    for method in ("direct", None) if positions > 1 else (None,):

        def kernel(*arguments: Any, method: str | None = method) -> Any:
            return linear.linear_weight_grad(*arguments, method=method)

        compare(kernel, reference.linear_weight_grad, g, x, b + 3, True, True, coordinates)


@pytest.mark.parametrize("positions", [2, 64, 65, 130])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gram(positions: int, dtype: torch.dtype) -> None:
    g = torch.randn(2, positions, 20, dtype=dtype)
    x = torch.randn(2, positions, 70, dtype=dtype)

    def kernel(*arguments: Any) -> Any:
        return linear.linear_weight_grad(*arguments, method="gram")

    compare(kernel, reference.linear_weight_grad, g, x, 2, True, True, False)


@pytest.mark.parametrize("positions", [1, 4])
@pytest.mark.parametrize(("weight", "bias"), [(True, False), (False, True)])
def test_linear_with_one_frozen(positions: int, weight: bool, bias: bool) -> None:
    g = torch.randn(3, positions, 6).expand(3, positions, 6)
    x = torch.randn(4, positions, 3).transpose(0, 2)  # not contiguous
    compare(linear.linear_weight_grad, reference.linear_weight_grad, g, x, 3, weight, bias, True)


def test_linear_takes_more_dimensions() -> None:
    g, x = torch.randn(3, 2, 4, 6), torch.randn(3, 2, 4, 5)
    compare(linear.linear_weight_grad, reference.linear_weight_grad, g, x, 3, True, True, True)


def test_the_gram_form_is_for_norms_of_few_positions_alone() -> None:
    def method(positions: int, coordinates: bool) -> str:
        g = torch.empty(8, positions, 1024, device="meta")
        return linear.choose_method(g, g, coordinates)

    assert method(1, False) == "outer"
    assert method(16, False) == "gram"
    assert method(16, True) == "direct"
    assert method(2048, False) == "direct"


@pytest.mark.parametrize("slots", [3, 7, 30])
@pytest.mark.parametrize("coordinates", [False, True])
def test_tiles_whole_and_in_pieces(
    monkeypatch: pytest.MonkeyPatch, slots: int, coordinates: bool
) -> None:
    """As on a device that is full with so few programs: of 12 to 24 tiles some are cut."""
    monkeypatch.setattr(common, "multiprocessors", lambda device: slots)
    monkeypatch.setattr(pieces, "resident", lambda *_: 1)
    monkeypatch.setattr(pieces, "JOIN_COST", 0)
    seen, cut_tiles = [], pieces.cut

    def record(*arguments: int) -> pieces.Pieces:
        seen.append(cut_tiles(*arguments))
        return seen[-1]

    monkeypatch.setattr(pieces, "cut", record)
    options = (True, False, coordinates)
    g, x = torch.randn(5, 20, 300), torch.randn(5, 20, 250)

    def direct(*arguments: Any) -> Any:
        return linear.linear_weight_grad(*arguments, method="direct")

    compare(direct, reference.linear_weight_grad, g, x, 5, *options)
    if coordinates:  # the outer product; norms alone need no kernel
        g, x = torch.randn(90, 1, 300), torch.randn(90, 1, 250)
        compare(linear.linear_weight_grad, reference.linear_weight_grad, g, x, 90, *options)
    for memory_format in (torch.contiguous_format, LAST2):
        case = ((5, 66, 4, 3), 130, (3, 2), (1, 1), (1, 1), (1, 1), 2, memory_format)
        arguments = conv_arguments(case, F32)
        compare(conv.conv_weight_grad, reference.conv_weight_grad, *arguments, *options)
    assert any(cut.rest for cut in seen)
    assert any(cut.whole and cut.rest for cut in seen) or slots == 30


@pytest.mark.parametrize("slots", [1, 7, 132])
@pytest.mark.parametrize("samples", [1, 2, 8, 1000])
def test_pieces_hold_every_sample_of_every_tile_once(slots: int, samples: int) -> None:
    for tiles, steps in itertools.product([*range(1, 150, 7), 36, 108, 144], [1, 16]):
        cut = pieces.cut(tiles, samples, steps, slots)
        assert cut.whole + cut.rest == tiles
        assert (cut.count - 1) * cut.size < samples <= cut.count * cut.size
        assert cut.whole % slots == 0 or not cut.rest
        assert cut.rest * cut.count <= 2 * slots + cut.rest  # the memory that they take


def time_on_a_device(samples: int, steps: int, slots: int, cut: pieces.Pieces) -> float:
    """Programs begin in order, each in the slot that is free first."""
    ends = [0] * slots
    full, last = divmod(samples, cut.size)
    for number, length in ((cut.whole, samples), (cut.rest * full, cut.size), (cut.rest, last)):
        for _ in range(number if length else 0):
            heapq.heapreplace(ends, ends[0] + length)
    joined = pieces.JOIN_COST * (1 + cut.rest * cut.count / slots) if cut.rest else 0
    return max(ends) * steps + joined


@pytest.mark.parametrize(("slots", "steps"), [(5, 1), (13, 16), (132, 1), (132, 64), (148, 16)])
def test_no_other_size_of_pieces_is_much_better(slots: int, steps: int) -> None:
    for tiles, samples in itertools.product(
        [1, slots // 3, slots // 2 + 1, slots * 2 // 3, slots - 1, slots + 7], [1, 2, 7, 16, 50]
    ):
        uncut, rest = pieces.Pieces(tiles, 0, samples, 1), tiles % slots
        times = [time_on_a_device(samples, steps, slots, uncut)]
        for size in range(1, samples):
            other = pieces.Pieces(tiles - rest, rest, size, common.cdiv(samples, size))
            if rest * other.count <= 2 * slots + rest:
                times.append(time_on_a_device(samples, steps, slots, other))
        cut = pieces.cut(tiles, samples, steps, slots)
        assert time_on_a_device(samples, steps, slots, cut) <= 1.05 * min(times), cut


def test_pieces_make_the_last_wave_short() -> None:
    """The tiles of a transformer's layers (768 wide) on an H100, 16 passes a sample."""
    assert pieces.cut(36, 8, 16, 132) == pieces.Pieces(0, 36, 3, 3)
    assert pieces.cut(108, 16, 16, 132) == pieces.Pieces(0, 108, 14, 2)
    assert pieces.cut(144, 8, 16, 132) == pieces.Pieces(132, 12, 1, 8)
    assert pieces.cut(132, 8, 16, 132) == pieces.Pieces(132, 0, 8, 1)
    assert pieces.cut(108, 8, 16, 132) == pieces.Pieces(108, 0, 8, 1)  # not worth it
    assert pieces.cut(1, 2, 1, 132) == pieces.Pieces(1, 0, 2, 1)


def test_splits_fill_the_device_and_stay_in_bounds() -> None:
    def splits(tiles: int, steps: int, size: int) -> int:
        return common.choose_splits(torch.device("cpu"), tiles, steps, size)

    assert splits(1, 4, 100) == 1  # nothing to divide
    assert splits(1, 40, 100) == 10
    assert splits(1000, 10**6, 100) == 1  # the device is full
    assert splits(1, 10**6, 1 << 26) == 1  # the parts would take too much memory


LAST2, LAST3 = torch.channels_last, torch.channels_last_3d
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


def conv_arguments(case: tuple[Any, ...], dtype: torch.dtype) -> list[Any]:
    """Of conv_weight_grad, up to the capacity."""
    shape, rows, size, stride, padding, dilation, groups, memory_format = case
    x = torch.randn(shape, dtype=dtype).to(memory_format=memory_format)
    convolution = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(size)]
    weight = torch.randn(rows, shape[1] // groups, *size, dtype=dtype)
    y = convolution(x, weight, None, stride, padding, dilation, groups)
    g = torch.randn(y.shape, dtype=dtype).to(memory_format=memory_format)
    return [g, x, list(size), list(stride), list(padding), list(dilation), groups, shape[0] + 2]


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


@pytest.mark.parametrize(("weight", "bias"), [(True, False), (False, True)])
def test_conv_with_one_frozen(weight: bool, bias: bool) -> None:
    g, x = torch.randn(2, 5, 6, 6), torch.randn(2, 3, 6, 6)
    options = [[3, 3], [1, 1], [1, 1], [1, 1], 1, 2, weight, bias, True]
    compare(conv.conv_weight_grad, reference.conv_weight_grad, g, x, *options)


@pytest.mark.parametrize("coordinates", [False, True])
@pytest.mark.parametrize(
    ("shape", "tokens", "width", "padding_idx"),
    [
        ((3, 10), 7, 20, 2),
        ((2,), 5, 300, -1),
        ((4, 3, 11), 6, 16, 0),
        ((35, 12), 2, 5, 1),  # samples are split
    ],
)
def test_embedding(
    shape: tuple[int, ...], tokens: int, width: int, padding_idx: int, coordinates: bool
) -> None:
    g, indices = torch.randn(*shape, width), torch.randint(tokens, shape)
    arguments = (g, indices, tokens + 1, padding_idx, shape[0] + 2, coordinates)
    compare(embedding.embedding_weight_grad, reference.embedding_weight_grad, *arguments)


@pytest.mark.parametrize(("weight", "bias"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(
    ("shape", "statistics_shape"),
    [
        ((3, 7, 140, 1), (3, 7, 1, 1)),  # LayerNorm
        ((3, 1, 20, 600), (3, 1, 20, 1)),  # GroupNorm, more than one chunk
        ((2, 1, 5, 9), (1, 1, 5, 1)),  # BatchNorm
        ((2, 530, 3, 1), None),  # no mean
        ((3, 5, 6, 1), (3, 5, 6, 1)),  # statistics of each element
    ],
)
def test_scale(
    shape: tuple[int, ...], statistics_shape: tuple[int, ...] | None, weight: bool, bias: bool
) -> None:
    g, x = torch.randn(shape), torch.randn(shape)
    mean = torch.randn(statistics_shape) if statistics_shape else None
    rstd = torch.rand(statistics_shape or (*shape[:2], 1, 1))
    arguments = (g, x, mean, rstd, shape[0] + 2, weight, bias, True)
    compare(norm.scale_weight_grad, reference.scale_weight_grad, *arguments)


@pytest.mark.parametrize(
    ("shape", "statistics_shape"),
    [
        ((3, 7, 40, 1), (3, 7, 1, 1)),  # LayerNorm
        ((2, 300, 33, 1), (2, 300, 1, 1)),  # in more chunks than are added up at once
        ((5, 1, 1500, 1), (5, 1, 1, 1)),
        ((2, 2, 8200, 1), (2, 2, 1, 1)),  # rows too long for a program
        ((3, 1, 20, 30), (3, 1, 5, 1)),  # GroupNorm
        ((3, 1, 18, 30), (3, 1, 6, 1)),  # of three channels each
        ((2, 1, 80, 6), (2, 1, 2, 1)),  # of forty
        ((2, 1, 5, 1100), (2, 1, 1, 1)),  # more positions than in a tile
        ((2, 1, 7, 9), (2, 1, 7, 1)),  # InstanceNorm
        ((2, 1, 6, 6), (2, 1, 6, 1)),  # with as many pixels as channels
        ((3, 1, 20, 30), (1, 1, 20, 1)),  # BatchNorm
        ((40, 1, 70, 1), (1, 1, 70, 1)),  # without pixels
        ((2, 3, 4, 5), (2, 3, 2, 1)),  # no layer of torch's
    ],
)
@pytest.mark.parametrize("centred", [True, False])
def test_norm_backward(
    shape: tuple[int, ...], statistics_shape: tuple[int, ...], centred: bool
) -> None:
    g, x, scale = torch.randn(shape), torch.randn(shape), torch.randn(shape[2])
    blocks = (*statistics_shape[:3], -1)  # true moments: torch's kernels may use that they are
    seen = x.transpose(0, 2) if statistics_shape[0] == 1 else x
    variance, mean = torch.var_mean(seen.reshape(blocks), 3, correction=0, keepdim=True)
    mean, rstd = mean.reshape(statistics_shape), variance.rsqrt().reshape(statistics_shape)
    if not centred and statistics_shape[0] == 1:
        return  # no layer has that
    given = mean if centred else None
    arguments = (g, x, given, rstd, scale, shape[0] + 2)
    compare(norm.norm_backward, reference.norm_backward, *arguments, True, True, True)
    channels_last = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (g, x)]
    compare(
        norm.norm_backward, reference.norm_backward, *channels_last, *arguments[2:], *[True] * 3
    )


@pytest.mark.parametrize("statistics_shape", [(3, 1, 2, 1), (1, 1, 6, 1)])
@pytest.mark.parametrize(("weight", "bias"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_norm_backward_with_frozen_parts(
    statistics_shape: tuple[int, ...], weight: bool, bias: bool, dtype: torch.dtype
) -> None:
    """The input's gradient is the same, and frozen parts are not in the norms."""
    g, x, scale = torch.randn(3, 1, 6, 5), torch.randn(3, 1, 6, 5), torch.randn(6)
    blocks = (3, 2, 15) if statistics_shape[0] == 3 else (3, 6, 5)
    over = 2 if statistics_shape[0] == 3 else (0, 2)
    variance, mean = torch.var_mean(x.reshape(blocks), over, correction=0, keepdim=True)
    mean, rstd = mean.reshape(statistics_shape), variance.rsqrt().reshape(statistics_shape)
    arguments = (g.to(dtype), x.to(dtype), mean, rstd, scale, 3, weight, bias, False)
    compare(norm.norm_backward, reference.norm_backward, *arguments)


@pytest.mark.parametrize("squares", [True, False])
@pytest.mark.parametrize(
    ("samples", "parts", "vectors", "chunks", "n"),
    [
        (3, 4, 0, 1, 0),
        (2, 1030, 1, 1, 140),  # more parts and elements than a program takes at a time
        (3, 0, 2, 5, 20),
        (2, 3, 2, 32, 130),
        (3, 2, 1, 33, 7),  # added up before
        (300, 1, 2, 1, 20),  # samples are split
        (1, 0, 0, 1, 0),
    ],
)
def test_finish(samples: int, parts: int, vectors: int, chunks: int, n: int, squares: bool) -> None:
    partials = torch.rand(samples, parts) if parts else None
    v = torch.randn(vectors, samples, chunks, n) if vectors else None
    for capacity in (samples, samples + 200, samples + 1500):
        done = finish.finish(torch.zeros(0).device, partials, v, samples, capacity, squares)
        truth = torch.zeros(2, capacity, dtype=torch.float64)
        truth[1, :samples] = 1
        if partials is not None:
            truth[0, :samples] += partials.double().sum(1)
        whole = torch.zeros(0, samples, n).double() if v is None else v.double().sum(2)
        truth[0, :samples] += whole.square().sum((0, 2))
        assert_close_to_truth(done.probe, truth, truth.float())
        assert len(done.sums) == vectors
        for of_k, (total, square) in zip(whole, done.sums, strict=True):
            expected = of_k.sum(0), of_k.square().sum(0) if squares else torch.zeros(0).double()
            assert_close_to_truth(total, expected[0], of_k.float().sum(0))
            assert_close_to_truth(square, expected[1], expected[1].float())
    with pytest.raises(RuntimeError, match="do not fit a probe of capacity"):
        finish.finish(torch.zeros(0).device, partials, v, samples, samples - 1, squares)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", [(5, 3), (70, 30), (3, 1000), (40, 1)])
def test_sample_statistics(shape: tuple[int, int], dtype: torch.dtype) -> None:
    g = torch.rand(shape, dtype=dtype)
    compare(statistics.sample_statistics, reference.sample_statistics, g)


@pytest.mark.parametrize("rows", [[5], [3, 0, 40], [0, 1100], [2000, 1], [0, 0]])
@pytest.mark.parametrize("spare", [0, 3])
def test_pool_samples(rows: list[int], spare: int) -> None:
    probes = [torch.rand(2, n + spare) for n in rows]
    for probe in probes:
        probe[1] = torch.randint(1, 4, probe.shape[1:]).float()
    norms, totals = statistics.pool_samples(probes, rows)
    expected_norms, expected = reference.pool_samples(probes, rows)
    assert torch.equal(norms, expected_norms)
    assert totals.dtype == torch.float64
    torch.testing.assert_close(totals[0], expected[0], rtol=1e-14, atol=0)
    assert torch.equal(totals[1:], expected[1:])


def parameters() -> list[Tensor]:
    image = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    return [torch.randn(3, 5), image, torch.randn(3000), torch.randn(()), torch.randn(0)]


def updated(update: Callable[..., Any], params: Any, grads: Any, sums: Any, *rest: Any) -> Any:
    """Everything that an update changes or returns, from copies of its arguments; float32."""
    params = [p.clone() for p in params]
    sums = [v.clone() for v in sums] if isinstance(sums, list) else sums.clone()
    norm_sq, reductions = update(params, grads, sums, *rest)
    sums = sums if isinstance(sums, list) else [sums]
    return [norm_sq, *reductions, *params, *sums]


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("coordinates", [False, True])
@pytest.mark.parametrize("scalar", [False, True])
def test_adagrad(scalar: bool, coordinates: bool, maximize: bool) -> None:
    params = parameters()
    grads = [torch.randn(p.shape) for p in params]  # of another layout than the image
    squares = [g.square() / 7 + torch.rand(g.shape) for g in grads] if coordinates else []
    if scalar:
        sums: Any = torch.tensor(0.5, dtype=torch.float64)
        rest: Sequence[Any] = ([0.1, 0.2, 0.3, 0.4, 0.5], 1e-10, [0.01, 0.0, 0.0, 0.1, 0.0])
        kernel, plain = adagrad.adagrad_norm_, reference.adagrad_norm_
    else:
        sums = [torch.rand_like(p) for p in params]
        rest = (0.1, 1e-10, 0.01)
        kernel, plain = adagrad.adagrad_, reference.adagrad_
    arguments = (params, grads, sums, squares, *rest, maximize, 0.5, 9)
    results = updated(kernel, *arguments)
    plains, truths = updated(plain, *arguments), updated(plain, *double(arguments))
    for result, expected, truth in zip(results, plains, truths, strict=True):
        # Sums come in float64 but of float32 terms.
        assert_close_to_truth(result.float(), truth, expected.float())


def test_adagrad_says_what_does_not_fit() -> None:
    w, v = [torch.ones(2, 3)], [torch.ones(2, 3)]
    rest = (0.1, 1e-10, 0.0, False, 1.0, 2)
    with pytest.raises(RuntimeError, match="differ in length"):
        adagrad.adagrad_(w, w, v * 2, [], *rest)
    with pytest.raises(RuntimeError, match="the shape of gradient 0"):
        adagrad.adagrad_(w, [torch.ones(3, 2)], v, [], *rest)
    with pytest.raises(RuntimeError, match="accumulator 0"):
        adagrad.adagrad_(w, w, [torch.ones(3, 2).T], [], *rest)
    with pytest.raises(RuntimeError, match="gaps"):
        adagrad.adagrad_([torch.ones(2, 6)[:, ::2]], w, v, [], *rest)


def test_terms_of_many_blocks() -> None:
    table = torch.rand(2500, 5)
    table[100, 2] = 7
    truth = table.double().sum(0)
    truth[2] = 7
    assert_close_to_truth(adagrad.pool_terms(table, 5).float(), truth, truth.float())


def test_grad_norm_sq() -> None:
    tensors = [*parameters(), torch.randn(4, 6)[:, ::2], torch.randn(3).bfloat16()]
    truth = reference.grad_norm_sq(tensors)
    found = adagrad.grad_norm_sq(tensors)
    assert_close_to_truth(found.float(), truth, truth.float())


@pytest.mark.parametrize(("coordinates", "bias", "maximize"), [
    (False, False, False), (False, True, True), (True, True, False)
])  # fmt: skip
@pytest.mark.parametrize("shape", [(5, 1, 30, 70), (4, 33, 20, 150), (70, 1, 140, 70)])
def test_linear_update(
    shape: tuple[int, ...], coordinates: bool, bias: bool, maximize: bool
) -> None:
    b, positions, rows, columns = shape
    g, x = torch.randn(b, positions, rows), torch.randn(b, positions, columns)
    w, v = torch.randn(rows, columns), torch.rand(rows, columns)
    rest = (b + 3, bias, coordinates, 0.1, 1e-9, 0.02, maximize, 0.5)

    def everything(update: Callable[..., Any], *tensors: Tensor) -> list[Tensor]:
        g, x, w, v = (t.clone() for t in tensors)
        norm_sq, reductions, *others = update(g, x, w, v, *rest)
        return [norm_sq, *reductions, *others, w, v]

    plain = reference.linear_adagrad_
    results = everything(linear_update.linear_adagrad_, g, x, w, v)
    truths, plains = everything(plain, *double([g, x, w, v])), everything(plain, g, x, w, v)
    for k, (result, truth, expected) in enumerate(zip(results, truths, plains, strict=True)):
        assert_close_to_truth(result.float(), truth, expected.float(), what=f"result {k}")


@pytest.mark.parametrize("kernel", [linear.linear_weight_grad, conv.conv_weight_grad])
def test_shapes_that_do_not_fit(kernel: Callable[..., Any]) -> None:
    options = () if kernel is linear.linear_weight_grad else ([1], [1], [0], [1], 1)
    with pytest.raises(RuntimeError, match="expected grad_out"):
        kernel(torch.ones(2, 3, 4), torch.ones(3, 3, 4), *options, 3, True, True, False)
    with pytest.raises(RuntimeError, match="do not fit a probe of capacity 1"):
        kernel(torch.ones(2, 3, 4), torch.ones(2, 3, 4), *options, 1, True, True, False)


def test_embedding_and_scale_shapes_that_do_not_fit() -> None:
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="expected grad_out"):
        embedding.embedding_weight_grad(torch.ones(2, 4, 5), tokens, 5, -1, 2, False)
    with pytest.raises(RuntimeError, match="expected grad_out"):
        norm.scale_weight_grad(
            torch.ones(2, 1, 3, 1), torch.ones(2, 3), None, None, 2, True, True, False
        )
    with pytest.raises(RuntimeError, match="expected g"):
        statistics.sample_statistics(torch.ones(3))
    with pytest.raises(RuntimeError, match="4 rows in a probe of capacity 3"):
        statistics.pool_samples([torch.ones(2, 3)], [4])


@pytest.mark.parametrize("name", triton_kernels.FAMILIES)
def test_registered_functions_take_what_the_schemas_give(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Kernels, or for float64 the reference: both get an op's arguments by position."""
    if common.interpreting():
        monkeypatch.setattr(triton_kernels, "_capable", lambda device: True)
        monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    p, g, sequence = [torch.ones(3)], [torch.rand(3)], (torch.randn(2, 3, 4), torch.randn(2, 3, 5))
    v = torch.ones((), dtype=torch.float64)
    weight = torch.ones(4, 5), torch.rand(4, 5)
    rest = (True, True, True)
    arguments = {
        "sample_statistics": (torch.randn(3, 4),),
        "pool_samples": ([torch.rand(2, 4)], [3]),
        "adagrad_": (p, g, [torch.ones(3)], [], 0.1, 1e-10, 0.0, False, 1.0, 2),
        "adagrad_norm_": (p, g, v, [], [0.1], 1e-10, [0.0], False, 1.0, 2),
        "grad_norm_sq": (g,),
        "linear_weight_grad": (*sequence, 2, *rest),
        "linear_adagrad_": (*sequence, *weight, 2, True, False, 0.1, 1e-10, 0.0, False, 1.0),
        "conv_weight_grad": (*sequence, [1], [1], [0], [1], 1, 2, *rest),
        "embedding_weight_grad": (sequence[0], torch.tensor([[0, 1, 0]] * 2), 2, -1, 2, True),
        "scale_weight_grad": (*[torch.randn(2, 3, 4, 1)] * 2, None, None, 2, *rest),
        "norm_backward": (
            *[torch.randn(2, 3, 4, 1)] * 2,
            None,
            torch.rand(2, 3, 1, 1),
            torch.ones(4),
            2,
            *rest,
        ),
    }[name]
    if name == "conv_weight_grad":
        arguments = (sequence[0].transpose(1, 2), sequence[1].transpose(1, 2), *arguments[2:])
    for these in (arguments, tuple(double(arguments))):
        truth = getattr(reference, name)(*double(these))
        result = triton_kernels._kernel(name)(*[a.clone() if a is v else a for a in these])
        for found, wanted in zip(
            [result] if isinstance(result, Tensor) else result,
            [truth] if isinstance(truth, Tensor) else truth,
            strict=True,
        ):
            assert_close_to_truth(found.float(), wanted, wanted.float())
