"""update="in_backward": the same weights, no gradients, and what it refuses."""

import copy
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close_to_truth
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset
from training import accumulators, assert_unchanged, batches, mse, network, snapshot, train, weights

import adagrad_kernels as ak

# torch's own, as in test_compile.py
may_compile = pytest.mark.filterwarnings(
    "ignore:<class .*Function'> should not be inst:DeprecationWarning"
)
FIXED = {"lr": 0.1, "batch_size": 8, "max_batch_size": 8}
STEPS = 50


def in_backward(model: nn.Module, **options: Any) -> ak.AdAdaGrad:
    return ak.AdAdaGrad(model, **{**FIXED, **options}, update="in_backward")


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 40), nn.ReLU(), nn.Linear(40, 33), nn.ReLU(), nn.Linear(33, 4)
    )


def vectors() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(120, 5, generator=generator)
    return TensorDataset(x, x[:, :4].argmax(1))


class Twice(nn.Module):
    """One layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(self.layer(self.first(x).tanh()).tanh()))


class Checkpointed(nn.Module):
    """Layers whose forward pass is repeated in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rest = nn.Linear(5, 6), mlp_of(6)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.rest, self.first(x), use_reentrant=False)  # type: ignore[return-value]


class OwnParameters(models.Transformer):
    """With positions that all samples share, and a normalisation that is no layer."""

    __module__ = "transformers.models.own"  # of the package whose modules are watched

    def __init__(self) -> None:
        super().__init__(tied=False, depth=1)
        self.gain = nn.Parameter(torch.rand(16))

    def forward(self, x: Tensor) -> Tensor:
        where = torch.arange(x.shape[1], device=x.device)
        y = self.layers(self.tokens(x) + self.positions(where))
        return self.head(F.layer_norm(y, (16,)) * (1 + self.gain))


def mlp_of(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 9), nn.Tanh(), nn.Linear(9, 4))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], TensorDataset]]] = {
    "mlp": (mlp, vectors),
    "cnn": (models.cnn, models.images),
    "transformer": (lambda: models.Transformer(tied=False, depth=1), models.texts),
    "transformer, tied": (lambda: models.Transformer(tied=True, depth=1), models.texts),
    "encoder": (models.Encoder, models.sequences),
    "called twice": (Twice, vectors),
    "checkpointed": (Checkpointed, vectors),
    "own parameters": (OwnParameters, models.texts),
}


def run(
    model: nn.Module, data: TensorDataset, update: str | None, **options: Any
) -> tuple[Tensor, Tensor, ak.AdAdaGrad | None]:
    """STEPS steps of AdAdaGrad, or of torch's Adagrad: weights, accumulators, the optimizer."""
    x, y = data.tensors
    dtype = next(model.parameters()).dtype
    x = x.to(dtype) if x.is_floating_point() else x
    ours = None
    if update is None:
        opt: Any = torch.optim.Adagrad(model.parameters(), lr=0.1, **options)
    else:
        opt = ours = ak.AdAdaGrad(model, **FIXED, **options, update=update)
    for step in range(STEPS):
        first = 8 * step % 112
        models.cross_entropy(model(x[first : first + 8]), y[first : first + 8]).backward()
        if step and update == "in_backward":
            assert all(p.grad is None for p in model.parameters())
        opt.step()
        opt.zero_grad()
    return weights(model), accumulators(opt), ours


@pytest.mark.parametrize("name", CASES)
def test_the_same_weights_and_statistics(name: str) -> None:
    make, data = CASES[name]
    torch.manual_seed(1)
    model = make()
    truth = run(copy.deepcopy(model).double(), data(), "after_backward")
    plain = run(copy.deepcopy(model), data(), "after_backward")
    found = run(model, data(), "in_backward")
    for k, what in enumerate(("weights", "accumulators")):
        assert_close_to_truth(found[k], truth[k], plain[k], what=what)  # type: ignore[arg-type]
    last = [result[2].statistics for result in (found, truth, plain)]  # type: ignore[union-attr]
    a, t, p = (s.sample_norms_sq for s in last)  # type: ignore[union-attr]
    assert_close_to_truth(a, t, p, what="sample norms")
    norms = (torch.tensor(s.mean_norm_sq, dtype=torch.float64) for s in last)  # type: ignore[union-attr]
    a, t, p = norms
    assert_close_to_truth(a.float(), t, p.float(), what="mean norm")


OPTIONS = {
    "lr_decay": {"lr_decay": 0.05},
    "weight_decay": {"weight_decay": 0.1},
    "maximize": {"maximize": True, "weight_decay": 0.3},
    "initial_accumulator_value": {"initial_accumulator_value": 0.5},
    "eps": {"eps": 0.1},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str) -> None:
    """In float64 the two ways and torch agree to rounding."""
    expected = run(mlp_seeded().double(), vectors(), None, **OPTIONS[name])
    found = run(mlp_seeded().double(), vectors(), "in_backward", **OPTIONS[name])
    for k in (0, 1):
        torch.testing.assert_close(found[k], expected[k], rtol=1e-9, atol=1e-11)


