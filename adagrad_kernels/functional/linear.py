"""`linear`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ._call import (
    NO_LISTENER,
    Call,
    WeightUpdate,
    as_grad,
    autocast,
    check_probe,
    counted,
    dtypes,
    notify,
    refuse_double_backward,
)
from ._product import product, product_of_rows


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, probe, weight_probe, bias_probe, call, update):
        ctx.dtypes = dtypes(weight, bias)
        weight, bias = autocast(weight, bias)
        # A weight that is not needed may change before the backward pass, as with torch's own.
        ctx.save_for_backward(x, weight if ctx.needs_input_grad[0] else None, probe)
        ctx.call, ctx.update = call, update
        y = product(x, weight, bias)
        if x.dim() == 2:
            return y
        return torch.ops.aten._unsafe_view.default(y, y.shape)  # of a view, `y += …` is refused

    @staticmethod
    def backward(ctx, grad_out):
        refuse_double_backward()
        x, weight, probe = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        need_x, need_w, need_b, _, need_ws, need_bs, *_ = ctx.needs_input_grad
        notify(ctx.call, x, grad_out)
        grad_x = product_of_rows(grad_out, weight) if need_x else None
        coordinates = need_ws or need_bs
        update = ctx.update if need_w and not coordinates else None
        if update is not None and update.takes(ctx.call, ctx.next_functions[1][0]):
            grad_b, grad_p = update(grad_out, x, probe.shape[1], need_b)
            grad_b, grad_p = as_grad(grad_b, bias_dtype, need_b), counted(grad_p, probe, ctx.call)
            return grad_x, None, grad_b, grad_p, None, None, None, None
        grad_w, grad_b, grad_p, sums_w, sums_b = ops.linear_weight_grad(
            grad_out, x, probe.shape[1], need_w, need_b, coordinates
        )
        return (
            grad_x,
            as_grad(grad_w, weight_dtype, need_w),
            as_grad(grad_b, bias_dtype, need_b),
            counted(grad_p, probe, ctx.call, x, grad_out),
            sums_w if need_ws else None,
            sums_b if need_bs else None,
            None,
            None,
        )


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    probe: Tensor,
    weight_probe: Tensor | None = None,
    bias_probe: Tensor | None = None,
    call: Call = NO_LISTENER,
    update: WeightUpdate | None = None,
) -> Tensor:
    """`torch.nn.functional.linear` that measures: y = x Wᵀ + bias.

    Args:
        x: input [b, …, I]; dimension 0 counts the samples, the others are positions in one.
        weight: [O, I].
        bias: [O] or None.
        probe: see the package, as the others below.
        weight_probe: as there.
        bias_probe: as there.
        call: as there.
        update: may update the weight in the backward pass, which then returns no gradient of it.

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
    check_probe(x.shape[0], probe, "linear")
    (x_,) = autocast(x)
    return _Linear.apply(x_, weight, bias, probe, weight_probe, bias_probe, call, update)  # type: ignore[return-value]
