"""Modules of other classes, whose own parameters measure: beyond the exactness of `test_layers`."""

import copy
import gc
import inspect
import types
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from layer_cases import Twice, between
from module_cases import (
    MODULE_CASES,
    Own,
    Patches,
    Positions,
    RMSNorm,
    Scaled,
)
from per_sample import per_sample
from torch import Tensor, nn
from torch.testing import assert_close
from watched import check, loss, measured

import adagrad_kernels as ak
from adagrad_kernels import profiling
from adagrad_kernels.layers import ObservedFallback, ObservedModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:<class .*Function'> should not be inst:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]
WATCHED = [n for n in MODULE_CASES if n not in ("own-einsum", "own-borrowed")]


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


class Started(nn.Module):
    """A recurrent layer whose initial states are parameters."""

    def __init__(self, kind: str, repeat: Callable[[Tensor, int], Tensor], first: bool) -> None:
        super().__init__()
        self.layer = getattr(nn, kind)(5, 4, 2, batch_first=first)
        number = 2 if kind == "LSTM" else 1
        self.states = nn.ParameterList(torch.randn(2, 1, 4) for _ in range(number))
        self.repeat = repeat

    def forward(self, x: Tensor) -> Tensor:
        states = tuple(self.repeat(state, len(x)) for state in self.states)
        first = self.layer.batch_first
        y, _ = self.layer(
            x if first else x.transpose(0, 1), states if self.layer.mode == "LSTM" else states[0]
        )
        return y if first else y.transpose(0, 1)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize(
    "repeat",
    [
        lambda state, b: state.tanh().expand(-1, b, -1).contiguous(),
        lambda state, b: state.repeat(1, b, 1),
        lambda state, b: state.new_zeros(2, b, 4) + state,
        lambda state, b: torch.cat([state] * b, 1),
    ],
)
def test_initial_states(
    kind: str, repeat: Callable[[Tensor, int], Tensor], device: torch.device
) -> None:
    model = Started(kind, repeat, first=kind == "LSTM").double().to(device)
    check(model, (3, 2, 6), device, fallback="vmap")  # two of them, as there are layers
    frozen = Started(kind, repeat, first=True).double().to(device)
    frozen.layer.requires_grad_(False)
    check(frozen, (3,), device, fallback="vmap")


@pytest.mark.parametrize(
    "repeat", [lambda h, b: torch.zeros(b, 4) + h, lambda h, b: torch.stack([h] * b)]
)
def test_initial_states_of_cells(repeat: Callable[[Tensor, int], Tensor]) -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.start = nn.LSTMCell(5, 4), nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            state = [repeat(self.start, len(x)), repeat(self.start.sin(), len(x))]
            for t in range(x.shape[1]):
                state = list(self.cell(x[:, t], state))
            return state[0]

    model = Steps().double()
    check(model, (3, 4), torch.device("cpu"), fallback="vmap")
    assert not any(isinstance(m, ObservedFallback) for m in model.modules())


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
    model = between(Own(lambda m, x: F.dropout(x * m.p0, 0.5, m.training), (5,)), 5).to(device)
    plain, x = copy.deepcopy(model), torch.randn(3, 5, device=device)
    ak.observe(model, fallback="vmap")
    torch.manual_seed(3)
    y = model(x)
    torch.manual_seed(3)
    assert_close(y, plain(x))
    assert_close(model.eval()(x), plain.eval()(x))


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
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for samples in (4, 5, 6, 7, 9):  # six positions
        model.zero_grad()
        observer.reset()
        x = torch.randint(11, (samples, 6), device=device)
        loss(compiled(x)).backward()
        s, truth = observer.statistics(), per_sample(model, loss, x)
        assert_close(s.sample_norms_sq, truth.norms_sq)
        assert_close(s.inner_products, truth.inner_products)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


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


def test_modules_of_other_kinds(device: torch.device) -> None:
    known: list[type] = []

    class Registered(Positions):
        def __init_subclass__(cls) -> None:
            known.append(cls)
            if len(known) > 1:
                raise TypeError("already registered")

    class Child(Registered):
        pass

    model = Child("plain")
    ak.observe(model).detach()
    other = Positions("plain")
    other.forward = types.MethodType(Positions.forward, other)
    ak.observe(other)
    with pytest.raises(ValueError, match="may be positions"):
        other(torch.randint(11, (5, 5)))
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 3)))
    ak.observe(traced)
    assert copy.deepcopy(traced)(torch.randint(11, (5, 3))).shape == (5, 3, 3)
    assert not isinstance(traced, (ObservedFallback, ObservedModule))
