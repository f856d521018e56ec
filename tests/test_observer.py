"""What `observe` measures equals float64 autograd, one sample at a time."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CASES, cross_entropy
from per_sample import per_sample
from tolerance import assert_close_to_truth
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import adagrad_kernels as ak
from adagrad_kernels.layers import ObservedLinear, contributions

# torch's own convolution says so of even kernels; the observed one pads without saying it.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def squares(out: Tensor, y: Tensor) -> Tensor:
    """A mean over the batch and all else."""
    return (out.flatten(1).tanh() - y).square().mean()


def total(out: Tensor, y: Tensor) -> Tensor:
    """A sum over the batch."""
    return (out.flatten(1).tanh() - y).square().sum()


def train_on(model: nn.Module, loss: Callable[..., Tensor], *batch: Tensor) -> None:
    loss(model(batch[0]), *batch[1:]).backward()


def assert_statistics(
    s: ak.GradientStatistics,
    model: nn.Module,
    loss: Callable[..., Tensor],
    *batch: Tensor,
    factor: float = 1.0,
) -> None:
    """Every figure of `s` is that of the samples' own gradients, times `factor`."""
    truth = per_sample(model, loss, *batch)
    plain = per_sample(model, loss, *batch, dtype=next(model.parameters()).dtype)
    n = batch[0].shape[0]

    def check(what: str, actual: Tensor, of: Callable[[Any], Tensor], scale: Tensor | None = None):
        square = factor**2
        assert_close_to_truth(
            actual, of(truth) * square, (of(plain) * square).to(actual.dtype),
            None if scale is None else scale * square, what,
        )  # fmt: skip

    eps = torch.finfo(plain.g.dtype).eps
    assert s.batch_size == n
    check("norms", s.sample_norms_sq, lambda p: p.norms_sq)
    # Computed in the layers' dtype, added up in float64: rounding is that of the layers.
    scale = truth.norms_sq.mean() * (eps / torch.finfo(torch.float64).eps)
    check("‖ḡ‖²", s.grad_norm_sq, lambda p: p.mean_norm_sq, scale)
    if n == 1:
        assert torch.isnan(s.variance_trace)
        return
    check("tr Σ̂", s.variance_trace, lambda p: p.variance_trace, scale * n / (n - 1))
    if s.inner_products is not None:  # of the last micro-batch
        last = s.inner_products.shape[0]
        size = (truth.norms_sq.max() * truth.mean_norm_sq).sqrt()
        check("⟨g_i, ḡ⟩", s.inner_products, lambda p: p.inner_products[-last:], size)
    if s.coordinate_variance is not None:
        assert set(s.coordinate_variance) == set(truth.shapes)
        size = truth.g.square().sum(0).max() / (n - 1)
        for name, found in s.coordinate_variance.items():
            check(
                name, found, lambda p, name=name: p.by_parameter(p.coordinate_variance)[name], size
            )


@dataclass
class Net:
    """A random network and a batch for it."""

    layers: str
    samples: int
    shape: tuple[int, ...]
    make: Callable[[], nn.Module] = field(repr=False)

    def build(self, device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
        model = self.make().to(device)
        x = torch.randn(self.samples, *self.shape, device=device)
        with torch.no_grad():
            out = model(x).flatten(1)
        return model, x, torch.randn_like(out)


@st.composite
def linear_nets(draw: st.DrawFn) -> Net:
    sizes = draw(st.lists(st.integers(1, 9), min_size=2, max_size=4))
    biases = [draw(st.booleans()) for _ in sizes[1:]]
    positions = draw(st.lists(st.integers(1, 3), max_size=2))

    def make() -> nn.Module:
        layers: list[nn.Module] = []
        for i, o, bias in zip(sizes, sizes[1:], biases, strict=False):
            layers += [nn.Linear(i, o, bias=bias), nn.Tanh()]
        return nn.Sequential(*layers)

    return Net(f"{sizes} {biases}", draw(st.integers(1, 6)), (*positions, sizes[0]), make)


@st.composite
def conv_nets(draw: st.DrawFn) -> Net:
    pair = lambda low, high: draw(st.tuples(st.integers(low, high), st.integers(low, high)))  # noqa: E731
    groups = draw(st.integers(1, 3))
    channels, out = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 3))
    kernel, dilation = pair(1, 3), pair(1, 2)
    extent = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    size = tuple(e + draw(st.integers(0, 3)) for e in extent)
    padding: Any = draw(st.sampled_from(["same", "valid", "numbers"]))
    stride = (1, 1) if padding == "same" else pair(1, 3)
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    if padding == "numbers":  # reflection needs more pixels than padding
        padding = tuple(min(p, s - 1) for p, s in zip(pair(0, 2), size, strict=True))
    bias = draw(st.booleans())

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(
                channels, out, kernel, stride, padding, dilation, groups, bias, padding_mode=mode
            ),
            nn.Tanh(),
            nn.Conv2d(out, 2, 1),
        )

    text = f"{channels}→{out} {kernel=} {stride=} {padding=} {dilation=} {groups=} {mode=} {bias=}"
    return Net(text, draw(st.integers(1, 4)), (channels, *size), make)


