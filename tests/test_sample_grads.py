"""Inner products by other ways than the layers' response to the gradient: from c_i, or its sum."""

from collections.abc import Callable

import pytest
import torch
from per_sample import per_sample
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import adagrad_kernels as ak
from adagrad_kernels.functional.conv import sample_grads_are_cheap
from adagrad_kernels.layers import linear


def loss(y: Tensor) -> Tensor:
    return y.flatten(1).square().sum(1).mean()


def frozen(layer: nn.Module, name: str) -> nn.Module:
    getattr(layer, name).requires_grad_(False)
    return layer


# name: (model, shape of a sample); pixels enough that c_i of convolutions are kept
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(3, 5, 4), (3, 200)),
    "conv2d": (
        lambda: nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.GroupNorm(1, 5)), (2, 12, 12),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 3, (2, 3, 1)), (2, 6, 6, 9)),
    "strides": (lambda: nn.Conv2d(3, 20, 3, (2, 1), (0, 2), (1, 2)), (3, 25, 18)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 5, 3, 2, 1), (3, 12, 13)),
    "transposed, groups": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False), (4, 150)),
    "groups": (lambda: nn.Conv2d(6, 12, 3, groups=3, bias=False), (6, 14, 14)),
    "other padding": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 12, 12)),
    "frozen bias": (lambda: frozen(nn.Conv2d(2, 3, 3), "bias"), (2, 14, 14)),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm([3, 6]), nn.LayerNorm(6)), (3, 4),
    ),
    "batch norm": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3), frozen(nn.BatchNorm1d(4), "bias")), (2, 150),
    ),
}  # fmt: skip


def kept(observer: ak.observer.Observer) -> dict[str, bool]:
    """By the layer's name whether c_i was kept, of the last micro-batch."""
    return {
        call.layer.observed_name: call.sample_grads is not None for call in observer._kept_calls[-1]
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_statistics(device: torch.device, name: str, dtype: torch.dtype) -> None:
    build, shape = MODELS[name]
    model = build().to(device, dtype)
    observer = ak.observe(model, coordinates=True, inner_products=True)
    x = torch.randn(17, *shape, device=device, dtype=dtype)
    out = model(x)
    (out * out.detach()).flatten(1).sum(1).mean().backward()
    if device.type == "cpu":
        chosen = kept(observer)
        assert any(chosen.values())
        for call in observer._kept_calls[-1]:
            assert bool(call.saved) != chosen[call.layer.observed_name]
    s = observer.statistics()
    observer.detach()
    if name == "batch norm":  # couples the samples: what they add to the gradient is measured
        flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        torch.testing.assert_close(
            s.inner_products.mean().float(), flat.double().square().sum().float(),
            rtol=3e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-6,
        )  # fmt: skip
        return
    truth = per_sample(model, lambda y: (y * y.detach()).flatten(1).sum(1).mean(), x)
    close = (
        {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-3}
    )
    if dtype == torch.bfloat16:
        close = {"rtol": 5e-2, "atol": 5e-2 * truth.inner_products.abs().max().item()}
    found, norms = s.inner_products.double().cpu(), s.sample_norms_sq.double().cpu()
    torch.testing.assert_close(found, truth.inner_products.cpu(), **close)
    torch.testing.assert_close(norms, truth.norms_sq.cpu(), **close)
    variance = torch.cat([v.flatten().double().cpu() for v in s.coordinate_variance.values()])
    torch.testing.assert_close(variance, truth.coordinate_variance.cpu(), **close)


class Uses(nn.Module):
    """A convolution that is called once, twice, checkpointed, or tied to another."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 2, 3, padding=1)
        self.second = nn.Conv2d(2, 2, 3, padding=1)
        self.how = how
        if how == "tied":
            self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "twice":
            x = self.first(x).tanh()
        if self.how == "checkpointed":
            return self.second(checkpoint(self.first, x, use_reentrant=False).tanh())
        return self.second(self.first(x).tanh())


@pytest.mark.parametrize(
    ("how", "first", "second"),
    [
        ("once", True, True),
        ("twice", False, True),
        ("tied", False, False),
        ("checkpointed", True, True),
    ],
)
def test_operands_are_kept_where_uses_must_be_joined(how: str, first: bool, second: bool) -> None:
    model = Uses(how).double()
    observer = ak.observe(model, inner_products=True)
    x = torch.randn(16, 2, 12, 12).double().requires_grad_()
    loss(model(x)).backward()
    assert kept(observer) == {"first": first, "second": second}
    s = observer.statistics()
    observer.detach()
    truth = per_sample(model, loss, x.detach())
    torch.testing.assert_close(s.inner_products, truth.inner_products)
    torch.testing.assert_close(s.sample_norms_sq, truth.norms_sq)


@pytest.mark.parametrize("every", [True, "all"])
def test_micro_batches(every: bool | str) -> None:
    model = nn.Conv2d(2, 3, 3, padding=1).double()
    observer = ak.observe(model, inner_products=every)
    x = torch.randn(40, 2, 12, 12).double()
    for part in x.split([20, 4, 16]):  # of 4 samples the operands are kept
        (loss(model(part)) * len(part) / len(x)).backward()
    s = observer.statistics()
    observer.detach()
    truth = per_sample(model, loss, x)
    last = slice(None) if every == "all" else slice(24, None)
    torch.testing.assert_close(s.inner_products, truth.inner_products[last])


@pytest.mark.parametrize(
    ("shape", "kept_"),
    [((16, 2, 12, 12), True), ((15, 2, 12, 12), False), ((16, 2, 10, 10), False)],
)
def test_few_samples_or_pixels_keep_the_operands(shape: tuple[int, ...], kept_: bool) -> None:
    model = nn.Conv2d(2, 3, 3, padding=1)
    observer = ak.observe(model, inner_products=True)
    loss(model(torch.randn(shape))).backward()
    assert kept(observer) == {"": kept_}


def test_without_inner_products_nothing_is_kept() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3))
    observer = ak.observe(model)
    for _ in range(2):  # the first one is checked, from the operands
        observer.reset()
        model.zero_grad()
        loss(model(torch.randn(16, 2, 14, 14))).backward()
    assert observer._kept_calls == []


def test_gradient_from_elsewhere_is_still_found() -> None:
    model = nn.Conv2d(2, 3, 3)
    observer = ak.observe(model, inner_products=True)
    y = loss(model(torch.randn(16, 2, 14, 14))) + model.weight.square().sum()
    y.backward()
    with pytest.raises(RuntimeError, match="'weight' has a gradient that the calls of its layer"):
        observer.statistics()


@pytest.fixture
def summed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each linear layer that was asked whether ⟨c_i, Σ_j c_j⟩ was taken."""
    found: list[bool] = []
    of = linear.linear_products

    def watched(x: Tensor, grad_out: Tensor, grads: dict[str, Tensor]) -> Tensor | None:
        products = of(x, grad_out, grads)
        found.append(products is not None)
        return products

    monkeypatch.setattr(linear, "linear_products", watched)
    return found


def conv1d(inputs: int, outputs: int) -> nn.Module:
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(outputs, inputs)


LINEAR: dict[str, Callable[[], nn.Module]] = {
    "bias": lambda: nn.Linear(40, 30),
    "no bias": lambda: nn.Linear(40, 30, bias=False),
    "frozen bias": lambda: frozen(nn.Linear(40, 30), "bias"),
    "frozen weight": lambda: frozen(nn.Linear(40, 30), "weight"),
    "two": lambda: nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 20)),
    "Conv1D": lambda: conv1d(40, 30),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LINEAR)
