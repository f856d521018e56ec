"""Observed models under `torch.compile(fullgraph=True)`."""

import copy
from collections.abc import Callable

import pytest
import torch
from models import CASES, Transformer, cross_entropy, texts
from per_sample import per_sample
from test_observer import Outside, assert_statistics, small, squares, train_on
from tolerance import assert_close_to_truth
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import adagrad_kernels as ak
from adagrad_kernels.functional import _call, _product

# What torch's compiler warns of while it looks at custom functions, inputs, and its own modules.
pytestmark = [
    pytest.mark.filterwarnings("ignore:<class .*Function'> should not be inst:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Nothing compiled by another test is reused."""
    torch.compiler.reset()


def compile_model(
    model: nn.Module, backend: str | CompileCounterWithBackend = "aot_eager"
) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, fullgraph=True, backend=backend)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("backend", "coordinates"), [("aot_eager", False), ("aot_eager", True), ("inductor", True)]
)
def test_statistics(device: torch.device, backend: str, coordinates: bool) -> None:
    model, x, y = small(device)
    observer = ak.observe(model, coordinates=coordinates)
    compiled = compile_model(model, backend)
    for _ in range(2):
        model.zero_grad()
        observer.reset()
        squares(compiled(x), y).backward()
        assert_statistics(observer.statistics(), model, squares, x, y)


def test_compiled_before_observed(device: torch.device) -> None:
    model, x, y = small(device)
    compiled = compile_model(model)
    squares(compiled(x), y).backward()
    model.zero_grad()
    observer = ak.observe(model)
    squares(compiled(x), y).backward()
    assert_statistics(observer.statistics(), model, squares, x, y)
    observer.detach()
    model.zero_grad()
    squares(compiled(x), y).backward()
    assert observer.micro_batches == 0


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_large_products_are_of_onednn_for_every_size_of_the_batch(
    monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    shapes: list[tuple[list[int], list[int]]] = []
    onednn = _product._onednn

    def counting(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
        shapes.append((list(x.shape), list(weight.shape)))
        return onednn(x, weight, *rest)

    monkeypatch.setattr(_product, "_onednn", counting)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(240, 280), nn.Tanh(), nn.Linear(280, 3))
    observer = ak.observe(model)
    compiled = compile_model(model, backend)
    for n in (40, 33, 7):
        x, y = torch.randn(n, 240, requires_grad=True), torch.randn(n, 3)
        model.zero_grad()
        observer.reset()
        shapes.clear()
        squares(compiled(x), y).backward()
        assert shapes == [([n, 240], [280, 240]), ([n, 280], [240, 280])]
        assert_statistics(observer.statistics(), model, squares, x.detach(), y)
        truth, plain = (
            torch.autograd.grad(squares(copy.deepcopy(model).to(d)(x.to(d)), y.to(d)), x)[0]
            for d in (torch.float64, torch.float32)
        )
        assert x.grad is not None
        assert_close_to_truth(x.grad, truth.double(), plain)


def graphs(model: nn.Module, shape: tuple[int, ...], observer: ak.Observer | None = None) -> int:
    """How many graphs growing batches take."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = compile_model(model, counter)
    device = next(model.parameters()).device
    for n in (2, 3, 8, 21, 64):
        x, y = torch.randn(n, *shape, device=device), torch.randn(n, 3, device=device)
        model.zero_grad()
        squares(compiled(x), y).backward()
        if observer is not None:
            assert observer.rows() == [n]
            assert_statistics(observer.statistics(), model, squares, x, y)
            observer.reset()
    return counter.frame_count


@pytest.mark.parametrize("inner_products", [False, True])
def test_growing_batches_make_two_graphs(device: torch.device, inner_products: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(device)
    observer = ak.observe(model, coordinates=True, inner_products=inner_products)
    assert graphs(model, (4,), observer) == 2  # one size, then any


def test_growing_batches_make_no_more_graphs_than_the_plain_model(device: torch.device) -> None:
    """torch's own convolution makes a graph more where it changes its algorithm."""
    model, *_ = small(device)
    plain = graphs(model, (2, 4, 4))
    assert graphs(model, (2, 4, 4), ak.observe(model)) == plain


def test_micro_batches(device: torch.device) -> None:
    model, x, y = small(device)
    observer = ak.observe(model)
    compiled = compile_model(model)
    for part in zip(x.split([2, 4]), y.split([2, 4]), strict=True):
        (squares(compiled(part[0]), part[1]) * (len(part[0]) / 6)).backward()
    s = observer.statistics()
    assert observer.rows() == [2, 4]
    assert_statistics(s, model, squares, x, y)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kept", [True, "all"])
def test_inner_products(device: torch.device, backend: str, kept: bool | str) -> None:
    model, x, y = small(device)
    observer = ak.observe(model, coordinates=True, inner_products=kept)
    compiled = compile_model(model, backend)
    for sizes in ([6], [2, 4]):
        model.zero_grad()
        observer.reset()
        for part in zip(x.split(sizes), y.split(sizes), strict=True):
            (squares(compiled(part[0]), part[1]) * (len(part[0]) / 6)).backward()
        s = observer.statistics()
        assert len(s.inner_products) == (6 if kept == "all" else sizes[-1])
        assert_statistics(s, model, squares, x, y)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["depthwise-separable", "transformer, tied", "encoder"])
