"""AdAdaGrad with a fixed batch size is torch.optim.Adagrad; its own behaviour beyond that."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerance import assert_close_to_truth
from torch import nn
from torch.optim import lr_scheduler
from training import accumulators, batches, mse, network, resumed, train, weights

import adagrad_kernels as ak

STEPS = 200
FIXED = {"batch_size": 8, "max_batch_size": 8}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lr_decay": {"lr_decay": 0.05},
    "weight_decay": {"weight_decay": 0.1},
    "initial_accumulator_value": {"initial_accumulator_value": 0.3},
    "eps": {"eps": 0.1},
    "maximize": {"maximize": True, "lr": 1e-3},
    "everything": {
        "lr": 0.05,
        "lr_decay": 0.01,
        "weight_decay": 0.02,
        "initial_accumulator_value": 0.1,
        "eps": 1e-3,
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_follows_torch_adagrad(options: dict[str, Any]) -> None:
    options = {"lr": 0.1, **options}

    def run(dtype: torch.dtype, ours: bool) -> tuple[torch.Tensor, torch.Tensor]:
        model = network(dtype)
        if ours:
            opt: torch.optim.Optimizer = ak.AdAdaGrad(model, **options, **FIXED)
        else:
            opt = torch.optim.Adagrad(model.parameters(), **options)
        train(model, opt, batches(STEPS, 8, dtype))
        return weights(model), accumulators(opt)

    truth = run(torch.float64, ours=False)
    for dtype in (torch.float32, torch.float64):
        ours, plain = run(dtype, ours=True), run(dtype, ours=False)
        for name, a, t, p in zip(("weights", "accumulators"), ours, truth, plain, strict=True):
            # the truth of float64 is torch's own result; 200 steps of rounding may add up
            scale = STEPS * t.abs().max() if dtype == torch.float64 else None
            assert_close_to_truth(a, t, p, scale=scale, what=f"{name} in {dtype}")


def test_param_groups_with_different_options() -> None:
    def groups(model: nn.Sequential) -> list[dict[str, Any]]:
        return [
            {"params": model[0].parameters(), "lr": 0.2, "weight_decay": 0.1},
            {"params": model[2].parameters(), "eps": 0.01, "lr_decay": 0.1},
        ]

    ours, theirs = network(), network()
    train(ours, ak.AdAdaGrad(ours, lr=0.05, params=groups(ours), **FIXED), batches(STEPS, 8))
    train(theirs, torch.optim.Adagrad(groups(theirs), lr=0.05), batches(STEPS, 8))
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-10, atol=1e-12)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]] = {
    "lambda": lambda opt: lr_scheduler.LambdaLR(opt, lambda k: 1 / (1 + k)),
    "step": lambda opt: lr_scheduler.StepLR(opt, 50, gamma=0.3),
    "cosine": lambda opt: lr_scheduler.CosineAnnealingLR(opt, STEPS),
    "one cycle": lambda opt: lr_scheduler.OneCycleLR(
        opt, max_lr=0.3, total_steps=STEPS + 1, cycle_momentum=False
    ),
    "sequential": lambda opt: lr_scheduler.SequentialLR(
        opt,
        [
            lr_scheduler.LinearLR(opt, 0.1, total_iters=20),
            lr_scheduler.ExponentialLR(opt, gamma=0.99),
        ],
        milestones=[20],
    ),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_learning_rate_schedulers(make: Callable[..., lr_scheduler.LRScheduler]) -> None:
    ours, theirs = network(), network()
    our_opt = ak.AdAdaGrad(ours, lr=0.1, **FIXED)
    their_opt = torch.optim.Adagrad(theirs.parameters(), lr=0.1)
    for model, opt in ((ours, our_opt), (theirs, their_opt)):
        train(model, opt, batches(STEPS, 8), after=make(opt).step)
    assert our_opt.param_groups[0]["lr"] == their_opt.param_groups[0]["lr"] != 0.1
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_state_goes_to_torch_and_back(dtype: torch.dtype) -> None:
    data = batches(60, 8, dtype)
    options = {"lr": 0.1, "lr_decay": 0.01}
    through = network(dtype)
    opt = ak.AdAdaGrad(through, **options, **FIXED)
    train(through, opt, data[:20])
    theirs = torch.optim.Adagrad(through.parameters(), lr=1.0)
    theirs.load_state_dict(copy.deepcopy(opt.state_dict()))
    opt.cycle.observer.detach()
    train(through, theirs, data[20:40])
    back = ak.AdAdaGrad(through, lr=1.0, **FIXED)
    back.load_state_dict(copy.deepcopy(theirs.state_dict()))
    train(through, back, data[40:])

    straight = network(dtype)
    train(straight, torch.optim.Adagrad(straight.parameters(), **options), data)
    torch.testing.assert_close(weights(through), weights(straight), rtol=1e-5, atol=1e-6)
    assert back.param_groups[0]["lr"] == 0.1
    assert back.state[through[0].weight]["step"] == 60


def test_state_dict_continues_bit_for_bit() -> None:
    data = batches(40, 8, torch.float32)

    def fresh() -> tuple[nn.Module, ak.AdAdaGrad]:
        model = network(torch.float32)
        return model, ak.AdAdaGrad(
            model, lr=0.1, batch_size=4, max_batch_size=8, smoothing=0.5, weight_decay=0.01
        )

    _, opt, _, opt2 = resumed(fresh, data)
    assert torch.equal(accumulators(opt2), accumulators(opt))
    assert opt2.state_dict()["adaptive"] == opt.state_dict()["adaptive"]


def test_the_saved_layout_of_an_accumulator_does_not_matter() -> None:
    def model(memory_format: torch.memory_format) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 1)).to(
            memory_format=memory_format
        )

    x = torch.randn(8, 3, 4, 4)
    saved = ak.AdAdaGrad(first := model(torch.contiguous_format), **FIXED)
    loaded = ak.AdAdaGrad(second := model(torch.channels_last), **FIXED)
    first(x).mean().backward()
    saved.step(), saved.zero_grad()
    second.load_state_dict(first.state_dict())
    loaded.load_state_dict(saved.state_dict())
    for m, opt in ((first, saved), (second, loaded)):
        m(x).mean().backward()
        opt.step()
    torch.testing.assert_close(weights(second), weights(first), rtol=1e-5, atol=1e-6)


def test_bfloat16_parameters_have_float32_accumulators() -> None:
    """Summed in bfloat16, 1000 gradients of 0.1 stall far below 1000 · 0.1²."""
    steps = 1000

    def run(make: Callable[[nn.Module], torch.optim.Optimizer]) -> tuple[nn.Module, Any]:
        model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
        opt = make(model)
        x = torch.full((2, 1), 0.1, dtype=torch.bfloat16)
        for _ in range(steps):
            model(x).mean().backward()
            opt.step()
            opt.zero_grad()
        return model, opt

    model, opt = run(lambda m: ak.AdAdaGrad(m, lr=1e-3, batch_size=2, max_batch_size=2))
    _, theirs = run(lambda m: torch.optim.Adagrad(m.parameters(), lr=1e-3))
    expected = steps * torch.tensor(0.1, dtype=torch.bfloat16).double().square().item()
    assert theirs.state[theirs.param_groups[0]["params"][0]]["sum"].item() < 0.7 * expected
    total = opt.state[model.weight]["sum"]
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(expected, rel=steps * torch.finfo(torch.float32).eps)

    opt.load_state_dict(opt.state_dict())
    assert torch.equal(opt.state[model.weight]["sum"], total), "torch casts it to bfloat16"


def test_closure() -> None:
    ours, theirs = network(), network()
    opt = ak.AdAdaGrad(ours, lr=0.1, **FIXED)
    for batch in batches(5, 8):

        def closure(batch: tuple[torch.Tensor, torch.Tensor] = batch) -> torch.Tensor:
            opt.zero_grad()
            loss = mse(ours, batch)
            loss.backward()
            return loss

        expected = mse(theirs, batch).item()
        assert opt.step(closure).item() == pytest.approx(expected, rel=1e-12)
        theirs.load_state_dict(ours.state_dict())
    assert opt.samples == 40


def test_frozen_parameters_are_left_alone() -> None:
    model = network()
    model[0].requires_grad_(False)
    opt = ak.AdAdaGrad(model, lr=0.1, **FIXED)
    before = model[0].weight.clone()
    train(model, opt, batches(3, 8))
    assert torch.equal(model[0].weight, before)
    assert len(opt.param_groups[0]["params"]) == 2


def test_frozen_in_the_middle() -> None:
    """A parameter that is frozen later keeps its value, even where an old gradient is left."""
    model = network()
    opt = ak.AdAdaGrad(model, lr=0.1, weight_decay=0.5, **FIXED)
    data = batches(4, 8)
    train(model, opt, data[:2])
    mse(model, data[2]).backward()
    opt.step()
    model[0].requires_grad_(False)
    opt.zero_grad(set_to_none=False)
    before = model[0].weight.clone()
    mse(model, data[3]).backward()
    opt.step()
    assert torch.equal(model[0].weight, before)
    norm = sum(p.grad.square().sum() for p in model[2].parameters())
    assert opt.statistics.grad_norm_sq.item() == pytest.approx(norm.item(), rel=1e-12)


def test_unfrozen_parameters_join_by_add_param_group() -> None:
    def unfreeze(model: nn.Module, opt: torch.optim.Optimizer) -> None:
        model[0].requires_grad_(True)
        opt.add_param_group({"params": list(model[0].parameters()), "lr": 0.02})

    ours, theirs = network(), network()
    for model in (ours, theirs):
        model[0].requires_grad_(False)
    our_opt = ak.AdAdaGrad(ours, lr=0.1, initial_accumulator_value=0.2, **FIXED)
    trainable = [p for p in theirs.parameters() if p.requires_grad]
    their_opt = torch.optim.Adagrad(trainable, lr=0.1, initial_accumulator_value=0.2)
    data = batches(40, 8)
    for model, opt in ((ours, our_opt), (theirs, their_opt)):
        train(model, opt, data[:20])
        unfreeze(model, opt)
    for p in theirs[0].parameters():  # torch makes state in __init__ only
        their_opt.state[p] = {"step": torch.tensor(0.0), "sum": torch.full_like(p, 0.2)}
    for model, opt in ((ours, our_opt), (theirs, their_opt)):
        train(model, opt, data[20:])
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-10, atol=1e-12)


def test_a_tensor_as_learning_rate() -> None:
    ours, theirs = network(), network()
    train(
        ours, ak.AdAdaGrad(ours, lr=torch.tensor(0.1, dtype=torch.float64), **FIXED), batches(9, 8)
    )
    train(theirs, torch.optim.Adagrad(theirs.parameters(), lr=0.1), batches(9, 8))
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-10, atol=1e-12)
