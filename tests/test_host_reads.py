"""A step reads one number from the device where it tests, and nothing where it does not.

On a GPU CUDA itself reports every wait of the host. On the CPU the ways to read a tensor are
counted, and those to copy Python numbers into one, which wait as well: it is the same Python code.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adagrad_kernels as ak
from adagrad_kernels import backward_rows, triton_kernels

READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "nonzero")
COPIES = ("new_tensor",)


class Network(nn.Module):
    """One layer of every kind that has kernels of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.group_norm, self.layer_norm = nn.GroupNorm(2, 8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up = nn.ConvTranspose1d(8, 8, 2)
        self.out = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.group_norm(self.conv(self.tokens(tokens).mT))
        x = self.layer_norm(self.up(x).mT)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.out(x.mean(1))


@contextlib.contextmanager
def counted_reads(device: torch.device, patch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the reads inside, one entry each."""
    found: list[str] = []
    if device.type == "cuda":
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield found
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found += [str(w.message) for w in caught if "called a synchronizing" in str(w.message)]
        return

    def counting(name: str) -> Callable[..., Any]:
        plain = getattr(Tensor, name)

        def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.requires_grad or self.numel() > 0:
                found.append(name)
            return plain(self, *args, **kwargs)

        return method

    with patch.context() as patched:
        for name in (*READS, *COPIES):
            patched.setattr(Tensor, name, counting(name))
        yield found


CRITERIA = {
    "norm": ak.NormTest(0.1),
    "coordinates": ak.CoordinateNormTest(0.1),
    "metric": ak.CoordinateNormTest(0.1, aggregate="adagrad"),
    "inner products": ak.AugmentedInnerProductTest(0.5, 1.0, debiased=True),
}


@pytest.mark.parametrize("make", [ak.AdAdaGrad, ak.AdAdaGradNorm])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_reads_of_a_step(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, criterion: str, make: Any
) -> None:
    model = Network().to(device)
    opt = make(
        model, criterion=CRITERIA[criterion], batch_size=8, max_batch_size=8, every=2,
        **({} if make is ak.AdAdaGrad else {"initial_accumulator_value": 1.0}),
    )  # fmt: skip
    tokens = torch.randint(11, (8, 5), device=device)
    classes = torch.randint(3, (8,), device=device)

    def step() -> None:
        F.cross_entropy(model(tokens), classes).backward()
        opt.step()
        opt.zero_grad()

    step(), step()  # the first one checks that the measurements explain the gradient
    for tested in (True, False, True, False):
        with counted_reads(device, monkeypatch) as reads:
            step()
        expected = tested * (2 if criterion == "inner products" else 1)
        assert len(reads) == expected, f"{'tested' if tested else 'untested'} step: {reads}"


@pytest.mark.filterwarnings("ignore:<class .*Function'> should not be inst:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_reads_of_a_compiled_step(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where the layers tell nobody of their calls."""
    torch.compiler.reset()
    if device.type == "cpu":  # where ops are not launched from Python, and reading is free
        monkeypatch.setattr(backward_rows, "noted", lambda: 8)
    model = nn.Sequential(nn.Conv1d(8, 8, 3), nn.LayerNorm(5), nn.Flatten(), nn.Linear(40, 3))
    model.to(device)
    opt = ak.AdAdaGrad(model, batch_size=8, max_batch_size=8, every=2)
    compiled = torch.compile(model, fullgraph=True)
    x, classes = torch.randn(8, 8, 7, device=device), torch.randint(3, (8,), device=device)

    def backward() -> None:
        F.cross_entropy(compiled(x), classes).backward()

    for tested in (None, None, True, False, True, False):
        backward()  # compiles, which reads as well
        with counted_reads(device, monkeypatch) as reads:
            opt.step()
            opt.zero_grad()
        if tested is not None:
            assert len(reads) == tested, f"{'tested' if tested else 'untested'} step: {reads}"
    opt.cycle.observer.detach()


class Marked(torch.autograd.Function):
    """An op on the CPU, called as those on CUDA devices are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x @ w.mT

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[None, Tensor]:
        call = triton_kernels._kernel("linear_weight_grad")
        return None, call(
            grad_out.unsqueeze(1), ctx.saved_tensors[0].unsqueeze(1), 16, True, False, False
        )[0]


def test_ops_on_cuda_devices_note_the_rows_of_the_backward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_kernels, "_capable", lambda _: False)  # the reference computes
    seen = []
    w = torch.randn(2, 3, requires_grad=True)
    w.register_hook(lambda _: seen.append(backward_rows.noted()))
    for rows in (5, 7):
        Marked.apply(torch.randn(rows, 3), w).sum().backward()
        assert backward_rows.noted() is None  # no backward pass runs
    (w * w).sum().backward()
    assert seen == [5, 7, None]


def test_the_reads_are_seen(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(3, device=device)
    with counted_reads(device, monkeypatch) as reads:
        x.tolist(), x.sum().item(), bool(x[0] > 0), float(x[0])
        x.new_tensor([1.0, 2.0])
    assert len(reads) == 5
