"""`expand`: a parameter once for each sample, where no kernel knows what becomes of it."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ._call import NO_LISTENER, Call, check_probe, counted, notify, refuse_double_backward


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parameter, samples, probe, weight_probe, call):
        ctx.save_for_backward(probe)
        ctx.call, ctx.shape, ctx.dtype = call, parameter.shape, parameter.dtype
        return parameter.unsqueeze(0).expand(samples, *parameter.shape)

    @staticmethod
    def backward(ctx, grad_out):
        refuse_double_backward()
        (probe,) = ctx.saved_tensors
        notify(ctx.call, grad_out)
        samples = grad_out.shape[0]
        grad, sums, norms = ops.sample_statistics(grad_out.reshape(samples, -1))
        counts = torch.ones_like(norms)
        grad_p = torch.stack([norms, counts]).to(probe.dtype)
        grad_p = torch.nn.functional.pad(grad_p, (0, probe.shape[1] - samples))
        return (
            grad.reshape(ctx.shape).to(ctx.dtype),
            None,
            counted(grad_p, probe, ctx.call, grad_out),
            sums.reshape(ctx.shape) if ctx.needs_input_grad[3] else None,
            None,
        )


def expand(
    parameter: Tensor,
    samples: int,
    probe: Tensor,
    weight_probe: Tensor | None = None,
    call: Call = NO_LISTENER,
) -> Tensor:
    """`parameter.expand(samples, *parameter.shape)` that measures.

    What is computed with row i must reach sample i's loss alone. Its gradient then is sample i's
    own, [b, P] numbers in all, of which one pass makes the gradient and the statistics.

    Args:
        parameter: of any shape.
        samples: b.
        probe: see the package, as the others below.
        weight_probe: as there.
        call: as there.

    Raises:
        ValueError: more samples than the probe has columns.

    Example:
        >>> w, probe = torch.ones(2).requires_grad_(), torch.zeros(2, 2).requires_grad_()
        >>> x = torch.tensor([[1., 2.], [3., 0.]])
        >>> (expand(w, 2, probe) * x).sum().backward()
        >>> w.grad.tolist(), probe.grad[0].tolist()
        ([4.0, 2.0], [5.0, 9.0])
    """
    check_probe(samples, probe, "expand")
    return _Expand.apply(parameter, samples, probe, weight_probe, call)  # type: ignore[return-value]