def test_linear_layers_of_few_samples(
    device: torch.device, summed: list[bool], name: str, dtype: torch.dtype
) -> None:
    model = LINEAR[name]().to(device, dtype)
    observer = ak.observe(model, inner_products=True)
    x = torch.randn(5, 40, device=device, dtype=dtype)
    loss(model(x)).backward()
    s = observer.statistics()
    observer.detach()
    rounded = dtype == torch.bfloat16  # is the gradient, which is not their sum then
    number = 2 if name == "two" else 1
    asked = not rounded and device.type == "cpu"
    assert summed == ([name != "frozen weight"] * number if asked else [])
    found, truth = s.inner_products.double().cpu(), per_sample(model, loss, x).inner_products.cpu()
    if rounded:
        close = {"rtol": 5e-2, "atol": 5e-2 * truth.abs().max().item()}
    else:
        close = {"rtol": 1e-10 if dtype == torch.float64 else 1e-4, "atol": 1e-9}
    torch.testing.assert_close(found, truth, **close)


def test_many_samples_or_positions_take_the_gradient(summed: list[bool]) -> None:
    model = nn.Linear(40, 30).double()
    observer = ak.observe(model, inner_products=True)
    for shape in ((9, 40), (5, 2, 40)):  # 2 · 9 · 70 > 40 · 30
        observer.reset()
        model.zero_grad()
        x = torch.randn(shape).double()
        loss(model(x)).backward()
        found = observer.statistics().inner_products
        torch.testing.assert_close(found, per_sample(model, loss, x).inner_products)
    assert summed == [False, False]
    observer.detach()


