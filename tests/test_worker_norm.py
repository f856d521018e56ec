"""The worker-level norm test on one process: gradients of micro-batches, no layer observed."""

import copy
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from per_sample import per_sample
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from training import batches, mse, network, weights

import adagrad_kernels as ak
from adagrad_kernels.workers import WorkerObserver

CLOSE = {"rtol": 1e-10, "atol": 1e-14}  # float64, few terms


class Odd(nn.Module):
    """Mixes the samples and holds its own parameter: nobody measures its samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 4).double(), nn.Linear(4, 2).double()
        self.scale = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.second((h - h.mean(0)).tanh()) * self.scale


def gradient(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Of the mean loss, by plain autograd on a copy."""
    other = copy.deepcopy(model)
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(mse(other, batch), list(other.parameters()))]
    )


@pytest.mark.parametrize("micro_batches", [2, 5])
def test_statistics_of_any_model(micro_batches: int) -> None:
    torch.manual_seed(0)
    model = Odd()
    data = batches(micro_batches, 6)
    means = torch.stack([gradient(model, batch) for batch in data])
    observer = WorkerObserver(model)
    for batch in data:
        mse(model, batch).backward()
    s = observer.statistics(gradient_scale=1 / micro_batches)
    assert (s.batch_size, s.workers) == (6 * micro_batches, micro_batches)
    torch.testing.assert_close(s.grad_norm_sq, means.mean(0).square().sum(), **CLOSE)
    torch.testing.assert_close(s.variance_trace, 6 * means.var(0).sum(), **CLOSE)


@given(st.integers(2, 6), st.sampled_from(["mean", "sum"]))
def test_workers_with_one_sample_each_measure_the_samples(samples: int, reduction: str) -> None:
    model, (batch,) = network(), batches(1, samples)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output, target, reduction=reduction)

    truth = per_sample(model, loss, *batch)
    observer = WorkerObserver(model)
    for x, y in zip(*(t.split(1) for t in batch), strict=True):
        loss(model(x), y).backward()
    s = observer.statistics(gradient_scale=1 / samples)
    torch.testing.assert_close(s.grad_norm_sq, truth.mean_norm_sq, **CLOSE)
    torch.testing.assert_close(s.variance_trace, truth.variance_trace, **CLOSE)


@pytest.mark.parametrize("kind", ["AdAdaGrad", "AdAdaGradNorm", "AdaptiveBatch"])
@pytest.mark.parametrize("printed", [False, True])
def test_decision_is_the_formula(kind: str, printed: bool) -> None:
    torch.manual_seed(0)
    model, micro_batches, size, eta = Odd(), 4, 6, 0.3
    test = ak.WorkerNormTest(eta, printed=printed)
    options = {"criterion": test, "batch_size": micro_batches * size}
    if kind == "AdaptiveBatch":
        opt = ak.AdaptiveBatch(model, torch.optim.SGD(model.parameters()), **options)
    else:
        opt = getattr(ak, kind)(model, lr=0.1, **options)
    data = batches(micro_batches, size)
    means = torch.stack([gradient(model, batch) for batch in data])
    for batch in data:
        assert not opt.updated
        mse(model, batch).backward()
        opt.step()
        opt.zero_grad()
    assert opt.updated
    deviations = (means - means.mean(0)).square().sum()
    variance = deviations / micro_batches if printed else deviations / (micro_batches - 1) * size
    needed = (variance / (eta**2 * means.mean(0).square().sum())).item()
    assert opt.decision.ratio == pytest.approx(needed / (micro_batches * size), rel=1e-9)
    assert opt.decision.batch_size == max(math.ceil(needed), micro_batches * size)
    if not printed:
        assert not opt.decision.passed


@given(st.integers(2, 8), st.integers(1, 50), st.floats(1e-3, 1e3), st.floats(0.05, 2.0))
def test_printed_form_saturates(workers: int, size: int, variance: float, eta: float) -> None:
    """In pure noise, ‖ḡ‖² = tr Σ̂/N, it asks for (J − 1)/η² samples, however large the batch is."""
    n = workers * size
    mean = variance / n
    s = ak.GradientStatistics(n, (n - 1) * variance + n * mean, mean, workers=workers)
    printed = ak.WorkerNormTest(eta, printed=True).evaluate(s)
    assert printed.ratio * n == pytest.approx((workers - 1) / eta**2, rel=1e-9)
    assert ak.WorkerNormTest(eta).evaluate(s).ratio * n == pytest.approx(n / eta**2, rel=1e-9)
    assert ak.WorkerNormTest(eta).evaluate(s) == ak.NormTest(eta).evaluate(s)


