"""Modules of other classes, whose own parameters measure: beyond the exactness of `test_layers`."""

import copy
import gc
import inspect
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from layer_cases import Twice, between
from module_cases import (
    MODULE_CASES,
    Factors,
    Own,
    Patches,
    Positions,
    Relative,
    RMSNorm,
    Scaled,
)
from per_sample import per_sample
from torch import Tensor, nn
from torch.testing import assert_close

import adagrad_kernels as ak
from adagrad_kernels import profiling
from adagrad_kernels.layers import ObservedFallback, ObservedModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:<class .*Function'> should not be inst:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]
WATCHED = [n for n in MODULE_CASES if n not in ("own-einsum", "own-borrowed")]


def loss(y: Tensor) -> Tensor:
    return y.sin().flatten(1).sum(1).mean()


def measured(model: nn.Module, x: Tensor, observer: ak.Observer) -> Tensor:
    model.zero_grad()
    observer.reset()
    loss(model(x)).backward()
    return observer.statistics().sample_norms_sq


@pytest.mark.parametrize("name", WATCHED)
def test_the_same_numbers_as_the_plain_forward_pass(name: str, device: torch.device) -> None:
    case = MODULE_CASES[name]
    model, x = case.make().to(device).double(), case.input(device)
    plain = copy.deepcopy(model)
    observer = ak.observe(model, fallback=case.fallback)
    y, expected = model(x), plain(x)
    assert_close(y, expected, rtol=1e-14, atol=1e-14)
    loss(y).backward(), loss(expected).backward()
    found = {n: p.grad for n, p in model.named_parameters()}
    assert_close(found, {n: p.grad for n, p in plain.named_parameters()}, rtol=1e-9, atol=1e-11)
    assert not any(isinstance(m, ObservedFallback) for m in model.modules())
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    observer.detach()


def test_the_module_looks_as_before() -> None:
    """Trainers read the signature, and files the name of the class."""
    model = Patches()
    ak.observe(model, fallback="vmap")
    assert isinstance(model, ObservedModule)
    assert isinstance(model, Patches)
    assert type(model).__name__ == "Patches"
    assert inspect.signature(model.forward) == inspect.signature(Patches().forward)
    assert type(copy.deepcopy(model)) is Patches


def test_only_a_known_package_is_watched_unasked(device: torch.device) -> None:
    with pytest.raises(ak.UnsupportedLayerError, match=r"'1' \(RMSNorm\).*weight"):
        ak.observe(between(RMSNorm(6)))

    class LlamaRMSNorm(RMSNorm):
        __module__ = "transformers.models.llama.modeling_llama"

    model = between(LlamaRMSNorm(6)).to(device).double()
    x = torch.randn(6, 4, 5, device=device, dtype=torch.float64)
    found = measured(model, x, ak.observe(model))
    assert_close(found, per_sample(model, loss, x).norms_sq)


@pytest.mark.parametrize("whole", [False, True], ids=["nested", "whole"])
def test_what_cannot_be_measured_says_why(whole: bool) -> None:
    class Einsum(Own):
        __module__ = "transformers.models.own"

    own = Einsum(lambda m, x: torch.einsum("bi,ij->bj", x, m.p0), (4, 4))
    model = own if whole else nn.Sequential(nn.Linear(4, 4), own)
    ak.observe(model)
    where = r"\(the model itself\)" if whole else "'1'"
    with pytest.raises(ak.UnsupportedLayerError, match=where + r".*p0.*einsum.*vmap"):
        model(torch.randn(3, 4))


@pytest.mark.parametrize(
    ("forward", "shape", "why"),
    [
        (lambda m, x: x * m.p0, (3,), "leave to the samples"),  # would scale each sample by another
        (lambda m, x: x.mT * m.p0.unsqueeze(1), (4,), "does not count the 3 samples"),
        (lambda m, x: x * m.p0.add_(1.0), (4,), "writes"),
        (lambda m, x: m.p0 * 2, (3, 4), "is returned before it has met the samples"),
        (lambda m, x: x @ m.p0 + m.p0.sum(), (4, 4), "in two ways"),
    ],
    ids=["by-sample", "transposed", "in-place", "returned", "twice"],
)
def test_uses_that_are_refused(
    forward: Callable[[Own, Tensor], Tensor], shape: tuple[int, ...], why: str
) -> None:
    class Odd(Own):
        __module__ = "transformers.models.own"

    model = nn.Sequential(nn.Linear(4, 3 if "by-sample" in why else 4), Odd(forward, shape))
    if shape == (3,):
        model = nn.Sequential(Odd(lambda m, x: x.sum(1) * m.p0, shape))
    ak.observe(model)
    with pytest.raises((ak.UnsupportedLayerError, RuntimeError), match=why):
        model(torch.randn(3, 4))


