"""python -m benchmarks.gpu: what one GPU does, the kernels against its limits, whole steps.

First the limits of this device in this run: the bandwidth of a copy and the rate of a bf16 matrix
product. Then each kernel, in GB/s and TFLOP/s and in percent of those, beside PyTorch's own way.
Then training steps, eager and compiled: the plain step is the fastest of
torch.optim.Adagrad(foreach=True), the fused op `torch._fused_adagrad_` (torch 2.11 has it, its
optimizer refuses it on CUDA) and a compiled update; and steps with vmap as in the official code,
and with Opacus where it is installed. Every result of ours is compared with float64 before its time
is taken. What is not begun --seconds after the start is left out, and said to be.

One JSON object a line goes to --out. `--device cpu --small` runs everything in seconds, on sizes
that mean nothing, to see that it works.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import adagrad_kernels as ak
from adagrad_kernels import ops, reference
from adagrad_kernels.benchmark.engine import require_equal
from adagrad_kernels.benchmark.records import now

from .gpu_layers import layer_kernels, linear_updates
from .gpu_steps import LR, OURS, PEERS, PLAIN, Unavailable, convolution, mean_loss, models
from .models import resnet18

Record = dict[str, Any]


def timed(run: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each of so many calls, after two that do not count."""
    run(), run()
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return times
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in itertools.pairwise(events)]


def percentiles(times: Sequence[float]) -> Record:
    """The seconds that 20, 50 and 80 % of the calls did not exceed."""
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return {"p20": cuts[1], "p50": cuts[4], "p80": cuts[7]}