def mlp_seeded() -> nn.Module:
    torch.manual_seed(1)
    return mlp()


def test_weights_that_are_not_contiguous() -> None:
    """Which the kernel that forms the gradient does not take: updated all the same."""
    found = []
    for update in ("after_backward", "in_backward"):
        model = network()
        for layer in (model[0], model[2]):
            layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
        opt = ak.AdAdaGrad(model, **FIXED, update=update)
        train(model, opt, batches(5, 8))
        assert not model[0].weight.is_contiguous()
        found.append(weights(model))
    torch.testing.assert_close(found[1], found[0])


def test_groups_schedulers_and_state() -> None:
    """Saved in the middle and resumed, everything as without the option."""

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        first, last = model[0], model[2]  # type: ignore[index]
        return [
            {"params": list(first.parameters()), "lr": 0.3, "weight_decay": 0.1},
            {"params": list(last.parameters()), "eps": 1e-3},
        ]

    ends = []
    for update in ("after_backward", "in_backward"):
        model = network()
        opt = ak.AdAdaGrad(model, **FIXED, params=groups(model), update=update)
        schedule = torch.optim.lr_scheduler.StepLR(opt, 3, 0.5)
        train(model, opt, batches(10, 8), schedule.step)
        saved = copy.deepcopy(opt.state_dict())
        other = copy.deepcopy(model)
        opt.cycle.observer.detach()
        opt = ak.AdAdaGrad(other, **FIXED, params=groups(other), update=update)
        opt.load_state_dict(saved)
        train(other, opt, batches(10, 8))
        ends.append((weights(other), accumulators(opt), opt.state_dict()))
    for a, b in zip(*(end[:2] for end in ends), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    for i in range(4):
        assert ends[0][2]["state"][i]["step"] == ends[1][2]["state"][i]["step"] == 20


def test_the_batch_grows_as_by_default() -> None:
    sizes = []
    for update in ("after_backward", "in_backward"):
        model = network()
        opt = ak.AdAdaGrad(
            model, lr=0.1, criterion=ak.NormTest(0.7), batch_size=4, max_batch_size=64,
            update=update,
        )  # fmt: skip
        data = TensorDataset(*(torch.cat(parts) for parts in zip(*batches(8, 32), strict=True)))
        loader, seen = ak.AdaptiveDataLoader(data, opt, max_micro_batch_size=64), []
        for _ in range(3):
            train(model, opt, loader, lambda: seen.append(opt.batch_size))  # noqa: B023
        sizes.append(seen)
    assert sizes[0] == sizes[1]
    assert sizes[0][-1] > 4


def test_autocast() -> None:
    model = network(torch.float32)
    opt = in_backward(model)
    for x, y in batches(5, 8, torch.float32):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.mse_loss(model(x), y)
        loss.backward()
        opt.step()
    assert weights(model).dtype == torch.float32
    assert opt.state[model[0].weight]["step"] == 5


def started(model: nn.Module, **options: Any) -> ak.AdAdaGrad:
    """An optimizer after its first step, which is as by default."""
    opt = in_backward(model, **options)
    train(model, opt, batches(1, 8))
    return opt


def test_gradients_of_inputs_update_nothing() -> None:
    model = network()
    opt = started(model)
    before = snapshot(model, opt)
    x = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    torch.autograd.grad(model(x).sum(), x)
    assert_unchanged(model, opt, before)
    train(model, opt, batches(3, 8))
    assert opt.state[model[0].weight]["step"] == 4


def test_an_unused_layer_is_left_alone() -> None:
    model = network()
    opt = started(model)
    before = model[0].weight.detach().clone()
    model[2](torch.randn(8, 4, dtype=torch.float64)).square().mean().backward()
    opt.step()
    assert torch.equal(model[0].weight, before)
    assert opt.state[model[0].weight]["step"] == 1
    assert opt.state[model[2].weight]["step"] == 2


def test_detached_the_model_is_plain_again() -> None:
    model = network()
    opt = started(model)
    opt.cycle.observer.detach()
    before = weights(model)
    mse(model, batches(1, 8)[0]).backward()
    assert torch.equal(weights(model), before)
    assert all(p.grad is not None for p in model.parameters())


def test_parameters_unfrozen_later() -> None:
    model = network()
    model[0].requires_grad_(False)
    opt = started(model)
    model[0].requires_grad_(True)
    opt.add_param_group({"params": list(model[0].parameters())})
    before = weights(model)
    train(model, opt, batches(1, 8))
    assert (weights(model) != before).all()


# Refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": ak.CoordinateNormTest(0.1)}, "CoordinateNormTest needs coordinates"),
        ({"criterion": ak.InnerProductTest(0.1)}, "InnerProductTest needs inner products"),
        ({"criterion": ak.WorkerNormTest(0.1)}, "WorkerNormTest needs workers"),
        ({"max_grad_norm": 1.0}, "cannot clip"),
    ],
)
def test_needs_the_gradient_afterwards(options: dict[str, Any], message: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=message):
        in_backward(model, **options)
    ak.AdAdaGrad(model)  # it was not left observed


