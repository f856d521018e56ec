"""Every wrong use of the optimizers: a clear error before anything has changed, or what is said."""

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import (
    Make,
    all_optimizers,
    assert_unchanged,
    batches,
    diagonal,
    mse,
    network,
    own_optimizers,
    scalar,
    snapshot,
    train,
    weights,
    wrapped,
)

import adagrad_kernels as ak


def inner(opt: Any) -> torch.optim.Optimizer:
    return opt.optimizer if isinstance(opt, ak.AdaptiveBatch) else opt


class UsesWeightOutside(nn.Module):
    """Its first layer's weight also gets a gradient that no layer call measures."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.unseen = nn.Linear(5, 2), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.seen(x) + nn.functional.linear(x, self.unseen.weight)


class FoldsSamples(nn.Module):
    """Its second layer takes for samples what are positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).view(-1, 3)).view(x.shape[0], 2, 2).sum(1)


@all_optimizers
@pytest.mark.parametrize(
    ("model", "message"),
    [(UsesWeightOutside, r"no statistics.*'unseen.weight'"), (FoldsSamples, "disagree.*'second'")],
)
def test_a_faulty_measurement_changes_nothing(
    make: Make, model: Callable[[], nn.Module], message: str
) -> None:
    network = model().double()
    opt = make(network, batch_size=8, max_batch_size=8)
    before = snapshot(network, inner(opt))
    mse(network, batches(1, 8)[0]).backward()
    with pytest.raises(RuntimeError, match=message):
        opt.step()
    assert_unchanged(network, inner(opt), before)
    assert not opt.updated
    assert opt.samples == 0


@all_optimizers
def test_a_fault_does_not_break_what_follows(make: Make) -> None:
    """zero_grad() and on with the next batch, as if there had been none."""
    bad, good = network(), network()
    opt, expected = (make(m, batch_size=8, max_batch_size=8) for m in (bad, good))
    mse(bad, batches(1, 4)[0]).backward()
    opt.step()
    mse(bad, batches(1, 3)[0]).backward()
    with pytest.raises(RuntimeError, match="micro-batches of 4 and 3 samples"):
        opt.step()
    opt.zero_grad()
    for model, o in ((bad, opt), (good, expected)):
        train(model, o, batches(5, 8))
    assert torch.equal(weights(bad), weights(good))


@all_optimizers
def test_micro_batches_of_different_sizes(make: Make) -> None:
    model = network()
    opt = make(model, batch_size=8, max_batch_size=8)
    before = snapshot(model, inner(opt))
    mse(model, batches(1, 4)[0]).backward()
    opt.step()
    mse(model, batches(1, 6)[0]).backward()
    with pytest.raises(RuntimeError, match=r"micro-batches of 4 and 6 samples in one batch of 8"):
        opt.step()
    assert_unchanged(model, inner(opt), before)


@all_optimizers
@pytest.mark.parametrize("criterion", ["norm", ak.NormTest, 0.1])
def test_what_is_no_criterion(make: Make, criterion: Any) -> None:
    with pytest.raises(TypeError, match=r"criterion must be one such as NormTest\(0\.1\)"):
        make(network(), criterion=criterion)


@all_optimizers
def test_unknown_arguments(make: Make) -> None:
    with pytest.raises(TypeError, match="unexpected argument 'fallbak'; there are growth_limit"):
        make(network(), fallbak="vmap")


def test_another_dtype_under_the_optimizer() -> None:
    model = network()
    opt = diagonal(model, batch_size=8)
    model.float()
    with pytest.raises(RuntimeError, match=r"is torch\.float32 on cpu now, its accumulator"):
        train(model, opt, [tuple(t.float() for t in batches(1, 8)[0])])