nets = st.one_of(linear_nets(), conv_nets())


@settings(max_examples=40)
@given(linear_nets())
def test_linear_layers(device: torch.device, net: Net) -> None:
    model, *batch = net.build(device)
    observer = ak.observe(model, coordinates=True, inner_products=True)
    train_on(model, squares, *batch)
    assert_statistics(observer.statistics(), model, squares, *batch)


@settings(max_examples=40)
@given(conv_nets())
def test_convolutions(device: torch.device, net: Net) -> None:
    model, *batch = net.build(device)
    observer = ak.observe(model, coordinates=True, inner_products=True)
    train_on(model, squares, *batch)
    assert_statistics(observer.statistics(), model, squares, *batch)


@given(nets)
def test_gradients_are_those_of_the_plain_model(device: torch.device, net: Net) -> None:
    model, x, y = net.build(device)
    plain, truth = copy.deepcopy(model), copy.deepcopy(model).double()
    x_truth = x.double().requires_grad_()
    squares(truth(x_truth), y.double()).backward()
    x_plain, x_ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    squares(plain(x_plain), y).backward()
    ak.observe(model)
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)
    squares(model(x_ours), y).backward()
    assert_close_to_truth(x_ours.grad, x_truth.grad, x_plain.grad, what="input")
    scale = per_sample(truth, squares, x, y).g.abs().mean(0).max()
    for p, q, r in zip(model.parameters(), truth.parameters(), plain.parameters(), strict=True):
        assert_close_to_truth(p.grad, q.grad, r.grad, scale)


@given(nets)
def test_a_sum_over_the_batch_scales_every_gradient_by_n(device: torch.device, net: Net) -> None:
    model, *batch = net.build(device)
    observer = ak.observe(model, coordinates=True)
    train_on(model, total, *batch)
    s = observer.statistics()
    assert_statistics(s, model, total, *batch, factor=net.samples)


@given(nets, st.data())
def test_micro_batches_of_any_sizes_pool_to_the_batch(
    device: torch.device, net: Net, data: st.DataObject
) -> None:
    model, *batch = net.build(device)
    sizes, left = [], net.samples
    while left:
        sizes.append(data.draw(st.integers(1, left)))
        left -= sizes[-1]
    observer = ak.observe(model, coordinates=True)
    for part in zip(*(t.split(sizes) for t in batch), strict=True):
        train_on(model, total, *part)
    s = observer.statistics()
    assert observer.rows() == sizes
    assert_statistics(s, model, total, *batch, factor=net.samples)


@given(nets, st.integers(1, 3))
def test_mean_losses_of_equal_micro_batches_take_gradient_scale(
    device: torch.device, net: Net, count: int
) -> None:
    model, x, y = net.build(device)
    x, y = torch.cat([x + k for k in range(count)]), torch.cat([y - k for k in range(count)])
    observer = ak.observe(model, coordinates=True)
    for part in zip(x.chunk(count), y.chunk(count), strict=True):
        train_on(model, squares, *part)
    assert_statistics(observer.statistics(gradient_scale=1 / count), model, squares, x, y)


class Checkpointed(nn.Module):
    """Recomputes every layer in the backward pass."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.children():
            x = checkpoint(layer, x, use_reentrant=False)  # type: ignore[assignment]
        return x


@given(nets)
def test_non_reentrant_checkpointing(device: torch.device, net: Net) -> None:
    model, *batch = net.build(device)
    observer = ak.observe(model, coordinates=True, inner_products=True)
    train_on(Checkpointed(model), squares, *batch)
    s = observer.statistics()
    observer.detach()
    assert_statistics(s, model, squares, *batch)


class Outside(nn.Module):
    """The second layer's weight is used, and the layer is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.first(x), self.second.weight)


