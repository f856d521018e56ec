"""Statistics of chosen layers only, and the standard error of the variance."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Transformer, cross_entropy, texts
from per_sample import PerSample, per_sample
from test_observer import squares
from torch import Tensor, nn
from training import batches, mse, network, optimizer, train, weights

import adagrad_kernels as ak

FIXED = {"batch_size": 8, "max_batch_size": 8}
STANDARD_ERRORS = 5  # a mean of many draws is farther from its expectation once in 10⁶ times


def restricted(truth: PerSample, names: list[str]) -> PerSample:
    """The truth about some of the parameters."""
    split = truth.g.split([shape.numel() for shape in truth.shapes.values()], 1)
    parts = dict(zip(truth.shapes, split, strict=True))
    return PerSample(
        torch.cat([parts[name] for name in names], 1), {name: truth.shapes[name] for name in names}
    )


def assert_statistics_of(s: ak.GradientStatistics, truth: PerSample, names: list[str]) -> None:
    assert s.subset == tuple(names)
    truth = restricted(truth, names)
    close: Callable[..., None] = torch.testing.assert_close
    close(s.sample_norms_sq, truth.norms_sq, rtol=1e-10, atol=0)
    close(s.grad_norm_sq, truth.mean_norm_sq, rtol=1e-10, atol=0)
    close(s.variance_trace, truth.variance_trace, rtol=1e-10, atol=0)
    if s.inner_products is not None:
        close(s.inner_products, truth.inner_products, rtol=1e-10, atol=1e-14)
    if s.coordinate_variance is not None:
        assert list(s.coordinate_variance) == names
        for name, expected in truth.by_parameter(truth.coordinate_variance).items():
            close(s.coordinate_variance[name], expected, rtol=1e-10, atol=1e-16)


def data() -> tuple[Tensor, Tensor]:
    dataset = texts(6)
    return dataset.tensors[0], dataset.tensors[1]


CHOICES: dict[str, tuple[Callable[[nn.Module], list[Any]], str]] = {
    "one layer": (lambda _: ["head"], r"head\..*"),
    "a module": (lambda model: [model.norm], r"norm\..*"),
    "a prefix": (lambda _: ["layers.1"], r"layers\.1\..*"),
    "several": (
        lambda model: ["tokens", model.layers[0].net, "layers.0.net.0", "norm"],
        r"tokens\..*|layers\.0\.net\..*|norm\..*",
    ),
    "everything": (lambda _: [""], r".*"),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_statistics_are_those_of_the_chosen_layers(choice: str) -> None:
    choose, pattern = CHOICES[choice]
    model = Transformer(tied=False, depth=2).double()
    x, y = data()
    truth = per_sample(model, cross_entropy, x, y)
    observer = ak.observe(model, coordinates=True, inner_products=True, layers=choose(model))
    cross_entropy(model(x), y).backward()
    s = observer.statistics()
    names = [name for name, _ in model.named_parameters() if re.fullmatch(pattern, name)]
    assert_statistics_of(s, truth, names)


# What torch's compiler warns of while it looks at custom functions, and at its own modules.
@pytest.mark.filterwarnings("ignore:<class .*Function'> should not be inst:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_the_same_under_accumulation_and_compiled() -> None:
    model = Transformer(tied=False, depth=1).double()
    x, y = data()
    truth = per_sample(model, cross_entropy, x, y)
    observer = ak.observe(model, layers=["norm", "head"])
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        observer.reset()
        for part in (slice(0, 3), slice(3, 6)):
            cross_entropy(run(x[part]), y[part]).backward()
        s = observer.statistics(gradient_scale=0.5)
        assert_statistics_of(s, truth, ["norm.weight", "norm.bias", "head.weight"])
    torch.compiler.reset()


class Strange(nn.Module):
    """A layer that is not supported, between two that are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.own = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x) * self.own))


