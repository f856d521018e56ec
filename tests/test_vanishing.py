"""Gradients whose squares float32 cannot hold: said; no reason for an error or a large batch."""

import logging

import pytest
import torch
from torch import nn

import adagrad_kernels as ak


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def decision(
    criterion: ak.NormTest | ak.CoordinateNormTest, scale: float, dtype: torch.dtype
) -> ak.Decision:
    net = model(dtype)
    opt = ak.AdAdaGrad(net, criterion=criterion, batch_size=64, max_batch_size=64)
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (net(x.to(dtype)).square().mean() * scale).backward()
    opt.step()
    assert opt.updated
    found = opt.decision
    assert found is not None
    return found


@pytest.mark.parametrize("scale", [1e-17, 1e-20, 1e-21, 1e-24])
@pytest.mark.parametrize(
    "criterion",
    [
        ak.NormTest(0.05),
        ak.CoordinateNormTest(0.5, aggregate="max"),
        ak.CoordinateNormTest(0.5, aggregate="quantile"),
    ],
)
def test_nothing_is_decided(
    criterion: ak.NormTest, scale: float, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "adagrad_kernels"):
        found = decision(criterion, scale, torch.float32)
    assert found.batch_size == 64
    if scale < 1e-23:  # ḡ² is 0, too: as at a minimum
        assert found.passed
    else:
        assert not found.tested
        assert "too small for float32" in caplog.text


@pytest.mark.parametrize("scale", [1e-10, 1e-13])
def test_small_gradients_are_tested_like_others(scale: float) -> None:
    expected = decision(ak.NormTest(0.05), 1.0, torch.float32)
    found = decision(ak.NormTest(0.05), scale, torch.float32)
    assert found.ratio == pytest.approx(expected.ratio, rel=1e-4)


def test_float64_holds_them() -> None:
    expected = decision(ak.NormTest(0.05), 1.0, torch.float64)
    found = decision(ak.NormTest(0.05), 1e-24, torch.float64)
    assert found.ratio == pytest.approx(expected.ratio, rel=1e-9)