def test_inner_products_of_models(kind: str) -> None:
    """Deep enough for the compiler to use memory again that it lends."""
    torch.manual_seed(0)
    model, batch = CASES[kind].make(), CASES[kind].data()[:7]
    observer = ak.observe(model, inner_products=True)
    compiled = compile_model(model, "inductor")
    for _ in range(2):
        model.zero_grad()
        observer.reset()
        cross_entropy(compiled(batch[0]), batch[1]).backward()
    assert_statistics(observer.statistics(), model, cross_entropy, *batch)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("coordinates", [False, True])
def test_tied_weights(backend: str, coordinates: bool) -> None:
    torch.manual_seed(0)
    model, batch = Transformer(tied=True, depth=1), texts(5)[:]
    observer = ak.observe(model, coordinates=coordinates)
    compiled = compile_model(model, backend)
    for _ in range(2):
        model.zero_grad()
        observer.reset()
        cross_entropy(compiled(batch[0]), batch[1]).backward()
        assert_statistics(observer.statistics(), model, cross_entropy, *batch)


def test_a_layer_used_twice_is_measured_where_graphs_tell(device: torch.device) -> None:
    layer, x = nn.Linear(3, 3).to(device), torch.randn(4, 3, device=device)
    observer = ak.observe(layer, inner_products=True)

    def twice(x: Tensor) -> Tensor:
        return layer(layer(x))

    loss = torch.compile(lambda x: twice(x).square().mean(), fullgraph=True, backend="aot_eager")
    loss(x).backward()
    found = observer.statistics()
    layer.zero_grad()
    observer.reset()
    twice(x).square().mean().backward()
    eager = observer.statistics()
    torch.testing.assert_close(found.sample_norms_sq, eager.sample_norms_sq)
    torch.testing.assert_close(found.inner_products, eager.inner_products)


def test_the_first_pass_is_checked_where_graphs_tell(device: torch.device) -> None:
    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.layer(x), self.layer.weight)

    def passes(gradient_before: bool) -> ak.Observer:
        model = Outside().to(device)
        if gradient_before:
            train_on(model, squares, x, y)
        observer = ak.observe(model, inner_products=True)
        squares(compile_model(model)(x), y).backward()
        return observer

    x, y = torch.randn(4, 3, device=device), torch.randn(4, 3, device=device)
    with pytest.raises(RuntimeError, match=r"'layer\.weight' has a gradient that the calls"):
        passes(gradient_before=False).statistics()
    passes(gradient_before=True).check()  # what was there before is not the calls'


