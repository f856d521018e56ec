"""Forward passes that are given up: for vmap, or by an exception."""

import copy

import pytest
import torch
import torch.nn.functional as F
from layer_cases import between
from module_cases import (
    MODULE_CASES,
    Own,
)
from per_sample import per_sample
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from watched import Known, check, loss, measured

import adagrad_kernels as ak
from adagrad_kernels.layers import ObservedFallback, ObservedModule


def test_falling_back_to_vmap_is_once_and_for_all(device: torch.device) -> None:
    case = MODULE_CASES["own-borrowed"]
    model, x = case.make().to(device).double(), case.input(device)
    before = {name: set(m.__dict__) for name, m in model.named_modules()}
    observer = ak.observe(model, fallback="vmap")
    kinds = [type(model[1])]
    for _ in range(3):
        assert_close(measured(model, x, observer), per_sample(model, loss, x).norms_sq)
        kinds.append(type(model[1]))
    assert issubclass(kinds[0], ObservedModule)
    assert len(set(kinds[1:])) == 1
    assert issubclass(kinds[1], ObservedFallback)
    assert "1.inner.weight" in [record.name for record in observer.coverage()]
    observer.detach()
    assert {name: set(m.__dict__) for name, m in model.named_modules()} == before
    assert type(model[1].inner) is nn.Linear


def test_what_is_given_up_is_undone(device: torch.device) -> None:
    """Random numbers and counted calls are as if the first attempt had not been."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p0, self.p1 = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(5, 3))
            self.inner = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("btd,de->bte", self.inner(x) * self.p0, self.p1)

    model = nn.Sequential(Odd(), nn.Dropout(0.5)).to(device)
    plain, x = copy.deepcopy(model), torch.randn(4, 7, 5, device=device)
    observer = ak.observe(model, fallback="vmap")
    torch.manual_seed(1)
    y = model(x)
    torch.manual_seed(1)
    assert_close(y, plain(x))
    loss(y).backward()
    assert not +observer._pending
    assert observer.statistics().batch_size == 4


def test_a_module_inside_is_given_up(device: torch.device) -> None:
    """The module around it goes on being watched, and what it passes on is refused."""

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain, self.table = nn.Parameter(torch.randn(5)), nn.Embedding(9, 5)
            self.inner = Own(lambda m, x: torch.einsum("btd,de->bte", x * m.p0, m.p1), (5,), (5, 5))

        def forward(self, x: Tensor) -> Tensor:
            places = torch.arange(x.shape[1], device=x.device)
            return self.inner(x * self.gain + self.table(places)) * self.gain

    model = Around().to(device).double()
    check(model, (4, 7, 5), device, fallback="vmap")
    observer = ak.observe(model, fallback="vmap")
    model(torch.randn(4, 7, 5, device=device, dtype=torch.float64))
    assert isinstance(model, ObservedModule)
    assert isinstance(model.inner, ObservedFallback)
    assert [r.method for r in observer.coverage() if r.owner == "inner"] == [
        ObservedFallback.observed_method
    ] * 2


def test_a_checkpoint_sees_one_forward_pass(device: torch.device) -> None:
    model = Own(lambda m, x: F.dropout(x * m.p0, 0.5), (5,)).to(device).double()
    plain, x = copy.deepcopy(model), torch.randn(4, 5, device=device, dtype=torch.float64)
    observer = ak.observe(model, fallback="vmap")
    found = []
    for m in (model, plain):
        torch.manual_seed(1)
        y = checkpoint(m, x, use_reentrant=False)
        loss(y).backward()
        found += [y, m.p0.grad]
    assert_close(found[:2], found[2:])
    assert observer.statistics().batch_size == 4


def test_an_input_that_was_written_to_cannot_be_given_back(device: torch.device) -> None:
    def forward(m: Own, x: Tensor) -> Tensor:
        return torch.einsum("bd,de->be", x.add_(1.0) * m.p0, m.p1)

    model = Own(forward, (5,), (5, 3)).to(device)
    observer = ak.observe(model, fallback="vmap")
    x = torch.randn(4, 5, device=device)
    with pytest.raises(RuntimeError, match=r"writes to its input.*run this batch again"):
        model(x.clone())
    assert observer.shared_values is None
    assert isinstance(model, ObservedFallback)  # from the next time on


def test_an_unused_head_needs_no_vmap(device: torch.device) -> None:
    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(5))
            self.head, self.spare = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x * self.gain)

    model = Headed().to(device).double()
    ak.observe(model, fallback="vmap")
    model(torch.randn(4, 5, device=device, dtype=torch.float64))
    assert isinstance(model, ObservedModule)


def test_buffers_that_a_forward_pass_rebinds(device: torch.device) -> None:
    class Moving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.mean = 0.9 * self.mean + x.square().mean()
            return torch.einsum("bd,de->be", x, self.weight)

    model = Moving().to(device)
    ak.observe(model, fallback="vmap")
    with pytest.raises(RuntimeError, match="changes its buffer 'mean'"):
        model(torch.randn(5, 4, device=device))


def test_exceptions_leave_nothing_behind(device: torch.device) -> None:
    def forward(m: Known, x: Tensor) -> Tensor:
        if len(x) == 3:
            raise KeyError("odd")
        return x * m.p0

    model = between(Known(forward, (5,)), 5).to(device).double()
    observer = ak.observe(model)
    with pytest.raises(KeyError):
        model(torch.randn(3, 7, 5, device=device, dtype=torch.float64))
    assert observer.shared_values is None
    assert torch._C._len_torch_function_stack() == 0
    observer.detach()
    check(model, (4, 5), device)