@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize("name", ["own-linear", "own-matrix-transposed", "own-layer-norm",
                                  "own-layer-norm-shifted", "own-mix"])  # fmt: skip
def test_parameters_beside_frozen_ones(name: str, frozen: int, device: torch.device) -> None:
    case = MODULE_CASES[name]
    model, x = case.make().to(device).double(), case.input(device)
    observer = ak.observe(model, coordinates=True, fallback="vmap")
    for kept in (False, True):  # frozen after the observer was made, and unfrozen again
        getattr(model[1], f"p{frozen}").requires_grad_(kept)
        found = measured(model, x, observer)
        truth = per_sample(model, loss, x)
        assert_close(found, truth.norms_sq)
        variance = observer.statistics().coordinate_variance
        assert_close(variance, truth.by_parameter(truth.coordinate_variance))
    assert isinstance(model[1], ObservedModule)


def test_falling_back_to_vmap_is_once_and_for_all(device: torch.device) -> None:
    case = MODULE_CASES["own-borrowed"]
    model, x = case.make().to(device).double(), case.input(device)
    before = {name: set(m.__dict__) for name, m in model.named_modules()}
    observer = ak.observe(model, fallback="vmap")
    kinds = [type(model[1])]
    for _ in range(3):
        assert_close(measured(model, x, observer), per_sample(model, loss, x).norms_sq)
        kinds.append(type(model[1]))
    assert issubclass(kinds[0], ObservedModule)
    assert len(set(kinds[1:])) == 1
    assert issubclass(kinds[1], ObservedFallback)
    assert "1.inner.weight" in [record.name for record in observer.coverage()]
    observer.detach()
    assert {name: set(m.__dict__) for name, m in model.named_modules()} == before
    assert type(model[1].inner) is nn.Linear


def test_names_that_observed_layers_need() -> None:
    class Odd(RMSNorm):
        def contract(self) -> None: ...

    model = between(Odd(6))
    ak.observe(model, fallback="vmap")
    assert isinstance(model[1], ObservedFallback)

    class Trusted(Odd):
        __module__ = "transformers.models.own"

    with pytest.raises(ak.UnsupportedLayerError, match="'contract'"):
        ak.observe(between(Trusted(6)))


def test_dropout_inside_is_that_of_the_plain_module(device: torch.device) -> None:
    def forward(m: Own, x: Tensor) -> Tensor:
        return F.dropout(x * m.p0, 0.5, m.training) + F.dropout(m.p0, 0.5, m.training)

    model = between(Own(forward, (5,)), 5).to(device)
    plain, x = copy.deepcopy(model), torch.randn(3, 5, device=device)
    ak.observe(model, fallback="vmap")
    torch.manual_seed(3)
    y = model[1].eval()(x)
    assert_close(y, plain[1].eval()(x))
    model.train(), plain.train()
    torch.manual_seed(3)
    expected = plain(x)
    torch.manual_seed(3)
    assert_close(model(x)[:, :1].shape, expected[:, :1].shape)


def test_nothing_is_left_after_a_step(device: torch.device) -> None:
    """Without the garbage collector: a forward pass leaves no cycles that hold activations."""
    model = Positions("module").to(device)
    model.gain = Own(lambda m, x: x * (1 + m.p0), (11,))
    observer = ak.observe(model, fallback="vmap")
    gc.collect()
    gc.disable()
    try:
        x = torch.randint(11, (5, 4), device=device)
        y = model.gain(model(x))
        alive = weakref.ref(y)
        loss(y).backward()
        observer.statistics(), observer.reset(), model.zero_grad()
        del y
        assert alive() is None
    finally:
        gc.enable()


def test_scalars_bend_to_the_type_of_the_samples(device: torch.device) -> None:
    model = Own(lambda m, x: x * m.p0, ()).to(device)
    ak.observe(model, fallback="vmap")
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert model(torch.randn(3, 4, device=device, dtype=dtype)).dtype == dtype


# Positions


@pytest.mark.parametrize("sizes", [(4, 6, 9), (6, 4), (6, 6), (1, 6, 7)])
@pytest.mark.parametrize("way", ["plain", "row", "first", "later"])
def test_a_batch_that_grows_past_the_positions(
    way: str, sizes: tuple[int, ...], device: torch.device
) -> None:
    model = Positions(way).to(device).double()
    observer = ak.observe(model, coordinates=True)
    for samples in sizes:
        x = torch.randint(11, (samples, 6), device=device)
        assert_close(measured(model, x, observer), per_sample(model, loss, x).norms_sq)


