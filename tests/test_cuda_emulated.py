"""The CUDA kernels, compiled for the CPU and run there thread by thread (cuda_emulation/).

The bodies are those of the CPU's tests. What a GPU alone can show is in test_gpu_kernels.py.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cuda_emulation.build import build
from cuda_emulation.toolkit import needs_nvcc, toolkit
from test_ops_optimizers import (  # noqa: F401
    check_reductions,
    copies,
    test_a_parameter_with_gaps_is_refused,
    test_adagrad,
    test_adagrad_norm,
    test_adagrad_norm_checks_its_tensors,
    test_adagrad_norm_takes_a_rate_for_each_parameter,
    test_gradients_of_other_dtypes_and_layouts,
    test_non_finite_gradients_are_not_hidden,
    test_one_rate_for_all,
)
from test_ops_statistics import (  # noqa: F401
    test_grad_norm_sq,
    test_grad_norm_sq_over_threads,
    test_sample_statistics,
    test_sample_statistics_keeps_infinities_in_their_row,
    test_sample_statistics_of_an_expanded_tensor,
    test_sample_statistics_over_threads,
    test_sample_statistics_takes_floating_point,
)
from tolerance import assert_close_to_truth

from adagrad_kernels import ops, reference
from adagrad_kernels.ops import _schemas

pytestmark = [needs_nvcc, pytest.mark.usefixtures("nan_memory")]

NAMES = ("sample_statistics", "adagrad_", "adagrad_norm_", "grad_norm_sq")
NAMESPACE = "adagrad_kernels_emulated"


@pytest.fixture(scope="module", autouse=True)
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """While this module runs, ops/ calls the emulated ops instead of the CPU's."""
    library = torch.library.Library(NAMESPACE, "DEF")
    for name in NAMES:
        schema = str(getattr(_schemas.registered, name).default._schema)
        library.define(schema.removeprefix("adagrad_kernels::"))
    torch.ops.load_library(str(build(tmp_path_factory.mktemp("emulated"), Path(toolkit or ""))))
    plain, _schemas.registered = _schemas.registered, getattr(torch.ops, NAMESPACE)
    yield
    _schemas.registered = plain


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu")


def guarded(t: torch.Tensor, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(t in the middle of a larger run of memory, all of that run)."""
    run = torch.full((t.numel() + 64,), 7.0, dtype=t.dtype)
    view = run[32 + offset : 32 + offset + t.numel()]
    return view.copy_(t), run


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("n", [1, 1023, 1024, 1025, 4099])
def test_nothing_is_written_beyond_a_tensor(n: int, offset: int, dtype: torch.dtype) -> None:
    exact = reference.compute_dtype(dtype)
    w, run_w = guarded(torch.randn(n).to(dtype), offset)
    v, run_v = guarded(torch.rand(n, dtype=exact), offset)
    grad = torch.randn(n).to(dtype)
    expected, expected_v = w.to(torch.float64), v.to(torch.float64)
    ops.adagrad_([w], [grad], [v], lr=0.1)
    reference.adagrad_([expected], [grad.double()], [expected_v], [], 0.1, 1e-10, 0, False, 1, 2)
    assert_close_to_truth(w, expected, expected.to(dtype))
    assert_close_to_truth(v, expected_v, expected_v.to(exact))
    for run in (run_w, run_v):
        assert (run[: 32 + offset] == 7).all()
        assert (run[32 + offset + n :] == 7).all()


@pytest.mark.parametrize("function", ["adagrad_", "adagrad_norm_"])
def test_more_tensors_than_one_launch_takes(function: str) -> None:
    """Several tables, of several types, and empty tensors between them."""
    kinds = [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ]
    made: dict[str, list[torch.Tensor]] = {"params": [], "grads": [], "sums": [], "squares": []}
    for i in range(400):
        param, grad = kinds[i % 5 if i < 30 else 0]
        exact = reference.compute_dtype(param)
        shape = () if i == 7 else (i % 11,)
        c = torch.randn(4, *shape, dtype=exact)
        made["params"].append(torch.randn(shape).to(param))
        made["grads"].append(c.sum(0).to(grad))
        made["sums"].append(torch.rand(shape, dtype=exact))
        made["squares"].append(c.square().sum(0))
    results = []
    for dtype in (None, torch.float64, None):
        p, g, c = (copies(made[key], dtype) for key in ("params", "grads", "squares"))
        v = copies(made["sums"], dtype)
        if function == "adagrad_norm_":
            v = torch.tensor(0.5, dtype=torch.float64)
        call = getattr(reference if results else _schemas.registered, function)
        rate, decay = (0.1, 0.1) if function == "adagrad_" else ([0.1] * 400, [0.1] * 400)
        found = call(p, g, v, c, rate, 1e-10, decay, False, 0.5, 4)
        results.append((p, found, v))
    for p, q, r in zip(*(result[0] for result in results), strict=True):
        assert_close_to_truth(p, q, r)
    v = results[1][2]
    roots = [v.sqrt()] * 400 if isinstance(v, torch.Tensor) else [x.sqrt() for x in v]
    check_reductions([result[1] for result in results], made, roots, 0.5, 4)


def test_blocks_of_more_than_1024_elements() -> None:
    w, grad, v = torch.randn(2_100_001), torch.randn(2_100_001), torch.rand(2_100_001)
    expected, expected_v = w.double(), v.double()
    norm, _ = ops.adagrad_([w], [grad], [v], lr=0.1)
    truth, _ = reference.adagrad_(
        [expected], [grad.double()], [expected_v], [], 0.1, 1e-10, 0, False, 1, 2
    )
    assert_close_to_truth(w, expected, expected.float())
    assert_close_to_truth(v, expected_v, expected_v.float())
    assert_close_to_truth(norm.float(), truth, truth.float())


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (9, 4096), (130, 2048), (700, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sample_statistics_at_the_edges_of_blocks(shape, dtype: torch.dtype) -> None:
    g = torch.randn(shape).to(dtype)
    found, truth = ops.sample_statistics(g), reference.sample_statistics(g.double())
    sizes = reference.sample_statistics(g.double().abs())
    for results in zip(found, truth, reference.sample_statistics(g), sizes, strict=True):
        assert_close_to_truth(*results)


def test_the_same_bits_every_time() -> None:
    g = torch.randn(70, 5001)
    first, second = ops.sample_statistics(g), ops.sample_statistics(g)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    norms = []
    for _ in range(2):
        w, v = [torch.ones(9001)], [torch.ones(9001)]
        norms.append(torch.cat([x.view(-1) for x in ops.adagrad_(w, [g[0, :1].expand(9001)], v)]))
    assert torch.equal(*norms)
