"""`observe(model)`: per-sample gradient statistics as a by-product of `backward()`."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from . import ops
from .attachment import attach, detached_class
from .coverage import Coverage, CoverageRecord
from .distributed import (
    Group,
    Ranks,
    check_same_gradient,
    data_parallel_group,
    is_sharded,
    whole,
)
from .functional import Call, WeightUpdate
from .layers import ObservedLayer
from .selfcheck import unexplained
from .shared import ObservedCall, cross_terms, repeated_uses
from .statistics import CoordinateReductions, GradientStatistics, LazyCoordinates


def observe(
    model: nn.Module,
    coordinates: bool = False,
    inner_products: bool = False,
    fallback: str = "error",
    process_group: Group | None = None,
    layers: Iterable[str | nn.Module] | None = None,
) -> Observer:
    """Makes a model's backward pass measure its per-sample gradients.

    The class of every supported layer instance with parameters is exchanged for its observed
    subclass: same parameters, same `state_dict`, still an instance of the original class.
    `observer.detach()` undoes it. Supported are the classes in `adagrad_kernels.layers.OBSERVED`
    and their subclasses that keep `forward`; layers without parameters need no support.
    Parameters that are tied, and layers that are called several times, are measured exactly.

    Args:
        model: its trainable parameters must belong to supported layers; dimension 0 of every
            layer's input counts the samples.
        coordinates: also measure each coordinate's variance (one buffer a parameter).
        inner_products: also measure ⟨g_i, ḡ⟩, of the samples of the last micro-batch. Keeps that
            micro-batch's layer inputs and output gradients until the statistics are read; costs
            about one forward pass.
        fallback: what to do about other modules with trainable parameters: "error", or "vmap",
            which forms the per-sample gradients of that module alone, see `ObservedFallback`.
        process_group: the processes that average their gradients, and whose samples the
            statistics pool: by default those of the model's `DistributedDataParallel`, or all of
            `torch.distributed`. All of them must ask for statistics together.
        layers: measure only these modules and everything in them (`"encoder"` includes
            `"encoder.0.norm"`), given by name or themselves; the other layers run as they are and
            need not be supported. Norms, ‖ḡ‖² and variances then are those of the gradient g_i^S
            with respect to the parameters S of these layers: exact for them, and a test controls
            the error of ḡ^S. For the whole model its ratio tr Σ^S/‖ḡ^S‖² is an estimate that is
            as good as S is typical: (tr Σ^S + tr Σ^R)/(‖ḡ^S‖² + ‖ḡ^R‖²) lies between it and that
            of the rest R, whatever the number of samples. In transformers the normalisation
            layers have been found to follow the whole (arXiv 2411.00999). The error from the
            samples alone is `GradientStatistics.variance_standard_error`.

    Raises:
        UnsupportedLayerError: naming the module and the ways out.
        ValueError: a model that is observed already, that has lazy layers or no trainable
            parameters; layers that are not the model's, or tied to ones that are not chosen.

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
    return Observer(model, coordinates, inner_products, fallback, process_group, layers)


class Updater(Protocol):
    """Updates parameters during the backward pass, see `optim.in_backward`."""

    def called(self, samples: int) -> None:
        """A layer call with so many samples takes part in the present backward pass."""
        ...

    def update_of(self, layer: ObservedLayer, weight: Tensor) -> WeightUpdate:
        """What may update the weight of a coming call."""
        ...

    def remove(self) -> None:
        """The model is observed no longer."""
        ...


