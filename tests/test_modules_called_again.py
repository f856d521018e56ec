"""Modules that are called more than once, with other uses of the same parameters."""

import pytest
import torch
import torch.nn.functional as F
from per_sample import per_sample
from torch import Tensor, nn
from torch.testing import assert_close
from watched import loss, measured

import adagrad_kernels as ak
from adagrad_kernels.layers import ObservedModule


class Linears(nn.Module):
    """A matrix and its transposition, each with a shift; or a shift that becomes a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4) / 2)
        self.shift, self.other = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor, way: str) -> Tensor:
        if way == "plain":
            return F.linear(x, self.weight, self.shift)
        if way == "no-shift":
            return F.linear(x, self.weight)
        if way == "back":
            return F.linear(x, self.weight.t(), self.other)
        if way == "norm":
            return F.layer_norm(x, (4,), self.shift, self.other)
        return x * self.shift


class Ways(nn.Module):
    """These ways, one after the other; so many fewer of them in the first batch."""

    def __init__(self, *ways: str, later: int = 0) -> None:
        super().__init__()
        self.ways, self.later, self.batches = ways, later, 0
        self.own, self.head = Linears(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for way in self.ways[: None if self.batches else len(self.ways) - self.later]:
            x = self.own(x, way).tanh()
        return self.head(x)


@pytest.mark.parametrize("coordinates", [False, True])
@pytest.mark.parametrize("later", [0, 1])
@pytest.mark.parametrize(
    "ways",
    [
        ("plain", "factor"),
        ("plain", "back"),
        ("plain", "plain"),
        ("plain", "no-shift"),
        ("norm", "factor"),
        ("back", "plain", "norm", "factor"),
    ],
    ids="-".join,
)
def test_a_module_called_again_in_another_way(
    ways: tuple[str, ...], later: int, coordinates: bool, device: torch.device
) -> None:
    model = Ways(*ways, later=later).to(device).double()
    observer = ak.observe(
        model, fallback="vmap", coordinates=coordinates, inner_products=coordinates
    )
    for batch in range(3):
        model.batches = batch
        x = torch.randn(6, 3, 4, device=device, dtype=torch.float64)
        found, truth = measured(model, x, observer), per_sample(model, loss, x)
        assert_close(found, truth.norms_sq)
        s = observer.statistics()
        if coordinates:
            variance = truth.by_parameter(truth.coordinate_variance)
            used = {name: variance[name] for name in s.coordinate_variance}
            assert_close(s.coordinate_variance, used)
            assert_close(s.inner_products, truth.inner_products)
    assert isinstance(model.own, ObservedModule)


class Refinement(nn.Module):
    """Begins with a parameter that only the first call uses."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.start = nn.Parameter(torch.ones(4)), nn.Parameter(torch.randn(4))
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        return self.layer(((self.start + x if h is None else h) * self.gain).tanh())


def test_a_parameter_of_some_calls(device: torch.device) -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Refinement()

        def forward(self, x: Tensor) -> Tensor:
            h = self.block(x)
            return self.block(x, self.block(x, h))

    model = Loop().to(device).double()
    observer = ak.observe(model, fallback="vmap")
    for _ in range(3):
        x = torch.randn(6, 4, device=device, dtype=torch.float64)
        assert_close(measured(model, x, observer), per_sample(model, loss, x).norms_sq)


def test_very_many_parameters(device: torch.device) -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.list = nn.ParameterList([torch.randn(3, 3) / 2 for _ in range(40)])
            self.last, self.shift = nn.Parameter(torch.eye(3)), nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            for weight in self.list:
                x = F.layer_norm(F.linear(x, weight), (3,))
            return F.linear(x, self.last, self.shift)

    model = Many().to(device).double()
    observer = ak.observe(model, fallback="vmap")
    x = torch.randn(6, 3, device=device, dtype=torch.float64)
    assert_close(measured(model, x, observer), per_sample(model, loss, x).norms_sq)
