"""The observer's life, and everything it refuses."""

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from per_sample import per_sample
from test_observer import Outside, assert_statistics, small, squares, total, train_on
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import adagrad_kernels as ak


def test_a_layer_called_for_parts_of_the_batch_is_refused_by_name(device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)).to(device)
    observer = ak.observe(model)
    x = torch.randn(6, 3, device=device)
    hidden = torch.cat([model[0](x[:2]), model[0](x[2:])])
    model[1](hidden).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"disagree about the number of samples .*'0'"):
        observer.statistics()


def test_gradients_whose_squares_vanish(device: torch.device) -> None:
    """As those of a loss that is all but zero: they are explained, too."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).to(device)
    observer = ak.observe(model)
    (model(torch.randn(5, 4, device=device)).square().sum() * 1e-27).backward()
    s = observer.statistics()
    assert s.batch_size == 5
    assert 0 <= s.mean_norm_sq < 1e-40


def test_layers_that_disagree_about_the_batch_dimension(device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Flatten(0, 1), nn.Linear(4, 1)).to(device)
    observer = ak.observe(model)
    model(torch.randn(5, 2, 3, device=device)).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"5 in '0'; 10 in '2'"):
        observer.statistics()
    observer.reset()
    model[0].requires_grad_(False)
    model.zero_grad()
    model(torch.randn(5, 2, 3, device=device)).square().mean().backward()
    assert observer.statistics().batch_size == 10  # nothing else says that there are five


def test_a_parameter_used_outside_its_layer(device: torch.device) -> None:
    model = Outside().to(device)
    observer = ak.observe(model)
    model(torch.randn(4, 3, device=device)).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"gradient but no statistics.*'second.weight'"):
        observer.statistics()


def test_a_parameter_used_in_its_layer_and_outside(device: torch.device) -> None:
    model, x, y = small(device)
    observer = ak.observe(model)
    loss = squares(model(x), y) + 0.1 * model[3].weight.square().sum()
    loss.backward()
    with pytest.raises(RuntimeError, match=r"'3.weight'.*outside its layer's forward"):
        observer.statistics()


def test_a_stale_gradient_is_not_taken_for_measured(device: torch.device) -> None:
    model = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)]).to(device)
    observer = ak.observe(model)
    x = torch.randn(4, 3, device=device)
    model[0](x).mean().backward()
    observer.reset()
    model[1](x).mean().backward()
    with pytest.raises(RuntimeError, match="the gradients still hold what was measured before"):
        observer.statistics()
    model.zero_grad()
    observer.reset()
    model[1](x).mean().backward()
    assert observer.statistics().batch_size == 4


@pytest.mark.parametrize("set_to_none", [True, False])
def test_reset_and_zero_grad_belong_together(device: torch.device, set_to_none: bool) -> None:
    model, x, y = small(device)
    observer = ak.observe(model)
    train_on(model, squares, x, y)
    observer.reset()
    train_on(model, squares, x, y)  # without zero_grad()
    with pytest.raises(RuntimeError, match="the gradients still hold"):
        observer.statistics()
    observer.reset()
    model.zero_grad(set_to_none)
    train_on(model, squares, x, y)
    observer.statistics()
    model.zero_grad(set_to_none)
    with pytest.raises(RuntimeError, match=r"the gradients were (cleared|changed)"):
        observer.statistics()
    train_on(model, squares, x, y)  # without reset()
    with pytest.raises(RuntimeError, match="its samples are still counted"):
        observer.statistics()
    observer.reset()
    model.zero_grad(set_to_none)
    train_on(model, squares, x, y)
    assert_statistics(observer.statistics(), model, squares, x, y)


def test_a_gradient_for_the_input_alone_says_nothing_of_the_parameters(
    device: torch.device,
) -> None:
    model, x, y = small(device)
    observer = ak.observe(model)
    train_on(model, squares, x, y)
    observer.reset()
    z = x.clone().requires_grad_()
    torch.autograd.grad(squares(model(z), y), z)  # before the gradients are cleared
    model.zero_grad()
    train_on(model, squares, x, y)
    assert_statistics(observer.statistics(), model, squares, x, y)


def test_a_batch_is_left_out_by_the_optimizers_zero_grad(device: torch.device) -> None:
    model, x, y = small(device)
    opt = ak.AdAdaGrad(model, 0.1, batch_size=len(x), max_batch_size=len(x))
    train_on(model, squares, x, y)
    opt.zero_grad()
    train_on(model, squares, x, y)
    opt.step(), opt.zero_grad()
    assert (opt.samples, opt.statistics.batch_size) == (len(x), len(x))
    train_on(model, squares, x, y)
    model.zero_grad()
    before = [p.detach().clone() for p in model.parameters()]
    train_on(model, squares, x, y)
    with pytest.raises(RuntimeError, match=r"call zero_grad\(\) of the optimizer"):
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    opt.zero_grad()
    train_on(model, squares, x, y)
    opt.step()
    assert opt.samples == 2 * len(x)


def test_reentrant_checkpointing_of_segments_is_refused(device: torch.device) -> None:
    model, x, y = small(device)
    observer = ak.observe(model)
    hidden = checkpoint(model[:3], x.requires_grad_(), use_reentrant=True)
    out = checkpoint(model[3:], hidden, use_reentrant=True)
    squares(out, y).backward()  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        observer.statistics()


def test_reentrant_checkpointing_of_the_whole_model_is_one_pass(device: torch.device) -> None:
    model, x, y = small(device)
    observer = ak.observe(model, coordinates=True)
    out = checkpoint(model, x.requires_grad_(), use_reentrant=True)
    squares(out, y).backward()  # type: ignore[arg-type]
    assert_statistics(observer.statistics(), model, squares, x.detach(), y)


def test_losses_of_different_layers_are_not_micro_batches(device: torch.device) -> None:
    model = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)]).to(device)
    observer = ak.observe(model)
    x = torch.randn(4, 3, device=device)
    for head in model:
        head(x).mean().backward()
    with pytest.raises(RuntimeError, match=r"'0'.*'1'.*not micro-batches"):
        observer.statistics()


def test_second_derivatives_are_refused(device: torch.device) -> None:
    model, x, y = small(device)
    ak.observe(model)
    with pytest.raises(RuntimeError, match=r"create_graph=True.*detach\(\)"):
        squares(model(x), y).backward(create_graph=True)


def test_backward_twice_through_one_forward(device: torch.device) -> None:
    """Two passes of the same samples would count them twice."""
    model, x, y = small(device)
    observer = ak.observe(model)
    out = model(x)
    squares(out, y).backward(retain_graph=True)
    observer.check()
    squares(out, 2 * y).backward()
    with pytest.raises(RuntimeError, match="in more backward passes than forward passes"):
        observer.statistics()
    observer.reset()
    model.zero_grad()
    alone = nn.Linear(3, 1).to(device)
    whole = ak.observe(alone)
    out = alone(torch.ones(2, 3, device=device))
    out.sum().backward(retain_graph=True), out.sum().backward()
    with pytest.raises(RuntimeError, match=r"layer '\(the model itself\)' took part"):
        whole.check()
    first, second = model(x), model(x)  # two forward passes first
    squares(first, y).backward(), squares(second, y).backward()
    s = observer.statistics(gradient_scale=0.5)
    assert_statistics(s, model, squares, torch.cat([x, x]), torch.cat([y, y]))


def test_statistics_before_any_backward(device: torch.device) -> None:
    model, x, y = small(device)
    observer = ak.observe(model)
    with pytest.raises(RuntimeError, match="no backward pass"):
        observer.statistics()
    train_on(model, squares, x, y)
    observer.statistics()
    observer.reset()
    with pytest.raises(RuntimeError, match="no backward pass"):
        observer.statistics()


def test_a_backward_pass_that_failed_leaves_no_trace(device: torch.device) -> None:
    model, x, y = small(device)
    observer = ak.observe(model, coordinates=True)
    out = model(x)
    model[0].weight.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        squares(out, y).backward()
    model.zero_grad()
    observer.reset()
    model[0].weight._backward_hooks.clear()
    train_on(model, squares, x, y)
    assert_statistics(observer.statistics(), model, squares, x, y)


def test_reading_does_not_consume(device: torch.device) -> None:
    model, x, y = small(device)
    observer = ak.observe(model, coordinates=True)
    train_on(model, squares, x, y)
    first, second = observer.statistics(), observer.statistics()
    assert torch.equal(first.sample_norms_sq, second.sample_norms_sq)
    assert first.variance == second.variance
    assert all(
        torch.equal(v, second.coordinate_variance[k]) for k, v in first.coordinate_variance.items()
    )


# The model while it is observed


def test_an_observed_model_is_the_same_model(device: torch.device) -> None:
    model, x, _ = small(device)
    before, classes = model.state_dict(), [type(m) for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    text = repr(model)
    expected = model(x)
    observer = ak.observe(model, coordinates=True)
    assert list(model.state_dict()) == list(before)
    assert all(isinstance(m, c) for m, c in zip(model.modules(), classes, strict=True))
    assert torch.equal(model(x), expected)
    model.load_state_dict(before)
    observer.detach()
    assert [type(m) for m in model.modules()] == classes
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert repr(model) == text
    assert torch.equal(model(x), expected)
    model(x).sum().backward(create_graph=False)
    assert observer.micro_batches == 0


def test_copies_and_pickles_are_plain(device: torch.device) -> None:
    model, x, y = small(device)
    observer = ak.observe(model, coordinates=True)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ]
    for other in copies:
        assert [type(m) for m in other] == [
            nn.Conv2d, nn.ReLU, nn.Flatten, nn.Linear, nn.Tanh, nn.Linear
        ]  # fmt: skip
        assert torch.equal(other(x), model(x))
        assert not any(p is q for p, q in zip(model.parameters(), other.parameters(), strict=True))
        train_on(other, squares, x, y)
        assert observer.micro_batches == 0
        second = ak.observe(other)
        other.zero_grad()
        train_on(other, squares, x, y)
        assert_statistics(second.statistics(), other, squares, x, y)
    train_on(model, squares, x, y)
    assert_statistics(observer.statistics(), model, squares, x, y)


def test_two_models_do_not_mix(device: torch.device) -> None:
    (one, x, y), (other, *_) = small(device), small(device)
    first, second = ak.observe(one), ak.observe(other)
    (squares(one(x), y) + squares(other(x), y)).backward()
    assert_statistics(first.statistics(), one, squares, x, y)
    assert_statistics(second.statistics(), other, squares, x, y)


def test_observing_again_after_detach(device: torch.device) -> None:
    model, x, y = small(device)
    ak.observe(model).detach()
    observer = ak.observe(model)
    train_on(model, squares, x, y)
    assert_statistics(observer.statistics(), model, squares, x, y)


def test_observing_twice_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    ak.observe(model)
    with pytest.raises(ValueError, match="'0' is observed already"):
        ak.observe(model)


@pytest.mark.parametrize("update", ["after_backward", "in_backward"])
def test_an_optimizer_that_is_no_more_gives_the_model_back(update: str) -> None:
    model, x, y = small(torch.device("cpu"))
    opt = ak.AdAdaGrad(model, batch_size=len(x), max_batch_size=len(x), update=update)
    for _ in range(2):
        train_on(model, squares, x, y)
        opt.step()
        opt.zero_grad()
    with pytest.raises(ValueError, match=r"call detach\(\) of the optimizer"):
        ak.observe(model)
    del opt
    gc.collect()
    observer = ak.observe(model)
    train_on(model, squares, x, y)
    assert_statistics(observer.statistics(), model, squares, x, y)


def test_an_optimizer_can_be_detached() -> None:
    model, x, y = small(torch.device("cpu"))
    kinds = [type(m) for m in model.modules()]
    first = ak.AdAdaGrad(model, batch_size=len(x))
    assert [type(m) for m in model.modules()] != kinds
    first.detach()
    assert [type(m) for m in model.modules()] == kinds
    second = ak.AdAdaGrad(model, batch_size=len(x))
    train_on(model, squares, x, y)
    second.step()
    assert second.statistics.batch_size == len(x)
    with pytest.raises(RuntimeError, match="step\\(\\) without statistics"):
        first.step()


@pytest.mark.parametrize(
    "options",
    [
        {"criterion": ak.NormTest(0.5)},
        {"criterion": ak.InnerProductTest(0.5, every_sample=True)},
        {"criterion": ak.CoordinateNormTest(0.5)},
        {"criterion": ak.NormTest(0.5), "update": "in_backward"},
        {"criterion": ak.WorkerNormTest(0.5)},
    ],
    ids=lambda options: "_".join(str(v).partition("(")[0] for v in options.values()),
)
def test_models_that_are_no_longer_used_are_freed(options: dict[str, Any]) -> None:
    model, x, y = small(torch.device("cpu"))
    opt = ak.AdAdaGrad(model, batch_size=len(x), max_batch_size=len(x), **options)
    for _ in range(2):
        train_on(model, squares, x, y)
        opt.step()
        opt.zero_grad()
    alive = [weakref.ref(t) for t in (model, *model.parameters(), opt)]
    del model, opt
    gc.collect()
    assert [ref() for ref in alive] == [None] * len(alive)


# What cannot be observed


def test_unsupported_layers_are_named_with_the_ways_out() -> None:
    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain, self.shift = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(Custom()))
    with pytest.raises(ak.UnsupportedLayerError) as error:
        ak.observe(model)
    for part in ("'1.0'", "Custom", "gain", "shift", "Linear", "requires_grad_(False)", "vmap"):
        assert part in str(error.value)
    assert type(model[0]) is nn.Linear  # nothing was attached
    model[1].requires_grad_(False)
    ak.observe(model).detach()


def test_a_subclass_with_its_own_forward_is_unsupported() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(2 * input)

    with pytest.raises(ak.UnsupportedLayerError, match=r"the model itself.*Doubled"):
        ak.observe(Doubled(2, 2))


def test_random_numbers_in_a_module_measured_by_vmap(device: torch.device) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain, self.dropout = nn.Parameter(torch.ones(2)), nn.Dropout()

        def forward(self, x: Tensor) -> Tensor:
            return self.dropout(torch.einsum("bi,i->bi", x, self.gain))

    model = nn.Sequential(nn.Linear(2, 2), Noisy()).to(device)
    observer = ak.observe(model, fallback="vmap")
    loss = model(torch.randn(3, 2, device=device)).sum()
    with pytest.raises(RuntimeError, match=r"'1' \(Noisy.*dropout"):
        loss.backward()
    observer.reset()
    model.eval()
    model(torch.randn(3, 2, device=device)).sum().backward()
    assert observer.statistics().batch_size == 3


def test_a_model_without_trainable_parameters() -> None:
    for model in (nn.ReLU(), nn.Linear(2, 2).requires_grad_(False)):
        with pytest.raises(ValueError, match="no trainable parameters"):
            ak.observe(model)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_layers() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"'0' is lazy.*forward pass"):
        ak.observe(model)
    model(torch.ones(2, 5))
    ak.observe(model)


def test_arguments_out_of_range() -> None:
    with pytest.raises(ValueError, match="fallback"):
        ak.observe(nn.Linear(2, 2), fallback="skip")
    with pytest.raises(ValueError, match="inner_products must be False, True or"):
        ak.observe(nn.Linear(2, 2), inner_products="some")


def test_inputs_without_a_sample_dimension(device: torch.device) -> None:
    linear = nn.Linear(3, 2).to(device)
    ak.observe(linear)
    with pytest.raises(ValueError, match="no sample dimension"):
        linear(torch.ones(3, device=device))
    conv = nn.Conv2d(1, 2, 1).to(device)
    ak.observe(conv)
    with pytest.raises(ValueError, match="samples"):
        conv(torch.ones(1, 4, 4, device=device))


def test_coverage_prints_a_table() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model[0].bias.requires_grad_(False)
    coverage = ak.observe(model).coverage()
    lines = str(coverage).splitlines()
    assert len(lines) == 5
    assert [line.split()[0] for line in lines[1:]] == [name for name, _ in model.named_parameters()]
    assert "not measured: frozen" in lines[2]


class Adapted(nn.Module):
    """A frozen layer with a low-rank adapter beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 5).requires_grad_(False)
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def test_low_rank_adapters(device: torch.device) -> None:
    model = nn.Sequential(Adapted(), nn.Tanh(), nn.Linear(5, 3).requires_grad_(False)).to(device)
    x, y = torch.randn(7, 4, 6, device=device), torch.randn(7, 12, device=device)
    observer = ak.observe(model, coordinates=True, inner_products=True)
    train_on(model, total, x, y)
    assert_statistics(observer.statistics(), model, total, x, y, factor=7)


@pytest.mark.parametrize("noise", [1e-1, 1e-3, 1e-5])
def test_samples_that_are_nearly_alike(device: torch.device, noise: float) -> None:
    """tr Σ̂ is then a small difference of large sums; it keeps what their rounding leaves."""
    model = nn.Sequential(nn.Linear(20, 10), nn.Tanh(), nn.Linear(10, 1)).to(device)
    x = 1 + noise * torch.randn(64, 20, device=device)
    y = torch.zeros(64, 1, device=device)
    observer = ak.observe(model, coordinates=True, inner_products=True)
    train_on(model, squares, x, y)
    s = observer.statistics()
    assert s.variance_trace >= 0
    assert all((variance >= 0).all() for variance in s.coordinate_variance.values())
    truth = per_sample(model, squares, x, y)
    # Roundings of samples that are alike are alike: they do not average out.
    rounding = 64 * torch.finfo(torch.float32).eps * truth.norms_sq.sum() / (len(x) - 1)
    assert (s.variance_trace - truth.variance_trace).abs() <= rounding
    assert truth.variance_trace > rounding or noise < 1e-2
