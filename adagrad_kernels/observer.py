"""`observe(model)`: per-sample gradient statistics as a by-product of `backward()`."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from . import faults, ops
from .attachment import attach, give_back, measure_by_vmap, tied_layers
from .coverage import Coverage, coverage_of
from .distributed import Group, Ranks, check_same_gradient, data_parallel_group, is_sharded
from .layers import ObservedLayer
from .measurements import along, by_coordinate
from .recorder import Recorder
from .reductions import CoordinateReductions
from .selfcheck import (
    check_bounded,
    check_calls,
    is_explained,
    parameter_name,
    parameters_with_grad,
)
from .shards import sums_over_ranks
from .statistics import GradientStatistics


def observe(
    model: nn.Module,
    coordinates: bool = False,
    inner_products: bool | str = False,
    fallback: str = "error",
    process_group: Group | None = None,
    layers: Iterable[str | nn.Module] | None = None,
    folded: Iterable[str | nn.Module] = (),
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
            micro-batch's layer inputs and output gradients (copies of them in a compiled model)
            until the statistics are read; costs about one forward pass. "all": of all
            micro-batches, and keeps those of all.
        fallback: what to do about other modules with trainable parameters: "error", or "vmap".
            That measures their own parameters where their forward passes use them, see
            `layers.ObservedModule` (as is done for the modules of transformers in any case), and
            modules of which that is not possible with everything in them by `torch.func.vmap`,
            see `layers.ObservedFallback`: exactly, slowly.
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
        folded: the modules, with everything in them, in which dimension 0 holds k rows of each
            sample, one sample after another, as after `x.flatten(0, 1)` of [samples, k, …]:
            frames of a video, windows of an image. The number of samples is dimension 0 of the
            first tensor that the model is given, and k what is left, in each call anew.

    Raises:
        UnsupportedLayerError: naming the module and the ways out.
        ValueError: a model that is observed already, that has lazy layers or no trainable
            parameters; layers that are not the model's, or tied to ones that are not chosen; folded
            ones that cannot be (three-dimensional convolutions, the model itself).

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
    if isinstance(inner_products, str) and inner_products != "all":
        raise ValueError(f'inner_products must be False, True or "all", got {inner_products!r}')
    return Observer(model, coordinates, inner_products, fallback, process_group, layers, folded)


class Observer(Recorder):
    """The observed layers of one model, and what they have measured; made by `observe`.

    Example:
        >>> observer = observe(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)))
        >>> [record.name for record in observer.coverage()]
        ['0.weight', '0.bias', '1.weight', '1.bias']
        >>> observer.detach()
    """

    def __init__(
        self,
        model: nn.Module,
        coordinates: bool = False,
        inner_products: bool | str = False,
        fallback: str = "error",
        process_group: Group | None = None,
        layers: Iterable[str | nn.Module] | None = None,
        folded: Iterable[str | nn.Module] = (),
    ) -> None:
        layers_, names, tied = attach(model, self, fallback, coordinates, layers, folded)
        self._fallback = fallback
        ranks = Ranks(process_group or data_parallel_group(model))
        super().__init__(names, tied, ranks, coordinates, inner_products, layers is not None)
        self.model = model
        self._layers = layers_
        self.owner: weakref.ref[object] | None = None  # the optimizer's part that made it, if any
        self._found_in_probe: list[set[str]] = []  # layers that only the probe has shown
        for layer in self._layers:
            layer.coordinate_probes()
            layer.notifies_from_graphs = self.inner_products or layer in tied

    @property
    def abandoned(self) -> bool:
        """Whether it was made for an optimizer that no longer exists."""
        return self.owner is not None and self.owner() is None

    def detach(self) -> None:
        """Gives every layer its class back. The model is as it was."""
        for layer in self._layers:
            give_back(layer)
        self._layers = []
        if self.updater is not None:
            self.updater.remove()
            self.updater = None
        self.reset()

    @property
    def may_fall_back(self) -> bool:
        """Whether modules may be measured by vmap."""
        return self._fallback == "vmap" and not torch.compiler.is_compiling()

    def fall_back(self, layer: ObservedLayer) -> None:
        """Has a module measured by vmap from now on, with everything in it."""
        self._layers = measure_by_vmap(layer, self, self._layers)
        self._tied = tied_layers(self._layers)
        for other in self._layers:
            other.notifies_from_graphs = self.inner_products or other in self._tied

    def uncalled(self, layer: ObservedLayer) -> list[ObservedLayer]:
        """The observed layers in a module that were not called in this forward pass."""
        inside = set(cast(nn.Module, layer).modules()) - {layer}
        return [other for other in self._layers if other in inside and not self.called(other)]

    def coverage(self) -> Coverage:
        """How each parameter is measured, and what that is estimated to cost.

        Prints as a table. The costs are those of `adagrad_kernels.costs`, for the shapes of the
        last forward pass, so that there are none before one; `adagrad_kernels.profiling` measures
        them.

        Example:
            >>> model = nn.Sequential(nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 5))
            >>> observer = observe(model)
            >>> _ = model(torch.randn(4, 20))
            >>> print(observer.coverage())
            parameter               layer   method         extra operations  extra bytes
            0.weight                Linear  outer product             +7.8%       +18.8%
            0.bias                  Linear  outer product
            2.weight                Linear  outer product            +10.7%       +18.2%
            2.bias                  Linear  outer product
            all layers with a cost                                    +8.5%       +18.6%
        """
        return coverage_of(
            self.model, self._layers, self._names, self._tied,
            self.coordinates, self.inner_products, self.partial,
        )  # fmt: skip

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of everything that is measured, each once, in the model's order."""
        found = dict.fromkeys(p for layer in self._layers for p in layer.trainable().values())
        if not found.keys() <= self._names.keys():  # fully_shard has replaced them
            self._names = {p: name for name, p in self.model.named_parameters()}
        return ((self._names[p], p) for p in found)

    def check(self) -> None:
        """Raises what is known to be wrong with the measurements so far.

        One transfer from the device if something seems to be missing: in a compiled model, which
        shows its calls through the probe alone, when these parameters get gradients for the
        first time (later `statistics` finds out); otherwise none.

        Raises:
            RuntimeError: layers that disagree about the number of samples; backward passes that
                do not belong to one model; a parameter with a gradient but without statistics.
        """
        self._checked()

    def _checked(self) -> dict[str, nn.Parameter]:
        """`check`; returns `_layers_with_grad`."""
        if self._to_explain is not None:
            first, sum_norms_sq = self._to_explain
            self._to_explain = None
            if fault := first.fault(sum_norms_sq, self.ranks):
                self._faults.append(fault)
        if self._faults:
            raise RuntimeError(self._faults[0])
        if self._with_grad is not None:  # since the last backward pass: an optimizer checks first
            return self._with_grad
        with_grad = self._layers_with_grad()
        unknown = with_grad.keys() - self._measured_layers()
        if self._micro_batches and unknown and unknown not in self._found_in_probe:
            probes = [probe for probe, _ in self._micro_batches]
            _, least, most, outside = ops.pool_samples(probes, self.rows())[1].tolist()
            self._check_calls(with_grad, least, most, outside)
            self._found_in_probe.append(unknown)
        self._with_grad = with_grad
        return with_grad

    def statistics(
        self,
        grad_norm_sq: Tensor | None = None,
        gradient_scale: float = 1.0,
        reductions: Tensor | None = None,
    ) -> GradientStatistics:
        """The statistics of everything backpropagated since the last `reset()`, on all ranks.

        ‖ḡ‖² is that of the parameters' `.grad` now: read before zero_grad(). One transfer from
        the device; where there are several ranks, one all_reduce of four numbers before it, one
        of the coordinates (a reduce-scatter where parameters are sharded), and an all_gather of
        the inner products.

        Args:
            grad_norm_sq: ‖gradient_scale · grad‖², this rank's share of it (see
                `Ranks.norm_sq`), if an optimizer has computed it already, of what is measured.
            gradient_scale: factor on the accumulated gradient, 1/M for the mean of M
                micro-batches with mean losses.
            reductions: what `ops.adagrad_` returned with `coordinate_sums`, if it was given them;
                means and variances are then computed when they are asked for.

        Raises:
            RuntimeError: no backward pass; layers that disagree about the number of samples; a
                parameter with a gradient but without statistics; a gradient larger than a mean
                of the samples' gradients can be; in a compiled model, layers that are used
                twice; ranks whose gradients have not been averaged.
        """
        if not self._micro_batches:
            raise RuntimeError(
                "no statistics: no backward pass has reached an observed layer since the last "
                "reset()"
            )
        with_grad = self._checked()
        rows = self.rows()
        grads = {p: p.grad for _, p in self.parameters() if p.grad is not None}
        if self.owner is None:  # its step has looked before
            self.check_unchanged()
        if not grads and grad_norm_sq is None:
            raise RuntimeError(
                "no statistics: the gradients were cleared after backward(); read the statistics "
                "before zero_grad()"
            )
        if grad_norm_sq is None:
            grad_norm_sq = self.ranks.norm_sq(list(grads.values())) * gradient_scale**2
        probes = [probe for probe, _ in self._micro_batches]
        norms, totals = ops.pool_samples(probes, rows)
        n, ranks = sum(rows), self.ranks
        found: list[float] = []
        if ranks.size == 1:
            parts = [totals, grad_norm_sq.view(1), *([] if reductions is None else [reductions])]
            parts += [] if self._uncancelled is None else [self._uncancelled.view(1)]
            numbers = torch.cat(parts).tolist()
            uncancelled = 0.0 if self._uncancelled is None else numbers.pop()
            sum_sq, least, most, outside, mean_norm_sq, *found = numbers
        else:
            pooled = ranks.pool(totals[0], grad_norm_sq, n)
            numbers = torch.cat([totals[1:], pooled]).tolist()
            least, most, outside, sum_sq, mean_norm_sq, samples, shares_sq = numbers
            if not any(is_sharded(grad) for grad in grads.values()):
                check_same_gradient(ranks, mean_norm_sq, shares_sq)
            if self.inner_products and samples != n * ranks.size:
                raise RuntimeError("inner products need as many samples on every rank")
            n = int(samples)
            uncancelled = 0.0 if self._uncancelled is None else math.inf  # not known of all ranks
            sum_sq, norms = sum_sq / ranks.size**2, norms / ranks.size**2
        self._check_calls(with_grad, least, most, outside)
        sum_norms_sq = sum_sq * (n * gradient_scale) ** 2
        mean = variance = None
        if self.coordinates:
            measured = {
                self._names[p]: (grads[p], sums) for p, sums in self._coordinate_sums(grads).items()
            }
            mean, variance = by_coordinate(measured, n, gradient_scale, lazy=bool(found))
        statistics = GradientStatistics(
            batch_size=n,
            sum_norms_sq=sum_norms_sq,
            mean_norm_sq=mean_norm_sq,
            contribution_norms_sq=norms,
            gradient_scale=gradient_scale,
            coordinate_mean=mean,
            coordinate_variance=variance,
            coordinate_reductions=CoordinateReductions(*found) if found else None,
            inner_products=self._inner_products(
                grads, n, gradient_scale, sum_norms_sq / n, mean_norm_sq
            ),
            subset=tuple(self._names[p] for p in grads) if self.partial else None,
        )
        if not statistics.vanishing:
            check_bounded(n, sum_norms_sq, mean_norm_sq, uncancelled * (n * gradient_scale) ** 2)
        return statistics

    def _layers_with_grad(self) -> dict[str, nn.Parameter]:
        """By the layer's name one of its parameters, where any has a gradient.

        Raises:
            RuntimeError: a parameter with a gradient that belongs to no observed layer; layers that
                were tied after they were observed.
        """
        known: dict[int, ObservedLayer] = {}  # by id, since a tensor's hash runs Python
        found: dict[str, nn.Parameter] = {}
        for layer in self._layers:
            for p in layer.trainable().values():
                other = known.setdefault(id(p), layer)
                if other is not layer and layer not in self._tied:
                    raise RuntimeError(faults.tied_later(other.observed_name, layer.observed_name))
                if p.grad is not None:
                    found[layer.observed_name] = p
        if not self.partial:
            for p in parameters_with_grad(self.model):
                if id(p) not in known:
                    name = parameter_name(self.model, p)
                    raise RuntimeError(
                        f"parameter {name!r} has a gradient, but no layer that is observed: it was "
                        "added, replaced or unfrozen after the optimizer (or observer) was made. "
                        "detach() that one and make a new one for the model as it is now"
                    )
        return found

    def _measured_layers(self) -> set[str]:
        return self._seen | {layer.observed_name for layer in self._tied}

    def _check_calls(
        self, with_grad: dict[str, nn.Parameter], least: float, most: float, outside: float
    ) -> None:
        """`check_calls`, with what the probe says."""
        check_calls(
            with_grad,
            self._names,
            self._seen,
            {layer.observed_name for layer in self._tied},
            most - self._notified_calls,
            alike=least == most,
            outside=bool(outside),
            inner_products=self.inner_products,
        )

    def coordinate_sums(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Σ_i c_i² of each of these parameters, for `ops.adagrad_`; empty if not all are known."""
        if not self.coordinates or self.ranks.size > 1 or sum(self.rows()) < 2:
            return []
        found = self._coordinate_sums({cast(nn.Parameter, p): p for p in parameters})
        return list(found.values()) if len(found) == len(parameters) else []

    def _coordinate_sums(self, grads: Mapping[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """Σ_i c_i² of what this rank holds of each parameter, over the samples of all ranks."""
        # By layer and name: while a layer of a sharded model runs, its parameters are others.
        probes = {
            p: layer.last_coordinate_probes.get(name)
            for layer in self._layers
            for name, p in layer.trainable().items()
        }
        found: dict[nn.Parameter, Tensor] = {}
        for p in grads:
            probe = probes.get(p)
            if probe is not None and probe.grad is not None:
                cross = self._cross_sums.get(probe)
                found[p] = probe.grad if cross is None else probe.grad + cross
        if self.ranks.size == 1 or not found:
            return found
        sums = sums_over_ranks(list(found.values()), list(found), self.ranks)
        torch._foreach_div_(sums, self.ranks.size**2)
        return dict(zip(found, sums, strict=True))

    def _inner_products(
        self,
        grads: dict[nn.Parameter, Tensor],
        n: int,
        gradient_scale: float,
        mean_sample_norm_sq: float,
        mean_norm_sq: float,
    ) -> Tensor | None:
        """⟨g_i, ḡ⟩ of the samples whose operands were kept, of all ranks."""
        if not self.inner_products:
            return None
        unit = n * gradient_scale**2 / self.ranks.size
        products, by_sums = self._along(grads, self._summed())
        if by_sums:
            mean = products.mean().item() * unit  # ‖ḡ‖², unless gradients were changed since
            if not is_explained(mean, mean_norm_sq, mean_sample_norm_sq, products.dtype):
                products, _ = self._along(grads, set())
        return self.ranks.gather(products * unit)

    @torch.no_grad()
    def _along(
        self, grads: dict[nn.Parameter, Tensor], summed: set[ObservedLayer]
    ) -> tuple[Tensor, bool]:
        """⟨c_i, grad⟩ of all calls that were kept, and whether any is that with a sum of c_j."""
        found = [
            along(calls, grads, self._dtype, self.probe.device, summed)
            for calls in self._kept_calls
        ]
        return torch.cat([products for products, _ in found]), any(by for _, by in found)

    def _summed(self) -> set[ObservedLayer]:
        """The layers whose gradients should be the sum over the samples of one call.

        On the CPU alone, where it costs nothing to look whether they are.
        """
        if len(self._micro_batches) > 1 or self.ranks.size > 1 or self.probe.device.type != "cpu":
            return set()
        number = Counter(call.layer for call in self._kept_calls[0])
        return {layer for layer, calls in number.items() if calls == 1} - self._tied