def test_training_grows_the_batch() -> None:
    torch.manual_seed(0)
    model = Odd()
    x = torch.randn(400, 5, dtype=torch.float64)
    dataset = TensorDataset(x, x[:, :2] + torch.randn(400, 2, dtype=torch.float64))
    test = ak.Averaged(ak.WorkerNormTest(0.7))
    opt = ak.AdAdaGrad(model, lr=0.05, criterion=test, batch_size=8, max_batch_size=64)
    loader = ak.AdaptiveDataLoader(dataset, opt, max_micro_batch_size=4)
    for _ in range(2):
        for a, b in loader:
            F.mse_loss(model(a), b).backward()
            opt.step()
            opt.zero_grad()
    assert opt.statistics.workers >= opt.statistics.batch_size / 4
    assert opt.batch_size > 32


def test_layers_stay_as_they_are() -> None:
    model = Odd()
    classes = [type(m) for m in model.modules()]
    before = weights(model)
    observer = WorkerObserver(model)
    assert [type(m) for m in model.modules()] == classes
    mse(model, *batches(1, 4)).backward()
    assert observer.micro_batches == 1
    observer.detach()
    mse(model, *batches(1, 4)).backward()
    assert observer.micro_batches == 0
    assert torch.equal(weights(model), before)


def test_unfrozen_parameters_are_measured() -> None:
    model, (batch,) = network(), batches(1, 4)
    model[0].requires_grad_(False)
    observer = WorkerObserver(model)
    mse(model, batch).backward()
    model[0].requires_grad_(True)
    model.zero_grad()
    observer.reset()
    for _ in range(2):  # twice the same micro-batch: no variance
        mse(model, batch).backward()
    s = observer.statistics(gradient_scale=0.5)
    total = gradient(model, batch).square().sum()
    torch.testing.assert_close(s.grad_norm_sq, total, **CLOSE)
    assert s.variance == pytest.approx(0, abs=1e-12 * total.item())


def test_one_worker_decides_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model, (batch,) = network(), batches(1, 8)
    opt = ak.AdAdaGrad(model, criterion=ak.WorkerNormTest(0.1), batch_size=8)
    mse(model, batch).backward()
    with caplog.at_level(logging.WARNING, "adagrad_kernels"):
        opt.step()
    assert opt.batch_size == 8
    assert math.isnan(opt.decision.ratio)
    assert "one micro-batch on one process has no variance between workers" in caplog.text


