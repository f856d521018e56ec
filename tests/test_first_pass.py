"""The first backward pass is checked without keeping more than it must."""

import copy
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adagrad_kernels as ak
from adagrad_kernels.selfcheck import Explanation


def deep() -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(6)))


def hooks(model: nn.Module) -> int:
    return sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())  # type: ignore[attr-defined]


def test_operands_are_freed_with_the_gradients_of_their_layer(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    grads: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    add = Explanation.add

    def watched(self: Explanation, call: Any) -> None:
        alive.append(sum(ref() is not None for ref in grads))
        grads.append(weakref.ref(call.saved[-1]))
        add(self, call)

    monkeypatch.setattr(Explanation, "add", watched)
    model = deep().to(device)
    observer = ak.observe(model)
    model(torch.randn(3, 8, device=device)).square().sum().backward()
    assert len(alive) == 6
    assert max(alive) <= 1
    assert not any(ref() is not None for ref in grads)
    observer.statistics()
    observer.detach()


def test_only_the_first_pass_has_hooks() -> None:
    model, x = deep(), torch.randn(3, 8)
    observer = ak.observe(model)
    seen: list[int] = []
    handle = model[0][0].weight.register_hook(lambda grad: seen.append(hooks(model)))
    for _ in range(2):
        model.zero_grad()
        observer.reset()
        model(x).square().sum().backward()
        assert hooks(model) == 0
    assert seen[0] > 0 == seen[1]
    handle.remove()
    observer.detach()


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise RuntimeError("in the middle")


@pytest.mark.parametrize("then", ["again", "reset", "detach"])
def test_a_pass_that_fails_leaves_nothing_behind(then: str) -> None:
    model, x = deep(), torch.randn(3, 8)
    observer = ak.observe(model)
    with pytest.raises(RuntimeError, match="in the middle"):
        model[3:](Failing.apply(model[:3](x))).square().sum().backward()
    assert hooks(model) > 0
    if then == "detach":
        observer.detach()
    else:
        model.zero_grad()
        observer.reset()
    assert hooks(model) == 0
    copy.deepcopy(model)
    if then == "again":
        y = model(x).square().sum() + model[5][0].weight.sum()
        y.backward()
        with pytest.raises(RuntimeError, match=r"'5.0.weight' has a gradient that the calls"):
            observer.statistics()


def test_gradients_that_a_hook_takes_away_are_not_compared() -> None:
    """As where an optimizer steps in a hook and frees the gradient."""
    model, x = deep(), torch.randn(3, 8)

    def take(p: Tensor) -> None:
        p.grad = None

    model[2][0].weight.register_post_accumulate_grad_hook(take)
    observer = ak.observe(model)
    model(x).square().sum().backward()
    assert observer.statistics(grad_norm_sq=torch.zeros(())).batch_size == 3
    observer.detach()


def test_gradient_from_elsewhere_is_found_with_several_micro_batches() -> None:
    model, x = deep(), torch.randn(3, 8)
    observer = ak.observe(model)
    (model(x).square().sum() + model[1][0].bias.sum()).backward()
    model(x).square().sum().backward()
    with pytest.raises(RuntimeError, match=r"'1.0.bias' has a gradient that the calls"):
        observer.statistics()
