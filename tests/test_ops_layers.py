"""The weight gradients of layers with their per-sample statistics, against float64."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import DTYPES, dtypes, laid_out, layouts, sizes
from tolerance import assert_close_to_truth
from torch import Tensor

from adagrad_kernels import ops, reference

pytestmark = pytest.mark.usefixtures("nan_memory")

NAMES = ("weight", "bias", "probe", "weight_sums", "bias_sums")
LABELS = {
    2: ("samples", "samples of bias"),
    3: ("weight", "probe", "weight_sums"),
    5: NAMES,
    7: ("input", *NAMES, "samples"),
}
flags = st.tuples(st.booleans(), st.booleans(), st.booleans())


def check(
    name: str, tensors: list[Tensor | None], *options: Any, b: int, plain: Callable | None = None
) -> None:
    """The op equals its reference in float64; the size of a sum is that of its terms."""

    def run(function: Callable, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        return function(*(t if t is None else change(t) for t in tensors), *options)

    def double(t: Tensor) -> Tensor:
        return t.double() if t.is_floating_point() else t

    def magnitude(t: Tensor) -> Tensor:
        return double(t).abs()

    of = getattr(reference, name)
    found = run(getattr(torch.ops.adagrad_kernels, name), lambda t: t)
    truth, plain_ = run(of, double), run(of, lambda t: t)
    sizes = [t if t is None else magnitude(t) for t in tensors]
    if name in ("scale_weight_grad", "norm_backward") and sizes[2] is not None:
        sizes[2] = -sizes[2]  # the mean is subtracted
    scales = of(*sizes, *options)
    if name == "norm_backward":  # the difference of three terms, here their sum
        each = sizes[4].numel() // max(1, sizes[3].shape[2])
        first = sizes[0] * sizes[3].repeat_interleave(each, 2) * sizes[4].view(1, 1, -1, 1)
        scales = (2 * first - scales[0], *scales[1:])
    labels = LABELS[len(found)]
    for label, a, t, p, scale in zip(labels, found, truth, plain_, scales, strict=True):
        if label == "probe":
            assert a.shape == t.shape
            assert torch.equal(a[1].double(), t[1]), "calls"
            assert not a[0, b:].any(), "beyond the samples"
            a, t, p, scale = a[0], t[0], p[0], scale[0]
        assert_close_to_truth(a, t, p, scale, label)
        assert a.is_contiguous() or label == "input"


@settings(max_examples=60)
@given(
    sizes, st.lists(st.integers(0, 3), max_size=2), sizes, sizes, flags, dtypes, layouts, layouts
)
def test_linear(
    device: torch.device, b, positions, out, features, wanted, dtype, layout, layout_2
) -> None:
    grad_out = laid_out(torch.randn(b, *positions, out, device=device).to(dtype), layout)
    x = laid_out(torch.randn(b, *positions, features, device=device).to(dtype), layout_2)
    check("linear_weight_grad", [grad_out, x], b + 2, *wanted, b=b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (3, 1, 300, 200),  # one position: matrix products
        (5, 2, 300, 500),  # a large weight: tasks take panels
        (40, 9, 30, 130),  # a small one: tasks take samples
        (3000, 2, 5, 3),  # many samples in a chunk
        (2000, 1, 40, 70),
    ],
)
def test_linear_over_threads(device: torch.device, shape, dtype: torch.dtype) -> None:
    b, positions, out, features = shape
    grad_out = torch.randn(b, positions, out, device=device).to(dtype)
    x = torch.randn(b, positions, features, device=device).to(dtype)
    check("linear_weight_grad", [grad_out, x], b, True, True, True, b=b)


def test_linear_with_expanded_operands(device: torch.device) -> None:
    """The gradient of a sum is one number, expanded; so are inputs shared by all samples."""
    grad_out = torch.randn((), device=device).expand(3, 4, 5)
    x = torch.randn(4, 2, device=device).expand(3, 4, 2)
    check("linear_weight_grad", [grad_out, x], 3, True, True, True, b=3)


Conv = dict[str, Any]


@st.composite
def convolutions(draw: st.DrawFn) -> Conv:
    dims = draw(st.integers(1, 3))
    many = lambda low, high: [draw(st.integers(low, high)) for _ in range(dims)]  # noqa: E731
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel, stride, dilation, padding = many(1, 3), many(1, 3), many(1, 2), many(0, 2)
    out = many(1, 4)
    spare = many(0, 2)  # pixels that no kernel reaches
    size = [
        max(1, (o - 1) * s + (k - 1) * d + 1 + e - 2 * p)
        for o, s, k, d, e, p in zip(out, stride, kernel, dilation, spare, padding, strict=True)
    ]
    return {
        "b": draw(st.integers(0, 4)),
        "channels": groups * draw(st.sampled_from([1, 2, 5])),
        "out_channels": groups * draw(st.sampled_from([1, 3, 16, 17, 33])),
        "size": size,
        "out": out,
        "options": (kernel, stride, padding, dilation, groups),
    }


def check_conv(
    device: torch.device, conv: Conv, wanted, dtype: torch.dtype, layout="", layout_2=""
) -> None:
    b = conv["b"]
    grad_out = torch.randn(b, conv["out_channels"], *conv["out"], device=device).to(dtype)
    x = torch.randn(b, conv["channels"], *conv["size"], device=device).to(dtype)
    tensors = [laid_out(grad_out, layout), laid_out(x, layout_2)]
    check("conv_weight_grad", tensors, *conv["options"], b + 1, *wanted, b=b)
    check("conv_sample_grads", tensors, *conv["options"], *wanted[:2], b=b)


@settings(max_examples=80)
@given(convolutions(), flags, dtypes, layouts, layouts)
def test_conv(device: torch.device, conv: Conv, wanted, dtype, layout, layout_2) -> None:
    check_conv(device, conv, wanted, dtype, layout, layout_2)


def conv2d(b: int, channels: int, out: int, kernel: int, size: int, groups: int = 1) -> Conv:
    options = ([kernel] * 2, [1, 1], [kernel // 2] * 2, [1, 1], groups)
    return {
        "b": b, "channels": channels, "out_channels": out, "size": [size] * 2,
        "out": [size] * 2, "options": options,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "conv",
    [
        conv2d(3, 96, 160, 3, 5),  # a large weight: tasks take panels
        conv2d(9, 3, 16, 3, 12),  # a small one: tasks take samples
        conv2d(2, 1, 16, 5, 28),
        conv2d(400, 2, 3, 3, 3),  # many samples in a chunk
        conv2d(4, 36, 36, 3, 6, groups=36),  # depthwise
        conv2d(2, 8, 70, 1, 9),  # pointwise, in place
        conv2d(3, 64, 96, 1, 4),  # the same with few pixels: norms by their products
        conv2d(3, 256, 320, 3, 4, groups=2),  # two large weights, few pixels
    ],
    ids=str,
)
@pytest.mark.parametrize("coordinates", [True, False])
def test_conv_over_threads(
    device: torch.device, conv: Conv, coordinates: bool, dtype: torch.dtype, layout: str
) -> None:
    check_conv(device, conv, (True, True, coordinates), dtype, layout, layout)


@settings(max_examples=40)
@given(
    st.integers(0, 5), st.lists(st.integers(0, 7), min_size=1, max_size=2), sizes,
    st.integers(1, 9), st.booleans(), dtypes, layouts, st.sampled_from([torch.int64, torch.int32]),
    st.data(),
)  # fmt: skip
def test_embedding(
    device: torch.device, b, positions, width, rows, coordinates, dtype, layout, index_dtype, data
) -> None:
    padding_idx = data.draw(st.integers(-1, rows - 1))
    grad_out = laid_out(torch.randn(b, *positions, width, device=device).to(dtype), layout)
    indices = torch.randint(rows, (b, *positions), device=device, dtype=index_dtype)
    options = (rows, padding_idx, b + 2, coordinates)
    check("embedding_weight_grad", [grad_out, laid_out(indices, "contiguous")], *options, b=b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 64, 200, 50), (3000, 3, 5, 7)])
def test_embedding_over_threads(device: torch.device, shape, dtype: torch.dtype) -> None:
    b, positions, width, rows = shape
    grad_out = torch.randn(b, positions, width, device=device).to(dtype)
    indices = torch.randint(rows, (b, positions), device=device)
    check("embedding_weight_grad", [grad_out, indices], rows, 1, b, True, b=b)


@settings(max_examples=50)
@given(
    st.integers(0, 4), st.integers(0, 3), sizes, st.integers(0, 4), flags, dtypes, layouts, layouts,
    st.data(),
)  # fmt: skip
def test_scale(
    device: torch.device, b, positions, channels, inner, wanted, dtype, layout, layout_2, data
) -> None:
    shape = (b, positions, channels, inner)
    statistics = []
    for _ in range(2):
        kept = data.draw(st.tuples(*[st.booleans()] * 3) | st.none())
        if kept is None:
            statistics.append(None)
        else:
            size = [n if keep else 1 for n, keep in zip(shape, kept, strict=False)]
            statistics.append(torch.randn(*size, 1, device=device).exp())
    grad_out = laid_out(torch.randn(shape, device=device).to(dtype), layout)
    x = laid_out(torch.randn(shape, device=device).to(dtype), layout_2)
    if statistics[0] is not None:  # x̂ = |x| + |mean| bounds the terms in `check`
        statistics[0] = -statistics[0]
    check("scale_weight_grad", [grad_out, x, *statistics], b + 2, *wanted, b=b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(30, 20, 70, 1), (16, 1, 33, 80), (3000, 2, 5, 2)])
def test_scale_over_threads(device: torch.device, shape, dtype: torch.dtype) -> None:
    grad_out = torch.randn(shape, device=device).to(dtype)
    x = torch.randn(shape, device=device).to(dtype)
    check("scale_weight_grad", [grad_out, x, None, None], shape[0], True, True, True, b=shape[0])


@st.composite
def normalisations(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes [b, T, C, S] of the input and [b, T, G, 1] or [1, 1, C, 1] of its statistics."""
    kind = draw(st.sampled_from(["rows", "groups", "batch"]))
    b, positions = draw(st.integers(0, 4)), draw(st.integers(0, 9))
    if kind == "rows":
        return (b, positions, draw(sizes), 1), (b, positions, 1, 1)
    inner = draw(st.sampled_from([0, 1, 2, 7, 16, 17, 32, 49, 150]))
    if kind == "batch":
        channels = draw(sizes)
        return (b, 1, channels, inner), (1, 1, channels, 1)
    groups, each = draw(st.integers(1, 5)), draw(sizes)
    positions = draw(st.sampled_from([1, 1, 3]))
    return (b, positions, groups * each, inner), (b, positions, groups, 1)


