"""Embeddings of positions that all samples share, and of one token for each sample."""

import copy

import pytest
import torch
import torch.nn.functional as F
from module_cases import (
    Factors,
    Positions,
    Relative,
)
from per_sample import per_sample
from torch import Tensor, nn
from torch.testing import assert_close
from watched import assert_exact_for_tokens, loss, measured

import adagrad_kernels as ak


@pytest.mark.parametrize("sizes", [(4, 6, 9), (6, 4), (6, 6), (1, 6, 7)])
@pytest.mark.parametrize("way", ["plain", "row", "first", "later"])
def test_a_batch_that_grows_past_the_positions(
    way: str, sizes: tuple[int, ...], device: torch.device
) -> None:
    model = Positions(way).to(device).double()
    assert_exact_for_tokens(model, sizes, device, coordinates=True)


@pytest.mark.parametrize("first", [6, 4])
def test_a_relative_bias_in_any_order_of_sizes(first: int, device: torch.device) -> None:
    assert_exact_for_tokens(Relative().to(device).double(), (first, 4, 6, 8), device)


def test_one_table_for_tokens_and_positions(device: torch.device) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(11, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            places = torch.arange(x.shape[1], device=x.device)
            return self.head((self.table(x) + self.table(places)).tanh())

    assert_exact_for_tokens(Shared().to(device).double(), (6, 4, 6), device)


def test_a_mask_beside_one_sample(device: torch.device) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(11, 4), nn.Embedding(7, 4)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            places = torch.arange(x.shape[1], device=x.device)
            y = self.tokens(x) + self.positions(places)
            return F.scaled_dot_product_attention(y, y, y, attn_mask=mask)

    model = Masked().to(device).double()
    plain, mask = copy.deepcopy(model), torch.ones(6, 6, device=device).tril().bool()
    observer = ak.observe(model)
    for samples in (4, 1):
        model.zero_grad()
        observer.reset()
        x = torch.randint(11, (samples, 6), device=device)
        loss(model(x, mask)).backward()
        norms = observer.statistics().sample_norms_sq
        for row, norm in zip(x, norms, strict=True):
            plain.zero_grad()
            loss(plain(row.unsqueeze(0), mask)).backward()
            assert_close(sum(p.grad.square().sum() for p in plain.parameters()), norm)


def test_labels_in_order_are_not_guessed(device: torch.device) -> None:
    class Labelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.labels, self.head = nn.Embedding(11, 4), nn.Linear(4, 3)

        def forward(self, y: Tensor) -> Tensor:
            return self.head(self.labels(y))

    model = Labelled().to(device).double()
    observer = ak.observe(model)
    with pytest.raises(ValueError, match=r"may be positions.*indices\.unsqueeze\(1\)"):
        model(torch.arange(5, device=device))
    y = torch.tensor([3, 1, 1, 0], device=device)
    loss(model(y)).backward()
    norms = observer.statistics().sample_norms_sq
    assert_close(norms, per_sample(model, loss, y).norms_sq)
    model(torch.arange(5, device=device))  # known by now


def test_positions_without_a_module_around_them() -> None:
    layer = nn.Embedding(6, 4)
    ak.observe(layer)
    with pytest.raises(ValueError, match=r"positions\.expand\(samples, -1\).*unsqueeze\(1\)"):
        layer(torch.arange(5))


def test_one_token_for_each_sample_and_then_another_number(device: torch.device) -> None:
    class Both(Factors):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.users(x[:2, 0]).sum()

    model = Both().to(device)
    ak.observe(model)
    with pytest.raises(ValueError, match=r"'users': 2 indices for 6 samples.*unsqueeze\(1\)"):
        model(torch.tensor([[3, 1], [0, 2], [5, 5], [1, 1], [7, 0], [2, 2]], device=device))


@pytest.mark.parametrize("samples", [1, 5])
def test_recommenders(samples: int, device: torch.device) -> None:
    model = Factors().to(device).double()
    x = torch.randint(11, (samples, 2), device=device)
    x[-1] = 0  # not in order
    observer = ak.observe(model, coordinates=True, inner_products=True)
    assert_close(measured(model, x, observer), per_sample(model, loss, x).norms_sq)
    s = observer.statistics()
    truth = per_sample(model, loss, x)
    assert_close(s.inner_products, truth.inner_products)