def test_the_same_warning_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    opt = diagonal(model, criterion=ak.WorkerNormTest(0.1), batch_size=8)
    with caplog.at_level(logging.WARNING, "adagrad_kernels"):
        train(model, opt, batches(3, 8))
    assert caplog.text.count("the batch size stays at 8") == 1
    assert "max_micro_batch_size" in caplog.text


@all_optimizers
def test_step_without_backward(make: Make) -> None:
    model = network()
    opt = make(model, batch_size=8, max_batch_size=8)
    with pytest.raises(RuntimeError, match="no backward pass"):
        opt.step()
    mse(model, batches(1, 4)[0]).backward()
    opt.step()
    with pytest.raises(RuntimeError, match="no backward pass"):
        opt.step()
    mse(model, batches(1, 4)[0]).backward()
    opt.step()  # the first half was not lost
    assert opt.updated
    assert opt.statistics.batch_size == 8


@all_optimizers
def test_step_without_gradients(make: Make) -> None:
    model = network()
    opt = make(model, batch_size=8, max_batch_size=8)
    mse(model, batches(1, 8)[0]).backward()
    model.zero_grad()
    with pytest.raises(RuntimeError, match="cleared after backward"):
        opt.step()


@all_optimizers
def test_an_incomplete_batch_changes_nothing(make: Make) -> None:
    model = network()
    opt = make(model, batch_size=8, max_batch_size=8)
    before = snapshot(model, inner(opt))
    mse(model, batches(1, 4)[0]).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    opt.step()
    opt.zero_grad()
    assert_unchanged(model, inner(opt), before)
    assert not opt.updated
    assert opt.decision is None
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(p.grad, gradient)


@all_optimizers
def test_zero_grad_forgotten(make: Make) -> None:
    model = network()
    opt = make(model, batch_size=8, max_batch_size=8)
    first, second = batches(2, 8)
    mse(model, first).backward()
    opt.step()
    before = snapshot(model, inner(opt))
    mse(model, second).backward()
    with pytest.raises(RuntimeError, match=r"call opt.zero_grad\(\) after opt.step\(\)"):
        opt.step()
    assert_unchanged(model, inner(opt), before)
    opt.zero_grad()
    mse(model, second).backward()
    opt.step()
    assert opt.statistics.batch_size == 8, "the refused backward pass was counted"


@all_optimizers
def test_a_backward_pass_that_step_was_not_told_of(make: Make) -> None:
    """A loss that is thrown away with its gradients, as GradScaler does, leaves no statistics."""
    model = network()
    opt = make(model, batch_size=8, max_batch_size=8)
    thrown, kept = batches(2, 8)
    mse(model, thrown).backward()
    opt.zero_grad()
    mse(model, kept).backward()
    opt.step()
    assert opt.statistics.batch_size == 8


@all_optimizers
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zeroed_by_the_model(make: Make, set_to_none: bool) -> None:
    model = network()
    opt = make(model, batch_size=8, max_batch_size=8)
    for batch in batches(3, 8):
        mse(model, batch).backward()
        opt.step()
        if set_to_none:
            model.zero_grad()
        else:
            opt.zero_grad(set_to_none=False)
    assert opt.samples == 24


