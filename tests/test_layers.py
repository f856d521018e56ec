"""Every layer × every statistic against float64 per-sample autograd, in every way of running."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from layer_cases import CASES, Case, between_convolutions
from module_cases import MODULE_CASES
from per_sample import per_sample
from tolerance import assert_close_to_truth
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import adagrad_kernels as ak

CASES = {**CASES, **MODULE_CASES}
every_layer = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def loss(y: Tensor) -> Tensor:
    return y.sin().flatten(1).sum(1).mean()


def assert_exact(s: ak.GradientStatistics, case: Case, model: nn.Module, x: Tensor, m: int) -> None:
    """All statistics equal those of the per-sample gradients; inner products of the last m."""
    truth = per_sample(model, loss, x)
    assert s.batch_size == len(x)
    assert_close(s.sample_norms_sq, truth.norms_sq)
    assert_close(s.grad_norm_sq.to(x.device), truth.mean_norm_sq)
    assert_close(s.variance_trace.to(x.device), truth.variance_trace)
    if s.coordinate_variance is not None:
        assert_close(s.coordinate_variance, truth.by_parameter(truth.coordinate_variance))
        assert_close(s.coordinate_mean, truth.by_parameter(truth.mean))
    if s.inner_products is not None:
        assert_close(s.inner_products, truth.inner_products[-m:])


@every_layer
@pytest.mark.parametrize("everything", [False, True], ids=["norms", "everything"])
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_one_batch_and_micro_batches(device: torch.device, case: Case, everything: bool) -> None:
    """Norms by themselves: inner products keep all operands, also where one was forgotten."""
    model, x = case.make().to(device).double(), case.input(device)
    before = {name: set(m.__dict__) for name, m in model.named_modules()}
    observer = ak.observe(model, everything, everything, fallback=case.fallback)
    for parts in (1, 2):
        model.zero_grad()
        observer.reset()
        for part in x.chunk(parts):
            loss(model(part)).backward()
        s = observer.statistics(gradient_scale=1 / parts)
        assert_exact(s, case, model, x, len(x) // parts)
    observer.detach()
    assert not any(isinstance(m, ak.layers.ObservedLayer) for m in model.modules())
    assert {name: set(m.__dict__) for name, m in model.named_modules()} == before


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_have_the_type_of_plain_ones_under_autocast(kind: Any) -> None:
    layer, x = kind(4, 5, batch_first=True), torch.randn(3, 2, 4)
    plain = copy.deepcopy(layer)
    ak.observe(layer)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = layer(x)[0], plain(x)[0]
    assert y.dtype == expected.dtype
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


@every_layer
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_checkpointing(device: torch.device, case: Case) -> None:
    model, x = case.make().to(device).double(), case.input(device)
    observer = ak.observe(model, coordinates=True, fallback=case.fallback)
    loss(checkpoint(model, x, use_reentrant=False)).backward()
    assert_exact(observer.statistics(), case, model, x, len(x))


@pytest.mark.parametrize(
    "case",
    [case for case in CASES.values() if case.compiles],
    ids=[name for name, case in CASES.items() if case.compiles],
)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.filterwarnings("ignore:<class .*Function'> should not be inst:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled(device: torch.device, case: Case) -> None:
    model, x = case.make().to(device).double(), case.input(device)
    observer = ak.observe(model, coordinates=True, fallback=case.fallback)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss(compiled(x)).backward()
    assert_exact(observer.statistics(), case, model, x, len(x))


@every_layer
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_bfloat16_autocast(device: torch.device, case: Case) -> None:
    model = case.make().to(device)
    x = case.input(device, torch.float32)
    observer = ak.observe(model, fallback=case.fallback)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = model(x)
        loss(y.float()).backward()
    s = observer.statistics()
    truth = per_sample(model, loss, x)
    observer.detach()
    plain = per_sample(model.bfloat16(), loss, x, dtype=torch.bfloat16)
    assert_close_to_truth(
        s.sample_norms_sq.bfloat16(),
        truth.norms_sq,
        plain.norms_sq,
        scale=truth.norms_sq.max() * 4,
    )


def test_batch_norm_in_training_mode_measures_contributions(device: torch.device) -> None:
    """c_i of scale and shift: what sample i adds to the batch's gradient, its sum that gradient."""
    norm = nn.BatchNorm2d(4)
    model = between_convolutions(norm).to(device).double()
    x = torch.randn(6, 3, 5, 5, device=device, dtype=torch.float64)
    plain = between_convolutions(nn.BatchNorm2d(4)).to(device).double()
    plain.load_state_dict(model.state_dict())
    observer = ak.observe(norm, coordinates=True)
    y = model[1](model[0](x))
    y.retain_grad()
    loss(model[2](y)).backward()
    loss(plain(x)).backward()
    assert_close([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
    assert_close(dict(model.named_buffers()), dict(plain.named_buffers()))
    normalised = (y - norm.bias.view(-1, 1, 1)) / norm.weight.view(-1, 1, 1)
    assert y.grad is not None
    scale, shift = (y.grad * normalised).sum((2, 3)), y.grad.sum((2, 3))
    g = torch.cat([scale, shift], 1) * len(x)
    s = observer.statistics()
    assert_close(s.sample_norms_sq, g.square().sum(1))
    assert_close(s.variance_trace.to(device), g.var(0).sum())
    assert s.coordinate_variance is not None
    assert_close(torch.cat(list(s.coordinate_variance.values())), g.var(0))


def test_batch_norm_statistics_follow_torch(device: torch.device) -> None:
    for options in ({}, {"momentum": None}, {"track_running_stats": False}):
        norm, plain = (nn.BatchNorm1d(5, **options).to(device) for _ in range(2))
        observer = ak.observe(norm)
        for _ in range(3):
            x = torch.randn(8, 5, device=device)
            assert_close(norm(x), plain(x))
        assert_close(norm.state_dict(), plain.state_dict())
        norm.eval(), plain.eval()
        assert_close(norm(x), plain(x))
        observer.detach()


def test_hugging_face_conv1d(device: torch.device) -> None:
    """By its qualified name, so that transformers need not be installed."""

    class Conv1D(nn.Module):
        __module__, __qualname__ = "transformers.pytorch_utils", "Conv1D"

        def __init__(self) -> None:
            super().__init__()
            self.nf = 3
            self.weight = nn.Parameter(torch.randn(5, 3))
            self.bias = nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            size_out = (*x.size()[:-1], self.nf)
            return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)

    model = Conv1D().to(device).double()
    x = torch.randn(6, 4, 5, device=device, dtype=torch.float64)
    observer = ak.observe(model, coordinates=True, inner_products=True)
    loss(model(x)).backward()
    assert_exact(observer.statistics(), CASES["linear"], model, x, len(x))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Embedding(5, 3, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), "add_bias_kv"),
        (nn.EmbeddingBag(3, 3, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (nn.Bilinear(3, 3, 3), "Bilinear"),
    ],
)
def test_refused_layers_name_the_reason(layer: nn.Module, message: str) -> None:
    with pytest.raises(ak.UnsupportedLayerError, match=message) as error:
        ak.observe(nn.ModuleDict({"inner": layer}))
    assert "'inner'" in str(error.value)


