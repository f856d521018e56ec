"""The training steps of benchmarks/gpu.py, timed and compared."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor, nn

import adagrad_kernels as ak

from .gpu_bench import Bench, Record, percentiles
from .gpu_ways import IN_BACKWARD, OURS, PEERS, PLAIN, Way, mean_loss, models

MODES = {"compiled": "default", "CUDA graphs": "reduce-overhead"}
"""How `torch.compile` is asked for models that are not eager."""


def steps(bench: Bench, how: str, fastest: dict[str, Record]) -> None:
    """Whole training steps of every model; their ratio is to the fastest plain step.

    Args:
        bench: of this run.
        how: "eager", or one of `MODES`; CUDA graphs only of the small model that launches bound.
        fastest: gets the fastest plain step of each model.
    """
    for index, (name, build, x, y, bf16) in enumerate(models(bench.device, bench.small)):
        if how == "CUDA graphs" and index:
            break
        label = f"{name} {how}"
        with bench.part(f"check of {label}"):
            _check_step(bench, build, x, y)
        ways = {**PLAIN, **OURS, **(IN_BACKWARD if how == "eager" else {})}
        for variant, prepare in ways.items():
            with bench.part(f"step {label} {variant}"):
                times = _step_times(bench, build, prepare, x, y, bf16, how)
                best = fastest.get(name)
                if variant not in PLAIN:
                    times |= _ratios(times, best)
                elif best is None or times["p50"] < best["p50"]:
                    fastest[name] = times
                bench.record("step", label, variant, **times)


def peer_steps(bench: Bench, fastest: dict[str, Record]) -> None:
    """Steps of others, eager; slow ones, so that they come last."""
    for name, build, x, y, bf16 in models(bench.device, bench.small):
        for variant, prepare in PEERS.items():
            with bench.part(f"step {name} eager {variant}", peer=True):
                times = _step_times(bench, build, prepare, x, y, bf16, "eager")
                times |= _ratios(times, fastest.get(name))
                bench.record("step", f"{name} eager", variant, **times)


def _ratios(times: Record, fastest: Record | None) -> Record:
    if fastest is None:
        return {}
    ratios = {"ratio": times["p50"] / fastest["p50"]}
    if times["peak_bytes"] is not None:
        ratios["memory_ratio"] = times["peak_bytes"] / fastest["peak_bytes"]
    return ratios


def _step_times(
    bench: Bench,
    build: Callable[[], nn.Module],
    prepare: Way,
    x: Tensor,
    y: Tensor,
    bf16: bool,
    how: str,
) -> Record:
    bench.check_time()
    torch.compiler.reset()
    model = build().to(bench.device)
    update = prepare(model, x, y, bf16)
    called = model if how == "eager" else torch.compile(model, mode=MODES[how])

    def run() -> None:
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=bf16):
            loss = mean_loss(called(x), y)
        loss.backward()
        update()

    cuda = bench.device.type == "cuda"
    gc.collect()  # models before this one, which observers refer back to
    run()  # compiles, and what else happens once
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times = percentiles(bench.timed(run))
    return {**times, "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None}


def _check_step(bench: Bench, build: Callable[[], nn.Module], x: Tensor, y: Tensor) -> None:
    """‖g_i‖² of the first samples, in float32, against one backward pass a sample."""
    torch.manual_seed(0)
    model = build().to(bench.device)
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
