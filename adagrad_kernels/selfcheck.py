"""Do the measured calls explain the gradient? An exact check of an observer's first backward pass,
and a necessary condition at every step.

A parameter that is also used outside its layer's forward (`F.linear(x, embedding.weight)`, a
penalty on the weights) gets gradient that no layer measures, and statistics would silently be
wrong. With G = p.grad and the contributions c_i that the layers measured,
Σ_i ⟨c_i, G⟩ = ‖G‖² holds exactly when they are all of it. On several ranks both sides, of the
gradients before they are averaged, are summed over them, so that all come to the same conclusion.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn

from . import faults
from .distributed import Ranks, is_sharded
from .eager import outside_graphs
from .shared import ObservedCall

# Relative rounding allowed in ‖G‖² and, since a mean gradient is small against its samples',
# in ‖G‖ times √(N Σ‖c_i‖²); by the precision of the least precise tensor that took part.
_ALLOWED = {
    torch.float64: (1e-8, 1e-10),
    torch.float32: (1e-3, 1e-5),
    torch.bfloat16: (5e-2, 1e-2),
    torch.float16: (2e-2, 2e-3),
}

_LEAST = 1e-18
"""Of gradients whose elements are smaller nothing is said: their squares vanish in float32."""


class Explanation:
    """Compares each gradient of one backward pass with its calls, as soon as it is complete.

    So operands are kept no longer than until the gradients of their layer are there: all of them
    until the end would be the activations once more, and their gradients.

    Args:
        names: the parameters' names. Sharded ones, others during the pass, are not compared.
    """

    def __init__(self, names: Mapping[nn.Parameter, str]) -> None:
        self._names = names
        self._calls: dict[nn.Parameter, list[tuple[ObservedCall, str]]] = {}
        self._hooks: dict[nn.Parameter, Any] = {}
        self._found: dict[nn.Parameter, tuple[Tensor, Tensor]] = {}
        self._dtypes: set[torch.dtype] = set()
        self._samples = 0

    def add(self, call: ObservedCall) -> None:
        """A call of the pass, whose gradients are still to be accumulated."""
        self._samples = call.samples
        self._dtypes.update(t.dtype for t in call.saved if t.is_floating_point())
        for key, p in call.layer.trainable().items():
            if p not in self._names:
                continue
            if p not in self._hooks:
                self._hooks[p] = p.register_post_accumulate_grad_hook(self._compare)
            self._calls.setdefault(p, []).append((call, key))

    def end(self) -> None:
        """The pass is over."""
        for hook in self._hooks.values():
            hook.remove()
        self._calls.clear()

    @outside_graphs
    @torch.no_grad()
    def _compare(self, p: nn.Parameter) -> None:
        """⟨Σ c_i, G⟩ and ‖G‖² of one parameter."""
        calls = self._calls.pop(p, [])
        if p in self._found:  # accumulated twice, as in a reentrant checkpoint
            del self._found[p]
        elif calls and p.grad is not None and not is_sharded(p.grad):
            self._dtypes.add(p.grad.dtype)
            grad = _wide(p.grad)
            scale = _largest(grad).clamp(min=_LEAST)
            products = [call.contract({key: grad / scale}).sum().double() for call, key in calls]
            explained = torch.stack(products).sum() * scale
            self._found[p] = explained, grad.double().square().sum()

    def fault(self, sum_norms_sq: Tensor, ranks: Ranks) -> str:
        """What is wrong with the first parameter whose gradient the calls do not explain, or "".

        Args:
            sum_norms_sq: Σ_i ‖c_i‖² over all parameters.
            ranks: all of them must call this.
        """
        if not self._dtypes:
            return ""
        relative, of_noise = _ALLOWED[max(self._dtypes, key=lambda dtype: torch.finfo(dtype).eps)]
        total = sum_norms_sq.double()
        found = self._found
        if ranks.size > 1:
            total, found = _over_ranks(ranks, list(self._names), total, found)
        spread = (total * self._samples).sqrt()
        for p, (value, norm_sq) in found.items():
            allowed = relative * norm_sq + of_noise * norm_sq.sqrt() * spread
            allowed = allowed + p.numel() * _LEAST**2
            if torch.isfinite(value) and (value - norm_sq).abs() > allowed:
                return (
                    f"parameter {self._names[p]!r} has a gradient that the calls of its layer do "
                    f"not explain (⟨Σ c_i, G⟩ = {value.item():.4g}, ‖G‖² = {norm_sq.item():.4g}): "
                    "it is also used outside its layer's forward. Call the layer instead; tie "
                    "weights by sharing the Parameter (head.weight = embedding.weight); put "
                    "weight penalties into weight_decay"
                )
        return ""


def is_explained(
    mean_product: float, mean_norm_sq: float, mean_sample_norm_sq: float, dtype: torch.dtype
) -> bool:
    """Whether the mean of ⟨g_i, v⟩ is ‖ḡ‖², to rounding, as it is for v = ḡ."""
    relative, of_noise = _ALLOWED[dtype]
    allowed = relative * mean_norm_sq + of_noise * (mean_norm_sq * mean_sample_norm_sq) ** 0.5
    return abs(mean_product - mean_norm_sq) <= allowed


def check_calls(
    with_grad: Mapping[str, nn.Parameter],
    names: Mapping[nn.Parameter, str],
    seen: Set[str],
    tied: Set[str],
    unseen_calls: float,
    alike: bool,
    outside: bool,
    inner_products: bool,
) -> None:
    """That every parameter with a gradient was measured, each layer once a sample.

    Calls of compiled graphs are counted by the probe alone, as a rule: "unseen".

    Args:
        with_grad: layers with a gradient, and one of its parameters.
        names: of the parameters.
        seen: layers whose calls have reported.
        tied: layers that share parameters.
        unseen_calls: how many calls a sample the probe has counted beyond those.
        alike: whether all samples have as many.
        outside: whether it has counted calls of more samples than the micro-batch has.
        inner_products: whether these are measured, for which calls must report.

    Raises:
        RuntimeError: otherwise.
    """
    missing = [layer for layer in with_grad if layer not in seen | tied]
    if missing and len(missing) > unseen_calls:
        among = ", ".join(repr(names[with_grad[layer]]) for layer in missing)
        raise RuntimeError(
            f"parameters got a gradient but no statistics: among {among}. They were used "
            "outside their layer's forward, or their gradient is an old one: call the layer, "
            "and zero_grad(set_to_none=True) after each step"
        )
    if unseen_calls > 0 and (inner_products or (tied and not tied & seen)):
        what = "inner products" if inner_products else "tied weights"
        raise RuntimeError(
            f"{what} cannot be measured where a CUDA graph is replayed: run without, or take "
            "another criterion"
        )
    if outside or (unseen_calls > 0 and (not alike or unseen_calls > len(missing))):
        raise RuntimeError(faults.UNSEEN_DISAGREEMENT)


def check_bounded(
    batch_size: int, sum_norms_sq: float, mean_norm_sq: float, uncancelled: float = 0.0
) -> None:
    """That ‖ḡ‖² ≤ Σ_i ‖g_i‖² / N, which holds for every mean; gradient from elsewhere may break it.

    Args:
        batch_size: N.
        sum_norms_sq: Σ_i ‖g_i‖².
        mean_norm_sq: ‖ḡ‖².
        uncancelled: the same sum over the uses of parameters that are used more than once, each by
            itself, of which the g_i are sums: their rounding is in both sides.

    Raises:
        RuntimeError: if it is far from holding.
    """
    mean_sample_norm_sq = sum_norms_sq / batch_size
    finite = math.isfinite(mean_norm_sq) and math.isfinite(mean_sample_norm_sq)
    allowed = 1.05 * mean_sample_norm_sq + 1e-4 * uncancelled / batch_size  # of 16-bit gradients
    if finite and mean_norm_sq > allowed:
        raise RuntimeError(
            f"the gradient is larger than a mean of the samples' gradients can be: ‖ḡ‖² = "
            f"{mean_norm_sq:.4g}, but ‖g_i‖² = {mean_sample_norm_sq:.4g} on average. Some of it is "
            "older than these samples (zero_grad() whenever the observer is reset), or comes from "
            "elsewhere than the layers' forward (weight penalties go into weight_decay), or was "
            "scaled after the backward pass"
        )


def parameters_with_grad(module: nn.Module) -> Iterator[nn.Parameter]:
    """The module's trainable parameters with a gradient, some twice; faster than `parameters()`."""
    left: list[nn.Module | None] = [module]
    while left:
        module_ = left.pop()
        if module_ is None:
            continue
        for p in module_._parameters.values():
            if p is not None and p.requires_grad and p.grad is not None:
                yield p
        if module_._modules:
            left.extend(reversed(module_._modules.values()))


def parameter_name(model: nn.Module, parameter: Tensor) -> str:
    """Of one of the model's parameters."""
    return next(name for name, p in model.named_parameters() if p is parameter)


def _over_ranks(
    ranks: Ranks,
    params: list[nn.Parameter],
    total: Tensor,
    found: dict[nn.Parameter, tuple[Tensor, Tensor]],
) -> tuple[Tensor, dict[nn.Parameter, tuple[Tensor, Tensor]]]:
    """The sums over the ranks of a number and of two numbers a parameter; missing ones are 0."""
    zero = torch.zeros_like(total)
    own = [number for p in params for number in found.get(p, (zero, zero))]
    total, *sums = ranks.sum_(torch.stack([total, *own])).unbind()
    return total, dict(zip(params, zip(sums[::2], sums[1::2], strict=True), strict=True))


def _largest(grad: Tensor) -> Tensor:
    values = grad.coalesce().values() if grad.is_sparse else grad
    return values.abs().max() if values.numel() else values.new_zeros(())


def _wide(grad: Tensor) -> Tensor:
    return grad if grad.dtype == torch.float64 else grad.float()
