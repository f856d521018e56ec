"""torch.amp.GradScaler: the scale cancels, an overflow changes nothing."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from criteria_cases import EVERY_CRITERION
from torch import nn
from torch.utils.data import TensorDataset
from training import (
    Batch,
    all_optimizers,
    assert_unchanged,
    batches,
    diagonal,
    mse,
    network,
    snapshot,
    train,
    weights,
)

import adagrad_kernels as ak

OPTIONS = {"criterion": ak.NormTest(0.7), "batch_size": 8, "max_batch_size": 8}


def scaled_step(scaler: torch.amp.GradScaler, model: nn.Module, opt: Any, data: list[Any]) -> None:
    for batch in data:
        scaler.scale(mse(model, batch)).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()


def scaler(
    init_scale: float = 1024.0, interval: int = 1000, device: str = "cpu"
) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(device, init_scale=init_scale, growth_interval=interval)


def batches_on(device: torch.device, number: int, size: int) -> list[Batch]:
    return [(x.to(device), y.to(device)) for x, y in batches(number, size, torch.float32)]


@all_optimizers
@pytest.mark.parametrize("micro", [8, 4])
def test_the_scale_cancels(device: torch.device, make: Callable[..., Any], micro: int) -> None:
    plain, scaled = (network(torch.float32).to(device) for _ in range(2))
    opts = [make(model, **OPTIONS) for model in (plain, scaled)]
    data = batches_on(device, 20, micro)
    train(plain, opts[0], data)
    scaled_step(scaler(device=device.type), scaled, opts[1], data)
    assert torch.equal(weights(scaled), weights(plain)), "a power of two is exact"
    assert opts[1].decision == opts[0].decision
    a, b = (opt.statistics for opt in opts)
    assert (b.sum_norms_sq, b.mean_norm_sq) == (a.sum_norms_sq, a.mean_norm_sq)
    assert torch.equal(b.sample_norms_sq, a.sample_norms_sq)


@pytest.mark.parametrize("name", EVERY_CRITERION)
def test_the_scale_cancels_in_every_test(name: str) -> None:
    """The loss that `CABS` is told is the one before scaling."""
    decisions = []
    for scale in (None, scaler()):
        model = network(torch.float32)
        opt = diagonal(model, criterion=EVERY_CRITERION[name](), batch_size=8, max_batch_size=8)
        for batch in batches(20, 4, torch.float32):
            loss = mse(model, batch)
            if scale is None:
                loss.backward()
                opt.step(loss=loss)
            else:
                scale.scale(loss).backward()
                scale.step(opt, loss=loss)
                scale.update()
            opt.zero_grad()
        decisions.append(opt.decision)
    assert decisions[0].tested
    assert decisions[1] == decisions[0], "a power of two is exact"


@all_optimizers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_loss_scale(make: Callable[..., Any], dtype: torch.dtype) -> None:
    """Batches grow; in bfloat16, which the scale does not move out of its range, bit for bit."""
    runs = []
    for scale in (scaler(init_scale=256.0), torch.amp.GradScaler("cpu", enabled=False)):
        model = network(torch.float32)
        opt = make(model, criterion=ak.NormTest(0.7), batch_size=8, max_batch_size=64)
        x, y = (torch.cat(t) for t in zip(*batches(40, 8, torch.float32), strict=True))
        loader = ak.AdaptiveDataLoader(TensorDataset(x, y), opt, max_micro_batch_size=16)
        sizes = []
        for _ in range(2):
            for part in loader:
                with torch.autocast("cpu", dtype=dtype):
                    loss = mse(model, part)
                scale.scale(loss).backward()
                scale.step(opt)
                scale.update()
                opt.zero_grad()
                if opt.updated:
                    sizes.append(opt.statistics.batch_size)
        assert sizes[0] == 8
        assert sizes[-1] > 16
        runs.append((sizes, weights(model)))
    if dtype == torch.bfloat16:
        assert runs[0][0] == runs[1][0]
        assert torch.equal(runs[0][1], runs[1][1])


@all_optimizers
def test_an_overflow_changes_nothing(device: torch.device, make: Callable[..., Any]) -> None:
    """Nor does it shift what is accumulated: the rest of its batch is left out with it."""
    model = network(torch.float32).to(device)
    opt = make(model, **OPTIONS)
    inner = getattr(opt, "optimizer", opt)
    data = batches_on(device, 6, 4)
    scale = scaler(device=device.type)
    scaled_step(scale, model, opt, data[:2])
    before, controller = snapshot(model, inner), copy.deepcopy(opt.state_dict()["adaptive"])
    x, y = data[2]
    scaled_step(scale, model, opt, [(x * float("inf"), y), data[3]])
    assert_unchanged(model, inner, before)
    assert opt.state_dict()["adaptive"] == controller
    assert not opt.updated
    scaled_step(scale, model, opt, data[4:])
    assert opt.updated
    assert opt.samples == 16
    assert torch.isfinite(weights(model)).all()


@all_optimizers
def test_a_scale_that_grows_in_the_middle_of_a_batch(
    make: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = network(torch.float32)
    opt = make(model, **OPTIONS)
    scaled_step(scaler(interval=3), model, opt, batches(6, 4, torch.float32))
    assert "the loss scale changed in the middle" in caplog.text
    assert opt.samples == 16, "two of three batches"
    assert torch.isfinite(weights(model)).all()


@all_optimizers
def test_unscaled_by_hand(make: Callable[..., Any]) -> None:
    model = network(torch.float32)
    opt, scale = make(model, **OPTIONS), scaler()
    scale.scale(mse(model, batches(1, 8, torch.float32)[0])).backward()
    scale.unscale_(opt)
    with pytest.raises(RuntimeError, match=r"scaler.unscale_\(\) was called"):
        scale.step(opt)