def norm_operands(
    device: torch.device, shape: tuple[int, ...], of: tuple[int, ...], dtype: torch.dtype
) -> list[Tensor]:
    """grad_out, x, mean, rstd and scale."""
    tensors = [torch.randn(s, device=device) for s in (shape, shape, of, of, shape[2:3])]
    tensors[2], tensors[3] = -tensors[2].abs(), tensors[3].exp()  # see `check`
    return [t.to(dtype) for t in tensors]


def laid_out_by_channel(t: Tensor, layout: str) -> Tensor:
    return t.mT.contiguous().mT if layout == "channels" else laid_out(t, layout)


norm_layouts = st.one_of(layouts, st.just("channels"))


@settings(max_examples=80)
@given(normalisations(), st.booleans(), flags, st.booleans(), dtypes, norm_layouts, norm_layouts)
def test_norm(
    device: torch.device, shapes, centred, wanted, samples, dtype, layout, layout_2
) -> None:
    shape, of = shapes
    grad_out, x, mean, *rest = norm_operands(device, shape, of, dtype)
    tensors = [laid_out_by_channel(grad_out, layout), laid_out_by_channel(x, layout_2)]
    mean = mean if centred or of[0] != shape[0] else None
    check("norm_backward", [*tensors, mean, *rest], shape[0] + 2, *wanted, samples, b=shape[0])
    grad_input = ops.norm_backward(*tensors, mean, *rest, shape[0])[0]
    assert grad_input.dtype == dtype
    assert grad_input.stride() == torch.empty_like(tensors[1]).stride()