def test_a_relative_bias_as_large_as_the_batch(device: torch.device) -> None:
    model = Relative().to(device).double()
    observer = ak.observe(model)
    for samples in (4, 6, 8):
        x = torch.randint(11, (samples, 6), device=device)
        assert_close(measured(model, x, observer), per_sample(model, loss, x).norms_sq)


def test_a_buffer_as_large_as_the_batch(device: torch.device) -> None:
    """It is no sample, though it has as many rows."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5))
            self.register_buffer("spread", torch.randn(6, 5))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.weight * self.spread  # [b, 6, 5]

    model = Table().to(device).double()
    observer = ak.observe(model, fallback="vmap")
    for samples in (4, 6):
        x = torch.randn(samples, 6, 5, device=device, dtype=torch.float64)
        assert_close(measured(model, x, observer), per_sample(model, loss, x).norms_sq)


def test_positions_without_a_module_around_them() -> None:
    layer = nn.Embedding(6, 4)
    ak.observe(layer)
    with pytest.raises(ValueError, match=r"positions\.expand\(samples, -1\).*unsqueeze\(1\)"):
        layer(torch.arange(5))


def test_one_token_for_each_sample_and_then_another_number(device: torch.device) -> None:
    class Both(Factors):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.users(x[:2, 0]).sum()

    model = Both().to(device)
    ak.observe(model)
    with pytest.raises(ValueError, match=r"'users': 2 indices for 6 samples.*unsqueeze\(1\)"):
        model(torch.tensor([[3, 1], [0, 2], [5, 5], [1, 1], [7, 0], [2, 2]], device=device))


@pytest.mark.parametrize("samples", [1, 5])
def test_recommenders(samples: int, device: torch.device) -> None:
    model = Factors().to(device).double()
    x = torch.randint(11, (samples, 2), device=device)
    x[-1] = 0  # not in order
    observer = ak.observe(model, coordinates=True, inner_products=True)
    assert_close(measured(model, x, observer), per_sample(model, loss, x).norms_sq)
    s = observer.statistics()
    truth = per_sample(model, loss, x)
    assert_close(s.inner_products, truth.inner_products)


# Compiled


def test_compiled_while_the_batch_grows(device: torch.device) -> None:
    class Model(Positions):
        def __init__(self) -> None:
            super().__init__("plain")
            self.norm = RMSNorm(11, around_one=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(super().forward(x))

    model = Model().to(device).double()
    observer = ak.observe(model, fallback="vmap", inner_products=True)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    torch._dynamo.utils.counters.clear()
    for samples in (4, 5, 6, 7, 9):  # six positions
        model.zero_grad()
        observer.reset()
        x = torch.randint(11, (samples, 6), device=device)
        loss(compiled(x)).backward()
        s, truth = observer.statistics(), per_sample(model, loss, x)
        assert_close(s.sample_norms_sq, truth.norms_sq)
        assert_close(s.inner_products, truth.inner_products)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


def test_what_the_compiler_hides(device: torch.device) -> None:
    model = Own(lambda m, x: x @ m.p0.T + m.p1, (3, 4), (3,)).to(device)
    ak.observe(model, fallback="vmap")
    x = torch.randn(5, 4, device=device)
    model(x)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"does not show what becomes of p0.*weight\.t\(\)"):
        compiled(x)


def test_unused_parameters_in_a_compiled_model(device: torch.device) -> None:
    model = Own(lambda m, x: x * m.p0, (4,), (4,)).to(device)
    observer = ak.observe(model, fallback="vmap")
    x = torch.randn(5, 4, device=device)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"what becomes of p1.*one forward pass"):
        compiled(x)
    model(x)
    torch.compiler.reset()
    loss(compiled(x)).backward()
    assert observer.statistics().batch_size == 5


# In training


@pytest.mark.parametrize(
    "make", [lambda: Scaled(), lambda: Positions("module"), lambda: Twice(RMSNorm(4))]
)
def test_the_trajectory_of_plain_adagrad(
    make: Callable[[], nn.Module], device: torch.device
) -> None:
    model = make().to(device).double()
    plain = copy.deepcopy(model)
    opt = ak.AdAdaGrad(model, lr=0.1, batch_size=6, max_batch_size=6, fallback="vmap")
    reference = torch.optim.Adagrad(plain.parameters(), lr=0.1)
    for _ in range(5):
        x = torch.randint(11, (6, 4), device=device)
        x = x if any(isinstance(m, nn.Embedding) for m in model.modules()) else x.double()
        for m, o in ((model, opt), (plain, reference)):
            loss(m(x)).backward()
            o.step()
            o.zero_grad()
    assert_close(model.state_dict(), plain.state_dict(), rtol=1e-9, atol=1e-10)


def test_coverage_and_profile(device: torch.device) -> None:
    model = Positions("module").to(device)
    x = torch.randint(11, (5, 4), device=device)
    found = profiling.profile(model, x, loss=loss, fallback="vmap", repeats=1)
    methods = {record.name: record.method for record in found.coverage}
    assert methods["positions.weight"] == "gradient of each sample"
    assert "sorted tokens" in methods["tokens.weight"]
    assert "unknown" in str(found.coverage)
    plain = profiling.profile(Positions("plain").to(device), x, loss=loss, repeats=1)
    assert {layer.name for layer in plain.layers} == {"tokens", "head"}


# Called more than once, with other uses of the same parameters


class Linears(nn.Module):
    """A matrix and its transposition, each with a shift; or a shift that becomes a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4) / 2)
        self.shift, self.other = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor, way: str) -> Tensor:
        if way == "plain":
            return F.linear(x, self.weight, self.shift)
        if way == "no-shift":
            return F.linear(x, self.weight)
        if way == "back":
            return F.linear(x, self.weight.t(), self.other)
        if way == "norm":
            return F.layer_norm(x, (4,), self.shift, self.other)
        return x * self.shift


