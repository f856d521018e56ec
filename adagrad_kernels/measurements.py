"""From the sums and operands of backward passes to what is asked of them beyond norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import torch
from torch import Tensor, nn

from .distributed import local, whole
from .layers import ObservedLayer
from .shards import in_layout
from .shared import ObservedCall
from .statistics import LazyCoordinates


def by_coordinate(
    measured: Mapping[str, tuple[Tensor, Tensor]], n: int, gradient_scale: float, lazy: bool
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """ḡ_j and var_j = (Σ_i g_ij² − N ḡ_j²)/(N − 1) of every coordinate, at least 0.

    Args:
        measured: by the parameter's name its .grad, and Σ_i c_i² of what this rank holds of it.
        n: N.
        gradient_scale: g_i = N · gradient_scale · c_i, ḡ = gradient_scale · grad.
        lazy: whether to compute them when they are asked for.
    """
    unit = n * gradient_scale**2 / (n - 1) if n > 1 else float("nan")

    def means() -> dict[str, Tensor]:
        return {
            name: in_layout(local(grad).to(sums.dtype) * gradient_scale, grad)
            for name, (grad, sums) in measured.items()
        }

    def variances() -> dict[str, Tensor]:
        found = {}
        for name, (grad, sums) in measured.items():
            own = local(grad).to(sums.dtype)
            value = (sums * (n * unit)).addcmul_(own, own, value=-unit).clamp_(min=0)
            found[name] = in_layout(value, grad)
        return found

    if not lazy:
        return means(), variances()
    grads = {name: grad for name, (grad, _) in measured.items()}
    return LazyCoordinates(grads, means), LazyCoordinates(grads, variances)


def along(
    calls: Sequence[ObservedCall],
    grads: Mapping[nn.Parameter, Tensor],
    dtype: torch.dtype,
    device: torch.device,
    summed: Set[ObservedLayer],
) -> tuple[Tensor, bool]:
    """⟨c_i, grad⟩ of the samples of one micro-batch, [b], from what its calls have kept.

    Args:
        calls: of its backward pass.
        grads: of the parameters.
        dtype: to compute in.
        device: of the result.
        summed: layers of one call, whose gradients are the sum of its samples' c_i.

    Returns:
        The products, and whether some are with that sum instead of the gradient.
    """
    by_sums = False
    total = torch.zeros(calls[0].samples, dtype=dtype, device=device)
    for call in calls:
        trainable = call.layer.trainable()
        used = {k: grads[p] for k, p in trainable.items() if p in grads}
        products = None
        if call.layer in summed and all(grad.dtype == dtype for grad in used.values()):
            products = call.layer.contract_sum(call.saved, used)
            by_sums |= products is not None
        if products is None and used:
            products = call.contract({k: whole(grad).to(dtype) for k, grad in used.items()})
        if products is not None:
            total = total + products
    return total, by_sums
