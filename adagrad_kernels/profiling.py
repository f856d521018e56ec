"""What statistics cost on a model: estimated and measured, by the layer and by the step."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .coverage import Coverage
from .observer import observe
from .optim import AdAdaGrad
from .profiling_layers import Arguments, Folded, calls, forward_and_backward, inside
from .profiling_report import LayerProfile, Profile, StepProfile
from .timing import TESTS, take_turns

__all__ = ["LayerProfile", "Profile", "StepProfile", "profile"]

LR = 1e-6
"""Of all optimizers here: the weights hardly move while steps are timed."""


def profile(
    model: nn.Module,
    *inputs: Tensor,
    loss: Callable[[Any], Tensor],
    coordinates: bool = False,
    fallback: str = "error",
    repeats: int = 20,
    folded: Sequence[str] = (),
) -> Profile:
    """Measures what per-sample statistics cost on a model, by the layer and by the step.

    Each layer runs by itself, on the inputs that it gets in the model and a random gradient of
    its output: once as it is and once observed, in turn. The overhead of a layer is the difference
    of the medians; it is negative where the observed kernel is faster than PyTorch's own. Whole
    steps take turns, all of them: that of `torch.optim.Adagrad(fused=True)` (its default where
    there is no fused one), and with the norm, inner-product and coordinate-wise test at every step.

    Works on copies: the model stays as it is, in weights, gradients and mode.

    Args:
        model: not observed; in the mode (training or evaluation) that is of interest, on the
            device of its inputs.
        *inputs: what it is called with; dimension 0 counts the samples.
        loss: of the model's output.
        coordinates: whether layers measure coordinate sums, too.
        fallback: see `observe`.
        repeats: turns of each comparison; more of them, steadier medians.
        folded: names of modules, see `observe`; layers in them run in a model of their own.

    Raises:
        UnsupportedLayerError: see `observe`.

    Example:
        >>> model = nn.Sequential(nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 5))
        >>> found = profile(model, torch.randn(8, 20), loss=lambda y: y.square().mean(), repeats=3)
        >>> [(layer.name, layer.cost.method) for layer in found.layers]
        [('0', 'outer product'), ('2', 'outer product')]
        >>> [step.name for step in found.steps]
        ['norm test', 'inner-product test', 'norms + coordinates']
    """
    options = {"fallback": fallback, "folded": folded}
    coverage = _coverage(model, inputs, loss, coordinates, options)
    layers = []
    for name, module, call in calls(model, inputs, coverage):
        of_layer: dict[str, Any] = {"fallback": fallback}
        if any(inside(name, other) or name == other for other in folded):
            module, call = Folded(module), ((inputs[0], *call[0]), call[1])
            of_layer["folded"] = ["layer"]
        layers.append(_layer(name, module, call, coverage, coordinates, of_layer, repeats))
    steps, baseline = _steps(model, inputs, loss, options, repeats)
    return Profile(coverage, layers, steps, baseline)


def _coverage(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    loss: Callable[[Any], Tensor],
    coordinates: bool,
    options: Mapping[str, Any],
) -> Coverage:
    observed = copy.deepcopy(model)
    observer = observe(observed, coordinates, **options)
    loss(observed(*inputs)).backward()
    observer.statistics()
    return observer.coverage()


def _layer(
    name: str,
    module: nn.Module,
    call: Arguments,
    coverage: Coverage,
    coordinates: bool,
    options: Mapping[str, Any],
    repeats: int,
) -> LayerProfile:
    observed = copy.deepcopy(module)
    observer = observe(observed, coordinates, **options)
    measured = forward_and_backward(observed, call)

    def run() -> None:
        measured()
        observer.reset()

    runs = {"plain": forward_and_backward(module, call), "observed": run}
    device = next(module.parameters()).device
    times = {n: statistics.median(t) for n, t in _turns(runs, repeats, device).items()}
    known = coverage.costs()
    parts = [c for owner, c in known.items() if owner == name or inside(owner, name)]
    parts = parts if name in known else []
    cost = sum(parts[1:], parts[0]) if parts else None
    kind = type(module.layer if isinstance(module, Folded) else module).__name__
    return LayerProfile(name, kind, cost, times["plain"], times["observed"])


def _turns(
    runs: dict[str, Callable[[], Any]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each turn, to the end of the work where the device does it by itself."""

    def waited(run: Callable[[], Any]) -> Callable[[], Any]:
        def whole() -> None:
            run()
            torch.accelerator.synchronize(device)

        return run if device.type == "cpu" else whole

    runs = {name: waited(run) for name, run in runs.items()}
    for run in (*runs.values(), *runs.values()):  # compiled, allocated, in the cache
        run()
    return take_turns(runs, seconds=0.0, least=repeats)


def _steps(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    loss: Callable[[Any], Tensor],
    options: Mapping[str, Any],
    repeats: int,
) -> tuple[list[StepProfile], str]:
    samples, plain = len(inputs[0]), copy.deepcopy(model)
    optimizer, baseline = _plain_optimizer(plain)
    runs = {baseline: _step(plain, optimizer, inputs, loss)}
    for name, criterion in TESTS.items():
        observed = copy.deepcopy(model)
        ours = AdAdaGrad(
            observed,
            lr=LR,
            criterion=criterion,
            batch_size=samples,
            max_batch_size=samples,
            **options,
        )
        runs[name] = _step(observed, ours, inputs, loss)
    times = _turns(runs, repeats, inputs[0].device)
    base = times.pop(baseline)
    found = [
        StepProfile(
            name,
            statistics.median(base),
            statistics.median(seconds),
            tuple(ours / plain for ours, plain in zip(seconds, base, strict=True)),
        )
        for name, seconds in times.items()
    ]
    return found, baseline


def _plain_optimizer(model: nn.Module) -> tuple[torch.optim.Optimizer, str]:
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        return torch.optim.Adagrad(trainable, lr=LR, fused=True), "torch.optim.Adagrad(fused=True)"
    except RuntimeError:  # none for this device or version of torch
        return torch.optim.Adagrad(trainable, lr=LR), "torch.optim.Adagrad()"


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: tuple[Tensor, ...],
    loss: Callable[[Any], Tensor],
) -> Callable[[], None]:
    def run() -> None:
        loss(model(*inputs)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run
