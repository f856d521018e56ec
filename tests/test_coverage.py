"""`coverage()` and the cost model: against operations counted one by one, and torch's counter."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from layer_cases import CASES, Custom, Language, between
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import adagrad_kernels as ak
from adagrad_kernels import _library, costs
from adagrad_kernels.costs import Call

compiled = pytest.mark.skipif(_library.load_error is not None, reason="no compiled kernels")


class Counter:
    """Counts the operations of a computation that is written out in `Number`s."""

    def __init__(self) -> None:
        self.operations = 0

    def zeros(self, *shape: int) -> list:
        if not shape:
            return Number(self)  # type: ignore[return-value]
        return [self.zeros(*shape[1:]) for _ in range(shape[0])]


class Number:
    """A number without a value: each product and each sum is an operation."""

    def __init__(self, counter: Counter) -> None:
        self.counter = counter

    def _operation(self, other: Number) -> Number:
        self.counter.operations += 1
        return Number(self.counter)

    __add__ = __mul__ = _operation


def counted(compute: Callable[[Counter], None]) -> int:
    counter = Counter()
    compute(counter)
    return counter.operations


SAMPLES, POSITIONS, ROWS, COLUMNS = 3, 4, 5, 2


def dot(counter: Counter, n: int) -> Number:
    u, v = counter.zeros(n), counter.zeros(n)
    total = counter.zeros()
    for x, y in zip(u, v, strict=True):
        total = total + x * y
    return total


def plain(c: Counter, positions: int, bias: bool) -> None:
    """Σ_i Σ_t g_it ⊗ x_it, and of the bias Σ g_it."""
    for _ in itertools.product(range(SAMPLES * positions), range(ROWS), range(COLUMNS)):
        c.zeros() + c.zeros() * c.zeros()
    for _ in itertools.product(range(SAMPLES * positions), range(ROWS if bias else 0)):
        c.zeros() + c.zeros()


def gradient_of_one(c: Counter, positions: int) -> None:
    for _ in itertools.product(range(positions), range(ROWS), range(COLUMNS)):
        c.zeros() + c.zeros() * c.zeros()


def taken_up(c: Counter, coordinates: bool) -> None:
    """One element of c_i: into the sum, its square into the norm and the coordinate sum."""
    c.zeros() + c.zeros()
    square = c.zeros() * c.zeros()
    c.zeros() + square
    if coordinates:
        c.zeros() + square


def direct(c: Counter, positions: int, bias: bool, coordinates: bool) -> None:
    for _ in range(SAMPLES):
        gradient_of_one(c, positions)
        for _ in range(ROWS * COLUMNS):
            taken_up(c, coordinates)
        for _ in range(ROWS if bias else 0):
            for _ in range(positions):
                c.zeros() + c.zeros()
            taken_up(c, coordinates)


def gram(c: Counter, positions: int, bias: bool, coordinates: bool) -> None:
    assert not coordinates
    plain(c, positions, False)
    for _ in range(SAMPLES):
        for first in range(positions):
            for _ in range(first, positions):
                c.zeros() + dot(c, ROWS) * dot(c, COLUMNS)
        for _ in range(ROWS if bias else 0):
            for _ in range(positions):
                c.zeros() + c.zeros()
            taken_up(c, coordinates)


def outer(c: Counter, positions: int, bias: bool, coordinates: bool) -> None:
    assert positions == 1
    plain(c, 1, bias)
    for _ in range(SAMPLES):
        length = dot(c, COLUMNS)
        if bias:
            length = length + c.zeros()  # one
        dot(c, ROWS) * length
    if not coordinates:
        return
    squares = [c.zeros() * c.zeros() for _ in range(SAMPLES * (ROWS + COLUMNS))]
    assert len(squares) == SAMPLES * (ROWS + COLUMNS)
    plain(c, 1, False)
    for _ in range(SAMPLES * (ROWS if bias else 0)):
        c.zeros() + c.zeros() * c.zeros()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("method", "compute", "positions", "coordinates"),
    [
        ("outer", outer, 1, False),
        ("outer", outer, 1, True),
        ("gram", gram, POSITIONS, False),
        ("direct", direct, POSITIONS, False),
        ("direct", direct, POSITIONS, True),
        ("reference", direct, POSITIONS, True),
    ],
)
def test_operations_of_a_product(
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    compute: Callable[..., None],
    positions: int,
    coordinates: bool,
    bias: bool,
) -> None:
    monkeypatch.setattr(costs, "choose", lambda *_: method)
    sizes = SAMPLES * positions * COLUMNS, SAMPLES * positions * ROWS
    call = Call(SAMPLES, *sizes, bias=ROWS if bias else 0, coordinates=coordinates)
    cost = costs.product(call, positions, ROWS, COLUMNS)
    with_statistics = counted(lambda c: compute(c, positions, bias, coordinates))
    assert cost.extra_flops == with_statistics - counted(lambda c: plain(c, positions, bias))
    assert cost.method == costs.METHODS[method]


@pytest.mark.parametrize("coordinates", [False, True])
def test_operations_of_scales_and_embeddings(coordinates: bool) -> None:
    def scale(c: Counter, statistics: bool) -> None:
        channels, positions = 5, 4
        for _ in range(SAMPLES * positions * channels):
            c.zeros() * c.zeros() + c.zeros()  # forward
            c.zeros() + c.zeros() * c.zeros()  # gradient of the scale
            c.zeros() + c.zeros()  # of the shift
            c.zeros() * c.zeros()  # of the input
        for _ in range(2 * SAMPLES * channels if statistics else 0):
            taken_up(c, coordinates)

    cost = costs.scale(
        Call(SAMPLES, SAMPLES * 20, SAMPLES * 20, bias=5, coordinates=coordinates), 5, True
    )
    assert cost.flops == counted(lambda c: scale(c, False))
    assert cost.extra_flops == counted(lambda c: scale(c, True)) - cost.flops

    def embedding(c: Counter, statistics: bool) -> None:
        for _ in range(SAMPLES * POSITIONS * COLUMNS):  # tokens that are all different
            c.zeros() + c.zeros()
            if statistics:
                square = c.zeros() * c.zeros()
                c.zeros() + square
                if coordinates:
                    c.zeros() + square

    call = Call(
        SAMPLES, SAMPLES * POSITIONS, SAMPLES * POSITIONS * COLUMNS, coordinates=coordinates
    )
    cost = costs.embedding(call, SAMPLES * POSITIONS, 7, COLUMNS)
    assert cost.flops == counted(lambda c: embedding(c, False))
    assert cost.extra_flops == counted(lambda c: embedding(c, True)) - cost.flops


@pytest.mark.parametrize("input_grad", [False, True])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Linear(5, 7), (6, 5)),
        (lambda: nn.Linear(5, 7, bias=False), (6, 4, 2, 5)),
        (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (4, 4, 9)),
        (lambda: nn.Conv2d(4, 6, (3, 2), dilation=2, padding="same"), (4, 4, 8, 9)),
        (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (4, 4, 8, 9)),
        (lambda: nn.Conv3d(2, 3, 2), (4, 2, 4, 3, 5)),
        (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (4, 4, 5)),
        (lambda: nn.ConvTranspose2d(4, 6, 3), (4, 4, 5, 6)),
    ],
)
def test_the_layer_itself_costs_what_torch_counts(
    layer: Callable[[], nn.Module], shape: tuple[int, ...], input_grad: bool
) -> None:
    model = layer()
    x = torch.randn(shape, requires_grad=input_grad)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    observer = ak.observe(model)
    model(x)
    (cost,) = observer.coverage().costs().values()
    assert cost.flops == counter.get_total_flops()


def cancelling(samples: int, positions: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Operands whose positions nearly cancel: Gram loses all digits of the norms, direct few."""
    g, x = torch.randn(samples, 1, rows), torch.randn(samples, 1, columns)
    g, x = g.repeat(1, positions, 1), x.repeat(1, positions, 1)
    signs = torch.tensor([1.0, -1.0]).repeat(positions)[:positions].reshape(1, -1, 1)
    return g, x * signs * (1 + torch.linspace(0, 2**-12, positions).reshape(1, -1, 1))


