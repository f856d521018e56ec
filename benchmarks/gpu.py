"""python -m benchmarks.gpu: what one GPU does, the kernels against its limits, whole steps.

First the limits of this device in this run: the bandwidth of a copy and the rate of a bf16 matrix
product. Then each kernel, in GB/s and TFLOP/s and in percent of those, beside PyTorch's own way.
Then training steps, eager, compiled and in CUDA graphs: the plain step is the fastest of
torch.optim.Adagrad(foreach=True), the fused op `torch._fused_adagrad_` (torch 2.11 has it, its
optimizer refuses it on CUDA) and a compiled update; and steps with vmap as in the official code,
and with Opacus where it is installed. Every result of ours is compared with float64 before its time
is taken. What is not begun --seconds after the start is left out, and said to be.

One JSON object a line goes to --out. `--device cpu --small` runs everything in seconds, on sizes
that mean nothing, to see that it works.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from .gpu_bench import Bench, Record
from .gpu_layers import layer_kernels, linear_updates
from .gpu_optimizers import optimizer_kernels, sample_statistics
from .gpu_steps import peer_steps, steps


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
    fastest: dict[str, Record] = {}  # plain steps, eager
    parts: dict[str, Callable[[], None]] = {
        "limits": bench.limits,
        "optimizer_kernels": lambda: optimizer_kernels(bench),
        "sample_statistics": lambda: sample_statistics(bench),
        "layer_kernels": lambda: layer_kernels(bench),
        "linear_updates": lambda: linear_updates(bench),
        "steps": lambda: steps(bench, "eager", fastest),
        "compiled steps": lambda: steps(bench, "compiled", {}),
        "steps in CUDA graphs": lambda: steps(bench, "CUDA graphs", {}),
        "steps of others": lambda: peer_steps(bench, fastest),
    }
    for name, part in parts.items():
        with bench.part(name):
            part()
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
