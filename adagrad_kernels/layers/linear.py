"""`torch.nn.Linear` and the transposed `Conv1D` of transformers, observed: inputs [b, …, I]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from ..functional._product import product
from .base import ObservedLayer, unwatched
from .contributions import Form, unrounded


class _Linear(ObservedLayer):
    observed_method = "outer product (one position a sample), Gram (few), direct (more)"

    def contract_sum(self, saved: tuple[Tensor, ...], grads: Mapping[str, Tensor]) -> Tensor | None:
        """See `ObservedLayer`."""
        x, grad_out = saved
        return linear_products(x, grad_out, grads)


class ObservedLinear(_Linear, nn.Linear):
    """A linear layer that measures; dimension 0 of its input counts the samples."""

    @unwatched
    def forward(self, input: Tensor) -> Tensor:
        """y = x Wᵀ + bias."""
        if not self.measures():
            return super().forward(input)
        x = self.by_samples(input)
        probe, weight_probe, bias_probe, call = self.probes(x)
        update = self.weight_update(self.weight)
        return self.as_rows(
            functional.linear(
                x, self.weight, self.bias, probe, weight_probe, bias_probe, call, update
            )
        )

    def form(self, call: functional.Call, name: str, saved: tuple[Tensor, ...]) -> Form:
        """See `ObservedLayer`."""
        return Form("linear" if name == "weight" else "")

    def sample_grads(
        self, call: functional.Call, saved: tuple[Tensor, ...], names: list[str]
    ) -> dict[str, Tensor]:
        """See `ObservedLayer`."""
        return {name: linear_sample_grads(*saved, of_bias=name == "bias") for name in names}

    def respond(
        self, call: functional.Call, operands: tuple[Tensor, ...], params: Mapping[str, Any]
    ) -> Tensor:
        """See `ObservedLayer`."""
        (x,) = operands
        return linear_response(x, params.get("weight"), params.get("bias"))


def linear_response(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias where either may be missing; with `product` unless it is to be differentiated."""
    if weight is None and bias is None:
        return x.new_zeros(1)
    if weight is None:
        assert bias is not None
        return bias.expand(*x.shape[:-1], bias.shape[0])
    return F.linear(x, weight, bias) if torch.is_grad_enabled() else product(x, weight, bias)


def linear_sample_grads(x: Tensor, grad_out: Tensor, of_bias: bool) -> Tensor:
    """c_i of the weight [b, O, I], or of the bias [b, O]; of 16-bit operands in float32."""
    x, grad_out = unrounded(x), unrounded(grad_out)
    grad = grad_out.reshape(grad_out.shape[0], -1, grad_out.shape[-1])
    if of_bias:
        return grad.sum(1)
    return grad.mT @ x.reshape(x.shape[0], -1, x.shape[-1])


def linear_products(x: Tensor, grad_out: Tensor, grads: Mapping[str, Tensor]) -> Tensor | None:
    """Σ_j ⟨g_i, g_j⟩ (⟨x_i, x_j⟩ + 1), which is ⟨c_i, Σ_j c_j⟩ for samples of one position.

    Without a bias there is no 1. That is 2·b²(O + I) operations and no reading of the gradient,
    whose product with x is 2·b·O·I: not for many samples, not for many positions.
    """
    if x.dim() > 2 or "weight" not in grads:
        return None
    out_features, in_features = grads["weight"].shape
    if 2 * len(x) * (out_features + in_features) > out_features * in_features:
        return None
    x, grad_out = (t.to(grads["weight"].dtype) for t in (x, grad_out))
    inputs = x @ x.mT
    return ((grad_out @ grad_out.mT) * (inputs + 1 if "bias" in grads else inputs)).sum(1)


class ObservedConv1D(_Linear, nn.Module):
    """The `Conv1D` of GPT-2 in transformers: a linear layer whose weight is [I, O]."""

    weight: nn.Parameter
    bias: nn.Parameter

    @unwatched
    def forward(self, x: Tensor) -> Tensor:
        """y = x W + bias."""
        if not self.measures():
            return self.plain_class.forward(self, x)
        x = self.by_samples(x)
        probe, weight_probe, bias_probe, call = self.probes(x)
        weight_probe = None if weight_probe is None else weight_probe.t()
        return self.as_rows(
            functional.linear(x, self.weight.t(), self.bias, probe, weight_probe, bias_probe, call)
        )

    def form(self, call: functional.Call, name: str, saved: tuple[Tensor, ...]) -> Form:
        """See `ObservedLayer`."""
        return Form("transposed" if name == "weight" else "")

    def sample_grads(
        self, call: functional.Call, saved: tuple[Tensor, ...], names: list[str]
    ) -> dict[str, Tensor]:
        """See `ObservedLayer`."""
        found = {name: linear_sample_grads(*saved, of_bias=name == "bias") for name in names}
        return {name: grad.mT if name == "weight" else grad for name, grad in found.items()}

    def respond(
        self, call: functional.Call, operands: tuple[Tensor, ...], params: Mapping[str, Any]
    ) -> Tensor:
        """See `ObservedLayer`."""
        (x,) = operands
        weight = params.get("weight")
        return linear_response(x, None if weight is None else weight.t(), params.get("bias"))