def normed(old: bool) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old one is deprecated
        norm = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
        return norm(nn.Linear(3, 3))


def masked() -> nn.Module:
    return torch.nn.utils.prune.random_unstructured(nn.Linear(3, 3), "weight", amount=0.5)


@pytest.mark.parametrize("make", [lambda: normed(True), lambda: normed(False), masked])
def test_a_weight_that_is_computed_is_refused_by_name(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(ak.UnsupportedLayerError, match="its weight is computed") as error:
        ak.observe(nn.ModuleDict({"inner": make()}))
    assert "'inner'" in str(error.value)


def test_a_weight_that_became_computed_is_noticed(device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(3, 3)).to(device)
    observer = ak.observe(model)
    x = torch.randn(4, 3, device=device)
    loss(model(x)).backward()
    observer.statistics(), observer.reset(), model.zero_grad()
    torch.nn.utils.prune.random_unstructured(model[0], "weight", amount=0.5)
    loss(model(x)).backward()
    with pytest.raises(RuntimeError, match="layer '0': weight is no parameter any more"):
        observer.statistics()


def test_pruned_weights_are_measured_by_vmap(device: torch.device) -> None:
    model, x = masked().to(device), torch.randn(4, 3, device=device)
    truth = []
    for row in x:
        loss(model(row.unsqueeze(0))).backward()
        truth.append(sum(p.grad.square().sum() for p in model.parameters()))
        model.zero_grad()
    observer = ak.observe(model, fallback="vmap")
    loss(model(x)).backward()
    assert_close(observer.statistics().sample_norms_sq, torch.stack(truth))


class Returns(nn.Module):
    """Returns what is given to it, beside an output."""

    def __init__(self, other: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.weight, self.other = nn.Parameter(torch.ones(3)), other

    def forward(self, x: Tensor) -> Any:
        return torch.einsum("bi,i->bi", x, self.weight), self.other(x)


@pytest.mark.parametrize(
    ("other", "got"),
    [
        (lambda x: x.sum(), r"got \[\]"),
        (lambda x: x.mT, r"got \[3, 4\]"),
        (lambda x: (x,), "got tuple"),
    ],
)
def test_outputs_measured_by_vmap_have_a_row_a_sample(
    device: torch.device, other: Callable[[Tensor], Any], got: str
) -> None:
    model = Returns(other).to(device)
    ak.observe(model, fallback="vmap")
    with pytest.raises(ValueError, match=r"a row for each of the 4 samples, " + got):
        model(torch.randn(4, 3, device=device))


def test_a_forward_pass_that_changes_buffers_cannot_be_measured_by_vmap(
    device: torch.device,
) -> None:
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)).to(device)
    ak.observe(model, fallback="vmap")
    x = torch.randn(4, 3, device=device)
    with pytest.raises(RuntimeError, match="changes its buffer"):
        model(x)
    model.eval()
    assert model(x).requires_grad


