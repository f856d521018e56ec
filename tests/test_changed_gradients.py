"""Gradients that are not what the backward passes left: noticed before anything is tested."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_processes import run
from torch import Tensor, nn
from training import Make, all_optimizers, assert_unchanged, batches, mse, network, snapshot

import adagrad_kernels as ak


def replace_all(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = p.grad * 0.1


def clip_first_layer(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model[0].parameters(), 1e-3)


def clear_first_layer(model: nn.Module) -> None:
    model[0].zero_grad()


def write_to_the_last(model: nn.Module) -> None:
    model[2].bias.grad.mul_(2)


CHANGES = [replace_all, clip_first_layer, clear_first_layer, write_to_the_last]


def optimizer(model: nn.Module, criterion: Any = None) -> ak.AdAdaGrad:
    return ak.AdAdaGrad(model, lr=0.1, criterion=criterion, batch_size=16, max_batch_size=16)


@pytest.mark.parametrize("criterion", [ak.NormTest(0.5), ak.WorkerNormTest(0.5)])
@pytest.mark.parametrize("before_step", [True, False])
@pytest.mark.parametrize("change", [*CHANGES, nn.Module.zero_grad])
def test_a_change_is_an_error(
    change: Callable[[nn.Module], None], before_step: bool, criterion: Any
) -> None:
    """Before the step, or between micro-batches; all cleared before a step has its own words."""
    model = network()
    opt = optimizer(model, criterion)
    before = snapshot(model, opt)
    first, second = batches(2, 8)
    mse(model, first).backward()
    opt.step()
    if not before_step:
        change(model)
    mse(model, second).backward()
    if before_step:
        change(model)
    message = "changed between backward" if before_step else "cleared or changed"
    if before_step and change is nn.Module.zero_grad:
        message = "cleared after backward"
    with pytest.raises(RuntimeError, match=message):
        opt.step()
    assert_unchanged(model, opt, before)


def test_other_layers_gradients_are_free_where_some_are_observed() -> None:
    model = network()
    observer = ak.observe(model, layers=["2"])
    mse(model, batches(1, 8)[0]).backward()
    clip_first_layer(model)
    assert observer.statistics().batch_size == 8
    write_to_the_last(model)
    with pytest.raises(RuntimeError, match="changed between backward"):
        observer.statistics()


@all_optimizers
def test_gradients_from_before_the_optimizer_are_not_taken_for_the_first_batch(make: Make) -> None:
    model = network()
    first, second = batches(2, 8)
    mse(model, first).backward()
    opt = make(model, batch_size=8, max_batch_size=8)
    mse(model, second).backward()
    with pytest.raises(RuntimeError, match="still hold another batch"):
        opt.step()
    opt.zero_grad()
    mse(model, second).backward()
    opt.step()
    fresh = network()
    other = make(fresh, batch_size=8, max_batch_size=8)
    mse(fresh, second).backward()
    other.step()
    assert opt.decision == other.decision


def test_gradients_of_zeros_from_before_the_optimizer_do_no_harm() -> None:
    model = network()
    mse(model, batches(1, 8)[0]).backward()
    model.zero_grad(set_to_none=False)
    opt = ak.AdAdaGrad(model, batch_size=8, max_batch_size=8)
    mse(model, batches(1, 8)[0]).backward()
    opt.step()
    assert opt.updated


class Breaks(nn.Module):
    """Its backward pass fails when told to."""

    fails = False

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(self.maybe_fail)
        return x

    def maybe_fail(self, grad: Tensor) -> None:
        if self.fails:
            raise MemoryError("as if there were none")


@pytest.mark.parametrize("aggregate", ["max", "adagrad"])
def test_a_backward_pass_that_failed_leaves_nothing_in_the_coordinates(aggregate: str) -> None:
    def model() -> nn.Sequential:
        plain = network()
        return nn.Sequential(plain[0], Breaks(), plain[2])

    criterion = ak.CoordinateNormTest(0.5, aggregate=aggregate)
    batch = batches(1, 16)[0]
    failing, smooth = model(), model()
    opt, expected = optimizer(failing, criterion), optimizer(smooth, criterion)
    failing[1].fails = True
    with pytest.raises(MemoryError):
        mse(failing, batch).backward()
    failing[1].fails = False
    opt.zero_grad()
    for net, each in ((failing, opt), (smooth, expected)):
        mse(net, batch).backward()
        each.step()
    assert opt.decision == expected.decision
    for name, variance in expected.statistics.coordinate_variance.items():
        assert torch.equal(opt.statistics.coordinate_variance[name], variance)


@all_optimizers
def test_a_graph_of_old_weights_is_an_error_as_in_torch(make: Make) -> None:
    """As in adversarial training: the loss of one model through another that was updated since."""
    generator, discriminator = nn.Linear(3, 5).double(), network()
    opt = make(discriminator, batch_size=8, max_batch_size=8)
    fake = generator(torch.randn(8, 3, dtype=torch.float64))
    with torch.enable_grad():
        old = nn.Sequential.forward(discriminator, fake).mean()
    mse(discriminator, batches(1, 8)[0]).backward()
    opt.step()
    opt.zero_grad()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        old.backward()


def test_losses_made_before_a_step_go_on_where_they_saved_no_weight() -> None:
    """As with torch's optimizer: an embedding, and a linear layer on data."""
    torch.manual_seed(0)
    indices, x = torch.randint(7, (2, 8, 1)), torch.randn(2, 8, 5)
    for layer, data in ((nn.Embedding(7, 3), indices), (nn.Linear(5, 3), x)):
        plain = copy.deepcopy(layer)
        ours = ak.AdAdaGrad(layer, lr=0.1, batch_size=8, max_batch_size=8)
        theirs = torch.optim.Adagrad(plain.parameters(), lr=0.1)
        for model, opt in ((layer, ours), (plain, theirs)):
            losses = [model(each).square().mean() for each in data]
            for loss in losses:
                loss.backward()
                opt.step()
                opt.zero_grad()
        assert ours.samples == 16
        torch.testing.assert_close(layer.weight, plain.weight)


