"""Known architectures trained end to end by AdAdaGrad, with batches that grow."""

import copy
from typing import NamedTuple

import pytest
import torch
from models import CASES, Case, cross_entropy
from test_observer import assert_statistics
from torch import Tensor, nn
from training import weights

import adagrad_kernels as ak

UPDATES = 15
OPTIONS = {"lr": 0.02, "initial_accumulator_value": 1e-2}

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """These tensors are too small for more."""
    torch.set_num_threads(1)


class Update(NamedTuple):
    """What went into an update, and what was measured on the way."""

    model: nn.Module  # before it
    micro_batches: list[tuple[Tensor, Tensor]]
    statistics: ak.GradientStatistics | None


def run(case: Case, dtype: torch.dtype) -> tuple[nn.Module, list[Update]]:
    """The trained model and all updates."""
    torch.manual_seed(0)
    model = case.make().to(dtype)
    opt = ak.AdAdaGrad(
        model, criterion=ak.NormTest(0.6), batch_size=4, max_batch_size=32, **OPTIONS
    )
    loader = ak.AdaptiveDataLoader(case.data(), opt, max_micro_batch_size=16)
    updates: list[Update] = []
    before, micro_batches = copy.deepcopy(model), []
    while True:
        for x, y in loader:
            x = x.to(dtype) if x.is_floating_point() else x
            micro_batches.append((x, y))
            cross_entropy(model(x), y).backward()
            opt.step()
            opt.zero_grad()
            if opt.updated:
                updates.append(Update(before, micro_batches, opt.statistics))
                before, micro_batches = copy.deepcopy(model), []
            if len(updates) == UPDATES:
                return model, updates


def mean_loss(model: nn.Module, case: Case) -> float:
    x, y = case.data().tensors
    with torch.no_grad():
        return cross_entropy(model(x), y).item()


@every_case
def test_learns_with_growing_batches(case: Case) -> None:
    model, updates = run(case, torch.float32)
    sizes = [sum(len(x) for x, _ in update.micro_batches) for update in updates]
    assert sizes == sorted(sizes)
    assert sizes[0] == 4 < sizes[-1]
    assert mean_loss(model, case) < 0.9 * mean_loss(updates[0].model, case)
    for update, size in zip(updates, sizes, strict=True):
        assert update.statistics is not None
        assert update.statistics.batch_size == size
        assert update.statistics.variance_trace > 0


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=name) for name, c in CASES.items() if c.independent]
)
def test_statistics_of_a_step(case: Case) -> None:
    """The first step, and one with several micro-batches after the weights have moved."""
    _, updates = run(case, torch.float32)
    accumulated = next(u for u in updates if len(u.micro_batches) > 1)
    for update in (updates[0], accumulated):
        x, y = (torch.cat(parts) for parts in zip(*update.micro_batches, strict=True))
        assert update.statistics is not None
        assert_statistics(update.statistics, update.model, cross_entropy, x, y)


@every_case
def test_follows_torch_adagrad_on_the_same_batches(case: Case) -> None:
    model, updates = run(case, torch.float64)
    theirs = copy.deepcopy(updates[0].model)
    opt = torch.optim.Adagrad(theirs.parameters(), **OPTIONS)
    for update in updates:
        for x, y in update.micro_batches:
            (cross_entropy(theirs(x), y) / len(update.micro_batches)).backward()
        opt.step()
        opt.zero_grad()
    torch.testing.assert_close(weights(model), weights(theirs), rtol=1e-8, atol=1e-10)
    for ours, buffer in zip(model.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(ours, buffer, rtol=1e-8, atol=1e-10)
