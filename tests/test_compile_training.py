"""Whole training runs, compiled, with growing batches."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from models import CLASSES, Transformer, cnn, cross_entropy, images, texts
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.data import TensorDataset
from training import batches, mse, network, weights

import adagrad_kernels as ak

# What torch's compiler warns of while it looks at custom functions, inputs, and its own modules.
pytestmark = [
    pytest.mark.filterwarnings("ignore:<class .*Function'> should not be inst:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]

MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], TensorDataset]]] = {
    "cnn": (cnn, images),
    "transformer": (lambda: Transformer(tied=False, depth=2), texts),
}
UPDATES = 12
NORM_TEST = ak.NormTest(0.5)


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Nothing compiled by another test is reused."""
    torch.compiler.reset()


class Run(NamedTuple):
    weights: Tensor
    sizes: list[int]  # of the batches
    micro_sizes: set[int]
    graphs: int


def train(
    kind: str,
    backend: str | None,
    dynamic: bool | None = None,
    whole: bool = False,
    test: object = NORM_TEST,
    **options: object,
) -> Run:
    """Trains; the forward pass and the loss are one compiled function unless backend is None.

    If `whole` the compiled function is the whole step, with backward(), step() and zero_grad().
    """
    torch.manual_seed(0)
    make, data = MODELS[kind]
    model = make().double()
    opt = ak.AdAdaGrad(
        model, lr=0.02, criterion=test, batch_size=4, max_batch_size=96,
        growth_limit=1.6, initial_accumulator_value=1e-2, **options,
    )  # fmt: skip
    loader = ak.AdaptiveDataLoader(data(), opt, max_micro_batch_size=40)
    counter = CompileCounterWithBackend(backend or "eager")

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(model(x), y)

    loss_fn = loss_of
    if backend is not None and not whole:
        loss_fn = torch.compile(loss_of, fullgraph=True, backend=counter, dynamic=dynamic)

    def step(x: Tensor, y: Tensor) -> None:
        loss_fn(x, y).backward()
        opt.step()
        opt.zero_grad()

    if whole:
        step = torch.compile(step, backend=counter, dynamic=dynamic)
    sizes, micro_sizes = [], set()
    while True:
        for x, y in loader:
            step(x.double() if x.is_floating_point() else x, y)
            micro_sizes.add(len(x))
            if opt.updated:
                sizes.append(opt.statistics.batch_size)
            if len(sizes) == UPDATES:
                return Run(weights(model), sizes, micro_sizes, counter.frame_count)


@pytest.mark.parametrize(
    ("kind", "whole", "test"),
    [
        ("cnn", False, NORM_TEST),
        ("cnn", True, NORM_TEST),
        ("transformer", True, NORM_TEST),
        ("cnn", False, ak.InnerProductTest(0.1, every_sample=True)),
        ("transformer", True, ak.AugmentedInnerProductTest(0.2, 0.4)),
    ],
)
def test_same_run_as_in_eager_mode_with_few_graphs(kind: str, whole: bool, test: object) -> None:
    eager = train(kind, None, test=test)
    compiled = train(kind, "aot_eager", whole=whole, test=test)
    assert compiled.sizes == eager.sizes
    torch.testing.assert_close(compiled.weights, eager.weights, rtol=1e-9, atol=1e-11)
    assert len(compiled.micro_sizes) >= 6
    assert compiled.sizes[-1] > 40  # several micro-batches
    # One for the first size and one for any; torch's convolution may split it by algorithm.
    assert 1 <= compiled.graphs <= 3


def test_a_graph_for_each_of_a_few_sizes() -> None:
    """Static shapes: one graph for every micro-batch shape, which `sizes` keeps few."""
    sizes = [4, 16, 32, 96]  # the last as three of 32
    compiled = train("cnn", "aot_eager", dynamic=False, sizes=sizes)
    assert sorted(set(compiled.sizes)) == sizes
    assert compiled.micro_sizes == {4, 16, 32}
    assert compiled.graphs == 3


@pytest.mark.slow
def test_inductor() -> None:
    """Told at once that sizes change, it compiles once."""
    eager = train("cnn", None)
    compiled = train("cnn", "inductor", dynamic=True)
    assert compiled.sizes == eager.sizes
    torch.testing.assert_close(compiled.weights, eager.weights, rtol=1e-9, atol=1e-11)
    assert compiled.graphs == 1


def test_the_loader_makes_room_before_anything_is_compiled() -> None:
    """A compiled graph cannot enlarge the probe that its samples' norms go into."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, CLASSES))
    opt = ak.AdAdaGrad(model, batch_size=4, max_batch_size=3000)
    probe = opt.cycle.observer.probe
    micro = probe.shape[1] + 100
    ak.AdaptiveDataLoader(images(), opt, max_micro_batch_size=probe.shape[1])
    assert opt.cycle.observer.probe is probe  # room enough
    loader = ak.AdaptiveDataLoader(images(), opt, max_micro_batch_size=micro)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    opt.controller.batch_size = micro
    x, y = next(iter(loader))
    assert len(x) == micro
    cross_entropy(compiled(x), y).backward()
    opt.step()
    assert opt.statistics.batch_size == micro

    small = ak.AdAdaGrad(nn.Linear(2, 1), batch_size=4, max_batch_size=8)
    before = small.cycle.observer.probe
    ak.AdaptiveDataLoader(images(), small, max_micro_batch_size=micro)
    assert small.cycle.observer.probe is before  # batches never get that large


@pytest.mark.parametrize("criterion", [ak.NormTest(0.5), ak.CoordinateNormTest(0.5)])
def test_micro_batches_of_a_model_whose_last_part_is_compiled(criterion: Any) -> None:
    """Its gradients are complete before the first eager layer's backward pass begins."""
    model = network()
    model[2].compile(backend="aot_eager")
    eager = network()
    size = {"batch_size": 16, "max_batch_size": 16}
    opt, expected = (ak.AdAdaGrad(m, criterion=criterion, **size) for m in (model, eager))
    for batch in batches(4, 8):
        for net, each in ((model, opt), (eager, expected)):
            mse(net, batch).backward()
            each.step()
            each.zero_grad()
        assert opt.updated == expected.updated
    assert opt.samples == 32
    assert opt.decision.ratio == pytest.approx(expected.decision.ratio)