def relative_error(norms: Tensor, g: Tensor, x: Tensor) -> float:
    truth = (g.double().mT @ x.double()).square().sum((1, 2))
    return ((norms.double() - truth).abs() / truth).max().item()


@compiled
@pytest.mark.parametrize(
    ("positions", "rows", "columns"),
    [(4, 23, 27), (4, 24, 25), (8, 48, 48), (8, 48, 49), (32, 192, 192), (32, 193, 193),
     (34, 400, 400)],
)  # fmt: skip
def test_the_method_is_the_one_that_the_kernel_takes(
    positions: int, rows: int, columns: int
) -> None:
    """Told by its rounding errors, for shapes on both sides of the choice."""
    g, x = cancelling(4, positions, rows, columns)
    for coordinates in (False, True):
        probe = ak.ops.linear_weight_grad(g, x, 4, True, False, coordinates)[2]
        loses_digits = relative_error(probe[0], g, x) > 0.02
        method = _library.method(rows, columns, positions, coordinates, True)
        assert method == ("gram" if loses_digits else "direct")
        # A 1×1 convolution is the same product.
        image = [t.mT.unsqueeze(2).contiguous() for t in (g, x)]
        one, zero = [1, 1], [0, 0]
        probe = ak.ops.conv_weight_grad(
            *image, one, one, zero, one, 1, 4, True, False, coordinates
        )[2]
        loses_digits = relative_error(probe[0], g, x) > 0.02
        method = _library.method(rows, columns, positions, coordinates, False)
        assert method == ("gram" if loses_digits else "direct")