class Observer:
    """Collects what the observed layers of one model measure; made by `observe`.

    One persistent tensor of zeros, the probe, is an input of every observed call; autograd sums
    its gradient over the layers. A hook on the probe takes the finished gradient away once a
    backward pass, so each pass is one micro-batch of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        coordinates: bool = False,
        inner_products: bool = False,
        fallback: str = "error",
        process_group: Group | None = None,
        layers: Iterable[str | nn.Module] | None = None,
    ) -> None:
        self.model = model
        self.partial = layers is not None
        self.ranks = Ranks(process_group or data_parallel_group(model))
        self.coordinates = coordinates
        self.inner_products = inner_products
        self._layers, self._names, self._tied = attach(model, self, fallback, layers)
        double = any(p.dtype == torch.float64 for p in self._names)
        self._dtype = torch.float64 if double else torch.float32
        self.probe = torch.empty(0)
        self._make_probe(1024, next(iter(self._names)).device)
        self._coordinate_probes: dict[nn.Parameter, Tensor] = {}
        self._calling: Counter[int] = Counter()
        self._calls: list[ObservedCall] = []
        self._unexplained = True
        self._to_explain: tuple[list[ObservedCall], Tensor] | None = None
        self._had_grads = False
        self.updater: Updater | None = None
        self._task = -1  # the backward pass that _calls belong to
        self._forget()
        for layer in self._layers:
            layer.coordinate_probes()

    def _forget(self) -> None:
        self._micro_batches: list[tuple[Tensor, int | None]] = []
        self._last_calls: list[ObservedCall] = []
        self._faults: list[str] = []
        self._noted: tuple[weakref.ref[Tensor], int] | None = None
        self._seen: set[str] = set()
        self._last_seen: set[str] = set()
        self._eager_calls = 0
        self._cross_sums: dict[nn.Parameter, Tensor] = {}

    def detach(self) -> None:
        """Gives every layer its class back. The model is as it was."""
        for layer in self._layers:
            plain = detached_class(layer)
            layer.release()
            layer.__class__ = plain  # type: ignore[assignment]
        self._layers = []
        if self.updater is not None:
            self.updater.remove()
            self.updater = None
        self.reset()

    def coverage(self) -> Coverage:
        """How each parameter is measured; prints as a table."""
        records = Coverage()
        for layer in self._layers:
            kind = layer.plain_class.__name__
            trainable = layer.trainable().values()
            for p in cast(nn.Module, layer).parameters():
                method, reason = layer.observed_method, ""
                if not any(p is q for q in trainable):
                    if p in self._measured():
                        continue  # belongs to an observed layer inside this one
                    method, reason = "", "frozen"
                records.append(CoverageRecord(self._names[p], kind, method, reason))
        if self.partial:
            known = {record.name for record in records}
            for module in self.model.modules():
                for p in module.parameters(recurse=False):
                    if self._names[p] not in known:
                        kind, reason = type(module).__name__, "not chosen"
                        records.append(CoverageRecord(self._names[p], kind, "", reason))
        return records

    def _measured(self) -> set[nn.Parameter]:
        return {p for layer in self._layers for p in layer.trainable().values()}

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of everything that is measured, each once, in the model's order."""
        found = dict.fromkeys(p for layer in self._layers for p in layer.trainable().values())
        if not found.keys() <= self._names.keys():  # fully_shard has replaced them
            self._names = {p: name for name, p in self.model.named_parameters()}
        return ((self._names[p], p) for p in found)

    # Measuring

    def _make_probe(self, capacity: int, device: torch.device) -> None:
        shape = (2, capacity)
        self.probe = torch.zeros(shape, dtype=self._dtype, device=device, requires_grad=True)
        self.probe.register_post_accumulate_grad_hook(self._collect)

    def reserve(self, samples: int) -> None:
        """Makes room for micro-batches of this size (needed before compiling a larger one)."""
        if samples > self.probe.shape[1]:
            self._make_probe(samples, self.probe.device)

    def probe_for(self, x: Tensor) -> Tensor:
        """The probe, with room for x's samples and on its device."""
        probe = self.probe
        if x.shape[0] > probe.shape[1] or x.device != probe.device:
            self._make_probe(max(x.shape[0], probe.shape[1]), x.device)
        return self.probe

    def coordinate_probe(self, parameter: nn.Parameter) -> Tensor:
        """A zero, expanded to the parameter's shape: its gradient is Σ_i c_i², itself no memory."""
        probe = self._coordinate_probes.get(parameter)
        if probe is None or probe.device != parameter.device:
            dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            zero = torch.zeros((), dtype=dtype, device=parameter.device)
            probe = zero.expand(parameter.shape).requires_grad_()
            self._coordinate_probes[parameter] = probe
        return probe

    def calling(self, call: Call) -> None:
        """Told by each eager layer call in the forward pass."""
        if torch._C._current_graph_task_id() == -1:  # a checkpoint's second forward is no new call
            self._calling[call.key] += 1
            if self._unexplained:
                self._had_grads |= any(p.grad is not None for p in self._names)

    def called(self, layer: ObservedLayer, call: Call, saved: tuple[Tensor, ...]) -> None:
        """Told by each eager layer call's backward pass."""
        task = torch._C._current_graph_task_id()
        if task != self._task:  # what is left is of a pass without the probe: autograd.grad's
            self._task, self._calls = task, []
        if self.updater is not None:
            self.updater.called(saved[0].shape[0])
        needed = self.inner_products or self._unexplained
        needed = needed or layer in self._tied or self._calling[call.key] > 1
        self._calls.append(ObservedCall(layer, call, saved[0].shape[0], saved if needed else ()))

    def used_once(self, layer: ObservedLayer, call: Call) -> bool:
        """Whether this is the layer's only call in the forward pass, and nothing of it is tied."""
        return self._calling[call.key] == 1 and layer not in self._tied

    def _collect(self, probe: Tensor) -> None:
        """The hook: one backward pass is over, and the probe's gradient is complete."""
        assert probe.grad is not None
        rows: int | None = None
        calls = self._calls
        if calls:
            rows = calls[0].samples
            self._to_explain = None  # the gradients are no longer those of one pass
            names = {call.layer.observed_name for call in calls}
            if self._last_seen and not names & self._last_seen:
                self._faults.append(_disjoint(self._last_seen, names))
            if any(call.samples != rows for call in calls):
                self._faults.append(_disagreement(calls))
            elif len({call.call.key for call in calls}) < len(calls) or self._tied:
                self._add_cross_terms(probe.grad, calls, rows)
            self._eager_calls = max(self._eager_calls, sum(call.call.counts for call in calls))
            self._seen |= names
            self._last_seen = names
            self._last_calls = calls if self.inner_products else []
            if self._unexplained:
                self._unexplained = False
                if not self._had_grads and not self._faults:
                    self._explain_when_complete(calls, probe.grad[0].sum())
            self._calls = []
            self._calling.clear()
        self._micro_batches.append((probe.grad, rows))
        probe.grad = None
        if self.ranks.size == 1:  # otherwise they are still to be averaged
            torch.autograd.Variable._execution_engine.queue_callback(self._note_gradient)

    def _note_gradient(self) -> None:
        """At the end of a backward pass: which version one of the gradients has."""
        grad = next((p.grad for p in self._names if p.grad is not None), None)
        self._noted = None if grad is None else (weakref.ref(grad), grad._version)

    def _explain_when_complete(self, calls: list[ObservedCall], sum_norms_sq: Tensor) -> None:
        """Has the first backward pass checked when all gradients are complete.

        That is at its end, or where ranks average their gradients, when all of them `check`.
        """
        if self.ranks.size > 1:
            self._to_explain = calls, sum_norms_sq
            return

        def explain() -> None:
            fault = unexplained(calls, self._names, sum_norms_sq, self.ranks)
            if fault:
                self._faults.append(fault)

        torch.autograd.Variable._execution_engine.queue_callback(explain)

    def _add_cross_terms(self, grad: Tensor, calls: list[ObservedCall], rows: int) -> None:
        for parameter, uses in repeated_uses(calls).items():
            if not all(use.by.saved for use in uses):
                self._faults.append(_unexpected(uses[0].by.layer.observed_name))
                return
            with torch.no_grad():
                norms, sums = cross_terms(parameter, uses, self.coordinates)
                grad[0, :rows].add_(norms)
            if sums is not None:  # the probe's own gradient may not have arrived yet
                known = self._cross_sums.get(parameter)
                self._cross_sums[parameter] = sums if known is None else known + sums

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

    def check(self) -> None:
        """Raises what is known to be wrong with the measurements so far.

        One transfer from the device if the model is compiled or something seems to be missing,
        otherwise none.

        Raises:
            RuntimeError: layers that disagree about the number of samples; backward passes that
                do not belong to one model; a parameter with a gradient but without statistics.
        """
        if self._to_explain is not None:
            calls, sum_norms_sq = self._to_explain
            self._to_explain = None
            if fault := unexplained(calls, self._names, sum_norms_sq, self.ranks):
                self._faults.append(fault)
        if self._faults:
            raise RuntimeError(self._faults[0])
        if self.coordinates and any(is_sharded(p) for _, p in self.parameters()):
            raise RuntimeError(
                "coordinates of sharded parameters cannot be measured: take a criterion that "
                "needs none, such as NormTest"
            )
        with_grad = self._layers_with_grad()
        if self._micro_batches and not with_grad.keys() <= self._measured_layers():
            probes = [probe for probe, _ in self._micro_batches]
            _, least, most, outside = ops.pool_samples(probes, self.rows())[1].tolist()
            self._check_calls(with_grad, least, most, outside)

    def check_unchanged(self) -> None:
        """Raises RuntimeError if the gradients have been written to since the backward pass.

        Looks at one of them, on one process.
        """
        grad = self._noted[0]() if self._noted is not None else None
        if grad is not None and grad._version != self._noted[1]:  # type: ignore[index]
            raise RuntimeError(
                "the gradients were changed between backward() and step(): the test would compare "
                "them with those of the samples as they were. To clip them, take max_grad_norm= "
                "of the optimizer"
            )

    def reset(self) -> None:
        """Forgets what was measured, for the next step. Gradients are not touched."""
        self._calls = []
        self._calling.clear()
        self._to_explain = None
        self._forget()
        for probe in self._coordinate_probes.values():
            probe.grad = None

    def statistics(
        self,
        grad_norm_sq: Tensor | None = None,
        gradient_scale: float = 1.0,
        reductions: Tensor | None = None,
    ) -> GradientStatistics:
        """The statistics of everything backpropagated since the last `reset()`, on all ranks.

        ‖ḡ‖² is that of the parameters' `.grad` now: read before zero_grad(). One transfer from
        the device; where there are several ranks, one all_reduce of four numbers before it, one
        of the coordinates, and an all_gather of the inner products.

        Args:
            grad_norm_sq: ‖gradient_scale · grad‖², this rank's share of it (see
                `Ranks.norm_sq`), if an optimizer has computed it already, of what is measured.
            gradient_scale: factor on the accumulated gradient, 1/M for the mean of M
                micro-batches with mean losses.
            reductions: what `ops.adagrad_` returned with `coordinate_sums`, if it was given them;
                means and variances are then computed when they are asked for.

        Raises:
            RuntimeError: no backward pass; layers that disagree about the number of samples; a
                parameter with a gradient but without statistics; in a compiled model, inner
                products, tied weights and layers that are used twice; ranks whose gradients have
                not been averaged.
        """
        if not self._micro_batches:
            raise RuntimeError(
                "no statistics: no backward pass has reached an observed layer since the last "
                "reset()"
            )
        self.check()
        rows = self.rows()
        grads = {p: p.grad for _, p in self.parameters() if p.grad is not None}
        if grad_norm_sq is None:
            grad_norm_sq = self.ranks.norm_sq(list(grads.values())) * gradient_scale**2
        probes = [probe for probe, _ in self._micro_batches]
        norms, totals = ops.pool_samples(probes, rows)
        n, ranks = sum(rows), self.ranks
        found: list[float] = []
        if ranks.size == 1:
            parts = [totals, grad_norm_sq.view(1), *([] if reductions is None else [reductions])]
            sum_sq, least, most, outside, mean_norm_sq, *found = torch.cat(parts).tolist()
        else:
            pooled = ranks.pool(totals[0], grad_norm_sq, n)
            numbers = torch.cat([totals[1:], pooled]).tolist()
            least, most, outside, sum_sq, mean_norm_sq, samples, shares_sq = numbers
            if not any(is_sharded(grad) for grad in grads.values()):
                check_same_gradient(ranks, mean_norm_sq, shares_sq)
            if self.inner_products and samples != n * ranks.size:
                raise RuntimeError("inner products need as many samples on every rank")
            n = int(samples)
            sum_sq, norms = sum_sq / ranks.size**2, norms / ranks.size**2
        self._check_calls(self._layers_with_grad(), least, most, outside)
        mean, variance = self._by_coordinate(grads, n, gradient_scale, lazy=bool(found))
        return GradientStatistics(
            batch_size=n,
            sum_norms_sq=sum_sq * (n * gradient_scale) ** 2,
            mean_norm_sq=mean_norm_sq,
            contribution_norms_sq=norms,
            gradient_scale=gradient_scale,
            coordinate_mean=mean,
            coordinate_variance=variance,
            coordinate_reductions=CoordinateReductions(*found) if found else None,
            inner_products=self._inner_products(grads, n, gradient_scale),
            subset=tuple(self._names[p] for p in grads) if self.partial else None,
        )

    def _layers_with_grad(self) -> dict[str, nn.Parameter]:
        """By the layer's name one of its parameters, where any has a gradient."""
        return {
            layer.observed_name: p
            for layer in self._layers
            for p in layer.trainable().values()
            if p.grad is not None
        }

    def _measured_layers(self) -> set[str]:
        return self._seen | {layer.observed_name for layer in self._tied}

    def _check_calls(
        self, with_grad: dict[str, nn.Parameter], least: float, most: float, outside: float
    ) -> None:
        """That every parameter with a gradient was measured, each layer once a sample."""
        measured = self._measured_layers()
        missing = [name for name in with_grad if name not in measured]
        compiled_calls = most - self._eager_calls
        if len(missing) > compiled_calls:
            names = ", ".join(repr(self._names[with_grad[name]]) for name in missing)
            raise RuntimeError(
                f"parameters got a gradient but no statistics: among {names}. They were used "
                "outside their layer's forward, or their gradient is an old one: call the layer, "
                "and zero_grad(set_to_none=True) after each step"
            )
        if compiled_calls > 0 and (self._tied or self.inner_products):
            what = "inner products" if self.inner_products else "tied weights"
            raise RuntimeError(f"{what} cannot be measured in a compiled model: run it without")
        if outside or (compiled_calls > 0 and (least != most or most > len(with_grad))):
            raise RuntimeError(
                "the layers disagree about the number of samples, or a layer was used twice in "
                "one backward pass of a compiled model; run one step without torch.compile to "
                "learn which"
            )

    def _by_coordinate(
        self, grads: dict[nn.Parameter, Tensor], n: int, gradient_scale: float, lazy: bool
    ) -> tuple[Mapping[str, Tensor] | None, Mapping[str, Tensor] | None]:
        """(ḡ, variance) of every coordinate, by the parameter's name."""
        if not self.coordinates:
            return None, None
        of_name = {
            self._names[p]: (grads[p].to(sums.dtype), sums)
            for p, sums in self._coordinate_sums(grads).items()
        }
        # (Σ g_ij² − N ḡ_j²)/(N − 1), with g_i = N·scale·c_i, ḡ = scale·grad
        unit = n * gradient_scale**2 / (n - 1) if n > 1 else float("nan")

        def means() -> dict[str, Tensor]:
            if gradient_scale == 1:
                return {name: grad for name, (grad, _) in of_name.items()}
            return {name: grad * gradient_scale for name, (grad, _) in of_name.items()}

        def variances() -> dict[str, Tensor]:
            return {
                name: (sums * (n * unit)).addcmul_(grad, grad, value=-unit).clamp_(min=0)
                for name, (grad, sums) in of_name.items()
            }

        if not lazy:
            return means(), variances()
        return LazyCoordinates(of_name, means), LazyCoordinates(of_name, variances)

    def coordinate_sums(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Σ_i c_i² of each of these parameters, for `ops.adagrad_`; empty if not all are known."""
        if not self.coordinates or self.ranks.size > 1 or sum(self.rows()) < 2:
            return []
        found = self._coordinate_sums({cast(nn.Parameter, p): p for p in parameters})
        return list(found.values()) if len(found) == len(parameters) else []

    def _coordinate_sums(self, grads: Mapping[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """Σ_i c_i² of each parameter, over all ranks."""
        found: dict[nn.Parameter, Tensor] = {}
        for p in grads:
            probe = self._coordinate_probes.get(p)
            if probe is not None and probe.grad is not None:
                cross = self._cross_sums.get(p)
                found[p] = probe.grad if cross is None else probe.grad + cross
        if self.ranks.size == 1 or not found:
            return found
        flat = torch.cat([sums.flatten() for sums in found.values()])
        parts = self.ranks.sum_(flat).div_(self.ranks.size**2).split([p.numel() for p in found])
        return {p: part.view(p.shape) for p, part in zip(found, parts, strict=True)}

    def _inner_products(
        self, grads: dict[nn.Parameter, Tensor], n: int, gradient_scale: float
    ) -> Tensor | None:
        """⟨g_i, ḡ⟩ of the samples of the last micro-batch, of all ranks."""
        if not self.inner_products:
            return None
        total = torch.zeros((), dtype=self._dtype, device=self.probe.device)
        with torch.no_grad():
            for call in self._last_calls:
                trainable = call.layer.trainable()
                params = {
                    k: whole(grads[p]).to(self._dtype) for k, p in trainable.items() if p in grads
                }
                if params:
                    total = total + call.layer.contract(call.call.key, call.saved, params)
        return self.ranks.gather(total * (n * gradient_scale**2 / self.ranks.size))


def _disagreement(calls: list[ObservedCall]) -> str:
    sizes = ", ".join(f"{call.layer.observed_name!r} {call.samples}" for call in calls)
    return (
        f"the layers disagree about the number of samples ({sizes}): dimension 0 of every "
        "layer's input must count the samples, with nothing folded into it"
    )


def _disjoint(before: set[str], now: set[str]) -> str:
    return (
        f"one backward pass reached the layers {_some(before)}, the next {_some(now)}, none of "
        "them the same: these are not micro-batches of one model. With torch.utils.checkpoint, "
        "use use_reentrant=False"
    )


def _unexpected(name: str) -> str:
    return (
        f"layer {name!r} took part twice in one backward pass but was called once in the forward "
        "pass: run backward() once for each forward pass"
    )


def _some(names: set[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(map(repr, shown)) + (", …" if len(names) > len(shown) else "")
