"""AdAdaGradNorm against ten lines of float64: one accumulator for all parameters."""

from typing import Any

import pytest
import torch
from tolerance import assert_close_to_truth
from torch import Tensor, nn
from training import assert_unchanged, batches, mse, network, resumed, snapshot, train, weights

import adagrad_kernels as ak

STEPS = 200
FIXED = {"batch_size": 8, "max_batch_size": 8}


def reference(
    model: nn.Module,
    data: list[tuple[Tensor, Tensor]],
    groups: list[dict[str, Any]],
    v: float = 1e-2,
    eps: float = 1e-10,
    sign: float = 1.0,
) -> tuple[Tensor, float]:
    """(weights, v) after v ← v + ‖d‖², w ← w − lr_k d/(√v + eps)."""
    for k, batch in enumerate(data):
        model.zero_grad()
        mse(model, batch).backward()
        found = []
        for group in groups:
            for p in group["params"]:
                d = sign * p.grad + group.get("weight_decay", 0) * p.detach()
                found.append((p, d, group["lr"] / (1 + k * group.get("lr_decay", 0))))
        v += sum(d.square().sum().item() for _, d, _ in found)
        for p, d, lr in found:
            p.data -= lr * d / (v**0.5 + eps)
    return weights(model), v


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight_decay": {"weight_decay": 0.1},
    "lr_decay": {"lr_decay": 0.05},
    "maximize": {"maximize": True, "lr": 1e-3},
    "eps and v₀": {"eps": 0.5, "initial_accumulator_value": 3.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_follows_the_formula(options: dict[str, Any]) -> None:
    options = {"lr": 0.5, **options}
    keys = ("lr", "lr_decay", "weight_decay")
    more = {
        "v": options.get("initial_accumulator_value", 1e-2),
        "eps": options.get("eps", 1e-10),
        "sign": -1.0 if options.get("maximize") else 1.0,
    }

    def plain(dtype: torch.dtype) -> tuple[Tensor, float]:
        model = network(dtype)
        group = {
            "params": list(model.parameters()),
            **{k: options[k] for k in keys if k in options},
        }
        return reference(model, batches(STEPS, 8, dtype), [group], **more)

    truth, true_v = plain(torch.float64)
    for dtype in (torch.float32, torch.float64):
        model = network(dtype)
        opt = ak.AdAdaGradNorm(model, **options, **FIXED)
        train(model, opt, batches(STEPS, 8, dtype))
        expected, v = plain(dtype)
        scale = STEPS * truth.abs().max() if dtype == torch.float64 else None
        assert_close_to_truth(weights(model), truth, expected, scale=scale, what=str(dtype))
        error = max(2 * abs(v - true_v), STEPS * torch.finfo(dtype).eps * true_v)
        assert abs(opt.accumulator.item() - true_v) <= error


def test_param_groups_share_the_accumulator() -> None:
    def groups(model: nn.Sequential) -> list[dict[str, Any]]:
        return [
            {"params": list(model[0].parameters()), "lr": 0.2, "weight_decay": 0.1},
            {"params": list(model[2].parameters()), "lr": 0.4, "lr_decay": 0.1},
        ]

    ours, plain = network(), network()
    opt = ak.AdAdaGradNorm(ours, params=groups(ours), **FIXED)
    train(ours, opt, batches(STEPS, 8))
    expected, v = reference(plain, batches(STEPS, 8), groups(plain))
    torch.testing.assert_close(weights(ours), expected, rtol=1e-10, atol=1e-12)
    assert opt.accumulator.item() == pytest.approx(v, rel=1e-10)


def test_there_is_one_accumulator() -> None:
    """Also where a dominant layer would hide it: the others' step is divided by the same root."""
    model = network()
    opt = ak.AdAdaGradNorm(model, lr=0.3, initial_accumulator_value=0.5, **FIXED)
    before = [p.detach().clone() for p in model.parameters()]
    mse(model, batches(1, 8)[0]).backward()
    opt.step()
    root = (0.5 + sum(p.grad.square().sum().item() for p in model.parameters())) ** 0.5
    for p, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(
            p.detach(), old - 0.3 * p.grad / (root + 1e-10), rtol=1e-12, atol=0
        )
    sums = [opt.state[p]["sum"] for p in model.parameters()]
    assert all(s is opt.accumulator for s in sums)
    assert sums[0].dtype == torch.float64
    assert sums[0].dim() == 0


def test_the_accumulator_is_float64_for_bfloat16_parameters() -> None:
    model = network(torch.bfloat16)
    opt = ak.AdAdaGradNorm(model, lr=1e-4, initial_accumulator_value=1e6, **FIXED)
    total = 1e6  # the next float32 is 0.06 away: squares of this size would be lost there
    for batch in batches(20, 8, torch.bfloat16):
        (1e-2 * mse(model, batch)).backward()
        total += sum(p.grad.double().square().sum().item() for p in model.parameters())
        opt.step()
        opt.zero_grad()
    assert opt.accumulator.item() - 1e6 == pytest.approx(total - 1e6, rel=1e-5)
    assert total - 1e6 > 0


def test_state_dict_continues_bit_for_bit() -> None:
    data = batches(40, 8, torch.float32)

    def fresh() -> tuple[nn.Module, ak.AdAdaGradNorm]:
        model = network(torch.float32)
        return model, ak.AdAdaGradNorm(model, lr=0.5, batch_size=4, max_batch_size=8)

    _, opt, second, opt2 = resumed(fresh, data)
    assert opt2.accumulator == opt.accumulator, "cast to the parameters' float32 on the way"
    assert all(opt2.state[p]["sum"] is opt2.accumulator for p in second.parameters())


def test_refuses_the_state_of_the_diagonal_optimizer_and_back() -> None:
    diagonal, scalar = network(), network()
    opt = ak.AdAdaGrad(diagonal, **FIXED)
    norm = ak.AdAdaGradNorm(scalar, **FIXED)
    for model, a, b in ((scalar, norm, opt), (diagonal, opt, norm)):
        before = snapshot(model, a)
        with pytest.raises(ValueError, match="accumulator"):
            a.load_state_dict(b.state_dict())
        assert_unchanged(model, a, before)


def test_all_groups_must_have_the_same_eps() -> None:
    model = network()
    groups = [
        {"params": list(model[0].parameters()), "eps": 0.1},
        {"params": list(model[2].parameters())},
    ]
    with pytest.raises(ValueError, match="eps must be the same"):
        ak.AdAdaGradNorm(model, params=groups, **FIXED)
    ak.AdAdaGradNorm(model, **FIXED)  # and the model is not left observed


@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_the_accumulator_must_start_positive(value: float) -> None:
    with pytest.raises(ValueError, match="initial_accumulator_value must be positive"):
        ak.AdAdaGradNorm(network(), initial_accumulator_value=value)