@all_optimizers
def test_a_loss_that_is_not_finite(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    opt = make(model, criterion=ak.NormTest(0.01), batch_size=8, max_batch_size=64)
    x, y = batches(1, 8)[0]
    with caplog.at_level(logging.WARNING, "adagrad_kernels"):
        mse(model, (x * float("nan"), y)).backward()
        opt.step()
    assert "the batch size stays at 8" in caplog.text
    assert "not finite" in caplog.text
    assert opt.batch_size == 8
    assert opt.decision.passed
    assert not opt.decision.tested


@all_optimizers
def test_a_batch_of_one_never_grows(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    with caplog.at_level(logging.WARNING, "adagrad_kernels"):
        opt = make(model, criterion=ak.NormTest(0.01), batch_size=1, max_batch_size=64)
    assert "never grows" in caplog.text
    caplog.clear()
    train(model, opt, batches(3, 1))
    assert opt.batch_size == 1
    assert not opt.decision.tested
    assert torch.isfinite(weights(model)).all()
    assert not caplog.text


@all_optimizers
def test_a_batch_that_is_larger_than_asked_for(make: Make) -> None:
    """It is tested as what it is; where it passes, the batch size stays."""
    model = network()
    opt = make(model, criterion=ak.NormTest(100.0), batch_size=4, max_batch_size=64)
    train(model, opt, batches(2, 16))
    assert opt.decision.passed
    assert opt.statistics.batch_size == 16
    assert opt.batch_size == 4
    assert opt.samples == 32


@all_optimizers
def test_unfrozen_but_not_added(make: Make) -> None:
    model = network()
    model[0].requires_grad_(False)
    opt = make(model, batch_size=8, max_batch_size=8)
    model[0].requires_grad_(True)
    before = snapshot(model, inner(opt))
    mse(model, batches(1, 8)[0]).backward()
    with pytest.raises(RuntimeError, match=r"'0.weight' has a gradient but is in none"):
        opt.step()
    assert_unchanged(model, inner(opt), before)


@all_optimizers
def test_sparse_gradients_are_refused_by_name(make: Make) -> None:
    model = network()
    opt = make(model, batch_size=8, max_batch_size=8)
    before = snapshot(model, inner(opt))

    def to_sparse(p: torch.Tensor) -> None:
        p.grad = p.grad.to_sparse()

    model[2].weight.register_post_accumulate_grad_hook(to_sparse)
    mse(model, batches(1, 8)[0]).backward()
    with pytest.raises(RuntimeError, match=r"'2.weight' has a sparse gradient"):
        opt.step()
    assert_unchanged(model, inner(opt), before)


@own_optimizers
@pytest.mark.parametrize(
    "other", [lambda: nn.Linear(5, 4), lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(2, 4))]
)
def test_the_state_of_another_model(make: Make, other: Callable[[], nn.Module]) -> None:
    model, another = network(), other().double()
    opt, theirs = make(model), diagonal(another)
    before = snapshot(model, opt)
    with pytest.raises(ValueError, match=r"another model|accumulator"):
        opt.load_state_dict(theirs.state_dict())
    assert_unchanged(model, opt, before)


@all_optimizers
def test_a_saved_batch_size_above_the_cap(make: Make) -> None:
    state = make(network(), batch_size=32, max_batch_size=64).state_dict()
    opt = make(network(), batch_size=8, max_batch_size=16)
    with pytest.raises(ValueError, match="saved batch size 32 is larger than max_batch_size"):
        opt.load_state_dict(state)
    assert opt.batch_size == 8


@all_optimizers
def test_loading_forgets_what_was_accumulated(make: Make) -> None:
    model = network()
    opt = make(model, batch_size=8, max_batch_size=8)
    state = opt.state_dict()
    mse(model, batches(1, 4)[0]).backward()
    opt.step()
    opt.load_state_dict(state)
    mse(model, batches(1, 8)[0]).backward()
    gradient = model[0].weight.grad.clone()
    expected = network()
    mse(expected, batches(1, 8)[0]).backward()
    torch.testing.assert_close(gradient, expected[0].weight.grad)
    opt.step()
    assert opt.statistics.batch_size == 8


@all_optimizers
def test_autograd_grad_in_between_is_not_counted(make: Make) -> None:
    """torch.autograd.grad of some parameters does not reach the probe: not a micro-batch."""
    model = network()
    opt = make(model, batch_size=8, max_batch_size=8)
    for batch in batches(3, 8):
        torch.autograd.grad(mse(model, batches(1, 20)[0]), [model[2].weight])
        mse(model, batch).backward()
        opt.step()
        opt.zero_grad()
    assert opt.samples == 24


def replaced(model: nn.Sequential) -> None:
    model[2] = nn.Linear(4, 2).double()


def extended(model: nn.Sequential) -> None:
    model.append(nn.Linear(2, 2).double())


def unfrozen(model: nn.Sequential) -> None:
    model[3].requires_grad_(True)


@all_optimizers
@pytest.mark.parametrize(
    ("change", "name"), [(replaced, r"2\.weight"), (extended, r"4\.weight"), (unfrozen, "3.weight")]
)
def test_parameters_that_no_layer_measures(
    make: Make, change: Callable[[nn.Sequential], None], name: str
) -> None:
    """They came after the optimizer, or their layer was frozen while it could not be observed."""
    model = network().append(nn.Bilinear(2, 2, 2).double())
    model[3].forward = lambda x: nn.Bilinear.forward(model[3], x, x)
    model[3].requires_grad_(False)
    opt = make(model, batch_size=8, max_batch_size=8)
    train(model, opt, batches(1, 8))
    change(model)
    if isinstance(opt, ak.AdaptiveBatch):
        opt.optimizer.add_param_group({"params": list(model[-1].parameters())})
    mse(model, batches(1, 8)[0]).backward()
    with pytest.raises(
        RuntimeError, match=name + "' has a gradient, but no layer that is observed"
    ):
        opt.step()


def test_layers_that_disagree_about_more_samples_than_the_probe_has(device: torch.device) -> None:
    """The probe is exchanged in the middle of the forward pass."""
    model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)]).to(device)
    observer = ak.observe(model)
    for _ in range(2):  # the first pass is checked more closely
        model.zero_grad(), observer.reset()
        few, many = torch.randn(8, 3, device=device), torch.randn(1500, 3, device=device)
        (model[0](few).sum() + model[1](many).sum()).backward()
        observer.probe_for(few[:1])
        observer._make_probe(1024, device)
    with pytest.raises(RuntimeError, match="disagree about the number of samples"):
        observer.statistics()