class Gain(nn.Module):
    """A layer whose keyword argument changes what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return factor * x * self.weight


def test_keyword_arguments_of_each_call_measured_by_vmap(device: torch.device) -> None:
    model, x = Gain().to(device), torch.randn(4, 3, device=device)
    observer = ak.observe(model, inner_products="all", fallback="vmap")
    for factor in (1.0, 3.0):  # two micro-batches
        model(x, factor=factor).sum().backward()
    each = torch.cat([x, 3 * x]) * 8  # g_i = N c_i
    s = observer.statistics()
    assert_close(s.sample_norms_sq, each.square().sum(1))
    assert_close(s.inner_products, each @ each.mean(0))
    model.zero_grad(), observer.reset()
    (model(x, factor=1.0) + model(x, factor=3.0)).sum().backward()  # two calls in one
    assert_close(observer.statistics().sample_norms_sq, (16 * x).square().sum(1))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_without_a_sample_dimension(
    device: torch.device, kind: type[nn.RNNBase]
) -> None:
    layer = kind(3, 4, batch_first=True).to(device)
    x = torch.randn(2, 5, 3, device=device)
    plain = layer(x[0])[0]
    ak.observe(layer)
    with pytest.raises(ValueError, match=r"\[5, 3\] has no sample dimension"):
        layer(x[0])
    with pytest.raises(ValueError, match=r"\[2, 0, 3\] has no positions"):
        layer(x[:, :0])
    packed = pack_padded_sequence(x, torch.tensor([5, 2]), batch_first=True)
    with pytest.raises(ValueError, match="packed sequence"):
        layer(packed)
    with torch.no_grad():  # measured is nothing
        assert_close(layer(x[0])[0], plain)
        layer(packed)


def test_one_value_has_no_deviation(device: torch.device) -> None:
    """As in the plain layer: of one spatial element, however many channels and samples."""
    layer = nn.InstanceNorm1d(3, affine=True).to(device)
    x = torch.randn(4, 3, 1, device=device)
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        layer(x)
    ak.observe(layer)
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        layer(x)


def test_an_embedding_scales_the_rows_it_reads(device: torch.device) -> None:
    """max_norm: in the forward pass, and only what was asked for."""
    plain = nn.Embedding(5, 3, max_norm=0.5).to(device)
    layer, tokens = copy.deepcopy(plain), torch.tensor([[0, 3], [3, 1]], device=device)
    ak.observe(layer)
    assert_close(layer(tokens), plain(tokens))
    assert_close(layer.weight, plain.weight)
    assert layer.weight[2].norm() > 0.5 > layer.weight[3].norm() - 1e-6


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_without_dropout_in_eval_mode(device: torch.device, need_weights: bool) -> None:
    plain = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True).to(device).eval()
    layer, x = copy.deepcopy(plain), torch.randn(3, 5, 4, device=device)
    ak.observe(layer)
    found = layer(x, x, x, need_weights=need_weights)[0]
    assert_close(found, plain(x, x, x, need_weights=need_weights)[0])


def test_dropout_between_recurrent_layers(device: torch.device) -> None:
    layer = nn.LSTM(3, 4, num_layers=2, dropout=0.5, batch_first=True).to(device)
    x = torch.randn(64, 9, 3, device=device)
    expected = layer.eval()(x)[0]
    ak.observe(layer)
    assert_close(layer(x)[0], expected)
    layer.train()
    first, second = layer(x)[0], layer(x)[0]
    assert not torch.equal(first, second)
    assert_close(first.mean(), expected.mean(), atol=0.05, rtol=0)


class UsesWeightOutside(nn.Module):
    """The head is the embedding's weight, but not a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(11, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.linear(self.embedding(x)), self.embedding.weight)


def test_gradient_from_outside_the_layers_is_an_error(device: torch.device) -> None:
    model = UsesWeightOutside().to(device)
    before = [p.detach().clone() for p in model.parameters()]
    opt = ak.AdAdaGrad(model, batch_size=6)
    loss(model(torch.randint(11, (6, 5), device=device))).backward()
    with pytest.raises(RuntimeError, match=r"'embedding\.weight' has a gradient that the calls"):
        opt.step()
    assert_close(list(model.parameters()), before)


def test_a_penalty_on_weights_is_an_error(device: torch.device) -> None:
    model = nn.Linear(4, 2).to(device)
    observer = ak.observe(model)
    (loss(model(torch.randn(6, 4, device=device))) + model.weight.square().sum()).backward()
    with pytest.raises(RuntimeError, match="weight_decay"):
        observer.statistics()


def test_prelu_of_one_number_a_sample(device: torch.device) -> None:
    layer, x = nn.PReLU().to(device), torch.tensor([1.0, -2.0, 3.0], device=device)
    plain = layer(x)
    observer = ak.observe(layer)
    y = layer(x)
    assert torch.equal(y, plain)
    y.sum().backward()
    assert (observer.statistics().sample_norms_sq / 9).tolist() == [0, 4, 0]
