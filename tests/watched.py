"""What the tests of watched forward passes share."""

from collections.abc import Callable
from typing import Any

import torch
from module_cases import Own
from per_sample import per_sample
from torch import Tensor, nn
from torch.testing import assert_close

import adagrad_kernels as ak


class Known(Own):
    """Of the package that is watched unasked: there is no vmap to fall back on."""

    __module__ = "transformers.models.own"

    def __init__(
        self, forward: Callable[..., Tensor], *shapes: tuple[int, ...], **buffers: Tensor
    ) -> None:
        super().__init__(forward, *shapes)
        for name, value in buffers.items():
            self.register_buffer(name, value)


def loss(y: Tensor) -> Tensor:
    return y.sin().flatten(1).sum(1).mean()


def measured(model: nn.Module, x: Tensor, observer: ak.Observer) -> Tensor:
    model.zero_grad()
    observer.reset()
    loss(model(x)).backward()
    return observer.statistics().sample_norms_sq


def check(model: nn.Module, sizes: tuple[int, ...], device: torch.device, **options: Any) -> None:
    """Exact with these numbers of samples [7, 5], one after the other; norms by themselves, too."""
    for everything in (False, True):
        observer = ak.observe(model, everything, everything, **options)
        for samples in sizes:
            x = torch.randn(samples, 7, 5, device=device, dtype=torch.float64)
            model.zero_grad()
            observer.reset()
            loss(model(x)).backward()
            s, truth = observer.statistics(), per_sample(model, loss, x)
            assert_close(s.sample_norms_sq, truth.norms_sq)
            if everything:
                assert_close(s.inner_products, truth.inner_products)
            if everything and samples > 1:
                assert_close(s.coordinate_variance, truth.by_parameter(truth.coordinate_variance))
        observer.detach()


def assert_exact_for_tokens(
    model: nn.Module, sizes: tuple[int, ...], device: torch.device, **options: Any
) -> None:
    """With these numbers of samples of six tokens, one after the other."""
    observer = ak.observe(model, **options)
    for samples in sizes:
        x = torch.randint(11, (samples, 6), device=device)
        assert_close(measured(model, x, observer), per_sample(model, loss, x).norms_sq)
