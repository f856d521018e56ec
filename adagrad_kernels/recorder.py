"""Records of the backward passes of a model: probes, calls, micro-batches, faults."""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from . import backward_rows, faults
from .distributed import Ranks
from .eager import outside_graphs
from .functional import Call
from .gradient_watch import GradientWatch, at_the_end
from .layers import ObservedLayer
from .layers.base import Updater
from .layers.shared_values import SharedValues
from .selfcheck import Explanation, parameters_with_grad
from .shared import ObservedCall, cross_terms, repeated_uses


class Recorder:
    """Records backward passes; the part of an `Observer` that the layers talk to.

    One persistent tensor of zeros, the probe, is an input of every observed call; autograd sums
    its gradient over the layers. A hook on the probe takes the finished gradient away once a
    backward pass, so each pass is one micro-batch of its own.

    Args:
        names: of the model's parameters.
        tied: layers that share a parameter with another one.
        ranks: the processes that average their gradients.
        coordinates: whether coordinate sums are measured.
        inner_products: whether the operands of the last micro-batch are kept, or "all".
        partial: whether only some layers are observed.
    """

    def __init__(
        self,
        names: dict[nn.Parameter, str],
        tied: set[ObservedLayer],
        ranks: Ranks,
        coordinates: bool,
        inner_products: bool | str,
        partial: bool,
    ) -> None:
        self.ranks, self.partial = ranks, partial
        self.coordinates = coordinates
        self.inner_products = bool(inner_products)
        self._keeps_all = inner_products == "all"
        self._names, self._tied = names, tied
        self._layers: list[ObservedLayer] = []  # set by the observer
        double = any(p.dtype == torch.float64 for p in names)
        self._dtype = torch.float64 if double else torch.float32
        self.probe = torch.empty(0)
        self._make_probe(1024, next(iter(names)).device)
        self._coordinate_probes: dict[nn.Parameter, Tensor] = {}
        self._forward_calls: Counter[int] = Counter()  # eager ones by key, since the last backward
        self._pending: Counter[int] = Counter()  # those whose backward pass is still to come
        self._calls: list[ObservedCall] = []
        self._first: Explanation | None = Explanation(names)  # until the first pass is over
        self._again = False  # whether a parameter is used more than once, in the present pass
        self._to_explain: tuple[Explanation, Tensor] | None = None
        self._had_grads = False
        self.updater: Updater | None = None
        self.shared_values: SharedValues | None = None  # of a forward pass that is watched
        self.samples: int | None = None  # in a forward pass of a model with folded layers
        self._passes: Counter[int] = Counter()  # those before, by their samples, without backward
        self._task = -1  # the backward pass that _calls belong to
        self._collected_task = -1  # the last one whose probe was collected
        self._outer_task = -1  # the one in which a reentrant checkpoint runs
        self._last_outer_task = -1  # that of the last one collected
        self._gradients = GradientWatch()
        self._suspicion = ""  # what is wrong with the present backward pass, if it accumulates
        self._forget()

    def _forget(self) -> None:
        self._micro_batches: list[tuple[Tensor, int | None]] = []
        self._kept_calls: list[list[ObservedCall]] = []  # of each micro-batch
        self._faults: list[str] = []
        self._seen: set[str] = set()
        self._last_seen: set[str] = set()
        self._notified_calls = 0
        self._with_grad: dict[str, nn.Parameter] | None = None  # what `Observer.check` has found
        self._gradients.forget()
        self._cross_sums: dict[Tensor, Tensor] = {}  # by coordinate probe
        self._uncancelled: Tensor | None = None  # Σ ‖c_i^k‖² of micro-batches with cross terms

    def _make_probe(self, capacity: int, device: torch.device) -> None:
        shape = (2, capacity)
        self.probe = torch.zeros(shape, dtype=self._dtype, device=device, requires_grad=True)
        self._capacity, self._device = capacity, self.probe.device  # asking tensors takes longer
        # The garbage collector does not see through a tensor's hooks: hence a weak one.
        of_this = weakref.WeakMethod(self._collect)

        @outside_graphs
        def collect(probe: Tensor) -> None:
            method = of_this()
            if method is not None:
                method(probe)

        self.probe.register_post_accumulate_grad_hook(collect)

    def reserve(self, samples: int) -> None:
        """Makes room for micro-batches of this size (needed before compiling a larger one)."""
        if samples > self.probe.shape[1]:
            self._make_probe(samples, self.probe.device)

    def probe_for(self, x: Tensor) -> Tensor:
        """The probe, with room for x's samples and on its device."""
        if x.shape[0] > self._capacity or x.device != self._device:
            self._make_probe(max(x.shape[0], self._capacity), x.device)
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

    def on_forward(self, call: Call) -> None:
        """Notified of each eager layer call in the forward pass."""
        if torch._C._current_graph_task_id() == -1:  # a checkpoint's second forward is no new call
            key, made, pending = call.key, self._forward_calls, self._pending
            made[key] = made.get(key, 0) + 1  # not +=, for which a Counter runs Python
            pending[key] = pending.get(key, 0) + 1
            if self._first is not None:
                self._had_grads |= any(p.grad is not None for p in self._names)
        elif not self._pending[call.key]:  # of a reentrant checkpoint, whose first had no graph
            self._pending[call.key] = 1
            self._outer_task = torch._C._current_graph_task_id()

    def called(self, layer: ObservedLayer) -> bool:
        """Whether a layer has been called since the last backward pass (eager mode)."""
        return not self._forward_calls.keys().isdisjoint(layer.call_keys())

    def counted_calls(self) -> tuple[Counter[int], Counter[int]]:
        """The calls of forward passes that were counted so far, for `restore_calls`."""
        return self._forward_calls.copy(), self._pending.copy()

    def restore_calls(self, counted: tuple[Counter[int], Counter[int]]) -> None:
        """Forgets those since then."""
        self._forward_calls, self._pending = (calls.copy() for calls in counted)

    def on_backward(
        self,
        layer: ObservedLayer,
        call: Call,
        saved: tuple[Tensor, ...],
        sample_grads: Mapping[str, Tensor] | None,
    ) -> None:
        """Notified of each layer call's backward pass; by compiled graphs only if asked to."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            if self._calls:  # of a pass that was broken off, or without the probe: autograd.grad's
                self._calls = []
                if not self._micro_batches:
                    self._clear_coordinates()
            self._task = task
            self._begin_again()
            self._suspicion = self._gradient_fault(begins=True)
        if self.updater is not None:
            self.updater.on_backward(saved[0].shape[0])
        # By a compiled graph, or a reentrant checkpoint.
        if self._first is not None and not self._forward_calls[call.key]:
            self._had_grads |= any(p.grad is not None for p in self._names)
        again = layer.used_again(self._forward_calls)
        self._again |= again
        needed = self.inner_products or again or layer in self._tied
        compared = self._first is not None and not self._had_grads
        kept: tuple[Tensor, ...] = ()
        if sample_grads is None and (needed or compared):
            kept = tuple(t.detach() for t in saved)
        observed = ObservedCall(layer, call, saved[0].shape[0], kept, sample_grads)
        if self._first is not None and compared:
            self._first.add(observed)
            if not needed:
                observed = observed._replace(saved=())
        self._calls.append(observed)

    def _begin_again(self) -> None:
        """The first backward pass, if there has been none that was complete."""
        if self._first is not None:
            self._first.end()
            self._first = Explanation(self._names)

    def wants_sample_grads(self, layer: ObservedLayer, call: Call) -> bool:
        """Whether c_i of this call would do instead of its operands: for inner products alone."""
        return self.inner_products and self.used_once(layer, call)

    def begin_samples(self, samples: int) -> None:
        """A forward pass of so many samples begins, in a model with folded layers."""
        self.samples = samples
        if not torch.compiler.is_compiling():
            self._passes[samples] += 1

    def samples_again(self, layer: ObservedLayer) -> int:
        """The number of samples where a checkpoint runs a folded layer again.

        Raises:
            RuntimeError: it is no checkpoint; or it may be any of several forward passes.
        """
        task = torch._C._current_graph_task_id()
        if task == -1:
            raise RuntimeError(faults.folded_outside(layer.observed_name))
        if task == self._task and self._calls:
            return self._calls[0].samples
        if len(self._passes) != 1:
            raise RuntimeError(faults.several_passes(layer.observed_name))
        return next(iter(self._passes))

    def used_once(self, layer: ObservedLayer, call: Call) -> bool:
        """Whether this is the layer's only call in the forward pass, and nothing of it is tied."""
        return self._forward_calls[call.key] == 1 and layer not in self._tied

    def _collect(self, probe: Tensor) -> None:
        """The hook: one backward pass is over, and the probe's gradient is complete."""
        assert probe.grad is not None
        rows = backward_rows.noted()
        calls = self._calls
        task = torch._C._current_graph_task_id()
        if task == self._collected_task:
            self._faults.append(faults.PROBE_CHANGED)
        self._collected_task = task
        if self._outer_task != -1:
            if self._outer_task == self._last_outer_task:
                self._faults.append(faults.REENTRANT)
            self._last_outer_task, self._outer_task = self._outer_task, -1
        fault = self._suspicion if calls else self._gradient_fault(begins=False)
        if fault:
            self._faults.append(fault)
        if calls:
            rows = calls[0].samples
            names = {call.layer.observed_name for call in calls}
            self._settle(calls)
            if self._last_seen and not names & self._last_seen:
                self._faults.append(faults.disjoint(self._last_seen, names))
            own = probe.grad[0].sum() if self._first is not None else None
            if rows == 0:
                self._faults.append(faults.EMPTY)
            if any(call.samples != rows for call in calls):
                sizes = [(call.layer.observed_name, call.samples) for call in calls]
                self._faults.append(faults.disagreement(sizes))
            elif self._tied or self._again or _used_again(calls):
                alone, known = probe.grad[0].sum(), self._uncancelled
                self._uncancelled = alone if known is None else known + alone
                self._add_cross_terms(probe.grad, calls, rows)
            counting = sum(call.call.counts for call in calls)
            self._notified_calls = max(self._notified_calls, counting)
            self._seen |= names
            self._last_seen = names
            if self.inner_products:
                self._kept_calls = [*(self._kept_calls if self._keeps_all else ()), calls]
            if self._first is not None:
                if own is not None and not self._had_grads and not self._faults:
                    self._explain_when_complete(self._first, own)
                else:
                    self._first.end()
                self._first = None
            self._calls, self._again = [], False
            self._forward_calls.clear()
            if self._passes:
                self._passes[rows] -= 1
                self._passes = +self._passes  # those that are left
        self._micro_batches.append((probe.grad, rows))
        self._with_grad = None
        probe.grad = None
        if self.ranks.size == 1:  # otherwise they are still to be averaged
            at_the_end(functools.partial(self._note_gradients, [call.layer for call in calls]))

    def _settle(self, calls: list[ObservedCall]) -> None:
        """That each of the calls was made in a forward pass of its own."""
        repeated = None
        for call in calls:
            if call.call.compiled:
                continue
            if self._pending[call.call.key]:
                self._pending[call.call.key] -= 1
            else:
                repeated = call
        if repeated is not None:
            self._faults.append(faults.repeated(repeated.layer.observed_name))

    @outside_graphs
    def _note_gradients(self, layers: list[ObservedLayer]) -> None:
        """At the end of a backward pass through these layers; none are known of a compiled one."""
        own = None
        if self.partial or len({id(layer) for layer in layers}) < len(self._layers):
            own = set(_with_grad(layers))  # the others may belong to compiled graphs
        measured = own if self.partial and own is not None else self._names
        self._gradients.note(measured, next(_with_grad(layers), None), own)

    def accept_changes(self) -> None:
        """The gradients have been written to since the backward pass, as they may be."""
        self._gradients.accept()

    def _gradient_fault(self, begins: bool) -> str:
        return self._gradients.fault(bool(self._micro_batches), begins)

    def _explain_when_complete(self, first: Explanation, sum_norms_sq: Tensor) -> None:
        """Has the first backward pass checked at its end; with several ranks when all `check`."""

        @outside_graphs
        def explain() -> None:
            first.end()
            if self.ranks.size > 1:
                self._to_explain = first, sum_norms_sq
            elif fault := first.fault(sum_norms_sq, self.ranks):
                self._faults.append(fault)

        torch.autograd.Variable._execution_engine.queue_callback(explain)

    def _add_cross_terms(self, grad: Tensor, calls: list[ObservedCall], rows: int) -> None:
        for parameter, uses in repeated_uses(calls).items():
            if not all(use.by.saved or use.by.sample_grads for use in uses):
                self._faults.append(faults.unexpected(uses[0].by.layer.observed_name))
                return
            with torch.no_grad():
                norms, sums = cross_terms(parameter, uses, self.coordinates)
                grad[0, :rows].add_(norms).clamp_(min=0)  # small differences are rounded
            if sums is not None:  # the probe's own gradient may not have arrived yet
                probe = uses[0].by.layer.last_coordinate_probes[uses[0].name]
                known = self._cross_sums.get(probe)
                self._cross_sums[probe] = sums if known is None else known + sums

    @property
    def micro_batches(self) -> int:
        """Backward passes since the last reset."""
        return len(self._micro_batches)

    def rows(self) -> list[int]:
        """The number of samples of each micro-batch since the last reset.

        Reads the device where the whole model is compiled and `backward_rows` has noted nothing:
        then only the probe knows.
        """
        for k, (probe, known) in enumerate(self._micro_batches):
            if known is None:
                self._micro_batches[k] = (probe, int(torch.count_nonzero(probe[1])))
        return [cast(int, n) for _, n in self._micro_batches]

    def check_unchanged(self) -> None:
        """Raises RuntimeError if the gradients have been changed since the backward pass.

        On one process. That all of them have been cleared is for the caller to say.
        """
        self._gradients.check()

    def reset(self) -> None:
        """Forgets what was measured, for the next step. Gradients are not touched."""
        self._calls, self._again = [], False
        self._forward_calls.clear()
        self._to_explain = None
        self._begin_again()
        self._forget()
        self._clear_coordinates()

    def _clear_coordinates(self) -> None:
        for probe in self._coordinate_probes.values():
            probe.grad = None


def _with_grad(layers: list[ObservedLayer]) -> Iterator[nn.Parameter]:
    return (p for layer in layers for p in parameters_with_grad(cast(nn.Module, layer)))


def _used_again(calls: list[ObservedCall]) -> bool:
    """Whether a layer's parameters were used more than once, by the calls themselves.

    In compiled graphs and reentrant checkpoints no forward pass has counted them.
    """
    layers = {call.layer for call in calls}
    if len(layers) == len(calls):
        return False
    keys = Counter(call.call.key for call in calls)
    return any(layer.used_again(keys) for layer in layers)
