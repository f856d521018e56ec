"""`sample_statistics` and `pool_samples` against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import DTYPES, dtypes, laid_out, layouts, sizes
from tolerance import assert_close_to_truth
from torch import Tensor

from adagrad_kernels import ops, reference

pytestmark = pytest.mark.usefixtures("nan_memory")


def check_sample_statistics(g: Tensor) -> None:
    found = ops.sample_statistics(g)
    truth, plain = reference.sample_statistics(g.double()), reference.sample_statistics(g)
    sizes = reference.sample_statistics(g.double().abs())
    for name, *results in zip(
        ("sum", "sum_sq", "norms_sq"), found, truth, plain, sizes, strict=True
    ):
        assert_close_to_truth(*results, what=name)


@settings(max_examples=40)
@given(sizes, sizes, dtypes, layouts)
def test_sample_statistics(
    device: torch.device, rows: int, columns: int, dtype: torch.dtype, layout: str
) -> None:
    check_sample_statistics(laid_out(torch.randn(rows, columns, device=device).to(dtype), layout))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 50_001), (5_000, 17), (64, 5_000), (1, 100_000)])
def test_sample_statistics_over_threads(device: torch.device, shape, dtype: torch.dtype) -> None:
    check_sample_statistics(torch.randn(*shape, device=device).to(dtype))


@pytest.mark.parametrize("shape", [(1, 5), (4, 1)])
def test_sample_statistics_of_an_expanded_tensor(device: torch.device, shape) -> None:
    check_sample_statistics(torch.randn(*shape, device=device).expand(4, 5))


def test_sample_statistics_keeps_infinities_in_their_row(device: torch.device) -> None:
    g = torch.ones(3, 70, device=device)
    g[1, 5], g[2, 6] = torch.inf, torch.nan
    total, total_sq, norms = ops.sample_statistics(g)
    assert norms[0] == 70
    assert norms[1] == torch.inf
    assert norms[2].isnan()
    assert total[5] == torch.inf
    assert total[6].isnan()
    assert total_sq.isfinite().sum() == 68


@pytest.mark.parametrize("function", [ops.sample_statistics, reference.sample_statistics])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_sample_statistics_takes_two_dimensions(function, shape) -> None:
    with pytest.raises(RuntimeError, match=r"expected g \[b, P\], got " + str(len(shape))):
        function(torch.ones(shape))


def test_sample_statistics_takes_floating_point() -> None:
    with pytest.raises(RuntimeError, match="floating point"):
        ops.sample_statistics(torch.ones(2, 2, dtype=torch.int64))


probe_rows = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3)), min_size=1, max_size=4)


@given(probe_rows, st.sampled_from([torch.float32, torch.float64]))
def test_pool_samples(
    device: torch.device, parts: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    rows = [n for n, _ in parts]
    probes = []
    for n, spare in parts:
        norms = torch.randn(n + spare, device=device, dtype=dtype).square()
        calls = torch.randint(4, (n + spare,), device=device).to(dtype)
        probes.append(torch.stack([norms, calls]))
    norms, totals = ops.pool_samples(probes, rows)
    expected = torch.cat([p[0, :n] for p, n in zip(probes, rows, strict=True)])
    assert torch.equal(norms, expected)
    assert totals.dtype == torch.float64
    assert_close_to_truth(totals[0], expected.double().sum(), expected.double().sum())
    calls = torch.cat([p[1, :n] for p, n in zip(probes, rows, strict=True)])
    beyond = torch.cat([p[1, n:] for p, n in zip(probes, rows, strict=True)])
    least, most = (calls.min().item(), calls.max().item()) if calls.numel() else (-1, 0)
    assert totals[1:].tolist() == [least, most, beyond.max().item() if beyond.numel() else 0]


@pytest.mark.parametrize("function", [ops.pool_samples, reference.pool_samples])
@pytest.mark.parametrize(
    ("probes", "rows"),
    [([torch.zeros(2, 3)], [1, 2]), ([torch.zeros(2, 3)], [4]), ([torch.zeros(2, 3)], [-1])],
)
def test_pool_samples_checks_rows(function, probes: list[Tensor], rows: list[int]) -> None:
    with pytest.raises(RuntimeError, match="row"):
        function(probes, rows)


@pytest.mark.parametrize("function", [ops.pool_samples, reference.pool_samples])
def test_pool_samples_takes_probes(function) -> None:
    with pytest.raises(RuntimeError, match="probe"):
        function([], [])
    with pytest.raises(RuntimeError, match=r"\[2, capacity\]"):
        function([torch.zeros(3, 2)], [2])
    with pytest.raises(RuntimeError, match="one dtype"):
        function([torch.zeros(2, 2), torch.zeros(2, 2).double()], [2, 2])


@given(st.lists(st.tuples(sizes, sizes), min_size=1, max_size=4), dtypes, layouts)
def test_grad_norm_sq(
    device: torch.device, shapes: list[tuple[int, int]], dtype: torch.dtype, layout: str
) -> None:
    tensors = [laid_out(torch.randn(shape, device=device).to(dtype), layout) for shape in shapes]
    exact = reference.compute_dtype(dtype)
    truth = torch.cat([t.double().flatten() for t in tensors]).square().sum()
    plain = torch.cat([t.to(exact).flatten() for t in tensors]).square().sum()
    found = ops.grad_norm_sq(tensors)
    assert found.dtype == torch.float64
    assert_close_to_truth(found.to(exact), truth, plain)


def test_grad_norm_sq_over_threads(device: torch.device) -> None:
    tensors = [torch.randn(50_000, device=device), torch.randn(3, 40_000, device=device)]
    flat = torch.cat([t.flatten() for t in tensors])
    found = ops.grad_norm_sq(tensors).float()
    assert_close_to_truth(found, flat.double().square().sum(), flat.square().sum())


@pytest.mark.parametrize("function", [ops.grad_norm_sq, reference.grad_norm_sq])
def test_grad_norm_sq_takes_tensors(function) -> None:
    with pytest.raises(RuntimeError, match="no tensors"):
        function([])