def test_not_finite(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    opt = ak.AdAdaGrad(model, criterion=ak.WorkerNormTest(0.1), batch_size=8)
    for factor in (1, math.inf):
        (mse(model, *batches(1, 4)) * factor).backward()
        opt.step()
    assert opt.updated
    assert opt.batch_size == 8
    assert "the gradient statistics are not finite" in caplog.text


def test_several_backward_passes_of_one_call() -> None:
    model, (batch,) = network(), batches(1, 4)
    observer = WorkerObserver(model)
    loss = mse(model, batch)
    loss.backward(retain_graph=True)
    loss.backward()
    with pytest.raises(RuntimeError, match="more backward passes than calls of the model"):
        observer.statistics()


def test_a_gradient_that_nobody_measured() -> None:
    """The parameter is unfrozen after the call of the model, so that no hook is there in time."""
    model, (batch,) = network(), batches(1, 4)
    model[2].weight.requires_grad_(False)
    observer = WorkerObserver(model)
    hidden = model(batch[0])
    model[2].weight.requires_grad_(True)
    (model[2](model[:2](batch[0])) + hidden - batch[1]).square().mean().backward()
    with pytest.raises(RuntimeError, match="1 parameters got a gradient that was not measured"):
        observer.statistics()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: WorkerObserver(network().requires_grad_(False)), ValueError, "nothing to observe"),
        (lambda: WorkerObserver(network()).statistics(), RuntimeError, "no backward pass"),
        (lambda: ak.WorkerNormTest(-1.0), ValueError, "eta must be a positive number"),
        (
            lambda: ak.WorkerNormTest().evaluate(ak.GradientStatistics(4, 8.0, 1.0)),
            ValueError,
            "those of single samples",
        ),
    ],
)
def test_mistakes(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_call_without_tensors() -> None:
    class Constant(nn.Linear):
        def forward(self, factor: float) -> Tensor:  # type: ignore[override]
            return self.weight.sum() * factor

    model = Constant(2, 2)
    observer = WorkerObserver(model)
    with pytest.raises(ValueError, match="without a tensor whose rows count the samples"):
        model(2.0)
    observer.detach()
    assert model(2.0).shape == ()


# Local steps; with several processes in test_distributed.py


def local(model: nn.Module, **options: object) -> ak.LocalAdaptiveBatch:
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return ak.LocalAdaptiveBatch(model, sgd, **{"local_steps": 3, "batch_size": 4, **options})


def test_local_steps_on_one_process_are_the_optimizer() -> None:
    one, other = network(), network()
    opt, plain = local(one), torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    opt.controller.limit_micro_batches(2)
    synchronised = []
    for x, y in batches(7, 4):
        for micro_batch in zip(x.split(2), y.split(2), strict=True):
            mse(one, micro_batch).backward()
            opt.step()
            opt.zero_grad()
        synchronised.append(opt.synchronised)
        plain.zero_grad()
        mse(other, (x, y)).backward()
        plain.step()
    assert synchronised == [False, False, True, False, False, True, False]
    torch.testing.assert_close(weights(one), weights(other), **CLOSE)
    assert (opt.batch_size, opt.samples) == (4, 28)
    assert not opt.decision.tested


@pytest.mark.parametrize("criterion", [ak.WorkerNormTest(0.5), ak.Averaged(ak.WorkerNormTest(0.5))])
def test_local_steps_resume(criterion: object) -> None:
    model, data = network(), batches(10, 4)
    opt = local(model, criterion=criterion)
    for batch in data[:5]:
        mse(model, batch).backward()
        opt.step()
        opt.zero_grad()
    other = network()
    other.load_state_dict(model.state_dict())
    resumed = local(other, criterion=copy.deepcopy(criterion))
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for m, o in ((model, opt), (other, resumed)):
        for batch in data[5:]:
            mse(m, batch).backward()
            o.step()
            o.zero_grad()
    assert torch.equal(weights(model), weights(other))
    assert resumed.state_dict()["controller"] == opt.state_dict()["controller"]
    assert resumed.controller.steps == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_steps": 0}, "local_steps must be at least 1"),
        ({"criterion": ak.NormTest(0.1)}, "use WorkerNormTest"),
        ({"every": 2}, "no option every"),
        ({"lr_policy": "sqrt"}, "no option lr_policy"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_mistakes_with_local_steps(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        local(network(), **options)


def test_a_local_batch_begins_anew_where_a_state_is_loaded() -> None:
    model = network()
    opt, ((x, y),) = local(model), batches(1, 4)
    opt.controller.limit_micro_batches(2)
    state = copy.deepcopy(opt.state_dict())
    mse(model, (x[:2], y[:2])).backward()
    opt.step()
    opt.load_state_dict(state)
    assert all(p.grad is None for p in model.parameters())
    mse(model, (x[:2], y[:2])).backward()
    opt.step()
    assert not opt.updated


def test_local_step_without_gradients() -> None:
    model = network()
    opt, ((x, y),) = local(model), batches(1, 4)
    opt.controller.limit_micro_batches(2)
    with pytest.raises(RuntimeError, match="without gradients"):
        opt.step()
    for micro_batch in zip(x.split(2), y.split(2), strict=True):  # goes on with a whole batch
        opt.zero_grad()
        assert not opt.updated
        mse(model, micro_batch).backward()
        opt.step()
    assert opt.updated
    assert (opt.samples, opt.micro_batches) == (4, 2)


def test_forward_passes_of_another_size_without_backward_are_named() -> None:
    model = network()
    opt = ak.AdAdaGrad(model, criterion=ak.WorkerNormTest(0.5), batch_size=16, max_batch_size=16)
    first, second = batches(2, 8)
    loss = mse(model, first)
    model(torch.randn(100, 5, dtype=torch.float64))
    loss.backward()
    with pytest.raises(RuntimeError, match=r"called with 8 and 100 samples.*no_grad"):
        opt.step()
    opt.zero_grad()
    for batch in (first, second):
        model(batch[0])  # of the same size
        mse(model, batch).backward()
        opt.step()
    assert opt.updated
    assert opt.samples == 16