def test_wrong_models_and_names() -> None:
    with pytest.raises(ValueError, match='"after_backward" or "in_backward"'):
        ak.AdAdaGrad(network(), update="sideways")
    with pytest.raises(ValueError, match="AdAdaGradNorm cannot update during the backward"):
        ak.AdAdaGradNorm(network(), update="in_backward")
    model = network()
    mse(model, batches(1, 8)[0]).backward()
    with pytest.raises(ValueError, match=r"'0\.weight' has a gradient already"):
        in_backward(model)
    model = network()
    model.compile(backend="eager")
    with pytest.raises(ValueError, match="compiled model"):
        in_backward(model)


def test_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adagrad_kernels.distributed.Ranks.size", 2)
    with pytest.raises(ValueError, match="single process, not in 2"):
        in_backward(network())


def test_accumulation_in_the_first_batch() -> None:
    model = network()
    opt = in_backward(model)
    before = snapshot(model, opt)
    with pytest.raises(RuntimeError, match="2 backward passes in a batch of 8"):
        train(model, opt, batches(2, 4))
    assert_unchanged(model, opt, before)


def test_accumulation_later() -> None:
    model = network()
    opt = started(model)
    before = snapshot(model, opt)
    with pytest.raises(RuntimeError, match="a backward pass of 4 samples in a batch of 8"):
        mse(model, batches(1, 4)[0]).backward()
    assert_unchanged(model, opt, before)
    opt.zero_grad()
    train(model, opt, batches(1, 8))


def test_a_second_backward_pass_before_the_step() -> None:
    model = network()
    opt = started(model)
    mse(model, batches(1, 8)[0]).backward()
    before = snapshot(model, opt)
    with pytest.raises(RuntimeError, match=r"second backward pass before opt\.step"):
        mse(model, batches(1, 8)[0]).backward()
    assert_unchanged(model, opt, before)


def test_a_loader_that_would_split_batches() -> None:
    model = network()
    opt = ak.AdAdaGrad(model, batch_size=8, max_batch_size=64, update="in_backward")
    data = TensorDataset(*batches(1, 64)[0])
    before = snapshot(model, opt)
    with pytest.raises(RuntimeError, match=r"max_micro_batch_size \(16\) is below max_batch_size"):
        train(model, opt, ak.AdaptiveDataLoader(data, opt, max_micro_batch_size=16))
    assert_unchanged(model, opt, before)


def test_a_loss_scale() -> None:
    model = network()
    opt = in_backward(model)
    before = snapshot(model, opt)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(mse(model, batches(1, 8)[0])).backward()
    with pytest.raises(RuntimeError, match="loss scale"):
        scaler.step(opt)
    assert_unchanged(model, opt, before)


@may_compile
@pytest.mark.parametrize("make", [in_backward, started])
def test_a_model_compiled_later(make: Callable[[nn.Module], ak.AdAdaGrad]) -> None:
    """Before the first step, or after it."""
    torch.compiler.reset()
    model = network()
    opt = make(model)
    before = snapshot(model, opt)
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(RuntimeError, match="compiled model"):
        train(compiled, opt, batches(1, 8))  # type: ignore[arg-type]
    assert_unchanged(model, opt, before)


def test_a_weight_used_outside_its_layer() -> None:
    """Found in the first batch, before anything has changed, or when it happens."""
    model = network()
    opt = in_backward(model)
    before = snapshot(model, opt)
    (mse(model, batches(1, 8)[0]) + model[0].weight.square().sum()).backward()
    with pytest.raises(RuntimeError, match="also used outside its layer's forward"):
        opt.step()
    assert_unchanged(model, opt, before)
    opt.zero_grad()
    train(model, opt, batches(1, 8))
    x, y = batches(1, 8)[0]
    penalty = model[0].weight.square().sum()
    with pytest.raises(RuntimeError, match=r"updated already|modified by an inplace operation"):
        ((model(x) - y).square().mean() + penalty).backward()


def test_an_old_graph_does_not_see_new_weights() -> None:
    """As with torch's optimizers: its saved weights are gone."""
    model = network()
    opt = started(model)
    loss = mse(model, batches(1, 8)[0])
    loss.backward(retain_graph=True)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