def small(device: torch.device, samples: int = 6) -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5), nn.Tanh(),
        nn.Linear(5, 3),
    ).to(device)  # fmt: skip
    x = torch.randn(samples, 2, 4, 4, device=device)
    return model, x, torch.randn(samples, 3, device=device)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy(device: torch.device, reduction: str) -> None:
    model, x, _ = small(device)
    y = torch.randint(3, (6,), device=device)

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out, y, reduction=reduction)

    observer = ak.observe(model, coordinates=True)
    train_on(model, loss, x, y)
    assert_statistics(
        observer.statistics(), model, loss, x, y, factor=6 if reduction == "sum" else 1
    )


def test_a_loss_scale_cancels_by_gradient_scale(device: torch.device) -> None:
    model, *batch = small(device)
    observer = ak.observe(model, coordinates=True)
    train_on(model, lambda *a: squares(*a) * 1024, *batch)
    assert_statistics(observer.statistics(gradient_scale=1 / 1024), model, squares, *batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_in_other_dtypes(device: torch.device, dtype: torch.dtype) -> None:
    model, *batch = small(device)
    model, batch = model.to(dtype), [t.to(dtype) for t in batch]
    observer = ak.observe(model, coordinates=True)
    train_on(model, squares, *batch)
    s = observer.statistics()
    truth = per_sample(model, squares, *batch)
    plain = per_sample(model, squares, *batch, dtype=dtype)
    found = torch.float64 if dtype == torch.float64 else torch.float32
    assert s.sample_norms_sq.dtype == found
    precise = plain.g.to(found)
    assert_close_to_truth(s.sample_norms_sq, truth.norms_sq, precise.square().sum(1))
    for name, variance in s.coordinate_variance.items():
        assert_close_to_truth(
            variance,
            truth.by_parameter(truth.coordinate_variance)[name],
            truth.by_parameter(precise.var(0))[name],
            truth.g.square().sum(0).max() / 5,
            name,
        )


def test_autocast(device: torch.device) -> None:
    model, *batch = small(device)
    truth = per_sample(model, squares, *batch)

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return squares(out.float(), y)

    with torch.autocast(device.type, torch.bfloat16):
        plain = per_sample(model, loss, *batch, dtype=torch.float32)
    observer = ak.observe(model, coordinates=True)
    with torch.autocast(device.type, torch.bfloat16):
        out = model(batch[0])
        assert out.dtype == torch.bfloat16
        value = loss(out, batch[1])
    value.backward()
    s = observer.statistics()
    assert_close_to_truth(s.sample_norms_sq, truth.norms_sq, plain.norms_sq)
    assert s.sample_norms_sq.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    for name, variance in s.coordinate_variance.items():
        assert_close_to_truth(
            variance,
            truth.by_parameter(truth.coordinate_variance)[name],
            plain.by_parameter(plain.coordinate_variance)[name],
            truth.g.square().sum(0).max() / 5,
            name,
        )


@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 5), nn.Conv1d(6, 5, 1), nn.ConvTranspose1d(6, 5, 1)]
)
def test_gradients_under_autocast_are_not_rounded(device: torch.device, layer: nn.Module) -> None:
    """Plain PyTorch rounds them to 16 bits on their way to the float32 parameters."""
    layer = copy.deepcopy(layer).to(device)
    ak.observe(layer)
    x = torch.randn((33, 6) if isinstance(layer, nn.Linear) else (33, 6, 1), device=device)
    with torch.autocast(device.type, torch.bfloat16):
        y = layer(x)
    upstream = torch.randn(y.shape, device=device).bfloat16()
    y.backward(upstream)
    g, a = upstream.double().flatten(1), x.bfloat16().double().flatten(1)
    truth = g.T @ a if not isinstance(layer, nn.ConvTranspose1d) else a.T @ g
    torch.testing.assert_close(layer.weight.grad.double().squeeze(-1), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad.double(), g.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "frozen",
    [("0.weight",), ("0.bias", "3.weight"), ("0.weight", "0.bias"), ("5.weight", "5.bias")],
)
def test_frozen_parameters_do_not_count(device: torch.device, frozen: tuple[str, ...]) -> None:
    model, *batch = small(device)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    observer = ak.observe(model, coordinates=True)
    train_on(model, squares, *batch)
    assert_statistics(observer.statistics(), model, squares, *batch)
    records = {r.name: r for r in observer.coverage()}
    assert set(records) == {name for name, _ in model.named_parameters()}
    for name, record in records.items():
        assert bool(record.method) == (name not in frozen)
        assert record.reason == ("frozen" if name in frozen else "")


