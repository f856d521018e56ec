"""AdaptiveBatch: any torch optimizer, the same trajectory, the same statistics as AdAdaGrad."""

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import nn
from training import batches, mse, network, resumed, train, weights

import adagrad_kernels as ak

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.9, 0.95)),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


@every_optimizer
def test_the_inner_trajectory(make: Callable[..., torch.optim.Optimizer]) -> None:
    ours, theirs = network(), network()
    opt = ak.AdaptiveBatch(ours, make(ours.parameters()), batch_size=8, max_batch_size=8)
    train(ours, opt, batches(50, 8))
    train(theirs, make(theirs.parameters()), batches(50, 8))
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-10, atol=1e-12)


@every_optimizer
def test_micro_batches_are_averaged(make: Callable[..., torch.optim.Optimizer]) -> None:
    whole, split = network(), network()
    opts = [
        ak.AdaptiveBatch(m, make(m.parameters()), batch_size=12, max_batch_size=12)
        for m in (whole, split)
    ]
    data = batches(10, 12)
    train(whole, opts[0], data)
    pieces = [piece for x, y in data for piece in zip(x.split(4), y.split(4), strict=True)]
    train(split, opts[1], pieces)
    torch.testing.assert_close(weights(split), weights(whole), rtol=1e-9, atol=1e-10)
    a, b = (o.statistics for o in opts)
    assert b.variance == pytest.approx(a.variance, rel=1e-9)
    assert b.mean_norm_sq == pytest.approx(a.mean_norm_sq, rel=1e-9)


def test_the_statistics_tell_the_learning_rate_of_the_step() -> None:
    """With the policy's factor, as CABS must compare with it."""
    model = network()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"batch_size": 4, "max_batch_size": 16, "lr_policy": "linear"}
    opt = ak.AdaptiveBatch(model, inner, ak.NormTest(1e-3), **options)
    before = weights(model)
    for size, lr in ((4, 0.1), (16, 0.4)):
        mse(model, batches(1, size)[0]).backward()
        grad = torch.cat([p.grad.flatten() for p in model.parameters()])
        opt.step()
        assert opt.statistics.lr == pytest.approx(lr)
        torch.testing.assert_close(weights(model), before - lr * grad)
        before = weights(model)
        opt.zero_grad()


def test_the_same_batch_sizes_as_adadagrad() -> None:
    ours, wrapped = network(), network()
    options = {"criterion": ak.NormTest(0.5), "batch_size": 4, "max_batch_size": 64}
    opt = ak.AdAdaGrad(ours, lr=0.1, **options)
    other = ak.AdaptiveBatch(wrapped, torch.optim.Adagrad(wrapped.parameters(), lr=0.1), **options)
    sizes: tuple[list[int], list[int]] = [], []
    for model, o, found in ((ours, opt, sizes[0]), (wrapped, other, sizes[1])):
        for k in range(12):
            mse(model, batches(k + 1, o.batch_size)[-1]).backward()
            o.step()
            o.zero_grad()
            found.append(o.batch_size)
    assert sizes[0] == sizes[1]
    assert sizes[0][-1] > 4
    torch.testing.assert_close(weights(wrapped), weights(ours), rtol=1e-9, atol=1e-10)


def test_state_dict_continues_bit_for_bit() -> None:
    data = batches(20, 8)

    def fresh() -> tuple[nn.Module, ak.AdaptiveBatch]:
        model = network()
        inner = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, ak.AdaptiveBatch(model, inner, batch_size=4, max_batch_size=8)

    _, opt, _, opt2 = resumed(fresh, data)
    assert opt2.batch_size == opt.batch_size
    assert opt2.samples == opt.samples


def test_unfrozen_parameters_join_the_inner_optimizer() -> None:
    model = network()
    model[0].requires_grad_(False)
    sgd = torch.optim.SGD(model[2].parameters(), lr=0.1)
    opt = ak.AdaptiveBatch(model, sgd, batch_size=8, max_batch_size=8)
    data = batches(6, 8)
    train(model, opt, data[:3])
    model[0].requires_grad_(True)
    mse(model, data[3]).backward()
    with pytest.raises(RuntimeError, match=r"'0.weight' has a gradient but is in none"):
        opt.step()
    opt.zero_grad()
    sgd.add_param_group({"params": list(model[0].parameters()), "lr": 0.01})
    before = model[0].weight.clone()
    mse(model, data[4]).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    opt.step()
    torch.testing.assert_close(model[0].weight, before - 0.01 * grads[0])
    norm_sq = torch.cat([g.flatten() for g in grads]).square().sum()
    torch.testing.assert_close(opt.statistics.grad_norm_sq, norm_sq)


def test_the_inner_optimizer_takes_schedulers() -> None:
    model = network()
    opt = ak.AdaptiveBatch(model, torch.optim.SGD(model.parameters(), lr=0.1))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt.optimizer, gamma=0.5)
    train(model, opt, batches(3, 8), after=scheduler.step)
    assert opt.param_groups[0]["lr"] == pytest.approx(0.1 / 8)
