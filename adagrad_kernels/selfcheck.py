"""The check of an observer's first backward pass: do the measured calls explain the gradient?

A parameter that is also used outside its layer's forward (`F.linear(x, embedding.weight)`, a
penalty on the weights) gets gradient that no layer measures, and statistics would silently be
wrong. With G = p.grad and the contributions c_i that the layers measured,
Σ_i ⟨c_i, G⟩ = ‖G‖² holds exactly when they are all of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .shared import ObservedCall

# Relative rounding allowed in ‖G‖² and, since a mean gradient is small against its samples',
# in ‖G‖ times √(N Σ‖c_i‖²); by the precision of the least precise tensor that took part.
_ALLOWED = {
    torch.float64: (1e-8, 1e-10),
    torch.float32: (1e-3, 1e-5),
    torch.bfloat16: (5e-2, 1e-2),
    torch.float16: (2e-2, 2e-3),
}


@torch.no_grad()
def unexplained(
    calls: list[ObservedCall], names: dict[nn.Parameter, str], sum_norms_sq: Tensor
) -> str:
    """What is wrong with the first parameter whose gradient the calls do not explain, or "".

    Args:
        calls: all calls of one backward pass, with their operands.
        names: the parameters' names.
        sum_norms_sq: Σ_i ‖c_i‖² over all parameters.
    """
    dtypes = [t.dtype for call in calls for t in call.saved if t.is_floating_point()]
    if not dtypes:
        return ""
    relative, of_noise = _ALLOWED[max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)]
    explained: dict[nn.Parameter, Tensor] = {}
    for call in calls:
        for key, p in call.layer.trainable().items():
            if p.grad is None:
                continue
            value = call.layer.contract(call.call.key, call.saved, {key: _wide(p.grad)}).sum()
            explained[p] = explained[p] + value if p in explained else value
    spread = (sum_norms_sq.double() * calls[0].samples).sqrt()
    for p, value in explained.items():
        assert p.grad is not None
        norm_sq = _wide(p.grad).double().square().sum()
        allowed = relative * norm_sq + of_noise * norm_sq.sqrt() * spread
        if torch.isfinite(value) and (value - norm_sq).abs() > allowed:
            return (
                f"parameter {names[p]!r} has a gradient that the calls of its layer do not "
                f"explain (⟨Σ c_i, G⟩ = {value.item():.4g}, ‖G‖² = {norm_sq.item():.4g}): it is "
                "also used outside its layer's forward. Call the layer instead; tie weights by "
                "sharing the Parameter (head.weight = embedding.weight); put weight penalties "
                "into weight_decay"
            )
    return ""


def _wide(grad: Tensor) -> Tensor:
    return grad if grad.dtype == torch.float64 else grad.float()
