"""Bags of embeddings: torch's own values, and each bag a sample."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import adagrad_kernels as ak

LENGTHS = (3, 0, 1, 5)
OPTIONS: list[dict[str, Any]] = [
    {"mode": "sum"}, {"mode": "mean"}, {"mode": "max"}, {"mode": "mean", "padding_idx": 2},
    {"mode": "sum", "padding_idx": 2}, {"mode": "max", "padding_idx": 2},
    {"mode": "sum", "include_last_offset": True}, {"mode": "sum", "max_norm": 0.5},
]  # fmt: skip


def bag(**options: Any) -> nn.EmbeddingBag:
    torch.manual_seed(0)
    return nn.EmbeddingBag(7, 4, **options).double()


def ragged(include_last_offset: bool = False) -> tuple[Tensor, Tensor]:
    """Nine tokens in four bags, one of them empty, some of them equal."""
    ends = torch.tensor((0, *LENGTHS)).cumsum(0)
    tokens = torch.tensor([2, 5, 5, 2, 0, 6, 0, 2, 1])
    return tokens, ends if include_last_offset else ends[:-1]


@pytest.mark.parametrize(
    ("options", "weighted"),
    [(o, False) for o in OPTIONS] + [(o, True) for o in OPTIONS if o["mode"] == "sum"],
    ids=str,
)
def test_bags_of_different_lengths(
    options: dict[str, Any], weighted: bool, device: torch.device
) -> None:
    plain, model = bag(**options).to(device), bag(**options).to(device)
    tokens, offsets = (t.to(device) for t in ragged(options.get("include_last_offset", False)))
    weights = torch.randn(9, dtype=torch.float64, device=device) if weighted else None
    w_1, w_2 = (None if weights is None else weights.clone().requires_grad_() for _ in range(2))
    factor = torch.randn(4, 4, dtype=torch.float64, device=device)
    observer = ak.observe(model, coordinates=True, inner_products=True)
    y = model(tokens, offsets, w_1)
    expected = plain(tokens, offsets, w_2)
    assert_close(y, expected)
    (y.sin() * factor).sum().backward()
    (expected.sin() * factor).sum().backward()
    assert_close(model.weight.grad, plain.weight.grad)
    if w_1 is not None:
        assert_close(w_1.grad, w_2.grad)
    s = observer.statistics()
    assert s.batch_size == 4
    rows = []
    for k, single in enumerate(factor):
        plain.zero_grad()
        only = torch.zeros_like(factor)
        only[k] = single
        (plain(tokens, offsets, weights).sin() * only).sum().backward()
        rows.append(4 * plain.weight.grad.flatten())
    g = torch.stack(rows)
    assert_close(s.sample_norms_sq, g.square().sum(1))
    assert_close(s.inner_products, g @ g.mean(0))
    assert_close(s.coordinate_variance["weight"].flatten(), g.var(0))


def test_arguments() -> None:
    model = bag(mode="mean")
    ak.observe(model)
    with pytest.raises(ValueError, match=r"\[b, L\], or \[n\] and offsets, got \[3\] and no"):
        model(torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=r"need mode='sum'.*got mode='mean'"):
        model(torch.ones(2, 3, dtype=torch.long), None, torch.ones(2, 3).double())


@pytest.mark.filterwarnings("ignore:<class .*Function'> should not be inst:DeprecationWarning")
def test_different_lengths_are_not_compiled() -> None:
    model = bag(mode="sum")
    ak.observe(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"cannot be compiled.*padding_idx"):
        compiled(*ragged())


def test_training_is_that_of_plain_adagrad(device: torch.device) -> None:
    model, plain = bag(mode="mean").to(device), bag(mode="mean").to(device)
    opt = ak.AdAdaGrad(model, lr=0.1, batch_size=4, max_batch_size=4)
    reference = torch.optim.Adagrad(plain.parameters(), lr=0.1)
    tokens, offsets = (t.to(device) for t in ragged())
    for _ in range(5):
        for m, o in ((model, opt), (plain, reference)):
            (m(tokens, offsets) - 1).square().mean().backward()
            o.step()
            o.zero_grad()
    assert_close(model.weight, plain.weight)


@pytest.mark.parametrize("offsets", [[1, 2], [0, 3, 2], [0, 9]])
def test_offsets_that_torch_refuses(offsets: list[int]) -> None:
    model = bag(mode="sum")
    ak.observe(model)
    with pytest.raises(ValueError, match="offsets must begin with 0"):
        model(torch.tensor([1, 2, 3, 0]), torch.tensor(offsets))