def test_untold_calls_cannot_be_told_apart(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a replayed CUDA graph, which does not run the op that tells."""
    model, x, y = small(device)
    observer = ak.observe(model, inner_products=True)
    squares(compile_model(model)(x), y).backward()
    observer.reset()
    monkeypatch.setattr(_call, "_notify", lambda *_: None)
    model.zero_grad()
    squares(compile_model(model)(x), y).backward()
    with pytest.raises(RuntimeError, match="inner products cannot be measured where a CUDA graph"):
        observer.statistics()


def test_gradients_cleared_between_compiled_passes(device: torch.device) -> None:
    model, x, y = small(device)
    observer = ak.observe(model)
    compiled = compile_model(model)
    for _ in range(2):  # rightly
        squares(compiled(x), y).backward()
        observer.statistics()
        observer.reset(), model.zero_grad()
    squares(compiled(x), y).backward()
    model.zero_grad()
    squares(compiled(x), y).backward()
    with pytest.raises(RuntimeError, match="its samples are still counted"):
        observer.statistics()


def test_compiled_and_eager_micro_batches(device: torch.device) -> None:
    model, x, y = small(device)
    observer = ak.observe(model)
    compiled = compile_model(model)
    squares(compiled(x[:3]), y[:3]).backward()
    train_on(model, squares, x[3:], y[3:])
    assert_statistics(observer.statistics(gradient_scale=0.5), model, squares, x, y)


def test_some_layers_compiled(device: torch.device) -> None:
    model, x, y = small(device)
    observer = ak.observe(model, coordinates=True)
    head = torch.compile(model[3:], fullgraph=True, backend="aot_eager")
    squares(head(model[:3](x)), y).backward()
    assert_statistics(observer.statistics(), model, squares, x, y)


def test_checkpointed(device: torch.device) -> None:
    model, x, y = small(device)
    observer = ak.observe(model)

    def run(x: Tensor) -> Tensor:
        hidden = checkpoint(model[:3], x, use_reentrant=False)
        return checkpoint(model[3:], hidden, use_reentrant=False)  # type: ignore[return-value]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    squares(compiled(x), y).backward()
    assert_statistics(observer.statistics(), model, squares, x, y)


def test_autocast(device: torch.device) -> None:
    model, x, y = small(device)
    observer = ak.observe(model)
    compiled = compile_model(model)
    norms = []
    for run in (model, compiled):
        observer.reset()
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            loss = squares(run(x).float(), y)
        loss.backward()
        norms.append(observer.statistics().sample_norms_sq)
    torch.testing.assert_close(*norms, rtol=1e-6, atol=0)


def test_frozen_and_unfrozen(device: torch.device) -> None:
    model, x, y = small(device)
    model[0].requires_grad_(False)
    observer = ak.observe(model)
    compiled = compile_model(model)
    for frozen in (False, True):
        squares(compiled(x), y).backward()
        assert_statistics(observer.statistics(), model, squares, x, y)
        model.requires_grad_(not frozen)
        if torch.__version__ < "2.13":  # which does not notice that
            torch.compiler.reset()
        model.zero_grad()
        observer.reset()


def test_a_larger_batch_than_the_probe_says_what_to_do(device: torch.device) -> None:
    model = nn.Linear(2, 1).to(device)
    observer = ak.observe(model)
    n = observer.probe.shape[1] + 1
    x, y = torch.randn(n, 2, device=device), torch.randn(n, 1, device=device)
    compiled = compile_model(model)
    with pytest.raises(Exception, match=r"observer\.reserve\(\)"):
        compiled(x)
    observer.reserve(n)
    torch.compiler.reset()
    squares(compile_model(model)(x), y).backward()
    assert observer.statistics().batch_size == n


class Queries(nn.Module):
    """One attention layer, to itself and then to something else."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.attention.out_proj.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(x, x, x)[0]
        return self.attention(y, x, x)[0]


def test_one_layer_by_several_calls(device: torch.device) -> None:
    model = Queries().double().to(device)
    observer = ak.observe(model, inner_products=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 5, 4, dtype=torch.float64, device=device)

    def loss(y: Tensor) -> Tensor:
        return y.sin().flatten(1).sum(1).mean()

    loss(compiled(x)).backward()
    truth = per_sample(model, loss, x)
    assert_close(observer.statistics().sample_norms_sq, truth.norms_sq)


class Partly(nn.Module):
    """An embedding, whose forward pass is watched, and layers that are partly frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(9, 4), nn.Linear(4, 4)
        self.linear.weight.requires_grad_(False)
        self.norms = nn.Sequential(nn.BatchNorm1d(4).eval(), nn.GroupNorm(2, 4))
        self.norms[1].weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norms(self.linear(self.embedding(x)).flatten(0, 1)).unflatten(0, x.shape)


def test_partly_frozen_layers_in_a_watched_model(device: torch.device) -> None:
    model = Partly().double().to(device)
    observer = ak.observe(model, folded=["norms"])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randint(9, (4, 5), device=device)

    def loss(y: Tensor) -> Tensor:
        return y.sin().flatten(1).sum(1).mean()

    loss(compiled(x)).backward()
    truth = per_sample(model, loss, x)
    assert_close(observer.statistics().sample_norms_sq, truth.norms_sq)


def test_layers_that_disagree_about_the_samples(device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Flatten(0, 1), nn.Linear(4, 1)).to(device)
    observer = ak.observe(model)
    compile_model(model)(torch.randn(5, 2, 3, device=device)).square().mean().backward()
    with pytest.raises(RuntimeError, match="disagree about the number of samples"):
        observer.statistics()


def test_a_layer_used_twice(device: torch.device) -> None:
    layer = nn.Linear(3, 3).to(device)
    observer = ak.observe(layer)
    compiled = torch.compile(lambda x: layer(layer(x)), fullgraph=True, backend="aot_eager")
    compiled(torch.randn(4, 3, device=device)).square().mean().backward()
    with pytest.raises(RuntimeError, match="used twice"):
        observer.statistics()


def test_a_parameter_used_outside_its_layer(device: torch.device) -> None:
    model = Outside().to(device)
    observer = ak.observe(model)
    compile_model(model)(torch.randn(4, 3, device=device)).square().mean().backward()
    with pytest.raises(RuntimeError, match="no statistics"):
        observer.statistics()


def test_the_gradient_itself(device: torch.device) -> None:
    model, x, y = small(device)
    truth = per_sample(model, squares, x, y)
    plain = per_sample(model, squares, x, y, dtype=torch.float32)
    ak.observe(model)
    squares(compile_model(model)(x), y).backward()

    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert_close_to_truth(found, truth.mean, plain.mean)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("inner_products", [False, True])
def test_replayed_cuda_graphs(inner_products: bool) -> None:
    """The compiler's own: recorded in the second pass, replayed from the third on."""
    model, x, y = small(torch.device("cuda"))
    observer = ak.observe(model, inner_products=inner_products)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for _ in range(5):
        x, y = torch.randn_like(x), torch.randn_like(y)
        model.zero_grad()
        observer.reset()
        torch.compiler.cudagraph_mark_step_begin()
        squares(compiled(x), y).backward()
        assert_statistics(observer.statistics(), model, squares, x, y)
