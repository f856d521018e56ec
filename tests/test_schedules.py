"""Schedules that count samples: their shape, and that batch sizes do not change it."""

import copy
import math

import pytest
import torch
from torch.optim.lr_scheduler import SequentialLR
from training import batches, network, train

import adagrad_kernels as ak
from adagrad_kernels.schedules import CosineDecay, LinearDecay, StepDecay


def optimizer(batch_size: int = 8) -> ak.AdAdaGrad:
    return ak.AdAdaGrad(network(), lr=0.5, batch_size=batch_size, max_batch_size=batch_size)


def test_cosine_by_hand() -> None:
    schedule = CosineDecay(optimizer(), total=110, warmup=10, final_factor=0.2)
    expected = {0: 0.0, 5: 0.5, 10: 1.0, 35: 0.2 + 0.4 * (1 + math.sqrt(0.5)), 60: 0.6, 110: 0.2}
    for samples, factor in expected.items():
        assert schedule.factor(samples) == pytest.approx(factor, abs=1e-12)
    assert schedule.factor(10**9) == pytest.approx(0.2)


def test_linear_and_step_by_hand() -> None:
    linear = LinearDecay(optimizer(), total=100)
    assert [linear.factor(s) for s in (0, 25, 100, 101)] == [1.0, 0.75, 0.0, 0.0]
    step = StepDecay(optimizer(), milestones=[10, 20], gamma=0.1)
    found = [step.factor(s) for s in (9, 10, 19, 20, 99)]
    assert found == pytest.approx([1.0, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("batch_size", [4, 8, 40])
def test_the_rate_follows_samples_not_steps(batch_size: int) -> None:
    opt = optimizer(batch_size)
    schedule = CosineDecay(opt, total=400, warmup=80)
    rates = {}

    def after() -> None:
        schedule.step()
        rates[opt.samples] = opt.param_groups[0]["lr"]

    train(opt.cycle.observer.model, opt, batches(200 // batch_size, batch_size), after)
    for samples in (40, 80, 200):
        assert rates[samples] == pytest.approx(0.5 * schedule.factor(samples))
    assert rates[40] == pytest.approx(0.25)


def test_nothing_changes_while_a_batch_is_accumulated() -> None:
    opt = optimizer(8)
    schedule = LinearDecay(opt, total=100)
    rates: list[float] = []

    def after() -> None:
        schedule.step()
        rates.append(opt.param_groups[0]["lr"])

    train(opt.cycle.observer.model, opt, batches(4, 4), after)
    assert rates == pytest.approx([0.5, 0.46, 0.46, 0.42])


def test_around_any_optimizer() -> None:
    model = network()
    sgd = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 1.0}, {"params": model[2].parameters()}], lr=0.1
    )
    opt = ak.AdaptiveBatch(model, sgd, batch_size=8, max_batch_size=8)
    schedule = LinearDecay(opt, total=32)
    train(model, opt, batches(2, 8), schedule.step)
    assert schedule.get_last_lr() == pytest.approx([0.5, 0.05])


def test_in_sequential_lr() -> None:
    opt = optimizer(8)
    parts = [LinearDecay(opt, total=80), StepDecay(opt, milestones=[24], gamma=0.5)]
    schedule = SequentialLR(opt, parts, milestones=[2])
    train(opt.cycle.observer.model, opt, batches(1, 8), schedule.step)
    assert opt.param_groups[0]["lr"] == pytest.approx(0.5 * 0.9)
    train(opt.cycle.observer.model, opt, batches(2, 8), schedule.step)
    assert opt.param_groups[0]["lr"] == pytest.approx(0.5 * 0.5)


def test_state_dict_resumes() -> None:
    first, second = optimizer(8), optimizer(8)
    schedules = CosineDecay(first, total=100), CosineDecay(second, total=100)
    train(first.cycle.observer.model, first, batches(5, 8), schedules[0].step)
    state = copy.deepcopy(schedules[0].state_dict())
    second.load_state_dict(first.state_dict())
    schedules[1].load_state_dict(state)
    for opt, schedule in zip((first, second), schedules, strict=True):
        train(opt.cycle.observer.model, opt, batches(1, 8), schedule.step)
    assert second.param_groups[0]["lr"] == first.param_groups[0]["lr"] < 0.5
    assert second.samples == 48


def test_errors() -> None:
    with pytest.raises(TypeError, match="SGD, which does not count samples"):
        CosineDecay(torch.optim.SGD(network().parameters()), total=10)
    with pytest.raises(ValueError, match=r"CosineDecay: warmup must lie in \[0, total\)"):
        CosineDecay(optimizer(), total=10, warmup=10)
    with pytest.raises(ValueError, match="LinearDecay: final_factor"):
        LinearDecay(optimizer(), total=10, final_factor=-0.1)
    with pytest.raises(ValueError, match="milestones must increase"):
        StepDecay(optimizer(), milestones=[20, 10])
