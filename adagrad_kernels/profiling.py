"""What statistics cost on a model: estimated and measured, by the layer and by the step."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .benchmark.engine import take_turns
from .costs import Cost
from .coverage import Coverage, percent
from .criteria import CoordinateNormTest, Criterion, NormTest
from .observer import observe
from .optim import AdAdaGrad

LR = 1e-6
"""Of all optimizers here: the weights hardly move while steps are timed."""


@dataclass(frozen=True)
class LayerProfile:
    """One layer's forward and backward pass, by itself, without and with observation.

    Attributes:
        name: the layer's name in the model.
        layer: its class.
        cost: the estimate, see `adagrad_kernels.costs`; None for modules measured by vmap.
        plain: seconds without, the median.
        observed: seconds with.
    """

    name: str
    layer: str
    cost: Cost | None
    plain: float
    observed: float

    @property
    def overhead(self) -> float:
        """observed / plain − 1."""
        return self.observed / self.plain - 1


@dataclass(frozen=True)
class StepProfile:
    """A whole training step: forward, loss, backward, update, test.

    Attributes:
        name: what the step does.
        plain: seconds of the step with `torch.optim.Adagrad` that it took turns with, the median.
        seconds: of this step.
    """

    name: str
    plain: float
    seconds: float

    @property
    def ratio(self) -> float:
        """seconds / plain."""
        return self.seconds / self.plain


@dataclass(frozen=True)
class Profile:
    """What `profile` found; prints as tables.

    Attributes:
        coverage: how each parameter is measured, with the estimated costs.
        layers: measured by themselves, in the model's order.
        steps: whole steps.
        baseline: the plain optimizer of the steps.
    """

    coverage: Coverage
    layers: list[LayerProfile]
    steps: list[StepProfile]
    baseline: str

    def __str__(self) -> str:
        """Coverage, layers, steps."""
        lines = [str(self.coverage), ""]
        width = max(len(name) for name in ["layer", *(p.name or p.layer for p in self.layers)])
        kind = max(len(p.layer) for p in self.layers)
        lines.append(
            f"{'layer':{width}}  {'':{kind}}  {'estimated':>22}  {'measured':>9}  "
            f"{'plain ms':>9}  {'observed ms':>11}"
        )
        for p in self.layers:
            estimate = "unknown"
            if p.cost is not None:
                estimate = f"{percent(p.cost.flops_ratio)}, bytes {percent(p.cost.bytes_ratio)}"
            lines.append(
                f"{p.name or p.layer:{width}}  {p.layer:{kind}}  {estimate:>22}  "
                f"{p.overhead:>+9.1%}  {p.plain * 1e3:9.3f}  {p.observed * 1e3:11.3f}"
            )
        lines += ["", f"whole step, as a ratio to the plain one ({self.baseline})"]
        for step in self.steps:
            lines.append(
                f"{step.name:20}  {step.ratio:5.2f}  {step.seconds * 1e3:.3f} ms, "
                f"plain {step.plain * 1e3:.3f} ms"
            )
        return "\n".join(lines)


def profile(
    model: nn.Module,
    *inputs: Tensor,
    loss: Callable[[Any], Tensor],
    coordinates: bool = False,
    fallback: str = "error",
    repeats: int = 20,
) -> Profile:
    """Measures what per-sample statistics cost on a model, by the layer and by the step.

    Each layer runs by itself, on the inputs that it gets in the model and a random gradient of
    its output: once as it is and once observed, in turn. The overhead of a layer is the difference
    of the medians; it is negative where the observed kernel is faster than PyTorch's own. Whole
    steps take turns with the step of `torch.optim.Adagrad(fused=True)` (its default where there
    is no fused one): the norm test at every step, then the coordinate-wise test.

    Works on copies: the model stays as it is, in weights, gradients and mode.

    Args:
        model: not observed; in the mode (training or evaluation) that is of interest.
        *inputs: what it is called with; dimension 0 counts the samples.
        loss: of the model's output.
        coordinates: whether layers measure coordinate sums, too.
        fallback: see `observe`.
        repeats: turns of each comparison; more of them, steadier medians.

    Raises:
        UnsupportedLayerError: see `observe`.

    Example:
        >>> model = nn.Sequential(nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 5))
        >>> found = profile(model, torch.randn(8, 20), loss=lambda y: y.square().mean(), repeats=3)
        >>> [(layer.name, layer.cost.method) for layer in found.layers]
        [('0', 'outer product'), ('2', 'outer product')]
        >>> [step.name for step in found.steps]
        ['norm test', 'norms + coordinates']
    """
    coverage = _coverage(model, inputs, loss, coordinates, fallback)
    layers = [
        _layer(name, module, call, coverage, coordinates, fallback, repeats)
        for name, module, call in _calls(model, inputs, coverage)
    ]
    steps, baseline = _steps(model, inputs, loss, fallback, repeats)
    return Profile(coverage, layers, steps, baseline)


def _coverage(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    loss: Callable[[Any], Tensor],
    coordinates: bool,
    fallback: str,
) -> Coverage:
    observed = copy.deepcopy(model)
    observer = observe(observed, coordinates, fallback=fallback)
    loss(observed(*inputs)).backward()
    observer.statistics()
    return observer.coverage()


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _calls(
    model: nn.Module, inputs: tuple[Tensor, ...], coverage: Coverage
) -> Iterator[tuple[str, nn.Module, Arguments]]:
    """Name, layer and arguments of what is measured; a layer inside another one is part of it."""
    owners = {record.owner for record in coverage if record.method}
    outer = [n for n in owners if not any(n != o and _inside(n, o) for o in owners)]
    arguments: dict[str, Arguments] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values = _detached(args), {k: _detached(v) for k, v in kwargs.items()}
            arguments.setdefault(name, values)  # type: ignore[arg-type]

        return hook

    plain = copy.deepcopy(model)
    modules = {name: module for name, module in plain.named_modules() if name in outer}
    hooks = [
        module.register_forward_pre_hook(keep(name), with_kwargs=True)
        for name, module in modules.items()
    ]
    plain(*inputs)
    for hook in hooks:
        hook.remove()
    for name, module in modules.items():
        if name in arguments:
            yield name, module, arguments[name]


def _inside(name: str, other: str) -> bool:
    return other == "" or name.startswith(other + ".")


def _detached(value: Any) -> Any:
    """Tensors as leaves that require grad where they did."""
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(value.requires_grad)
    return tuple(_detached(v) for v in value) if isinstance(value, tuple) else value


def _layer(
    name: str,
    module: nn.Module,
    call: Arguments,
    coverage: Coverage,
    coordinates: bool,
    fallback: str,
    repeats: int,
) -> LayerProfile:
    observed = copy.deepcopy(module)
    observer = observe(observed, coordinates, fallback=fallback)
    measured = _forward_and_backward(observed, call)

    def run() -> None:
        measured()
        observer.reset()

    times = _medians({"plain": _forward_and_backward(module, call), "observed": run}, repeats)
    known = coverage.costs().items()
    parts = [cost for owner, cost in known if owner == name or _inside(owner, name)]
    cost = sum(parts[1:], parts[0]) if parts else None
    return LayerProfile(name, type(module).__name__, cost, times["plain"], times["observed"])


def _forward_and_backward(module: nn.Module, call: Arguments) -> Callable[[], None]:
    args, kwargs = call
    outputs = _outputs(module(*args, **kwargs))
    grads = [torch.randn_like(y) for y in outputs]
    leaves = [t for t in (*args, *kwargs.values(), *module.parameters()) if isinstance(t, Tensor)]

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        torch.autograd.backward(_outputs(module(*args, **kwargs)), grads)

    return run


def _outputs(output: Any) -> list[Tensor]:
    found = output if isinstance(output, (tuple, list)) else (output,)
    return [y for y in found if isinstance(y, Tensor) and y.requires_grad]


def _medians(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    for run in (*runs.values(), *runs.values()):  # compiled, allocated, in the cache
        run()
    times = take_turns(runs, seconds=0.0, least=repeats)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def _steps(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    loss: Callable[[Any], Tensor],
    fallback: str,
    repeats: int,
) -> tuple[list[StepProfile], str]:
    tests: dict[str, Criterion] = {
        "norm test": NormTest(0.1),
        "norms + coordinates": CoordinateNormTest(0.1),
    }
    samples, plain = len(inputs[0]), copy.deepcopy(model)
    optimizer, baseline = _plain_optimizer(plain)
    base = _step(plain, optimizer, inputs, loss)
    found = []
    for name, criterion in tests.items():
        observed = copy.deepcopy(model)
        ours = AdAdaGrad(
            observed,
            lr=LR,
            criterion=criterion,
            batch_size=samples,
            max_batch_size=samples,
            fallback=fallback,
        )
        times = _medians({"plain": base, "ours": _step(observed, ours, inputs, loss)}, repeats)
        found.append(StepProfile(name, times["plain"], times["ours"]))
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
