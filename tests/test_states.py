"""States of the optimizers where torch's own can do it: hooks, old versions, changed layouts."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from training import (
    Make,
    accumulators,
    assert_unchanged,
    batches,
    mse,
    network,
    own_optimizers,
    snapshot,
    train,
    weights,
)

import adagrad_kernels as ak

FIXED = {"batch_size": 8, "max_batch_size": 8}


def trained(make: Make) -> tuple[nn.Module, Any]:
    model = network()
    opt = make(model, **FIXED)
    train(model, opt, batches(3, 8))
    return model, opt


@own_optimizers
def test_load_hooks_see_and_change_what_is_loaded(make: Make) -> None:
    _, opt = trained(make)
    state = opt.state_dict()
    other = make(network(), **FIXED)

    def quadruple(_: object, state: dict[str, Any]) -> dict[str, Any]:
        state = copy.deepcopy(state)
        for each in state["state"].values():
            each["sum"] = each["sum"] * 4  # one tensor for all with a single accumulator
        return state

    other.register_load_state_dict_pre_hook(quadruple)
    other.load_state_dict(state)
    assert torch.equal(accumulators(other), 4 * accumulators(opt))

    def clear(optimizer: torch.optim.Optimizer) -> None:
        for each in optimizer.state.values():
            each["sum"].zero_()

    other.register_load_state_dict_post_hook(clear)
    other.load_state_dict(state)
    assert not accumulators(other).any()


@own_optimizers
def test_state_hooks_see_the_whole_state(make: Make) -> None:
    _, opt = trained(make)

    def only_torch(_: object, state: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in state.items() if key != "adaptive"}

    opt.register_state_dict_post_hook(only_torch)
    assert opt.state_dict().keys() == {"state", "param_groups"}


def test_a_state_of_an_older_torch_goes_on() -> None:
    """Whose steps are Python numbers, and whose groups lack later options."""
    model = network()
    theirs = torch.optim.Adagrad(model.parameters(), lr=0.1)
    train(model, theirs, batches(2, 8))
    state = copy.deepcopy(theirs.state_dict())
    for each in state["state"].values():
        each["step"] = int(each["step"])
    for group in state["param_groups"]:
        for option in ("foreach", "maximize", "differentiable", "fused"):
            del group[option]
    other = copy.deepcopy(model)
    opt = ak.AdAdaGrad(other, **FIXED)
    opt.load_state_dict(state)
    for net, each in ((model, theirs), (other, opt)):
        train(net, each, batches(2, 8))
    torch.testing.assert_close(weights(other), weights(model), rtol=1e-12, atol=0)
    assert opt.state[other[0].weight]["step"] == 4


@own_optimizers
def test_a_layout_that_changes_after_the_optimizer_was_made(make: Make) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 4 * 4, 2)).double()
    opt = make(model, **FIXED)
    other = copy.deepcopy(model)
    expected = make(other, **FIXED)
    x = torch.randn(8, 3, 6, 6, dtype=torch.float64)
    for step in range(3):
        if step == 1:
            model.to(memory_format=torch.channels_last)
            assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
        for net, each in ((model, opt), (other, expected)):
            net(x).square().mean().backward()
            each.step()
            each.zero_grad()
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(accumulators(opt), accumulators(expected), rtol=1e-12, atol=1e-15)


def test_an_error_in_one_group_changes_none() -> None:
    class Mixed(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self[2](self[1](self[0](x)).to(self[2].weight.dtype))

    model = Mixed(*network())
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.3}]
    opt = ak.AdAdaGrad(model, params=groups, **FIXED)
    model[2].float()
    before = snapshot(model, opt)
    x, y = batches(1, 8)[0]
    (model(x) - y).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"'2.weight' is torch.float32 on cpu now"):
        opt.step()
    assert_unchanged(model, opt, before)


def test_a_wrapped_optimizers_state_loads_as_a_whole_or_not_at_all() -> None:
    def make(lr: float, cap: int) -> ak.AdaptiveBatch:
        model = network()
        inner = torch.optim.Adam(model.parameters(), lr=lr)
        return ak.AdaptiveBatch(model, inner, batch_size=8, max_batch_size=cap)

    large, small = make(0.001, 64), make(0.5, 16)
    large.controller.batch_size = 64
    with pytest.raises(ValueError, match="larger than max_batch_size"):
        small.load_state_dict(large.state_dict())
    assert small.param_groups[0]["lr"] == 0.5
    two = torch.nn.Sequential(network())
    groups = [{"params": two[0][0].parameters()}, {"params": two[0][2].parameters()}]
    other = ak.AdaptiveBatch(two, torch.optim.Adam(groups), batch_size=8, max_batch_size=64)
    other.controller.batch_size = 32
    with pytest.raises(ValueError, match="parameter group"):
        large.load_state_dict(other.state_dict())
    assert large.batch_size == 64
    model = large.cycle.observer.model
    first, second = batches(2, 32)
    for batch in (first, second):  # also in the middle of a batch
        mse(model, batch).backward()
        large.step()
        with pytest.raises(ValueError, match="parameter group"):
            large.load_state_dict(other.state_dict())
    assert large.updated


def test_averages_of_another_criterion_are_refused() -> None:
    def make(criterion: Any) -> ak.AdAdaGrad:
        model = network()
        opt = ak.AdAdaGrad(model, criterion=ak.Averaged(criterion), **FIXED)
        train(model, opt, batches(2, 8))
        return opt

    state = make(ak.NormTest(0.5)).state_dict()
    make(ak.NormTest(0.2)).load_state_dict(state)  # the bound is no part of the averages
    for other in (
        ak.InnerProductTest(0.5),
        ak.NormTest(0.5, debiased=True),
        ak.CoordinateNormTest(0.5),
    ):
        opt = make(other)
        before = opt.cycle.criterion.state_dict()
        with pytest.raises(ValueError, match="averages are those of NormTest"):
            opt.load_state_dict(state)
        assert repr(opt.cycle.criterion.state_dict()) == repr(before)
    with pytest.raises(ValueError, match="not of CoordinateNormTest"):
        make(ak.CoordinateNormTest(0.5, aggregate="adagrad")).load_state_dict(
            make(ak.CoordinateNormTest(0.5)).state_dict()
        )


def test_statistics_of_coordinates_can_be_pickled() -> None:
    model = network()
    opt = ak.AdAdaGrad(model, criterion=ak.CoordinateNormTest(0.5, aggregate="adagrad"), **FIXED)
    mse(model, batches(1, 8)[0]).backward()
    opt.step()
    found = pickle.loads(pickle.dumps(opt.statistics))
    assert found.variance == opt.statistics.variance
    for name, variance in opt.statistics.coordinate_variance.items():
        assert torch.equal(found.coordinate_variance[name], variance)


class Suggests:
    """A criterion of a user's own."""

    needs: frozenset[str] = frozenset()

    def __init__(self, suggestion: Any) -> None:
        self.suggestion = suggestion

    def evaluate(self, statistics: ak.GradientStatistics) -> Any:
        return self.suggestion


def test_own_criteria_may_suggest_fractions() -> None:
    model = network()
    criterion = Suggests(ak.Decision(False, 11.2, 1.4))  # type: ignore[arg-type]
    opt = ak.AdAdaGrad(model, criterion=criterion, batch_size=8, max_batch_size=16)
    train(model, opt, batches(1, 8))
    assert opt.batch_size == 12
    assert opt.decision.batch_size == 12


@pytest.mark.parametrize("wrong", [None, 12, ak.Decision(False, math.nan, 1.0)])  # type: ignore[arg-type]
def test_other_results_of_own_criteria_are_named(wrong: Any) -> None:
    model = network()
    opt = ak.AdAdaGrad(model, criterion=Suggests(wrong), batch_size=8, max_batch_size=16)
    mse(model, batches(1, 8)[0]).backward()
    with pytest.raises(TypeError, match=r"Suggests.* must return a Decision"):
        opt.step()