def data_parallel(rank: int, world: int) -> dict[str, Any]:
    """What `DistributedDataParallel` writes to the gradients at the end is no change."""
    found: dict[str, Any] = {}
    for criterion in (ak.WorkerNormTest(0.5), ak.CoordinateNormTest(0.5), ak.NormTest(0.5)):
        for bucket_view in (False, True):
            torch.manual_seed(0)
            plain = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()
            model = nn.parallel.DistributedDataParallel(plain, gradient_as_bucket_view=bucket_view)
            opt = optimizer(model, criterion)
            for batch in batches(4, 8):
                mse(model, batch).backward()
                opt.step()
                opt.zero_grad()
            found[f"{criterion} {bucket_view}"] = opt.samples
    return found


def test_one_process_with_data_parallel(tmp_path: Path) -> None:
    (found,) = run(data_parallel, 1, tmp_path)
    assert set(found.values()) == {32}


def test_lazy_coordinates_are_not_those_of_later_gradients() -> None:
    model = network()
    opt = optimizer(model, ak.CoordinateNormTest(0.5, aggregate="adagrad"))
    batch = batches(1, 16)[0]
    mse(model, batch).backward()
    opt.step()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=False)
    with pytest.raises(RuntimeError, match="written to since the step"):
        opt.statistics.coordinate_mean["0.weight"]
    mse(model, batch).backward()
    opt.zero_grad(set_to_none=False)
    mse(model, batch).backward()
    opt.step()
    means = opt.statistics.coordinate_mean
    kept = {name: p.grad.clone() for name, p in model.named_parameters()}
    opt.zero_grad(set_to_none=False)
    assert all(torch.equal(means[name], kept[name]) for name in expected)
