"""`observe(model)`: per-sample gradient statistics as a by-product of `backward()`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from . import ops
from .layers import OBSERVED, ObservedLayer, observed_class
from .statistics import GradientStatistics


@dataclass(frozen=True)
class CoverageRecord:
    """How one parameter is measured.

    Attributes:
        name: the parameter's name in the model.
        layer: class of the layer that owns it.
        method: how its statistics are computed, empty if they are not.
        reason: why not, empty if they are.
    """

    name: str
    layer: str
    method: str
    reason: str = ""


class Coverage(list[CoverageRecord]):
    """A list of records that prints as a table."""

    def __str__(self) -> str:
        """One line a parameter."""
        rows = [("parameter", "layer", "method")]
        rows += [(r.name, r.layer, r.method or f"not measured: {r.reason}") for r in self]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        return "\n".join(f"{a:{widths[0]}}  {b:{widths[1]}}  {c}".rstrip() for a, b, c in rows)


class UnsupportedLayerError(TypeError):
    """A layer with trainable parameters whose per-sample gradients cannot be measured."""


def observe(
    model: nn.Module,
    coordinates: bool = False,
    inner_products: bool = False,
    fallback: str = "error",
) -> Observer:
    """Makes a model's backward pass measure its per-sample gradients.

    The class of every supported layer instance with parameters is exchanged for its observed
    subclass: same parameters, same `state_dict`, still an instance of the original class.
    `observer.detach()` undoes it. Supported now: `nn.Linear`, `nn.Conv2d` and subclasses that
    keep their `forward`; layers without parameters need no support.

    Args:
        model: its trainable parameters must belong to supported layers, each used once in a
            forward pass; dimension 0 of every layer's input counts the samples.
        coordinates: also measure each coordinate's variance (one buffer a parameter).
        inner_products: not available yet.
        fallback: "error", what to do about unsupported layers.

    Raises:
        UnsupportedLayerError: naming the module and the ways out.
        ValueError: a parameter shared by two layers, a model that is observed already, a model
            without trainable parameters.
        NotImplementedError: inner_products=True or fallback="vmap".

    Example:
        >>> model = nn.Linear(3, 1)
        >>> observer = observe(model)
        >>> model(torch.randn(8, 3)).square().mean().backward()
        >>> s = observer.statistics()
        >>> s.batch_size, tuple(s.sample_norms_sq.shape)
        (8, (8,))
        >>> observer.detach()
    """
    if fallback not in ("error", "vmap"):
        raise ValueError(f'fallback must be "error" or "vmap", got {fallback!r}')
    if fallback == "vmap" or inner_products:
        what = 'fallback="vmap"' if fallback == "vmap" else "inner_products=True"
        raise NotImplementedError(f"observe: {what} is not available in this version")
    return Observer(model, coordinates)


class Observer:
    """Collects what the observed layers of one model measure; made by `observe`.

    One persistent tensor of zeros, the probe, is an input of every observed call; autograd sums
    its gradient over the layers. A hook on the probe takes the finished gradient away once a
    backward pass, so each pass is one micro-batch of its own.
    """

    def __init__(self, model: nn.Module, coordinates: bool = False) -> None:
        self.model = model
        self.coordinates = coordinates
        self._layers = self._attach()
        double = any(p.dtype == torch.float64 for p in model.parameters())
        self._dtype = torch.float64 if double else torch.float32
        self.probe = torch.empty(0)
        self._make_probe(1024, next(model.parameters()).device)
        self._micro_batches: list[tuple[Tensor, int | None]] = []
        self._calls: list[tuple[ObservedLayer, int]] = []
        self._faults: list[str] = []
        self._seen: set[str] = set()
        self._eager_calls = 0
        if coordinates:
            self._make_coordinate_probes()

    # Attachment

    def _attach(self) -> list[ObservedLayer]:
        layers: list[ObservedLayer] = []
        owners: dict[nn.Parameter, str] = {}
        plan: list[tuple[nn.Module, str, type[ObservedLayer]]] = []
        for name, module in self.model.named_modules():
            own = dict(module.named_parameters(recurse=False))
            if isinstance(module, ObservedLayer):
                raise ValueError(f"layer {name!r} is observed already; detach that observer first")
            if any(nn.parameter.is_lazy(p) for p in own.values()):
                raise ValueError(f"layer {name!r} is lazy; run one forward pass before observing")
            for key, p in own.items():
                if p in owners and p.requires_grad:
                    raise ValueError(
                        f"parameter {_join(name, key)!r} is the same tensor as {owners[p]!r}: "
                        "tied weights are not supported yet; untie or freeze them"
                    )
                owners[p] = _join(name, key)
            observed = observed_class(type(module)) if own else None
            if observed is not None:
                plan.append((module, name, observed))
            elif trainable := [k for k, p in own.items() if p.requires_grad]:
                raise UnsupportedLayerError(self._unsupported(name, module, trainable))
        if not any(p.requires_grad for p in owners):
            raise ValueError("the model has no trainable parameters: there is nothing to observe")
        for module, name, observed in plan:
            module.__dict__["plain_class"] = type(module)
            module.__class__ = observed  # type: ignore[assignment]
            layer = cast(ObservedLayer, module)
            layer.attach(self, name)
            layers.append(layer)
        return layers

    @staticmethod
    def _unsupported(name: str, module: nn.Module, trainable: list[str]) -> str:
        known = ", ".join(cls.__name__ for cls in OBSERVED)
        return (
            f"layer {name or '(the model itself)'!r} ({type(module).__name__}) has trainable "
            f"parameters ({', '.join(trainable)}) whose per-sample gradients cannot be measured. "
            f"Supported: {known} and subclasses that keep their forward. Freeze the parameters "
            "with requires_grad_(False), or replace the layer."
        )

    def detach(self) -> None:
        """Gives every layer its class back. The model is as it was."""
        for layer in self._layers:
            plain = layer.plain_class
            layer.release()
            layer.__class__ = plain  # type: ignore[assignment]
        self._layers = []
        self.reset()

    def coverage(self) -> Coverage:
        """How each parameter is measured; prints as a table."""
        records = Coverage()
        for layer in self._layers:
            kind = layer.plain_class.__name__
            for key, p in cast(nn.Module, layer).named_parameters(recurse=False):
                name = _join(layer.observed_name, key)
                if p.requires_grad:
                    records.append(CoverageRecord(name, kind, layer.observed_method))
                else:
                    records.append(CoverageRecord(name, kind, "", "frozen"))
        return records

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of everything that is measured, in the model's order."""
        for layer in self._layers:
            for key, p in layer.trainable().items():
                yield _join(layer.observed_name, key), p

    # Measuring

    def _make_probe(self, capacity: int, device: torch.device) -> None:
        shape = (2, capacity)
        self.probe = torch.zeros(shape, dtype=self._dtype, device=device, requires_grad=True)
        self.probe.register_post_accumulate_grad_hook(self._collect)

    def reserve(self, samples: int) -> None:
        """Makes room for micro-batches of this size (needed before compiling a larger one)."""
        if samples > self.probe.shape[1]:
            self._make_probe(samples, self.probe.device)

    def _make_coordinate_probes(self) -> None:
        for layer in self._layers:
            layer.make_coordinate_probes()

    def probe_for(self, x: Tensor) -> Tensor:
        """The probe, with room for x's samples and on its device."""
        probe = self.probe
        if x.shape[0] > probe.shape[1] or x.device != probe.device:
            self._make_probe(max(x.shape[0], probe.shape[1]), x.device)
            if self.coordinates:
                self._make_coordinate_probes()
            return self.probe
        return probe

    def called(self, layer: ObservedLayer, samples: int) -> None:
        """Told by each eager layer call's backward pass."""
        self._calls.append((layer, samples))

    def _collect(self, probe: Tensor) -> None:
        """The hook: one backward pass is over, and the probe's gradient is complete."""
        assert probe.grad is not None
        rows: int | None = None
        calls = self._calls
        if calls:
            rows = calls[0][1]
            names = {layer.observed_name for layer, _ in calls}
            if len(names) < len(calls) or any(samples != rows for _, samples in calls):
                self._faults.append(self._describe_fault())
            self._eager_calls = max(self._eager_calls, len(calls))
            self._seen |= names
            self._calls = []
        self._micro_batches.append((probe.grad, rows))
        probe.grad = None

    def _describe_fault(self) -> str:
        counts: dict[str, list[int]] = {}
        for layer, samples in self._calls:
            counts.setdefault(layer.observed_name, []).append(samples)
        twice = [name for name, found in counts.items() if len(found) > 1]
        if twice:
            return (
                f"layer {twice[0]!r} was used {len(counts[twice[0]])} times in one backward pass: "
                "the cross terms of its per-sample gradients are not measured. Use one copy of "
                "the layer for each call"
            )
        sizes = ", ".join(f"{name!r} {found[0]}" for name, found in counts.items())
        return (
            f"the layers disagree about the number of samples ({sizes}): dimension 0 of every "
            "layer's input must count the samples, with nothing folded into it"
        )

    @property
    def micro_batches(self) -> int:
        """Backward passes since the last reset."""
        return len(self._micro_batches)

    def rows(self) -> list[int]:
        """The number of samples of each micro-batch since the last reset.

        Reads the device where the whole model is compiled: then only the probe knows.
        """
        for k, (probe, known) in enumerate(self._micro_batches):
            if known is None:
                self._micro_batches[k] = (probe, int(torch.count_nonzero(probe[1])))
        return [cast(int, n) for _, n in self._micro_batches]

    def reset(self) -> None:
        """Forgets what was measured, for the next step. Gradients are not touched."""
        self._micro_batches = []
        self._calls = []
        self._faults = []
        self._seen = set()
        self._eager_calls = 0
        for layer in self._layers:
            for probe in layer._coordinate_probes.values():
                probe.grad = None

    def statistics(
        self, grad_norm_sq: Tensor | None = None, gradient_scale: float = 1.0
    ) -> GradientStatistics:
        """The statistics of everything backpropagated since the last `reset()`.

        ‖ḡ‖² is that of the parameters' `.grad` now: read before zero_grad(). One transfer from
        the device.

        Args:
            grad_norm_sq: ‖gradient_scale · grad‖² if an optimizer has computed it already.
            gradient_scale: factor on the accumulated gradient, 1/M for the mean of M
                micro-batches with mean losses.

        Raises:
            RuntimeError: no backward pass; a layer used twice; layers that disagree about the
                number of samples; a parameter with a gradient but without statistics.
        """
        if not self._micro_batches:
            raise RuntimeError(
                "no statistics: no backward pass has reached an observed layer since the last "
                "reset()"
            )
        if self._faults:
            raise RuntimeError(self._faults[0])
        rows = self.rows()
        grads = {name: p.grad for name, p in self.parameters() if p.grad is not None}
        if grad_norm_sq is None:
            grad_norm_sq = _norm_sq(list(grads.values())) * gradient_scale**2
        probes = [probe for probe, _ in self._micro_batches]
        norms, totals = ops.pool_samples(probes, rows)
        numbers = torch.cat([totals, grad_norm_sq.view(1)])
        sum_sq, least, most, outside, mean_norm_sq = numbers.tolist()
        self._check_calls(grads, least, most, outside)
        n = sum(rows)
        return GradientStatistics(
            batch_size=n,
            sum_norms_sq=sum_sq * (n * gradient_scale) ** 2,
            mean_norm_sq=mean_norm_sq,
            contribution_norms_sq=norms,
            gradient_scale=gradient_scale,
            coordinate_variance=self._variances(grads, n, gradient_scale),
        )

    def _check_calls(
        self, grads: dict[str, Tensor], least: float, most: float, outside: float
    ) -> None:
        """That every parameter with a gradient was measured, each layer once a sample."""
        with_grad = {
            layer.observed_name: key
            for layer in self._layers
            for key in layer.trainable()
            if _join(layer.observed_name, key) in grads
        }
        missing = [name for name in with_grad if name not in self._seen]
        compiled_calls = most - self._eager_calls
        if len(missing) > compiled_calls:
            names = ", ".join(repr(_join(name, with_grad[name])) for name in missing)
            raise RuntimeError(
                f"parameters got a gradient but no statistics: among {names}. They were used "
                "outside their layer's forward, or their gradient is an old one: call the layer, "
                "and zero_grad(set_to_none=True) after each step"
            )
        if outside or (compiled_calls and (least != most or most > len(with_grad))):
            raise RuntimeError(
                "the layers disagree about the number of samples, or a layer was used twice in "
                "one backward pass; run one step without torch.compile to learn which"
            )

    def _variances(
        self, grads: dict[str, Tensor], n: int, gradient_scale: float
    ) -> dict[str, Tensor] | None:
        if not self.coordinates:
            return None
        found: dict[str, Tensor] = {}
        for layer in self._layers:
            for key, probe in layer._coordinate_probes.items():
                name = _join(layer.observed_name, key)
                if probe.grad is None or name not in grads:
                    continue
                mean = grads[name].to(probe.dtype) * gradient_scale
                total = probe.grad * (n * gradient_scale) ** 2 - n * mean * mean
                found[name] = total.clamp_(min=0) / (n - 1) if n > 1 else total * float("nan")
        return found


def _join(layer: str, parameter: str) -> str:
    return f"{layer}.{parameter}" if layer else parameter


def _norm_sq(tensors: list[Tensor]) -> Tensor:
    """Σ‖t‖² in float64, of at least one tensor."""
    norms = [torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]
    return torch.stack(norms).square().sum()