@compiled
def test_methods_of_layers() -> None:
    def method(layer: nn.Module, *shape: int, **options: bool) -> str:
        observer = ak.observe(layer, **options)
        layer(torch.randn(shape))
        (record, *_) = observer.coverage()
        observer.detach()
        return record.method

    assert method(nn.Linear(64, 64), 8, 64) == "outer product"
    assert method(nn.Linear(64, 64), 8, 4, 64) == "Gram"
    assert method(nn.Linear(64, 64), 8, 4, 64, coordinates=True) == "direct"
    assert method(nn.Linear(64, 64), 8, 40, 64) == "direct"
    assert method(nn.Conv2d(64, 64, 3), 8, 64, 4, 4) == "Gram"
    assert method(nn.Conv2d(64, 64, 3, groups=64), 8, 64, 4, 4) == "direct"


def seen(model: nn.Module, x: Tensor, **options) -> ak.Observer:
    observer = ak.observe(model, **options)
    model(x)
    return observer


def test_nothing_is_estimated_before_a_forward_pass() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    observer = ak.observe(model)
    assert [record.cost for record in observer.coverage()] == [None] * 4
    lines = str(observer.coverage()).splitlines()
    assert [line.endswith("not seen yet") for line in lines] == [False, True, False, True, False]
    with torch.no_grad():  # not measured, so not seen
        model(torch.randn(4, 2))
    assert str(observer.coverage()).splitlines() == lines
    model(torch.randn(4, 2))
    assert "not seen yet" not in str(observer.coverage())
    assert str(observer.coverage()).splitlines()[-1].startswith("all layers with a cost")
    observer.detach()
    assert all("seen" not in layer.__dict__ for layer in model)


def test_the_table_shows_the_ratios() -> None:
    """T = 1: b(2(O + I) + 2) more operations than 3·2·b·O·I, X + Y more numbers than 3(X+Y+W)."""
    layer = nn.Linear(30, 20)
    table = str(seen(layer, torch.randn(8, 30, requires_grad=True)).coverage()).splitlines()
    flops = (2 * 50 + 2) / (6 * 600)
    moved = 8 * 50 / (3 * (8 * 50 + 600))
    assert table[1].split()[-2:] == [f"+{flops:.1%}", f"+{moved:.1%}"]
    assert table[2].split() == ["bias", "Linear", "outer", "product"]
    assert table[-1].split()[-2:] == table[1].split()[-2:]


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.fallback == "error"])
def test_every_layer_has_a_cost_that_grows_with_what_is_measured(name: str) -> None:
    case = CASES[name]
    x = case.input(torch.device("cpu"), torch.float32)
    model = case.make()
    found = []
    for options in ({}, {"coordinates": True}, {"coordinates": True, "inner_products": True}):
        observer = seen(model, x, **options)
        found.append(observer.coverage())
        observer.detach()
    assert all((record.cost is None) == (record.reason == "frozen") for record in found[0])
    for owner, cost in found[0].costs().items():
        by_coordinate, products = (coverage.costs()[owner] for coverage in found[1:])
        assert cost.flops == by_coordinate.flops > 0
        assert cost.extra_flops > 0
        assert by_coordinate.extra_flops != cost.extra_flops
        assert cost.extra_bytes < by_coordinate.extra_bytes < products.extra_bytes
        assert by_coordinate.extra_flops < products.extra_flops


