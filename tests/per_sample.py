"""The truth about per-sample gradients: plain autograd, one sample at a time, in float64."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Loss = Callable[..., Tensor]  # loss(model(x), *targets) of a batch, a scalar


@dataclass(frozen=True)
class PerSample:
    """Per-sample gradients g [b, P] of all trainable parameters, and what follows from them."""

    g: Tensor
    shapes: dict[str, torch.Size]

    @property
    def norms_sq(self) -> Tensor:
        """‖g_i‖², [b]."""
        return self.g.square().sum(1)

    @property
    def mean(self) -> Tensor:
        """ḡ, [P]."""
        return self.g.mean(0)

    @property
    def mean_norm_sq(self) -> Tensor:
        """‖ḡ‖²."""
        return self.mean.square().sum()

    @property
    def coordinate_variance(self) -> Tensor:
        """Sample variance of every coordinate, [P]."""
        return self.g.var(0)

    @property
    def variance_trace(self) -> Tensor:
        """tr Σ̂, from the deviations themselves."""
        return self.coordinate_variance.sum()

    @property
    def inner_products(self) -> Tensor:
        """⟨g_i, ḡ⟩, [b]."""
        return self.g @ self.mean

    def by_parameter(self, flat: Tensor) -> dict[str, Tensor]:
        """A vector [P] cut into the parameters."""
        parts = flat.split([shape.numel() for shape in self.shapes.values()])
        return {
            name: part.view(shape)
            for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)
        }


def per_sample(
    model: nn.Module, loss: Loss, x: Tensor, *targets: Tensor, dtype: torch.dtype = torch.float64
) -> PerSample:
    """The gradient of each sample's own loss. The model is copied, not touched.

    Args:
        model: its trainable parameters are those that require grad.
        loss: of the output and the targets of a batch; called with one sample.
        x: the batch; dimension 0 counts the samples, here and in the targets.
        targets: what else the loss takes.
        dtype: float64 for the truth; a lower one shows how wrong plain PyTorch is.
    """
    model = copy.deepcopy(model).to(dtype)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    rows = []
    with torch.enable_grad():
        for i in range(x.shape[0]):
            one = [
                t[i : i + 1].to(dtype) if t.is_floating_point() else t[i : i + 1]
                for t in (x, *targets)
            ]
            grads = torch.autograd.grad(
                loss(model(one[0]), *one[1:]), [p for _, p in named], allow_unused=True
            )
            rows.append(
                torch.cat(
                    [
                        (torch.zeros_like(p) if grad is None else grad).flatten()
                        for grad, (_, p) in zip(grads, named, strict=True)
                    ]
                )
            )
    return PerSample(torch.stack(rows), {name: p.shape for name, p in named})
