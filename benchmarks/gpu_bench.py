"""What the parts of benchmarks/gpu.py share: timing on a device, its limits, the records."""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import adagrad_kernels as ak
from adagrad_kernels.benchmark.engine import Unavailable
from adagrad_kernels.benchmark.records import now

Record = dict[str, Any]
SECONDS = 2.0
"""What one way to do a thing may take."""


def timed(
    run: Callable[[], Any], device: torch.device, repeats: int, ahead: bool = False
) -> list[float]:
    """Seconds of each of so many calls, after some that do not count; of fewer if they are slow.

    Args:
        run: the call.
        device: where it runs.
        repeats: how often, if that takes no more than `SECONDS`.
        ahead: whether the device first waits until the calls are launched, so that the time that
            launching takes is hidden.
    """
    run(), run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    repeats = max(3, min(repeats, int(SECONDS / (time.perf_counter() - start))))
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return times
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize()
    if ahead:
        torch.cuda._sleep(50_000_000)  # cycles
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

    def timed(self, run: Callable[[], Any], ahead: bool = False) -> list[float]:
        """Seconds of each of some calls, after two that do not count.

        Raises:
            Unavailable: the time is up.
        """
        self.check_time()
        return timed(run, self.device, repeats=3 if self.small else 20, ahead=ahead)

    def check_time(self) -> None:
        """Raises Unavailable if nothing is to be begun any more."""
        if time.monotonic() > self.ends:
            raise Unavailable("the time was up")

    @contextlib.contextmanager
    def part(self, name: str, peer: bool = False) -> Iterator[None]:
        """Records what goes wrong inside, so that the other parts still run.

        Args:
            name: of the part.
            peer: whether it is none of ours, and may need more memory than there is.
        """
        try:
            yield
        except Unavailable as error:
            self.record("skipped", name, "", reason=str(error))
        except torch.OutOfMemoryError as error:
            self.failures += not peer
            self.record("skipped" if peer else "failed", name, "", reason=str(error))
        except Exception as error:
            self.failures += 1
            traceback.print_exc()
            self.record("failed", name, type(error).__name__, reason=str(error))

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

    def kernel(
        self,
        name: str,
        bytes_moved: int,
        variants: dict[str, Callable[[], Any]],
        flops: int = 0,
    ) -> None:
        """Times the ways to do one thing, which needs so many bytes and operations at least.

        0 where they are not to be told.
        """
        for variant, run in variants.items():
            values: Record = percentiles(self.timed(run, ahead=True))
            rate, flop_rate = bytes_moved / values["p50"], flops / values["p50"]
            if bytes_moved:
                values |= {"gb_per_s": rate / 1e9, "percent_of_copy": 100 * rate / self.copy_rate}
            if flops:
                values["tflop_per_s"] = flop_rate / 1e12
                values["percent_of_product"] = 100 * flop_rate / self.product_rate
            self.record("kernel", name, variant, **values)
