"""`conv` and `conv_transpose`, for one to three spatial dimensions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ._call import (
    NO_LISTENER,
    Call,
    as_grad,
    autocast,
    check_probe,
    counted,
    dtypes,
    notify,
    refuse_double_backward,
    wants_sample_grads,
)

_CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_CONV_TRANSPOSE = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, probe, weight_probe, bias_probe, call, k, *options):
        ctx.dtypes = dtypes(weight, bias)
        weight, bias = autocast(weight, bias)
        ctx.save_for_backward(x, weight, probe)
        ctx.call, ctx.k, ctx.options = call, k, options
        return _CONV[x.dim()](x, weight, bias, *options)

    @staticmethod
    def backward(ctx, grad_out):
        refuse_double_backward()
        x, weight, probe = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        stride, padding, dilation, groups = ctx.options
        need_x, need_w, need_b, _, need_ws, need_bs = ctx.needs_input_grad[:6]
        saved = _of_samples(ctx.k, x, grad_out)
        if need_w and _keeps_sample_grads(ctx.call, grad_out, x, weight, ctx.k):
            sample_grads = _sample_grads(grad_out, x, weight, ctx.k, ctx.options, need_b)
            notify(ctx.call, *saved, sample_grads=sample_grads)
            found = _of_sample_grads(sample_grads, probe.shape[1])
        else:
            notify(ctx.call, *saved)
            found = _weight_grad(
                grad_out, x, weight, ctx.k, ctx.options,
                probe.shape[1], need_w, need_b, need_ws or need_bs,
            )  # fmt: skip
        grad_w, grad_b, grad_p, sums_w, sums_b = found
        grad_x = None
        if need_x:
            grad_x = torch.ops.aten.convolution_backward.default(
                grad_out, x, weight, None, stride, padding, dilation, False, [0] * len(stride),
                groups, [True, False, False],
            )[0]  # fmt: skip
        return (
            grad_x,
            as_grad(grad_w, weight_dtype, need_w),
            as_grad(grad_b, bias_dtype, need_b),
            counted(grad_p, probe, ctx.call, *saved),
            sums_w if need_ws else None,
            sums_b if need_bs else None,
            *(None,) * 6,
        )


class _ConvTranspose(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, probe, weight_probe, bias_probe, call, k, *options):
        ctx.dtypes = dtypes(weight, bias)
        weight, bias = autocast(weight, bias)
        ctx.save_for_backward(x, weight, probe)
        ctx.call, ctx.k, ctx.options = call, k, options
        stride, padding, output_padding, dilation, groups = options
        function = _CONV_TRANSPOSE[x.dim()]
        return function(x, weight, bias, stride, padding, output_padding, groups, dilation)

    @staticmethod
    def backward(ctx, grad_out):
        refuse_double_backward()
        x, weight, probe = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        need_x, need_w, need_b, _, need_ws, need_bs = ctx.needs_input_grad[:6]
        saved = _of_samples(ctx.k, x, grad_out)
        grad_x = None
        if need_x:  # with much output padding, the last pixels of grad_out reach no pixel of x
            grad_x = _CONV[x.dim()](grad_out, weight, None, *_as_conv(ctx.options))
            grad_x = grad_x[(..., *map(slice, x.shape[2:]))]
        # The weight's gradient is that of a convolution of grad_out whose output x is.
        options = _as_conv(ctx.options)
        if need_w and _keeps_sample_grads(ctx.call, x, grad_out, weight, ctx.k):
            sample_grads = _sample_grads(x, grad_out, weight, ctx.k, options, False)
            if need_b:
                by_channel = _by_channel(grad_out, ctx.k)
                sample_grads["bias"] = by_channel.to(sample_grads["weight"].dtype).sum((1, 3))
            notify(ctx.call, *saved, sample_grads=sample_grads)
            found = _of_sample_grads(sample_grads, probe.shape[1])
        else:
            notify(ctx.call, *saved)
            wanted = probe.shape[1], need_w, False, need_ws
            grad_w, grad_b, grad_p, sums_w, sums_b = _weight_grad(
                x, grad_out, weight, ctx.k, options, *wanted
            )
            if need_b:
                by_channel = _by_channel(grad_out, ctx.k)
                _, grad_b, grad_p_bias, _, sums_b = ops.scale_weight_grad(
                    by_channel, by_channel, None, None, probe.shape[1], False, True, need_bs
                )
                grad_p = torch.stack([grad_p[0] + grad_p_bias[0], grad_p[1]])
            found = grad_w, grad_b, grad_p, sums_w, sums_b
        grad_w, grad_b, grad_p, sums_w, sums_b = found
        return (
            grad_x,
            as_grad(grad_w, weight_dtype, need_w),
            as_grad(grad_b, bias_dtype, need_b),
            counted(grad_p, probe, ctx.call, *saved),
            sums_w if need_ws else None,
            sums_b if need_bs else None,
            *(None,) * 7,
        )


def _as_conv(options: tuple) -> tuple:
    stride, padding, _, dilation, groups = options
    return stride, padding, dilation, groups


def _by_channel(grad_out: Tensor, k: int) -> Tensor:
    """[b·k, O, *D] as [b, k, O, pixels]."""
    return grad_out.reshape(-1, k, grad_out.shape[1], grad_out.shape[2:].numel())


def _of_samples(k: int, *images: Tensor) -> tuple[Tensor, ...]:
    """[b·k, C, *D] as [b, k, C, *D], unless k is 1."""
    return images if k == 1 else tuple(t.unflatten(0, (-1, k)) for t in images)


def _weight_grad(
    grad_out: Tensor, x: Tensor, weight: Tensor, k: int, options: tuple, *wanted: Any
) -> tuple[Tensor, ...]:
    """`ops.conv_weight_grad` of samples of k images each: of one image with k slices."""
    stride, padding, dilation, groups = options
    size = weight.shape[2:]
    if k == 1:
        return ops.conv_weight_grad(grad_out, x, size, stride, padding, dilation, groups, *wanted)
    g, a = (t.transpose(1, 2) for t in _of_samples(k, grad_out, x))
    grad_w, grad_b, probe, sums_w, sums_b = ops.conv_weight_grad(
        g, a, (1, *size), (1, *stride), (0, *padding), (1, *dilation), groups, *wanted
    )
    grad_w, sums_w = (t.squeeze(2) if t.dim() > 1 else t for t in (grad_w, sums_w))
    return grad_w, grad_b, probe, sums_w, sums_b


def sample_grads_are_cheap(samples: int, positions: int, parameters: int, operands: int) -> bool:
    """Whether c_i rather than the operands is to be kept for inner products, on the CPU.

    The operands need another forward pass, 2·T operations an element of c_i; c_i is written once
    and read twice. On two cores of an EPYC both take the same time at about T = 64 where c_i stays
    in a cache, and at 300 to 400 where it does not. Threads share the samples: few are too few.
    Nor may c_i take more memory than the operands, but for a few megabytes.

    Args:
        samples: b.
        positions: T, pixels of a sample's images.
        parameters: elements of the weight.
        operands: numbers in the input and in the gradient of the output.
    """
    own = samples * parameters
    if own <= 1 << 22:
        return samples >= 16 and positions >= 128 and own <= 4 * operands
    return samples >= 16 and positions >= 512 and own <= operands


def _keeps_sample_grads(call: Call, g: Tensor, a: Tensor, weight: Tensor, k: int) -> bool:
    """Whether the call's listener is to get c_i; g and a as for `_weight_grad`."""
    if g.device.type != "cpu" or not wants_sample_grads(call):
        return False  # before a compiled graph, which is for batches of all sizes, is asked for any
    positions, operands = k * g.shape[2:].numel(), g.numel() + a.numel()
    return sample_grads_are_cheap(len(g) // k, positions, weight.numel(), operands)


def _sample_grads(
    grad_out: Tensor, x: Tensor, weight: Tensor, k: int, options: tuple, bias: bool
) -> dict[str, Tensor]:
    """c_i of samples of k images each, of the weight and, if wanted, the bias."""
    stride, padding, dilation, groups = options
    size = weight.shape[2:]
    if k > 1:  # one image with k slices
        grad_out, x = (t.transpose(1, 2) for t in _of_samples(k, grad_out, x))
        size, stride, padding, dilation = (1, *size), (1, *stride), (0, *padding), (1, *dilation)
    of_weight, of_bias = ops.conv_sample_grads(
        grad_out, x, size, stride, padding, dilation, groups, True, bias
    )
    found = {"weight": of_weight.reshape(-1, *weight.shape)}
    return {**found, "bias": of_bias} if bias else found


def _of_sample_grads(sample_grads: dict[str, Tensor], capacity: int) -> tuple[Tensor, ...]:
    """What `_weight_grad` returns, from c_i; always with coordinate sums."""
    c = sample_grads["weight"]
    grad_w, sums_w, norms = ops.sample_statistics(c.flatten(1))
    grad_b = sums_b = norms[:0]
    if "bias" in sample_grads:
        grad_b, sums_b, of_bias = ops.sample_statistics(sample_grads["bias"])
        norms = norms + of_bias
    probe = norms.new_zeros(2, capacity)
    probe[0, : len(c)] = norms
    probe[1, : len(c)] = 1
    return grad_w.view(c.shape[1:]), grad_b, probe, sums_w.view(c.shape[1:]), sums_b


def conv_statistics(
    grad_out: Tensor, x: Tensor, weight: Tensor, options: tuple, capacity: int, coordinates: bool
) -> tuple[Tensor, Tensor]:
    """The probe's gradient and the coordinate sums of a weight, for k images a sample.

    Args:
        grad_out: [b, k, O, *D].
        x: [b, k, C, *D]; of a transposed convolution it takes the place of grad_out.
        weight: whose shape is meant.
        options: stride, padding, dilation and groups.
        capacity: columns of the probe.
        coordinates: whether the sums are wanted.
    """
    k = x.shape[1]
    rows = (grad_out.flatten(0, 1), x.flatten(0, 1))
    _, _, probe, sums, _ = _weight_grad(
        *rows, weight, k, options, capacity, True, False, coordinates
    )
    return probe, sums


def _images(x: Tensor, weight: Tensor) -> tuple[Tensor, int]:
    """[b, k, C, *D] as [b·k, C, *D], and k."""
    return (x.flatten(0, 1), x.shape[1]) if x.dim() > weight.dim() else (x, 1)


def _check(x: Tensor, weight: Tensor, probe: Tensor, name: str) -> None:
    folded = x.dim() == weight.dim() + 1 and x.dim() in _CONV
    if weight.dim() not in _CONV or not (x.dim() == weight.dim() or folded):
        raise ValueError(
            f"{name}: expected an input [samples, channels, ...] with "
            f"{weight.dim() - 2} spatial dimensions, got {list(x.shape)}"
        )
    check_probe(x.shape[0], probe, name)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    probe: Tensor,
    weight_probe: Tensor | None = None,
    bias_probe: Tensor | None = None,
    call: Call = NO_LISTENER,
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] = (0, 0),
    dilation: tuple[int, ...] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv1d`, `conv2d` or `conv3d` that measures.

    Args:
        x: input [b, C, *D], or with one or two dimensions D also [b, k, C, *D]: k images a sample.
        weight: [O, C/groups, *kernel_size].
        bias: [O] or None.
        probe: see the package, as the others below.
        weight_probe: as there.
        bias_probe: as there.
        call: as there.
        stride: one number a spatial dimension; padding and dilation likewise.
        padding: zeros on both sides.
        dilation: distance of kernel elements.
        groups: as in `torch.nn.Conv2d`.

    Raises:
        ValueError: an input without the sample dimension, or more samples than columns.

    Example:
        >>> x = torch.tensor([1., 2.]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
        >>> w, probe = torch.ones(1, 1, 2, 2).requires_grad_(), torch.zeros(2, 2).requires_grad_()
        >>> conv(x, w, None, probe).sum().backward()
        >>> probe.grad[0].tolist()
        [4.0, 16.0]
    """
    _check(x, weight, probe, "conv")
    images, k = _images(autocast(x)[0], weight)
    y: Any = _Conv.apply(
        images, weight, bias, probe, weight_probe, bias_probe, call,
        k, stride, padding, dilation, groups,
    )  # fmt: skip
    return y if x.dim() == weight.dim() else y.unflatten(0, x.shape[:2])


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    probe: Tensor,
    weight_probe: Tensor | None = None,
    bias_probe: Tensor | None = None,
    call: Call = NO_LISTENER,
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] = (0, 0),
    output_padding: tuple[int, ...] = (0, 0),
    dilation: tuple[int, ...] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv_transpose1d`, `2d` or `3d` that measures.

    Args:
        x: input [b, C, *D], or with one or two dimensions D also [b, k, C, *D]: k images a sample.
        weight: [C, O/groups, *kernel_size].
        bias: [O] or None.
        probe: see the package, as the others below.
        weight_probe: as there.
        bias_probe: as there.
        call: as there.
        stride: one number a spatial dimension; padding, output_padding, dilation likewise.
        padding: as in `torch.nn.ConvTranspose2d`.
        output_padding: as there.
        dilation: distance of kernel elements.
        groups: as there.

    Raises:
        ValueError: an input without the sample dimension, or more samples than columns.

    Example:
        >>> x = torch.tensor([1., 2.]).view(2, 1, 1, 1)
        >>> w, probe = torch.ones(1, 1, 2, 2).requires_grad_(), torch.zeros(2, 2).requires_grad_()
        >>> conv_transpose(x, w, None, probe).sum().backward()
        >>> probe.grad[0].tolist()
        [4.0, 16.0]
    """
    _check(x, weight, probe, "conv_transpose")
    images, k = _images(autocast(x)[0], weight)
    y: Any = _ConvTranspose.apply(
        images, weight, bias, probe, weight_probe, bias_probe, call,
        k, stride, padding, output_padding, dilation, groups,
    )  # fmt: skip
    return y if x.dim() == weight.dim() else y.unflatten(0, x.shape[:2])