def test_parameters_frozen_and_unfrozen_between_steps(device: torch.device) -> None:
    model, *batch = small(device)
    model[0].requires_grad_(False)
    observer = ak.observe(model, coordinates=True)
    for change in (lambda: model[0].requires_grad_(), lambda: model[3].requires_grad_(False)):
        change()
        model.zero_grad()
        observer.reset()
        train_on(model, squares, *batch)
        assert_statistics(observer.statistics(), model, squares, *batch)


def test_eval_mode_measures_too(device: torch.device) -> None:
    model, *batch = small(device)
    observer = ak.observe(model.eval(), coordinates=True)
    train_on(model, squares, *batch)
    assert_statistics(observer.statistics(), model, squares, *batch)


def test_forward_passes_without_grad_measure_nothing(device: torch.device) -> None:
    model, x, y = small(device)
    observer = ak.observe(model)
    with torch.no_grad():
        model(x[:2])
    with torch.inference_mode():
        model(x[:2])
    train_on(model, squares, x, y)
    assert_statistics(observer.statistics(), model, squares, x, y)


def test_a_forward_pass_without_backward_leaves_no_trace(device: torch.device) -> None:
    model, *batch = small(device)
    observer = ak.observe(model, coordinates=True)
    model(batch[0][:3])
    train_on(model, squares, *batch)
    assert_statistics(observer.statistics(), model, squares, *batch)


def test_a_layer_left_out_of_a_pass_has_gradient_zero(device: torch.device) -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)
            self.use_second = True

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + self.second(x) if self.use_second else self.first(x)

    model = Branch().to(device)
    x, y = torch.randn(5, 4, device=device), torch.randn(5, 3, device=device)
    observer = ak.observe(model)
    model.use_second = False
    train_on(model, squares, x, y)
    assert_statistics(observer.statistics(), model, squares, x, y)


def test_batches_larger_than_the_probe(device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).to(device)
    observer = ak.observe(model, coordinates=True)
    n = observer.probe.shape[1] + 1
    x, y = torch.randn(n, 2, device=device), torch.randn(n, 1, device=device)
    for part in ((x[:3], y[:3]), (x[3:], y[3:])):
        train_on(model, total, *part)
    assert_statistics(observer.statistics(), model, total, x, y, factor=n)
    observer.reset()
    model.zero_grad()
    train_on(model, squares, x, y)
    assert_statistics(observer.statistics(), model, squares, x, y)


def test_a_larger_batch_in_the_middle_of_a_backward_pass(device: torch.device) -> None:
    """A second forward pass that needs a larger probe does not lose the first one's samples."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).to(device)
    observer = ak.observe(model)
    n = observer.probe.shape[1] + 1
    x, y = torch.randn(n + 4, 2, device=device), torch.randn(n + 4, 1, device=device)
    few = total(model(x[:4]), y[:4])
    many = total(model(x[4:]), y[4:])
    few.backward()
    many.backward()
    assert_statistics(observer.statistics(), model, total, x, y, factor=n + 4)


def test_subclasses_that_keep_forward(device: torch.device) -> None:
    class Named(nn.Linear):
        note = "kept"

    class Scaled(nn.Conv2d):
        def reset_parameters(self) -> None:
            super().reset_parameters()
            with torch.no_grad():
                self.weight.mul_(2)

    model = nn.Sequential(Scaled(1, 2, 2), nn.Flatten(), Named(8, 2)).to(device)
    observer = ak.observe(model, coordinates=True)
    assert isinstance(model[0], Scaled)
    assert isinstance(model[2], Named)
    assert model[2].note == "kept"
    batch = torch.randn(4, 1, 3, 3, device=device), torch.randn(4, 2, device=device)
    train_on(model, squares, *batch)
    assert_statistics(observer.statistics(), model, squares, *batch)


@pytest.mark.parametrize("kind", ["depthwise-separable", "transformer, tied"])
def test_inner_products_in_pieces(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Of a few samples each, and of one where it is larger than a piece."""
    rows = []
    respond = ObservedLinear.respond

    def counting(self: Any, key: int, operands: tuple[Tensor, ...], params: Any) -> Tensor:
        rows.append(len(operands[0]))
        return respond(self, key, operands, params)

    torch.manual_seed(0)
    model, batch = CASES[kind].make(), CASES[kind].data()[:7]
    observer = ak.observe(model, inner_products=True)
    train_on(model, cross_entropy, *batch)
    observer.check()  # which contracts as well
    monkeypatch.setattr(ObservedLinear, "respond", counting)
    monkeypatch.setattr(contributions, "_PIECE", 20)
    assert_statistics(observer.statistics(), model, cross_entropy, *batch)
    assert 1 <= min(rows) <= max(rows) < 7