@pytest.mark.parametrize("how", ["accumulated", "tied", "twice"])
def test_gradients_that_are_no_sum_of_one_call(summed: list[bool], how: str) -> None:
    model = nn.Sequential(nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 30)).double()
    if how == "tied":
        model[2].weight = model[0].weight
    observer = ak.observe(model, inner_products=True)
    x = torch.randn(4, 30).double()
    run = nn.Sequential(*model, *model) if how == "twice" else model
    for part in x.split(2) if how == "accumulated" else [x]:
        (loss(run(part)) * len(part) / len(x)).backward()
    s = observer.statistics()
    assert summed == []
    truth = per_sample(nn.Sequential(*model, *model) if how == "twice" else model, loss, x)
    expected = truth.inner_products[2:] if how == "accumulated" else truth.inner_products
    torch.testing.assert_close(s.inner_products, expected)
    observer.detach()


def scaled(model: nn.Module, observer: ak.Observer) -> None:
    """As a GradScaler does."""
    for p in model.parameters():
        p.grad.div_(2.0)
    observer.accept_changes()


def masked(model: nn.Module, observer: ak.Observer) -> None:
    model[0].weight.grad.data[:15] = 0


CHANGES = {f.__name__: f for f in (scaled, masked)}


@pytest.mark.parametrize("how", [*CHANGES, "hooks"])
def test_gradients_that_are_changed_after_the_first_step(summed: list[bool], how: str) -> None:
    """No sum of the samples' any more: inner products are those with what they are now."""
    model = nn.Sequential(nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 30)).double()
    observer = ak.observe(model, inner_products=True)
    x = torch.randn(4, 30).double()
    loss(model(x)).backward()
    observer.statistics()
    observer.reset()
    model.zero_grad()
    summed.clear()
    if how == "hooks":
        for p in model.parameters():
            p.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
    loss(model(x)).backward()
    if how in CHANGES:
        CHANGES[how](model, observer)
    s = observer.statistics()
    assert summed == [True, True]
    now = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(s.inner_products, per_sample(model, loss, x).g @ now)
    observer.detach()


def test_parameters_unfrozen_after_the_pass() -> None:
    """Old zeros are their gradients: the samples have added nothing."""
    x = torch.randn(16, 2, 14, 14).double()
    flat = (nn.Flatten(), nn.Linear(392, 50))
    for layers in ([nn.Conv2d(2, 3, 3)], [nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3)], flat):
        model = nn.Sequential(*layers).double()
        observer = ak.observe(model, inner_products=True)
        loss(model(x)).backward()
        observer.reset()
        model.zero_grad(set_to_none=False)
        bias = layers[-1].bias.requires_grad_(False)
        loss(model(x)).backward()
        truth = per_sample(model, loss, x)
        bias.requires_grad_()
        torch.testing.assert_close(observer.statistics().inner_products, truth.inner_products)
        observer.detach()


# What torch's compiler warns of while it looks at custom functions and inputs.
@pytest.mark.filterwarnings("ignore:<class .*Function'> should not be inst:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("layer", [nn.Conv2d(2, 2, 3, padding=1), nn.GroupNorm(1, 2)])
def test_a_layer_in_a_compiled_graph_and_outside(layer: nn.Module) -> None:
    """Nobody has counted the first call when the second one keeps c_i."""
    torch.compiler.reset()
    model = nn.Sequential(layer).double()
    observer = ak.observe(model, inner_products=True)
    x = torch.randn(16, 2, 12, 12).double().requires_grad_()
    compiled = torch.compile(lambda x: model(x), backend="aot_eager")
    loss(compiled(model(x).tanh())).backward()
    assert [call.sample_grads is not None for call in observer._kept_calls[-1]] == [False, True]
    s = observer.statistics()
    observer.detach()
    truth = per_sample(nn.Sequential(layer, nn.Tanh(), layer), loss, x.detach())
    torch.testing.assert_close(s.inner_products, truth.inner_products)
    torch.testing.assert_close(s.sample_norms_sq, truth.norms_sq)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("samples", "positions", "parameters", "operands", "cheap"),
    [
        (16, 1024, 36_864, 16 * 131_072, True),  # ResNet-18, the first blocks
        (16, 256, 147_456, 16 * 65_536, True),
        (16, 64, 589_824, 16 * 32_768, False),
        (256, 1024, 36_864, 256 * 131_072, True),
        (256, 256, 147_456, 256 * 65_536, False),  # beyond the cache
        (16, 512, 2_359_296, 16 * 541_696, False),  # four times the operands
        (16, 144, 147_456, 16 * 20_000, False),  # more than four, if few
    ],
)
def test_what_is_smaller_is_kept(
    samples: int, positions: int, parameters: int, operands: int, cheap: bool
) -> None:
    assert sample_grads_are_cheap(samples, positions, parameters, operands) == cheap
