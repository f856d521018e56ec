"""Differentiable layers whose backward pass also measures each sample's gradient.

Each function computes what its namesake in `torch.nn.functional` computes, and takes one
tensor more, the `probe`. It does not enter the result; its *gradient* is the measurement:
row 0 holds the squared norms ‖c_i‖² of the samples' contributions to the layer's parameter
gradients, row 1 the number of layer calls that counted the sample. Since these are ordinary
gradients, autograd sums them over layers, and checkpointing, `torch.compile`, accumulation and
data parallelism need nothing special. Coordinate sums Σ_i c_i² are the gradients of two more
probes with the shapes of weight and bias.
"""

from __future__ import annotations

import weakref
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from . import ops


class CallListener(Protocol):
    """Told of every backward pass through an observed call that runs outside a compiled graph."""

    def called(self, key: int, samples: int) -> None:
        """The layer call with this key took part with so many samples."""


listeners: weakref.WeakValueDictionary[int, CallListener] = weakref.WeakValueDictionary()
"""Who listens to which key."""


def _tell(key: int, samples: int) -> None:
    if key and not torch.compiler.is_compiling():
        listener = listeners.get(key)
        if listener is not None:
            listener.called(key, samples)


def _check(x: Tensor, probe: Tensor, name: str) -> None:
    if probe.dim() != 2 or probe.shape[0] != 2:
        raise ValueError(f"{name}: expected a probe [2, capacity], got {list(probe.shape)}")
    if x.shape[0] > probe.shape[1]:
        raise ValueError(
            f"{name}: a batch of {x.shape[0]} samples needs a probe of that many columns, "
            f"got {list(probe.shape)}"
        )


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "per-sample statistics have no second derivative: an observed model cannot run "
            "backward(create_graph=True); call observer.detach() first"
        )


def _as(grad: Tensor, like: Tensor | None, wanted: bool) -> Tensor | None:
    return grad.to(like.dtype) if wanted and like is not None else None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, probe, weight_probe, bias_probe, key):
        ctx.save_for_backward(x, weight, bias, probe)
        ctx.key = key
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad_out):
        _refuse_double_backward()
        x, weight, bias, probe = ctx.saved_tensors
        need_x, need_w, need_b, _, need_ws, need_bs, _ = ctx.needs_input_grad
        _tell(ctx.key, x.shape[0])
        grad_x = grad_out.matmul(weight) if need_x else None
        grad_w, grad_b, grad_p, sums_w, sums_b = ops.linear_weight_grad(
            grad_out, x, probe.shape[1], need_w, need_b, need_ws or need_bs
        )
        return (
            grad_x,
            _as(grad_w, weight, need_w),
            _as(grad_b, bias, need_b),
            grad_p.to(probe.dtype),
            sums_w if need_ws else None,
            sums_b if need_bs else None,
            None,
        )


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x, weight, bias, probe, weight_probe, bias_probe, key, *options
    ):  # fmt: skip
        ctx.save_for_backward(x, weight, bias, probe)
        ctx.key, ctx.options = key, options  # type: ignore[attr-defined]
        return F.conv2d(x, weight, bias, *options)

    @staticmethod
    def backward(ctx, grad_out):
        _refuse_double_backward()
        x, weight, bias, probe = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.options
        need_x, need_w, need_b, _, need_ws, need_bs = ctx.needs_input_grad[:6]
        _tell(ctx.key, x.shape[0])
        grad_x = None
        if need_x:
            grad_x = torch.ops.aten.convolution_backward.default(
                grad_out, x, weight, None, stride, padding, dilation, False, [0, 0], groups,
                [True, False, False],
            )[0]  # fmt: skip
        grad_w, grad_b, grad_p, sums_w, sums_b = ops.conv2d_weight_grad(
            grad_out, x, weight.shape[2:], stride, padding, dilation, groups,
            probe.shape[1], need_w, need_b, need_ws or need_bs,
        )  # fmt: skip
        return (
            grad_x,
            _as(grad_w, weight, need_w),
            _as(grad_b, bias, need_b),
            grad_p.to(probe.dtype),
            sums_w if need_ws else None,
            sums_b if need_bs else None,
            *(None,) * 5,
        )


def _autocast(x: Tensor, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The casts that autocast would do inside, done outside, so that autograd sees them."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return (x, *tensors)
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in (x, *tensors)
    )


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    probe: Tensor,
    weight_probe: Tensor | None = None,
    bias_probe: Tensor | None = None,
    key: int = 0,
) -> Tensor:
    """`torch.nn.functional.linear` that measures: y = x Wᵀ + bias.

    Args:
        x: input [b, …, I]; dimension 0 counts the samples, the others are positions in one.
        weight: [O, I].
        bias: [O] or None.
        probe: zeros [2, capacity] that require grad, capacity ≥ b; float32, or float64 for
            float64 layers. Its gradient is described above.
        weight_probe: a tensor of the weight's shape that requires grad; receives Σ_i c_i².
        bias_probe: likewise for the bias.
        key: the call's key in `listeners`, 0 for none.

    Raises:
        ValueError: an input of one dimension, or more samples than the probe has columns.

    Example:
        >>> x, w = torch.tensor([[1., 0.], [0., 2.]]), torch.ones(1, 2, requires_grad=True)
        >>> probe = torch.zeros(2, 2, requires_grad=True)
        >>> linear(x, w, None, probe).sum().backward()
        >>> probe.grad[0].tolist()
        [1.0, 4.0]
    """
    if x.dim() < 2:
        raise ValueError(
            f"linear: an input of shape {list(x.shape)} has no sample dimension; give "
            "[samples, ..., features]"
        )
    _check(x, probe, "linear")
    x_, weight_, bias_ = _autocast(x, weight, bias)
    return _Linear.apply(x_, weight_, bias_, probe, weight_probe, bias_probe, key)  # type: ignore[return-value]


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    probe: Tensor,
    weight_probe: Tensor | None = None,
    bias_probe: Tensor | None = None,
    key: int = 0,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv2d` that measures; see `linear` for the probes.

    Args:
        x: input [b, C, H, W].
        weight: [O, C/groups, kh, kw].
        bias: [O] or None.
        probe: as in `linear`.
        weight_probe: as in `linear`.
        bias_probe: as in `linear`.
        key: as in `linear`.
        stride: vertical and horizontal; padding and dilation likewise.
        padding: zeros on both sides.
        dilation: distance of kernel elements.
        groups: as in `torch.nn.Conv2d`.

    Raises:
        ValueError: an input without the sample dimension, or more samples than columns.
    """
    if x.dim() != 4:
        raise ValueError(f"conv2d: expected an input [samples, C, H, W], got {list(x.shape)}")
    _check(x, probe, "conv2d")
    x_, weight_, bias_ = _autocast(x, weight, bias)
    return _Conv2d.apply(
        x_, weight_, bias_, probe, weight_probe, bias_probe, key, stride, padding, dilation, groups
    )  # type: ignore[return-value]