OF_NORMS = {
    "rows": ((30, 20, 70, 1), (30, 20, 1, 1)),
    "groups": ((16, 1, 66, 64), (16, 1, 33, 1)),
    "one group": ((20, 1, 12, 600), (20, 1, 1, 1)),
    "small groups": ((3000, 1, 8, 4), (3000, 1, 4, 1)),
    "batch": ((40, 1, 70, 49), (1, 1, 70, 1)),
    "flat batch": ((300, 1, 300, 1), (1, 1, 300, 1)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels"])
@pytest.mark.parametrize("case", OF_NORMS)
@pytest.mark.usefixtures("threads")
def test_norm_over_threads(
    device: torch.device, case: str, layout: str, dtype: torch.dtype
) -> None:
    shape, of = OF_NORMS[case]
    grad_out, x, *rest = norm_operands(device, shape, of, dtype)
    tensors = [laid_out_by_channel(grad_out, layout), laid_out_by_channel(x, layout), *rest]
    check("norm_backward", tensors, shape[0], True, True, True, True, b=shape[0])
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(ops.norm_backward(*tensors, shape[0], coordinates=True, samples=True))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "wanted", [(True, True, True), (False, True, False), (False, False, False)]
)
def test_every_size_may_be_zero(device: torch.device, wanted, dtype: torch.dtype) -> None:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    for b, n, c, k in itertools.product([0, 2], repeat=4):
        check("linear_weight_grad", [randn(b, n, c), randn(b, n, k)], b + 1, *wanted, b=b)
        check("linear_weight_grad", [randn(b, c), randn(b, k)], b + 1, *wanted, b=b)
        tensors = [randn(b, n, c, k), randn(b, n, c, k)]
        for statistic in (None, randn(b, n, 1, 1), randn(1, 1, c, 1), randn(b, n, c, 1)):
            check("scale_weight_grad", [*tensors, statistic, statistic], b + 1, *wanted, b=b)
        rest = randn(b, n, 1, 1), randn(b, n, 1, 1), randn(c)
        check("norm_backward", [*tensors, *rest], b + 1, *wanted, True, b=b)
        if not (c == 0 and n):  # a token needs a row
            indices = torch.zeros(b, n, dtype=torch.int64, device=device)
            options = (c, -1, b + 1, wanted[2])
            check("embedding_weight_grad", [randn(b, n, k), indices], *options, b=b)
    options = ([2, 2], [1, 1], [1, 1], [1, 1], 1)
    for b, c, o in itertools.product([0, 2], repeat=3):
        check("conv_weight_grad", [randn(b, o, 3, 3), randn(b, c, 2, 2)], *options, b, *wanted, b=b)
        check("conv_weight_grad", [randn(b, o, 0, 3), randn(b, c, 2, 2)], *options, b, *wanted, b=b)


def test_infinite_samples_do_not_spread(device: torch.device) -> None:
    """One sample's overflow is that sample's: the others' norms stay as they are."""
    grad_out, x = torch.randn(4, 3, 5, device=device), torch.randn(4, 3, 6, device=device)
    clean = ops.linear_weight_grad(grad_out, x, 4)[2][0]
    grad_out[2, 1, 1] = torch.inf
    norms = ops.linear_weight_grad(grad_out, x, 4)[2][0]
    assert not norms[2].isfinite()
    rest = [0, 1, 3]
    assert torch.equal(norms[rest], clean[rest])
    image, grad = torch.randn(4, 2, 6, 6, device=device), torch.randn(4, 3, 6, 6, device=device)
    options = ([3, 3], [1, 1], [1, 1], [1, 1], 1, 4)
    clean = ops.conv_weight_grad(grad, image, *options)[2][0]
    image[2, 1, 3, 3] = torch.nan
    norms = ops.conv_weight_grad(grad, image, *options)[2][0]
    assert norms[2].isnan()
    assert torch.equal(norms[rest], clean[rest])


def f32(*shape: int) -> Tensor:
    return torch.ones(shape)


CONV = ([3, 3], [1, 1], [1, 1], [1, 1])
NORM = (f32(2, 3, 1, 1), f32(2, 3, 1, 1), f32(4))
WANTED = (True, True, False)
BAD: dict[str, tuple[str, tuple]] = {
    "linear b": ("linear_weight_grad", (f32(3, 2), f32(4, 2), 4, *WANTED)),
    "linear positions": ("linear_weight_grad", (f32(3, 2, 2), f32(3, 4, 2), 4, *WANTED)),
    "linear swapped positions": (
        "linear_weight_grad", (f32(3, 2, 4, 2), f32(3, 4, 2, 2), 4, *WANTED),
    ),
    "linear dimensions": ("linear_weight_grad", (f32(3, 2, 2), f32(3, 2), 4, *WANTED)),
    "linear vectors": ("linear_weight_grad", (f32(3), f32(3), 4, *WANTED)),
    "linear dtypes": ("linear_weight_grad", (f32(3, 2), f32(3, 2).double(), 4, *WANTED)),
    "linear capacity": ("linear_weight_grad", (f32(3, 2), f32(3, 2), 2, *WANTED)),
    "conv b": ("conv_weight_grad", (f32(3, 2, 4, 4), f32(2, 2, 4, 4), *CONV, 1, 4, *WANTED)),
    "conv groups": ("conv_weight_grad", (f32(3, 2, 4, 4), f32(3, 3, 4, 4), *CONV, 2, 4, *WANTED)),
    "conv no groups": (
        "conv_weight_grad", (f32(3, 2, 4, 4), f32(3, 2, 4, 4), *CONV, 0, 4, *WANTED),
    ),
    "conv output": ("conv_weight_grad", (f32(3, 2, 5, 4), f32(3, 2, 4, 4), *CONV, 1, 4, *WANTED)),
    "conv stride": (
        "conv_weight_grad",
        (f32(3, 2, 4, 4), f32(3, 2, 4, 4), [3, 3], [1], [1, 1], [1, 1], 1, 4, *WANTED),
    ),
    "conv dimensions": ("conv_weight_grad", (f32(3, 2, 4), f32(3, 2, 4), *CONV, 1, 4, *WANTED)),
    "conv dtypes": (
        "conv_weight_grad",
        (f32(3, 2, 4, 4), f32(3, 2, 4, 4).double(), *CONV, 1, 4, *WANTED),
    ),
    "conv capacity": ("conv_weight_grad", (f32(3, 2, 4, 4), f32(3, 2, 4, 4), *CONV, 1, 2, *WANTED)),
    "conv samples": ("conv_sample_grads", (f32(3, 2, 4, 4), f32(2, 2, 4, 4), *CONV, 1, True, True)),
    "conv samples output": (
        "conv_sample_grads", (f32(3, 2, 5, 4), f32(3, 2, 4, 4), *CONV, 1, True, True),
    ),
    "embedding tokens": (
        "embedding_weight_grad", (f32(2, 2, 3), torch.tensor([[0, 1], [2, 5]]), 5, -1, 2, False),
    ),
    "embedding negative tokens": (
        "embedding_weight_grad", (f32(2, 2, 3), torch.tensor([[0, 1], [2, -1]]), 5, -1, 2, False),
    ),
    "embedding positions": (
        "embedding_weight_grad", (f32(2, 3, 3), torch.tensor([[0, 1], [2, 3]]), 5, -1, 2, False),
    ),
    "embedding capacity": (
        "embedding_weight_grad", (f32(2, 2, 3), torch.tensor([[0, 1], [2, 3]]), 5, -1, 1, False),
    ),
    "scale shapes": (
        "scale_weight_grad", (f32(2, 3, 4, 5), f32(2, 3, 4, 4), None, None, 2, *WANTED),
    ),
    "scale dimensions": ("scale_weight_grad", (f32(2, 3), f32(2, 3), None, None, 2, *WANTED)),
    "scale mean": (
        "scale_weight_grad", (f32(2, 3, 4, 5), f32(2, 3, 4, 5), f32(2, 2, 1, 1), None, 2, *WANTED),
    ),
    "scale capacity": (
        "scale_weight_grad", (f32(2, 3, 4, 5), f32(2, 3, 4, 5), None, None, 1, *WANTED),
    ),
    "norm shapes": ("norm_backward", (f32(2, 3, 4, 5), f32(2, 3, 4, 4), *NORM, 2, *WANTED, True)),
    "norm dimensions": ("norm_backward", (f32(2, 3), f32(2, 3), *NORM, 2, *WANTED, True)),
    "norm groups": (
        "norm_backward", (*[f32(2, 3, 4, 5)] * 2, *[f32(2, 3, 3, 1)] * 2, f32(4), 2, *WANTED, True),
    ),
    "norm of the batch at positions": (
        "norm_backward", (*[f32(2, 3, 4, 5)] * 2, *[f32(1, 1, 4, 1)] * 2, f32(4), 2, *WANTED, True),
    ),
    "norm of the batch without mean": (
        "norm_backward", (*[f32(2, 1, 4, 5)] * 2, None, f32(1, 1, 4, 1), f32(4), 2, *WANTED, True),
    ),
    "norm mean": (
        "norm_backward",
        (*[f32(2, 3, 4, 5)] * 2, f32(2, 3, 2, 1), f32(2, 3, 1, 1), f32(4), 2, *WANTED, True),
    ),
    "norm scale": (
        "norm_backward", (*[f32(2, 3, 4, 5)] * 2, *NORM[:2], f32(3), 2, *WANTED, True),
    ),
    "norm capacity": ("norm_backward", (*[f32(2, 3, 4, 5)] * 2, *NORM, 1, *WANTED, True)),
}  # fmt: skip


@pytest.mark.parametrize("where", ["kernel", "reference"])
@pytest.mark.parametrize("bad", BAD)
def test_shapes_are_checked(bad: str, where: str) -> None:
    name, args = BAD[bad]
    module = torch.ops.adagrad_kernels if where == "kernel" else reference
    with pytest.raises(RuntimeError):
        getattr(module, name)(*args)


@pytest.mark.parametrize("bad", [name for name in BAD if "capacity" in name])
def test_a_probe_too_small_is_named(bad: str) -> None:
    name, args = BAD[bad]
    b = args[0].shape[0]
    with pytest.raises(RuntimeError, match=f"{b} samples do not fit a probe of capacity {b - 1}"):
        getattr(torch.ops.adagrad_kernels, name)(*args)