def test_a_micro_batch_without_samples(device: torch.device) -> None:
    model = network().to(device)
    observer = ak.observe(model)
    model(torch.empty(0, 5, dtype=torch.float64, device=device)).sum().backward()
    with pytest.raises(RuntimeError, match="a micro-batch without samples"):
        observer.statistics()


@all_optimizers
def test_optimizers_are_not_copied(make: Make) -> None:
    opt = make(network())
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="make an optimizer for the copy"):
            copied(opt)


def local(model: nn.Module) -> ak.LocalAdaptiveBatch:
    return ak.LocalAdaptiveBatch(model, torch.optim.SGD(model.parameters(), lr=0.1), local_steps=2)


@pytest.mark.parametrize("make", [diagonal, scalar, wrapped, local])
@pytest.mark.parametrize("state", [{}, torch.optim.SGD([torch.ones(1)]).state_dict(), None])
def test_the_state_of_something_else(make: Make, state: Any) -> None:
    model = network()
    opt = make(model)
    if make in (diagonal, scalar) and state:
        return  # one of a torch optimizer
    with pytest.raises(ValueError, match=f"no state of {type(opt).__name__}"):
        opt.load_state_dict(state)


@all_optimizers
@pytest.mark.parametrize("needs", [None, "coordinates", {"coordinate"}, ["loss"]])
def test_a_criterion_of_ones_own_says_what_it_needs(make: Make, needs: Any) -> None:
    class Mine:
        def evaluate(self, statistics: ak.GradientStatistics) -> ak.Decision:
            return ak.Decision(True, statistics.batch_size, 0.0)

    criterion = Mine()
    if needs is not None:
        criterion.needs = needs
    with pytest.raises(
        TypeError, match=r"needs of .* must be a set out of accumulators, all_inner"
    ):
        make(network(), criterion=criterion)
    criterion.needs = frozenset({"coordinates"})
    model = network()
    train(model, make(model, criterion=criterion), batches(1, 8))