class Bench:
    """The device, its limits, and the records of one run."""

    def __init__(self, device: torch.device, small: bool, out: Path | None, seconds: float) -> None:
        self.device, self.small, self.out = device, small, out
        self.ends = time.monotonic() + seconds
        self.copy_rate = self.product_rate = 0.0
        self.failures = 0
        cuda = device.type == "cuda"
        self.facts = {
            "device": torch.cuda.get_device_name(device) if cuda else "cpu",
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "version": ak.__version__,
            "date": now(),
        }

    def record(self, kind: str, name: str, variant: str, **values: Any) -> None:
        """Prints a result and appends it to the file."""
        numbers = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in values.items()
            if value is not None
        )
        print(f"{kind:7} {name:52} {variant:26} {numbers}", flush=True)
        if self.out:
            line = {"kind": kind, "name": name, "variant": variant, **values, **self.facts}
            with self.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def timed(self, run: Callable[[], Any]) -> list[float]:
        """Seconds of each of some calls, after two that do not count.

        Raises:
            Unavailable: the time is up.
        """
        self.check_time()
        return timed(run, self.device, repeats=3 if self.small else 20)

    def check_time(self) -> None:
        """Raises Unavailable if nothing is to be begun any more."""
        if time.monotonic() > self.ends:
            raise Unavailable("the time was up")

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Records what goes wrong inside, so that the other parts still run."""
        try:
            yield
        except Unavailable as error:
            self.record("skipped", name, "", reason=str(error))
        except Exception as error:
            self.failures += 1
            traceback.print_exc()
            self.record("failed", name, type(error).__name__, reason=str(error))

    # The limits of the device

    def limits(self) -> None:
        """Measures the copy bandwidth, read and written bytes counted, and a matrix product."""
        n = 1 << (16 if self.small else 28)
        source = torch.ones(n, device=self.device)
        target = torch.empty_like(source)
        times = percentiles(self.timed(lambda: target.copy_(source)))
        self.copy_rate = 8 * n / times["p50"]
        self.record("limit", "copy", f"{4 * n} bytes", **times, gb_per_s=self.copy_rate / 1e9)
        n = 128 if self.small else 8192
        a = torch.randn(n, n, device=self.device, dtype=torch.bfloat16)
        times = percentiles(self.timed(lambda: a @ a))
        self.product_rate = 2 * n**3 / times["p50"]
        rate = self.product_rate / 1e12
        self.record("limit", "bf16 product", f"{n}³", **times, tflop_per_s=rate)

    # Kernels

    def kernel(
        self,
        name: str,
        bytes_moved: int,
        variants: dict[str, Callable[[], Any]],
        flops: int = 0,
    ) -> None:
        """Times the ways to do one thing, which needs so many bytes and operations at least."""
        for variant, run in variants.items():
            values: Record = percentiles(self.timed(run))
            rate, flop_rate = bytes_moved / values["p50"], flops / values["p50"]
            values |= {"gb_per_s": rate / 1e9, "percent_of_copy": 100 * rate / self.copy_rate}
            if flops:
                values["tflop_per_s"] = flop_rate / 1e12
                values["percent_of_product"] = 100 * flop_rate / self.product_rate
            self.record("kernel", name, variant, **values)

    def optimizer_kernels(self) -> None:
        """Updates of one large tensor, and of the many tensors of a ResNet-18."""
        large = [(1 << 12,)] if self.small else [(1 << 27,)]
        many = [p.shape for p in (convolution if self.small else resnet18)().parameters()]
        for what, shapes in (("one tensor", large), ("model's tensors", many)):
            for dtype in (torch.float32, torch.bfloat16):
                self._updates(what, shapes, dtype)

    def _updates(self, what: str, shapes: Sequence[Any], dtype: torch.dtype) -> None:
        make = [torch.randn(shape, device=self.device) for shape in shapes]
        params = [t.to(dtype) for t in make]
        grads = [torch.randn_like(p) for p in params]
        sums = [torch.ones_like(p, dtype=torch.float32) for p in params]
        squares = [torch.ones_like(v) for v in sums]
        scalar = torch.ones((), dtype=torch.float64, device=self.device)
        steps = [torch.ones((), device=self.device) for _ in params]
        self._check_updates(params, grads, sums)
        n = sum(p.numel() for p in params)
        size = params[0].element_size()
        label = f"{what}, {n / 1e6:.3g} M {str(dtype).removeprefix('torch.')}"
        options = {"lr": LR, "weight_decay": 0.0, "eps": 1e-10, "maximize": False}
        ways: dict[str, Callable[[], Any]] = {
            "ours": lambda: ops.adagrad_(params, grads, sums, lr=LR)
        }
        if dtype == torch.float32:  # otherwise its accumulators are as short as the parameters
            ways["torch._fused_adagrad_"] = lambda: torch._fused_adagrad_(
                params, grads, sums, steps, lr_decay=0.0, **options
            )
        self.kernel(f"adagrad_ {label}", n * (3 * size + 8), ways)
        self.kernel(
            f"adagrad_ + coordinates {label}", n * (3 * size + 12),
            {"ours": lambda: ops.adagrad_(params, grads, sums, squares, lr=LR, samples=8)},
        )  # fmt: skip
        self.kernel(
            f"adagrad_norm_ {label}", n * 4 * size,
            {"ours": lambda: ops.adagrad_norm_(params, grads, scalar, lr=LR)},
        )  # fmt: skip
        self.kernel(
            f"grad_norm_sq {label}", n * size,
            {
                "ours": lambda: ops.grad_norm_sq(grads),
                "torch._foreach_norm": lambda: torch.stack(torch._foreach_norm(grads)).norm(),
            },
        )  # fmt: skip

    @staticmethod
    def _check_updates(params: list[Tensor], grads: list[Tensor], sums: list[Tensor]) -> None:
        p, v = [t.clone() for t in params], [t.clone() for t in sums]
        ops.adagrad_(p, grads, v, lr=LR)
        for i in range(len(p)):
            results = []
            for dtype in (torch.float64, None):
                q, w = params[i].clone().to(dtype), sums[i].clone().to(dtype)
                g = grads[i].to(dtype)
                reference.adagrad_([q], [g], [w], [], LR, 1e-10, 0.0, False, 1.0, 2)
                results.append(q)
            require_equal("adagrad_", p[i], results[1], results[0])

    def sample_statistics(self) -> None:
        """One pass over materialised per-sample gradients, beside three expressions."""
        shapes = [(8, 300)] if self.small else [(256, 1 << 20), (256, 541_094), (4096, 10_000)]
        for b, p in shapes:
            for dtype in (torch.float32, torch.bfloat16):
                g = torch.randn(b, p, device=self.device).to(dtype)
                truth = reference.sample_statistics(g[:, :4096].double())
                plain = reference.sample_statistics(g[:, :4096])
                for found, t, q in zip(ops.sample_statistics(g)[:2], truth, plain, strict=False):
                    scale = g[:, :4096].double().abs().sum(0)
                    require_equal("sample_statistics", found[:4096], q, t, scale)
                name = f"sample_statistics [{b}, {p}] {str(dtype).removeprefix('torch.')}"
                self.kernel(
                    name, g.numel() * g.element_size(),
                    {
                        "ours": lambda g=g: ops.sample_statistics(g),
                        "three expressions": lambda g=g: reference.sample_statistics(g),
                    },
                )  # fmt: skip

    # Steps

    def steps(self, compiled: bool) -> None:
        """Whole training steps of every model; their ratio is to the fastest plain step."""
        ways = {**PLAIN, **OURS, **({} if compiled else PEERS)}
        how = "compiled" if compiled else "eager"
        for name, build, x, y, bf16 in models(self.device, self.small):
            label = f"{name} {how}"
            with self.part(f"check of {label}"):
                self._check_step(build, x, y)
            fastest: Record = {}
            for variant, prepare in ways.items():
                with self.part(f"step {label} {variant}"):
                    self.check_time()
                    torch.compiler.reset()
                    model = build().to(self.device)
                    update = prepare(model, x, y, bf16)
                    called = torch.compile(model) if compiled else model
                    times = self._step_times(called, update, x, y, bf16)
                    if variant in PLAIN:
                        if not fastest or times["p50"] < fastest["p50"]:
                            fastest = times
                    elif fastest:
                        times["ratio"] = times["p50"] / fastest["p50"]
                        if times["peak_bytes"] is not None:
                            times["memory_ratio"] = times["peak_bytes"] / fastest["peak_bytes"]
                    self.record("step", label, variant, **times)

    def _step_times(
        self,
        model: Callable[[Tensor], Tensor],
        update: Callable[[], None],
        x: Tensor,
        y: Tensor,
        bf16: bool,
    ) -> Record:
        def run() -> None:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                loss = mean_loss(model(x), y)
            loss.backward()
            update()

        cuda = self.device.type == "cuda"
        gc.collect()  # models before this one, which observers refer back to
        run()  # compiles, and what else happens once
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        times = percentiles(self.timed(run))
        return {**times, "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None}

    def _check_step(self, build: Callable[[], nn.Module], x: Tensor, y: Tensor) -> None:
        """‖g_i‖² of the first samples, in float32, against one backward pass a sample."""
        torch.manual_seed(0)
        model = build().to(self.device)
        few = min(4, len(x))
        truth = []
        for i in range(few):
            mean_loss(model(x[i : i + 1]), y[i : i + 1]).backward()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            truth.append(sum(g.double().square().sum() for g in grads))
            model.zero_grad()
        observer = ak.observe(model)
        mean_loss(model(x[:few]), y[:few]).backward()
        found = observer.statistics().sample_norms_sq
        torch.testing.assert_close(found.double(), torch.stack(truth), rtol=1e-2, atol=0)  # TF32


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes to try the program with")
    parser.add_argument("--out", type=Path, help="append records here, one JSON object a line")
    parser.add_argument("--seconds", type=float, default=3600, help="begin nothing after these")
    args = parser.parse_args()
    bench = Bench(torch.device(args.device), args.small, args.out, args.seconds)
    torch.manual_seed(0)
    parts: dict[str, Callable[[], None]] = {
        "limits": bench.limits,
        "optimizer_kernels": bench.optimizer_kernels,
        "sample_statistics": bench.sample_statistics,
        "layer_kernels": lambda: layer_kernels(bench),
        "linear_updates": lambda: linear_updates(bench),
        "steps": lambda: bench.steps(compiled=False),
        "compiled steps": lambda: bench.steps(compiled=True),
    }
    for name, part in parts.items():
        with bench.part(name):
            part()
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