class Ways(nn.Module):
    """These ways, one after the other; so many fewer of them in the first batch."""

    def __init__(self, *ways: str, later: int = 0) -> None:
        super().__init__()
        self.ways, self.later, self.batches = ways, later, 0
        self.own, self.head = Linears(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for way in self.ways[: None if self.batches else len(self.ways) - self.later]:
            x = self.own(x, way).tanh()
        return self.head(x)


@pytest.mark.parametrize("coordinates", [False, True])
@pytest.mark.parametrize("later", [0, 1])
@pytest.mark.parametrize(
    "ways",
    [
        ("plain", "factor"),
        ("plain", "back"),
        ("plain", "plain"),
        ("plain", "no-shift"),
        ("norm", "factor"),
        ("back", "plain", "norm", "factor"),
    ],
    ids="-".join,
)
def test_a_module_called_again_in_another_way(
    ways: tuple[str, ...], later: int, coordinates: bool, device: torch.device
) -> None:
    model = Ways(*ways, later=later).to(device).double()
    observer = ak.observe(
        model, fallback="vmap", coordinates=coordinates, inner_products=coordinates
    )
    for batch in range(3):
        model.batches = batch
        x = torch.randn(6, 3, 4, device=device, dtype=torch.float64)
        found, truth = measured(model, x, observer), per_sample(model, loss, x)
        assert_close(found, truth.norms_sq)
        s = observer.statistics()
        if coordinates:
            variance = truth.by_parameter(truth.coordinate_variance)
            used = {name: variance[name] for name in s.coordinate_variance}
            assert_close(s.coordinate_variance, used)
            assert_close(s.inner_products, truth.inner_products)
    assert isinstance(model.own, ObservedModule)


class Refinement(nn.Module):
    """Begins with a parameter that only the first call uses."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.start = nn.Parameter(torch.ones(4)), nn.Parameter(torch.randn(4))
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        return self.layer(((self.start + x if h is None else h) * self.gain).tanh())


def test_a_parameter_of_some_calls(device: torch.device) -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Refinement()

        def forward(self, x: Tensor) -> Tensor:
            h = self.block(x)
            return self.block(x, self.block(x, h))

    model = Loop().to(device).double()
    observer = ak.observe(model, fallback="vmap")
    for _ in range(3):
        x = torch.randn(6, 4, device=device, dtype=torch.float64)
        assert_close(measured(model, x, observer), per_sample(model, loss, x).norms_sq)


def test_very_many_parameters(device: torch.device) -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.list = nn.ParameterList([torch.randn(3, 3) / 2 for _ in range(40)])
            self.last, self.shift = nn.Parameter(torch.eye(3)), nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            for weight in self.list:
                x = F.layer_norm(F.linear(x, weight), (3,))
            return F.linear(x, self.last, self.shift)

    model = Many().to(device).double()
    observer = ak.observe(model, fallback="vmap")
    x = torch.randn(6, 3, device=device, dtype=torch.float64)
    assert_close(measured(model, x, observer), per_sample(model, loss, x).norms_sq)