def test_other_layers_stay_as_they_are() -> None:
    model = Strange().double()
    x, y = torch.randn(5, 4).double(), torch.randn(5, 2).double()
    with pytest.raises(ak.UnsupportedLayerError):
        ak.observe(model)
    truth = per_sample(model, squares, x, y)
    observer = ak.observe(model, layers=["last"])
    assert type(model.first) is nn.Linear
    assert type(model) is Strange
    squares(model(x), y).backward()
    assert_statistics_of(observer.statistics(), truth, ["last.weight", "last.bias"])
    table = {record.name: record.reason for record in observer.coverage()}
    assert table == {
        "last.weight": "", "last.bias": "", "own": "not chosen",
        "first.weight": "not chosen", "first.bias": "not chosen",
    }  # fmt: skip
    observer.detach()
    assert type(model.last) is nn.Linear


def test_two_observers_of_different_layers() -> None:
    """Their sums are those of the whole."""
    model = network()
    ((x, y),) = batches(1, 8)
    whole = per_sample(model, lambda out, y: (out - y).square().mean(), x, y)
    observers = [ak.observe(model, layers=[name]) for name in ("0", "2")]
    mse(model, (x, y)).backward()
    found = [observer.statistics() for observer in observers]
    variance = torch.stack([s.variance_trace for s in found])
    square = torch.stack([s.grad_norm_sq for s in found])
    torch.testing.assert_close(variance.sum(), whole.variance_trace, rtol=1e-10, atol=0)
    torch.testing.assert_close(square.sum(), whole.mean_norm_sq, rtol=1e-10, atol=0)
    # What the docstring promises: the ratio of the whole lies between those of the parts.
    low, high = (variance / square).sort().values
    assert low < whole.variance_trace / whole.mean_norm_sq < high


def test_without_layers_the_subset_is_everything() -> None:
    model = network()
    observer = ak.observe(model)
    mse(model, batches(1, 8)[0]).backward()
    assert observer.statistics().subset is None


def test_errors() -> None:
    model = Transformer(tied=True, depth=1)
    with pytest.raises(ValueError, match="'head' as well"):
        ak.observe(model, layers=["tokens"])
    with pytest.raises(ValueError, match="'layer' is no module of the model; it has 'tokens'"):
        ak.observe(model, layers=["layer"])
    with pytest.raises(ValueError, match="Linear is no module of the model"):
        ak.observe(model, layers=[nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="none of them has trainable parameters"):
        ak.observe(model, layers=["layers.0.net.1"])
    with pytest.raises(ValueError, match="none of them has trainable parameters"):
        ak.observe(model, layers=[])
    with pytest.raises(TypeError, match="a list of names or modules"):
        ak.observe(model, layers="head")
    with pytest.raises(ak.UnsupportedLayerError):
        ak.observe(Strange(), layers=[""])
    ak.observe(model, layers=["tokens", "head"]).detach()  # nothing was attached by the others


def test_criteria_that_need_all_layers() -> None:
    for criterion in (ak.CABS(), ak.WorkerNormTest(0.5)):
        with pytest.raises(ValueError, match="leave observe_layers out"):
            ak.AdAdaGrad(network(), criterion=criterion, observe_layers=["0"])
    with pytest.raises(ValueError, match="leave observe_layers out"):
        ak.AdAdaGrad(network(), update="in_backward", observe_layers=["0"])


CRITERIA = (
    ak.NormTest(0.5),
    ak.InnerProductTest(0.5),
    ak.CoordinateNormTest(0.5),
    ak.CoordinateNormTest(0.5, aggregate="adagrad"),
)


@pytest.mark.parametrize(
    ("kind", "criterion"),
    [
        pytest.param(kind, criterion, id=f"{kind}-{criterion}")
        for kind in ("AdAdaGrad", "AdAdaGradNorm", "AdaptiveBatch")
        for criterion in CRITERIA
        if kind != "AdaptiveBatch" or "accumulators" not in criterion.needs
    ],
)
def test_optimizers_test_the_subset_and_update_everything(kind: str, criterion: Any) -> None:
    runs = []
    for layers in (["2"], None):
        model = network()
        options = {"criterion": criterion, "observe_layers": layers, **FIXED}
        opt = optimizer(kind, model, **options)
        data = batches(6, 4)  # two micro-batches a step
        train(model, opt, data[:4])
        before = copy.deepcopy(model)
        train(model, opt, data[4:])
        runs.append((weights(model), opt.statistics))
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-12, atol=0)
    s = runs[0][1]
    x, y = (torch.cat(parts) for parts in zip(*data[4:], strict=True))
    truth = per_sample(before, lambda out, y: (out - y).square().mean(), x, y)
    names = ["2.weight", "2.bias"]
    assert s.subset == tuple(names)
    part = restricted(truth, names)
    torch.testing.assert_close(s.grad_norm_sq, part.mean_norm_sq, rtol=1e-10, atol=0)
    torch.testing.assert_close(s.variance_trace, part.variance_trace, rtol=1e-10, atol=0)
    if s.coordinate_variance is not None:
        assert list(s.coordinate_variance) == names
    assert runs[1][1].subset is None
    assert runs[1][1].variance > s.variance


