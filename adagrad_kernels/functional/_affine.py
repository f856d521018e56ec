"""What layers with a scale and a shift by channel share: their gradients.

The backward pass of a normalisation is one op, `ops.norm_backward`, and that of the affine part
`ops.scale_weight_grad`; both take views [b, T, C, S] of the tensors (channels C, positions T before
and S after them).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import ops
from ._call import as_grad, counted, notify, wants_sample_grads


def affine_grads(
    ctx: Any,
    affine: list[Tensor],
    view: tuple[int, ...],
    grad_out: Tensor,
    x: Tensor,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    input_grad: bool = True,
) -> tuple[Tensor | None, ...]:
    """Gradients of (x, weight, bias, probe, weight_probe, bias_probe), a forward's first arguments.

    Args:
        ctx: of the autograd function.
        affine: weight, bias and probe.
        view: [b, T, C, S], as which grad_out and x are seen.
        grad_out: gradient of the output.
        x: the input.
        mean: the statistics [b, T, G, 1] or [1, 1, C, 1] by which x is normalised, if any.
        rstd: likewise.
        input_grad: False if they are not taken from x: then x's gradient is left to the caller.
    """
    weight, bias, probe = affine
    need_x, need_w, need_b, _, need_ws, need_bs = ctx.needs_input_grad[:6]
    wanted = (probe.shape[1], need_w, need_b, need_ws or need_bs)
    g, a = grad_out.reshape(view), x.reshape(view)
    statistics = [t for t in (mean, rstd) if t is not None]
    if statistics and len(statistics[0]) != view[0]:
        statistics = [t.expand(view[0], -1, -1, -1) for t in statistics]
    saved = (a, *statistics, g)
    grad_x = sample_grads = None
    if need_x and input_grad and rstd is not None:
        keeps = wants_sample_grads(ctx.call)
        scale = _shaped(weight, (view[2],))
        grad_x, *found, c = ops.norm_backward(g, a, mean, rstd, scale, *wanted, keeps)
        grad_x = grad_x.reshape(x.shape)
        if keeps:  # they are much smaller than the operands
            own = zip(("weight", "bias"), (need_w, need_b), c.unbind(1), strict=True)
            sample_grads = {name: each for name, needed, each in own if needed}
    else:
        m, r = (t if t is None else by_channel(t, view[2]) for t in (mean, rstd))
        found = ops.scale_weight_grad(g, a, m, r, *wanted)
    notify(ctx.call, *saved, sample_grads=sample_grads)
    grad_w, grad_b, grad_p, sums_w, sums_b = found
    return (
        grad_x,
        as_grad(_shaped(grad_w, weight.shape), weight.dtype, True) if need_w else None,
        as_grad(_shaped(grad_b, bias.shape), bias.dtype, True) if need_b else None,
        counted(grad_p, probe, ctx.call, *saved),
        _shaped(sums_w, weight.shape) if need_ws else None,
        _shaped(sums_b, bias.shape) if need_bs else None,
    )


def _shaped(t: Tensor, shape: Sequence[int]) -> Tensor:
    """As `reshape`, which takes longer where there is nothing to do."""
    return t if t.dim() == len(shape) else t.reshape(shape)


def by_channel(statistic: Tensor, channels: int) -> Tensor:
    """[b, T, G, 1] for each of the channels, where there are groups of them."""
    groups = statistic.shape[2]
    return (
        statistic.repeat_interleave(channels // groups, 2) if 1 < groups < channels else statistic
    )


def check_channels(x: Tensor, name: str) -> None:
    """That the input has samples and channels."""
    if x.dim() < 2:
        raise ValueError(
            f"{name}: expected an input [samples, channels, …], got shape {list(x.shape)}"
        )
