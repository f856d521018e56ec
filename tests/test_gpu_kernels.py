"""What only a GPU can show of the CUDA kernels: streams, graphs, synchronisation, memory, bits."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tolerance import assert_close_to_truth
from torch import Tensor

from adagrad_kernels import _build, ops, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not _build.cuda_archs, reason=f"CUDA kernels {_build.cuda}"),
]

SHAPES = [(1000, 1001), (7,), (0, 3), (65537,)]


class Problem:
    """Tensors for one call of each op; the calls change `state` and return the results."""

    def __init__(self, device: str = "cuda") -> None:
        torch.manual_seed(0)
        self.params = [torch.randn(shape, device=device) for shape in SHAPES]
        self.grads = [torch.randn(shape, device=device) for shape in SHAPES]
        self.sums = [torch.rand(shape, device=device) for shape in SHAPES]
        self.squares = [torch.rand(shape, device=device) for shape in SHAPES]
        self.sum = torch.ones((), dtype=torch.float64, device=device)
        self.block = torch.randn(100, 5001, device=device)

    def adagrad(self) -> list[Tensor]:
        options = {"lr": 0.1, "weight_decay": 0.1, "grad_scale": 0.5, "samples": 4}
        return [*ops.adagrad_(self.params, self.grads, self.sums, self.squares, **options)]

    def adagrad_norm(self) -> list[Tensor]:
        options = {"lr": 0.1, "weight_decay": 0.1, "grad_scale": 0.5, "samples": 4}
        return [*ops.adagrad_norm_(self.params, self.grads, self.sum, self.squares, **options)]

    def grad_norm_sq(self) -> list[Tensor]:
        return [ops.grad_norm_sq(self.grads)]

    def sample_statistics(self) -> list[Tensor]:
        return [*ops.sample_statistics(self.block)]

    @property
    def state(self) -> list[Tensor]:
        return [*self.params, *self.sums, self.sum]


CALLS = ("adagrad", "adagrad_norm", "grad_norm_sq", "sample_statistics")


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def expected(call: str, steps: int = 1) -> tuple[list[Tensor], list[Tensor]]:
    """(results, state) of so many eager calls."""
    problem = Problem()
    for _ in range(steps):
        results = getattr(problem, call)()
    return results, problem.state


@pytest.mark.parametrize("op", ["adagrad_", "adagrad_norm_", "grad_norm_sq", "sample_statistics"])
def test_the_compiled_kernel_runs(op: str) -> None:
    dump = torch._C._dispatch_dump(f"adagrad_kernels::{op}")
    assert "CUDA: registered at csrc/cuda/" in dump


@pytest.mark.parametrize("call", CALLS)
def test_the_same_bits_every_time(call: str) -> None:
    assert same(expected(call)[0], expected(call)[0])
    assert same(expected(call)[1], expected(call)[1])


@pytest.mark.parametrize("call", CALLS)
def test_the_host_does_not_wait(call: str) -> None:
    problem = Problem()
    getattr(problem, call)()
    torch.cuda.set_sync_debug_mode("error")
    try:
        getattr(problem, call)()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("call", CALLS)
def test_the_current_stream_is_used(call: str) -> None:
    """Inputs that another stream still writes are read only after that."""
    wanted = expected(call)
    problem, stream = Problem(), torch.cuda.Stream()
    tensors = [*problem.state, *problem.grads, *problem.squares, problem.block]
    values = [t.clone() for t in tensors]
    for t in tensors:
        t.fill_(float("nan"))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # some 0.1 s
        for t, value in zip(tensors, values, strict=True):
            t.copy_(value)
        results = getattr(problem, call)()
    stream.synchronize()
    assert same(results, wanted[0])
    assert same(problem.state, wanted[1])


@pytest.mark.parametrize("call", CALLS)
def test_a_captured_graph_repeats_the_call(call: str) -> None:
    problem, start = Problem(), Problem()
    run: Callable[[], list[Tensor]] = getattr(problem, call)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # warm-up, as torch asks for
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    for t, value in zip(problem.state, start.state, strict=True):
        t.copy_(value)
    for _ in range(3):
        graph.replay()
    wanted = expected(call, steps=3)
    assert same(results, wanted[0])
    assert same(problem.state, wanted[1])


def test_more_tensors_than_one_launch_takes() -> None:
    params = [torch.randn(i % 50, device="cuda") for i in range(1000)]
    grads, sums = [torch.randn_like(p) for p in params], [torch.rand_like(p) for p in params]
    truth, sums64 = [p.double() for p in params], [v.double() for v in sums]
    norm, _ = ops.adagrad_(params, grads, sums, lr=0.1)
    grads64 = [g.double() for g in grads]
    wanted, _ = reference.adagrad_(truth, grads64, sums64, [], 0.1, 1e-10, 0, False, 1, 2)
    assert_close_to_truth(norm.float(), wanted, wanted.float())
    flat = torch.cat(truth)
    assert_close_to_truth(torch.cat(params), flat, flat.float())


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    n = 2**31 + 4097
    if torch.cuda.mem_get_info()[0] < 20 * n:
        pytest.skip("needs 40 GB of free device memory")
    w = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    grad = torch.zeros_like(w)
    grad[-3:] = 2
    sums = torch.zeros(n, device="cuda")
    norm, _ = ops.adagrad_([w], [grad], [sums], lr=1.0)
    assert norm.item() == 12
    assert w[-4:].tolist() == [0, -1, -1, -1]
    assert sums[-4:].tolist() == [0, 4, 4, 4]
    assert ops.grad_norm_sq([grad]).item() == 12
    total, total_sq, norms = ops.sample_statistics(grad.view(1, n))
    assert (total[-1], total_sq[-1], norms[0]) == (2, 4, 12)
    total, _, norms = ops.sample_statistics(grad[: n - n % 4096].view(-1, 4096))
    assert norms.shape == (n // 4096,)
    assert total.sum() == grad[: n - n % 4096].sum()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("call", CALLS)
def test_another_device_than_the_current_one(call: str) -> None:
    problem = Problem("cuda:1")
    results = getattr(problem, call)()
    assert torch.cuda.current_device() == 0
    assert all(t.device.index == 1 for t in results)
    wanted = expected(call)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(problem.state, wanted[1], strict=True))


def test_tensors_of_two_devices_are_refused() -> None:
    w = [torch.ones(2, device="cuda")]
    with pytest.raises(RuntimeError, match="one device"):
        ops.adagrad_(w, [torch.ones(2)], [torch.ones(2, device="cuda")])
    with pytest.raises(RuntimeError, match="one device"):
        ops.grad_norm_sq([w[0], torch.ones(2)])


PROGRAM = """
import torch
from adagrad_kernels import ops
for n in (1, 1000, 5001):
    for dtype in (torch.float32, torch.bfloat16):
        w = [torch.ones(n + 1, dtype=dtype, device="cuda")[k:] for k in (0, 1)]
        v = [torch.ones_like(p, dtype=torch.float32) for p in w]
        c = [torch.ones_like(x) for x in v]
        g = [torch.ones_like(p) for p in w]
        ops.adagrad_(w, g, v, c)
        ops.adagrad_norm_(w, g, torch.ones((), dtype=torch.float64, device="cuda"), c,
                          weight_decay=0.1)
        ops.grad_norm_sq(g)
        ops.sample_statistics(torch.ones(9, n, dtype=dtype, device="cuda"))
        ops.sample_statistics(torch.ones(150, n, dtype=dtype, device="cuda"))
torch.cuda.synchronize()
print("done")
"""


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        pytest.skip("compute-sanitizer is not installed")
    command = [sanitizer, "--tool", tool, "--kernel-name", "kernel_substring=adagrad_kernels"]
    command += ["--error-exitcode", "9", sys.executable, "-c", PROGRAM]
    root = Path(__file__).parents[1]
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=root, env=env, timeout=90, check=False
    )
    output = done.stdout + done.stderr
    if "Device not supported" in output:
        pytest.skip("compute-sanitizer does not work on this machine")
    assert done.returncode == 0, output
    assert "done" in output