def test_a_gradient_outside_the_subset_must_be_in_a_group_too() -> None:
    model = network()
    model[0].requires_grad_(False)
    opt = ak.AdAdaGrad(model, observe_layers=["2"], **FIXED)
    model[0].requires_grad_(True)
    mse(model, batches(1, 8)[0]).backward()
    with pytest.raises(RuntimeError, match=r"'0\.weight' has a gradient but is in none"):
        opt.step()


# The standard error of tr Σ̂


def statistics_of(g: Tensor, inner_products: bool) -> ak.GradientStatistics:
    n = len(g)
    mean = g.mean(0)
    return ak.GradientStatistics(
        n, g.square().sum().item(), mean.square().sum().item(),
        contribution_norms_sq=g.square().sum(1) / n**2,
        inner_products=g @ mean if inner_products else None,
    )  # fmt: skip


def skewed(*shape: int) -> Tensor:
    """Exponential noise, of mean 0 and variance 1: its third moment is 2."""
    return torch.empty(shape, dtype=torch.float64).exponential_() - 1


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("noise", "signal", "inner_products"),
    [(normal, 0.0, False), (normal, 1.0, True), (skewed, 0.0, False), (skewed, 1.0, True)],
)
def test_standard_error(noise: Callable[..., Tensor], signal: float, inner_products: bool) -> None:
    """The spread of tr Σ̂ over many draws is what one draw says, on average."""
    draws, n, size = 1500, 64, 10
    deviations = torch.linspace(0.5, 2, size, dtype=torch.float64)
    traces, squares = [], []
    for _ in range(draws):
        s = statistics_of(signal + deviations * noise(n, size), inner_products)
        traces.append(s.variance_trace)
        squares.append(s.variance_standard_error.square())
    traces, squares = torch.stack(traces), torch.stack(squares)
    # Var of the sample variance of the traces ≈ (κ − 1)/draws of its square, κ their kurtosis.
    centred = traces - traces.mean()
    kurtosis = centred.pow(4).mean() / centred.square().mean() ** 2
    spread = traces.var()
    error = spread * ((kurtosis - 1) / draws).sqrt() + squares.std() / draws**0.5
    neglected = 2 * spread / n  # first order in 1/N
    assert (squares.mean() - spread).abs() < STANDARD_ERRORS * error + neglected
    assert error < 0.1 * spread  # the test tells something


def test_without_inner_products_it_is_an_upper_bound_for_symmetric_noise() -> None:
    """Var ‖g_i‖² = Var ‖g_i − μ‖² + 4 μᵀΣμ there."""
    exact, bound = [], []
    for _ in range(300):
        g = 3 + normal(64, 10)
        exact.append(statistics_of(g, inner_products=True).variance_standard_error.square())
        bound.append(statistics_of(g, inner_products=False).variance_standard_error.square())
    ratio = torch.stack(bound).mean() / torch.stack(exact).mean()
    expected = (2 * 10 + 4 * 9 * 10) / (2 * 10)
    assert ratio.item() == pytest.approx(expected, rel=0.1)


def test_standard_error_of_a_step() -> None:
    model = network()
    opt = ak.AdAdaGrad(model, criterion=ak.InnerProductTest(0.5), **FIXED)
    ((x, y),) = batches(1, 8)
    truth = per_sample(model, lambda out, y: (out - y).square().mean(), x, y)
    train(model, opt, [(x, y)])
    distances = (truth.g - truth.mean).square().sum(1)
    expected = (distances.var() / 8).sqrt()
    found = opt.statistics.variance_standard_error
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    assert statistics_of(normal(1, 3), inner_products=False).variance_standard_error.isnan()
