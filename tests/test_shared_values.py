"""What the watch of a forward pass tells apart: samples, constants, shared values."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layer_cases import between
from module_cases import (
    Own,
)
from torch import Tensor, nn
from torch.testing import assert_close
from watched import Known, check, loss

import adagrad_kernels as ak


def with_frozen_table() -> Known:
    model = Known(lambda m, x: x + m.p0 * m.p1, (5,), (7, 5))
    model.p1.requires_grad_(False)
    return model


def counting(m: Known, x: Tensor) -> Tensor:
    """A constant that samples are written to is none any more."""
    sums = torch.zeros(x.shape[0], 7, 5, dtype=x.dtype, device=x.device)
    sums += x
    return sums * m.p0


def arange(m: Known, x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], dtype=x.dtype, device=x.device).unsqueeze(1)


SPREAD = torch.randn(9, 5, dtype=torch.float64)


CONSTANT: dict[str, Callable[[], Known]] = {
    "buffer": lambda: Known(lambda m, x: x + m.p0 * m.pe[: x.shape[1]], (5,), pe=SPREAD.clone()),
    "buffer-product": lambda: Known(
        lambda m, x: x + m.pe[: x.shape[1]] @ m.p0, (5, 5), pe=SPREAD.clone()
    ),
    "frozen": with_frozen_table,
    "rotary": lambda: Known(lambda m, x: x * torch.cos(arange(m, x) * m.p0), (5,)),
    "linear": lambda: Known(lambda m, x: x + F.linear(arange(m, x), m.p0), (5, 1)),
    "mask": lambda: Known(
        lambda m, x: x + (torch.ones(7, 7, device=x.device).tril().double() @ m.p0), (7, 5)
    ),
    "samples-in-zeros": lambda: Known(counting, (5,)),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_constants_with_as_many_rows_as_samples(name: str, device: torch.device) -> None:
    check(between(CONSTANT[name](), 5).to(device).double(), (7, 4, 7, 1), device)


@pytest.mark.parametrize(
    ("what", "first"),  # in a first batch of as many, nothing tells what an argument is: limits.md
    [
        ("attribute", 5),
        ("attribute", 3),
        ("new", 5),
        ("detached", 5),
        ("argument", 3),
        ("random", 3),
    ],
)
def test_other_things_with_as_many_rows_as_samples(
    what: str, first: int, device: torch.device
) -> None:
    """Attributes, and what is made of them, are constants; of others, sizes are evidence."""

    class Distances(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
            self.slope, self.table = nn.Parameter(torch.randn(())), nn.Parameter(torch.randn(5, 1))
            self.fixed = torch.randn(5, 5, dtype=torch.float64, device=device)

        def forward(self, x: Tensor, given: Tensor) -> Tensor:
            h = self.inner(x)
            spread = {
                "attribute": self.fixed,
                "argument": given,
                "new": h.new_full((5, 5), 2.0).tril(),
                "random": torch.rand(5, 5, dtype=x.dtype, device=x.device) * 0 + given,
                "detached": self.table.detach() * self.fixed,
            }[what]
            scores = h @ h.mT + self.slope * spread
            return self.head(scores.softmax(-1) @ h) + self.table.sum()

    model = Distances().to(device).double()
    plain, given = copy.deepcopy(model), torch.randn(5, 5, dtype=torch.float64, device=device)
    observer = ak.observe(model, fallback="vmap")
    for samples in (first, 5, 6, 5):
        model.zero_grad()
        observer.reset()
        x = torch.randn(samples, 5, 4, device=device, dtype=torch.float64)
        loss(model(x, given)).backward()
        for row, norm in zip(x, observer.statistics().sample_norms_sq, strict=True):
            plain.zero_grad()
            loss(plain(row.unsqueeze(0), given)).backward()
            assert_close(sum(p.grad.square().sum() for p in plain.parameters()), norm)


def test_repeated_to_as_many_heads_as_samples(device: torch.device) -> None:
    """After a batch of another size has shown that heads do not follow it."""

    def forward(m: Known, x: Tensor) -> Tensor:
        heads = m.p0.unsqueeze(0).expand(3, 7, 5)
        return x + heads.sum(0)

    check(between(Known(forward, (7, 5)), 5).to(device).double(), (4, 3, 5, 3), device)


@pytest.mark.parametrize("repeat", ["expand", "repeat"])
def test_tokens_for_one_sample(repeat: str, device: torch.device) -> None:
    """Queries that are expanded, and then go into layers that the watch does not see into."""

    class Latents(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.latents, self.gain = nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.ones(6))
            self.q, self.k = nn.Linear(5, 6), nn.Linear(5, 6)

        def forward(self, x: Tensor) -> Tensor:
            if repeat == "expand":
                rows = self.latents.expand(x.shape[0], -1, -1)
            else:
                rows = self.latents.unsqueeze(0).repeat(x.shape[0], 1, 1)
            k = self.k(x)
            return F.scaled_dot_product_attention(self.q(rows), k, k) * self.gain

    for sizes in ((4, 1), (1, 4), (3, 5)):
        check(Latents().to(device).double(), sizes, device, fallback="vmap")


def zeroed(m: Known, x: Tensor) -> Tensor:
    h = m.p0.clone()
    h[0] = 0.0
    return x + h


def through_a_view(m: Known, x: Tensor) -> Tensor:
    h = m.p0 * 1
    h[0].exp_()
    return x + h


def constant_in_a_loop(m: Known, x: Tensor) -> Tensor:
    d, tables = torch.zeros(7, 1, dtype=x.dtype, device=x.device), []
    for _ in range(3):
        d += 1
        tables.append(m.p0 + d)
    return x * tables[0] * tables[1]


def without_grad(m: Known, x: Tensor) -> Tensor:
    h = m.p0 * 1
    with torch.no_grad():
        h[0] = 0.0
    return x + h


WRITES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "relu": lambda m, x: x * F.relu(m.p0 * 2, inplace=True),
    "exp": lambda m, x: x * (m.p0 * 2).exp_(),
    "item": zeroed,
    "view": through_a_view,
    "constant": constant_in_a_loop,
    "no-grad": without_grad,
    "strided": lambda m, x: x + torch.as_strided(m.p0, (7, 5), (1, 1)),
    "into-zeros": lambda m, x: x + x.new_zeros(7, 5).index_put((x.new_zeros(1).long(),), m.p0),
}


@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_to_is_refused_or_measured_by_vmap(name: str, device: torch.device) -> None:
    shape = (11,) if name == "strided" else (5,)
    known = between(Known(WRITES[name], shape), 5).to(device).double()
    ak.observe(known)
    x = torch.randn(4, 7, 5, device=device, dtype=torch.float64)
    if name == "into-zeros":
        loss(known(x)).backward()  # computed of a constant, out of place
    else:
        with pytest.raises(ak.UnsupportedLayerError, match="cannot be measured"):
            known(x)
    free = between(Own(WRITES[name], shape), 5).to(device).double()
    plain, y = copy.deepcopy(free), free(x)
    observer = ak.observe(free, fallback="vmap")
    assert_close(free(x), y)
    observer.detach()
    if name != "strided":
        check(plain, (4, 6), device, fallback="vmap")


def test_hooks_of_what_is_computed(device: torch.device) -> None:
    def forward(m: Known, x: Tensor) -> Tensor:
        h = m.p0 * 1
        h.register_hook(lambda grad: 2 * grad)
        return x * h

    model = Known(forward, (5,)).to(device)
    ak.observe(model)
    with pytest.raises(ak.UnsupportedLayerError, match="register_hook"):
        model(torch.randn(4, 5, device=device))


def test_a_layer_that_is_given_a_shared_value(device: torch.device) -> None:
    class Queries(Known):
        __module__ = Known.__module__

        def __init__(self) -> None:
            super().__init__(lambda m, x: x + m.layer(m.p0), (7, 5))
            self.layer = nn.Linear(5, 5)

    model = Queries().to(device)
    ak.observe(model)
    for samples in (4, 7):
        with pytest.raises(ak.UnsupportedLayerError, match="layer 'layer' takes it before it has"):
            model(torch.randn(samples, 7, 5, device=device))


def test_mixed_precision_of_what_is_computed(device: torch.device) -> None:
    def forward(m: Known, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            table = m.p0 @ m.p1
        return x + table

    model = Known(forward, (7, 16), (16, 5)).to(device)
    plain, x = copy.deepcopy(model), torch.randn(4, 7, 5, device=device)
    ak.observe(model)
    with torch.autocast(device.type, torch.bfloat16):
        assert_close(model(x), plain(x), rtol=0, atol=1e-6)