def test_frozen_parts_cost_nothing() -> None:
    layer, x = nn.Linear(6, 5), torch.randn(4, 3, 6, requires_grad=True)
    whole = seen(layer, x)
    (cost,) = whole.coverage().costs().values()
    whole.detach()
    layer.weight.requires_grad_(False)
    observer = seen(layer, x)
    frozen, bias = observer.coverage()
    assert (frozen.reason, frozen.cost) == ("frozen", None)
    assert bias.cost is not None
    assert bias.cost.extra_flops == 3 * 4 * 5
    assert bias.cost.flops == cost.flops * 2 // 3  # no weight gradient


def test_several_calls_of_one_layer_add_up() -> None:
    """Cross attention: three projections with a third of the weight each, of as many numbers."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(4, 5, 8, requires_grad=True)
    costs_of = {}
    for name, args in (("self", (x, x, x)), ("cross", (x, x.sin(), x.cos()))):
        observer = ak.observe(attention)
        attention(*args)
        costs_of[name] = observer.coverage().costs()
        observer.detach()
    same, cross = costs_of["self"][""], costs_of["cross"][""]
    assert same.flops == cross.flops == 3 * (2 * 4 * 5 * 8 * 24)
    assert cross.bytes == same.bytes + 2 * 3 * 4 * (4 * 5 * 8)  # the input is read three times
    assert set(costs_of["self"]) == {"", "out_proj"}


def test_low_precision_is_converted_on_the_cpu() -> None:
    layer, x = nn.Linear(6, 5), torch.randn(4, 3, 6, requires_grad=True)
    observer = seen(layer.bfloat16(), x.bfloat16())
    (cost,) = observer.coverage().costs().values()
    numbers = 4 * 3 * (6 + 5) + 6 * 5
    assert cost.bytes == 3 * 2 * numbers
    assert cost.extra_bytes == (2 + 4) * numbers


def test_what_cannot_be_estimated_says_so() -> None:
    observer = seen(between(Custom(), 4)[:2], torch.randn(6, 5), fallback="vmap")
    coverage = observer.coverage()
    assert [r.cost is None for r in coverage] == [r.layer == "Custom" for r in coverage]
    line = next(line for line in str(coverage).splitlines() if line.startswith("1.matrix"))
    assert line.endswith("unknown")
    tied = seen(Language(tied=True), torch.randint(11, (6, 9))).coverage()
    methods = {record.layer: record.method for record in tied}
    assert methods["Embedding"].endswith("cross terms")
    assert methods["Linear"].endswith("cross terms")
    assert methods["LayerNorm"] == "sums by channel"


@pytest.mark.parametrize(
    ("layer", "passes"),
    [
        (nn.LayerNorm(5), 0),
        (nn.RMSNorm(5), 0),
        (nn.InstanceNorm1d(4, affine=True), 0),
        (nn.InstanceNorm1d(4, affine=True, track_running_stats=True), 4),
        (nn.PReLU(4), 15),
    ],
)
def test_layers_in_several_kernels_move_more_bytes(layer: nn.Module, passes: int) -> None:
    x = torch.randn(6, 4, 5, requires_grad=True)
    (cost,) = seen(layer, x).coverage().costs().values()
    assert cost.bytes == 5 * 4 * x.numel()  # forward 2, backward 2 for the parameters, 1 written
    assert cost.extra_bytes == passes * 4 * x.numel()


@pytest.mark.parametrize("positions", [4, 1024])
def test_convolutions_on_a_gpu_are_asked_of_their_own_kernels(
    monkeypatch: pytest.MonkeyPatch, positions: int
) -> None:
    conv = pytest.importorskip("adagrad_kernels.triton_kernels.conv")
    monkeypatch.setattr(costs.triton_kernels, "load_error", "")
    call = costs.Call(samples=8, inputs=1, outputs=1, device="cuda")
    found = costs.choose(call, positions, 512, 4608, linear=False)
    assert found == conv.method_of(positions, 512, 4608, False)
    assert found == ("gram" if positions == 4 else "direct")
