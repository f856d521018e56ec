"""`GradientStatistics`: formulas by hand, edges, immutability, one transfer from the device."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import adagrad_kernels as ak

sums = st.floats(0, 1e12)


def made_from(g: Tensor, gradient_scale: float = 1.0, **more: object) -> ak.GradientStatistics:
    """The statistics of per-sample gradients [N, P], as an observer would make them."""
    n = g.shape[0]
    return ak.GradientStatistics(
        batch_size=n,
        sum_norms_sq=g.square().sum().item(),
        mean_norm_sq=g.mean(0).square().sum().item(),
        contribution_norms_sq=(g / (n * gradient_scale)).square().sum(1),
        gradient_scale=gradient_scale,
        **more,  # type: ignore[arg-type]
    )


def close(found: Tensor, expected: Tensor | float) -> None:
    assert found.dtype == torch.float64
    torch.testing.assert_close(
        found, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0
    )


@given(st.integers(2, 6), st.integers(1, 5), st.sampled_from([1.0, 0.25]))
def test_formulas(n: int, size: int, gradient_scale: float) -> None:
    g = torch.randn(n, size, dtype=torch.float64) + 1
    s = made_from(g, gradient_scale)
    assert s.batch_size == n
    assert s.finite
    close(s.sample_norms_sq, g.square().sum(1))
    close(s.grad_norm_sq, g.mean(0).square().sum())
    close(s.variance_trace, g.var(0).sum())
    assert s.variance == s.variance_trace.item()
    signal = g.mean(0).square().sum() - g.var(0).sum() / n
    if signal > 1e-9:
        torch.testing.assert_close(s.noise_scale, g.var(0).sum() / signal, rtol=1e-6, atol=0)
    elif signal < -1e-9:
        assert s.noise_scale == math.inf


def test_by_hand() -> None:
    """g = (1, 2), (3, 0): ḡ = (2, 1), ‖ḡ‖² = 5, Σ‖g‖² = 14, tr Σ̂ = 4."""
    s = made_from(torch.tensor([[1.0, 2.0], [3.0, 0.0]]).double())
    assert s.variance == 4
    assert s.grad_norm_sq == 5
    assert s.noise_scale == pytest.approx(4 / (5 - 4 / 2))
    assert s.sample_norms_sq.tolist() == [5, 9]


def test_the_batch_of_one_has_no_variance() -> None:
    s = ak.GradientStatistics(batch_size=1, sum_norms_sq=4.0, mean_norm_sq=4.0)
    assert math.isnan(s.variance)
    assert s.variance_trace.isnan()
    assert s.noise_scale.isnan()
    assert s.finite


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("where", ["sum_norms_sq", "mean_norm_sq"])
def test_non_finite_sums(bad: float, where: str) -> None:
    figures = {"sum_norms_sq": 9.0, "mean_norm_sq": 1.0, where: bad}
    s = ak.GradientStatistics(batch_size=3, **figures)
    assert not s.finite
    assert not math.isfinite(s.variance)
    assert not s.noise_scale.isfinite()


@given(st.integers(2, 10**6), sums, sums)
def test_variance_is_never_negative(n: int, sum_norms_sq: float, mean_norm_sq: float) -> None:
    s = ak.GradientStatistics(batch_size=n, sum_norms_sq=sum_norms_sq, mean_norm_sq=mean_norm_sq)
    assert s.variance >= 0
    assert s.noise_scale.isnan() or s.noise_scale >= 0


@pytest.mark.parametrize(
    ("total", "mean", "expected"),
    [
        (8.0, 2.0, 0.0),  # no variance
        (0.0, 0.0, math.nan),  # nothing at all
        (8.0, 0.0, math.inf),  # noise alone
        (8.0, 0.5, math.inf),  # tr Σ̂ = 2, ‖ḡ‖² = tr Σ̂/4: no signal is left
        (8.0, 1.0, 4 / 3 / (1 - 1 / 3)),
    ],
)
def test_noise_scale(total: float, mean: float, expected: float) -> None:
    s = ak.GradientStatistics(batch_size=4, sum_norms_sq=total, mean_norm_sq=mean)
    assert s.noise_scale.item() == pytest.approx(expected, nan_ok=True)


def test_inner_product_variance() -> None:
    products = torch.tensor([1.0, 2.0, 6.0])
    s = made_from(torch.randn(3, 2).double(), inner_products=products)
    assert s.inner_product_variance is not None
    assert s.inner_product_variance.item() == pytest.approx(7.0)
    assert made_from(torch.randn(3, 2).double()).inner_product_variance is None


def test_without_samples() -> None:
    s = ak.GradientStatistics(batch_size=2, sum_norms_sq=1.0, mean_norm_sq=0.2)
    with pytest.raises(RuntimeError, match="sums alone"):
        _ = s.sample_norms_sq


def test_immutable() -> None:
    s = made_from(torch.randn(3, 2).double())
    with pytest.raises(dataclasses.FrozenInstanceError):
        s.batch_size = 5  # type: ignore[misc]
    s.grad_norm_sq.fill_(9.0)
    s.sample_norms_sq.fill_(9.0)
    assert s.mean_norm_sq != 9
    assert (s.sample_norms_sq != 9).all()


def test_reset_does_not_change_what_was_read() -> None:
    model = nn.Linear(3, 2)
    observer = ak.observe(model, coordinates=True)
    x = torch.randn(4, 3)
    model(x).square().mean().backward()
    s = observer.statistics()
    norms = s.sample_norms_sq.clone()
    assert s.coordinate_variance is not None
    variances = {name: v.clone() for name, v in s.coordinate_variance.items()}
    observer.reset()
    model.zero_grad(set_to_none=False)
    model(3 * x).square().mean().backward()
    observer.statistics()
    assert torch.equal(s.sample_norms_sq, norms)
    assert all(torch.equal(s.coordinate_variance[name], v) for name, v in variances.items())


class Transfers(TorchDispatchMode):
    """Counts what would stop a GPU: numbers that Python reads from tensors."""

    READS = (
        "aten._local_scalar_dense",
        "aten.item",
        "aten.is_nonzero",
        "aten.equal",
        "aten.nonzero",
    )

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += str(func.overloadpacket) in self.READS
        return func(*args, **(kwargs or {}))


@given(sums, sums)
def test_the_sums_between_workers_are_those_of_some_samples(sum_sq: float, mean_sq: float) -> None:
    """Σ‖g_i‖² ≥ N‖ḡ‖², whatever rounding makes of the workers' norms."""
    s = ak.GradientStatistics.between_workers(4, 32, sum_sq, mean_sq)
    assert s.sum_norms_sq >= 32 * mean_sq
    assert s.workers == 4


def test_the_standard_error_with_inner_products_of_other_samples() -> None:
    """As many as this rank has samples, of the last micro-batch of all ranks: not its own."""
    g, p = torch.randn(4, 3), torch.randn(4)
    rank = dataclasses.replace(made_from(g), batch_size=8)
    found = dataclasses.replace(rank, inner_products=p).variance_standard_error
    assert found == rank.variance_standard_error


def test_the_device_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, backward, statistics, all properties: one `tolist` of five numbers a step."""
    read: list[int] = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda t: read.append(t.numel()) or tolist(t))
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(8, 2))
    observer = ak.observe(model, coordinates=True)
    model(torch.randn(4, 1, 3, 3)).sum().backward()  # the first pass checks itself
    observer.reset(), model.zero_grad()
    with Transfers() as transfers:
        for _ in range(3):
            model(torch.randn(4, 1, 3, 3)).square().mean().backward()
        s = observer.statistics(gradient_scale=1 / 3)
        assert read == [5]
        inside = transfers.count
        for name in ("grad_norm_sq", "variance_trace", "sample_norms_sq", "noise_scale"):
            assert getattr(s, name) is not None
        assert transfers.count == inside <= 5
        assert read == [5]
