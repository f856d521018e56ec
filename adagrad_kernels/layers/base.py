"""What every observed layer shares: where its probes come from, and how it is copied."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .. import functional
from .contributions import Contributions
from .shared_values import SharedValues


class UnsupportedLayerError(TypeError):
    """A layer with trainable parameters whose per-sample gradients cannot be measured.

    Example:
        >>> observe(nn.Bilinear(2, 2, 1))
        Traceback (most recent call last):
        ...
        adagrad_kernels.layers.base.UnsupportedLayerError: ...Bilinear...
    """


class Updater(Protocol):
    """Updates parameters during the backward pass, see `optim.in_backward`."""

    def on_backward(self, samples: int) -> None:
        """A layer call with so many samples takes part in the present backward pass."""
        ...

    def update_of(self, layer: ObservedLayer, weight: Tensor) -> functional.WeightUpdate:
        """What may update the weight of a coming call."""
        ...

    def remove(self) -> None:
        """The model is observed no longer."""
        ...


class CallRecorder(Protocol):
    """What the layers know of their observer: the interface of `recorder.Recorder`."""

    probe: Tensor
    coordinates: bool
    shared_values: SharedValues | None
    samples: int | None

    def begin_samples(self, samples: int) -> None:
        """A forward pass of so many samples begins, in a model with folded layers."""
        ...

    def samples_again(self, layer: ObservedLayer) -> int:
        """The number of samples where a checkpoint runs a folded layer again."""
        ...

    @property
    def updater(self) -> Updater | None:
        """What updates weights during the backward pass, if anything does."""
        ...

    @property
    def abandoned(self) -> bool:
        """Whether it was made for an optimizer that no longer exists."""
        ...

    def detach(self) -> None:
        """Gives every layer its class back."""
        ...

    @property
    def may_fall_back(self) -> bool:
        """Whether modules may be measured by vmap."""
        ...

    def fall_back(self, layer: ObservedLayer) -> None:
        """Has a module measured by vmap from now on, with everything in it."""
        ...

    def uncalled(self, layer: ObservedLayer) -> list[ObservedLayer]:
        """The observed layers in a module that were not called in this forward pass."""
        ...

    def counted_calls(self) -> Any:
        """The calls of forward passes that were counted so far, for `restore_calls`."""
        ...

    def restore_calls(self, counted: Any) -> None:
        """Forgets those since then."""
        ...

    def probe_for(self, x: Tensor) -> Tensor:
        """The probe, with room for x's samples and on its device."""
        ...

    def coordinate_probe(self, parameter: nn.Parameter) -> Tensor:
        """What takes Σ_i c_i² of the parameter as its gradient."""
        ...

    def on_forward(self, call: functional.Call) -> None:
        """Notified of each eager layer call in the forward pass."""
        ...

    def on_backward(
        self,
        layer: ObservedLayer,
        call: functional.Call,
        saved: tuple[Tensor, ...],
        sample_grads: Mapping[str, Tensor] | None,
    ) -> None:
        """Notified of each layer call's backward pass; by compiled graphs only if asked to."""
        ...

    def wants_sample_grads(self, layer: ObservedLayer, call: functional.Call) -> bool:
        """Whether c_i of this call would do instead of its operands."""
        ...

    def used_once(self, layer: ObservedLayer, call: functional.Call) -> bool:
        """Whether this is the only use of the layer's parameters."""
        ...


def unwatched(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the forward pass of a layer, whose own functions need no watch (eager mode)."""

    @functools.wraps(forward)
    def run(self: ObservedLayer, *args: Any, **kwargs: Any) -> Any:
        values = self._observer.shared_values
        if values is None:
            return forward(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            before, values.in_layer = values.in_layer, True
            try:
                return forward(self, *args, **kwargs)
            finally:
                values.in_layer = before
        values.check_met((*args, *kwargs.values()), f"layer {self.observed_name!r} takes it")
        with torch._C.DisableTorchFunction():
            return forward(self, *args, **kwargs)

    return run


class Seen(NamedTuple):
    """The input of a call: what its cost is estimated from, see `coverage`."""

    shape: torch.Size
    dtype: torch.dtype
    input_grad: bool


class ObservedLayer(Contributions):
    """Mixed into the class of a layer instance while it is observed.

    A subclass implements `forward` with the functions of `adagrad_kernels.functional`, and
    `respond`: its output as a function of its parameters alone, which is linear in them.

    Attributes:
        observed_name: the module's path in the model.
        foldable: whether `by_samples` of its inputs can be measured.
        takes_sample_grads: whether its parameters have the names that functions notify c_i by, and
            one call uses all of them.
        observed_parameters: names of the parameters that the layer measures.
        plain_class: the class that the instance had before.
        notifies_from_graphs: whether compiled graphs, too, notify of their calls: it takes copies
            of their operands.
        takes_positions: of an embedding, whether its indices are shared by all samples, once that
            is known.
        observed_folded: whether dimension 0 of its inputs holds several rows of each sample.
        observed_counts: of a model, whether its inputs tell folded layers the number of samples.
        observed_sizes: where values computed of its parameters met others, or were repeated:
            (number of samples, size of dimension 0) so far.
        seen: the last input of each of its calls (eager mode), by the call's key.
    """

    observed_parameters: tuple[str, ...] = ("weight", "bias")
    observed_method: ClassVar[str]
    foldable: ClassVar[bool] = True
    takes_sample_grads: ClassVar[bool] = False
    observed_name: str
    plain_class: type[nn.Module]
    notifies_from_graphs: bool
    seen: dict[int, Seen]
    takes_positions: bool | None = None
    observed_folded: bool
    observed_counts: bool
    observed_sizes: dict[Any, set[tuple[int | None, int]]]
    _parameters: dict[str, nn.Parameter | None]  # of the module

    @classmethod
    def refusal(cls, module: nn.Module) -> str:
        """Why this instance cannot be observed although its class can; empty if it can."""
        return ""

    @property
    def abandoned(self) -> bool:
        """Whether it is observed for an optimizer that no longer exists."""
        return self._observer.abandoned

    @property
    def shared_values(self) -> SharedValues | None:
        """What watches the forward pass, if a module around this layer has begun to."""
        return self._observer.shared_values

    def detach(self) -> None:
        """Has its observer give all its layers back."""
        self._observer.detach()

    def attach(self, observer: CallRecorder, name: str) -> None:
        """Called by the observer after the class was exchanged."""
        self._observer = observer
        self._call = functional.Call(functional.listen(self))
        self._calls: dict[Any, functional.Call] = {}  # of layers with several
        self._coordinate_probes: dict[str, Tensor] = {}
        self.seen = {}
        self.takes_positions = None
        self.observed_folded = self.observed_counts = False
        self.observed_sizes = {}
        self.notifies_from_graphs = False
        self.observed_name = name

    def release(self) -> None:
        """Removes every trace of the observer; the class is exchanged back by the caller."""
        for name in OWN_ATTRIBUTES:
            self.__dict__.pop(name, None)

    def on_backward(
        self,
        call: functional.Call,
        saved: tuple[Tensor, ...],
        sample_grads: Mapping[str, Tensor] | None,
    ) -> None:
        """Notified of the backward pass of each call, see `CallListener`."""
        self._observer.on_backward(self, call, saved, sample_grads)

    def wants_sample_grads(self, call: functional.Call) -> bool:
        """See `CallListener`."""
        return self.takes_sample_grads and self._observer.wants_sample_grads(self, call)

    def call_keys(self) -> set[int]:
        """Those of its calls."""
        return {self._call.key, *(call.key for call in self._calls.values())}

    def trainable(self) -> dict[str, nn.Parameter]:
        """The layer's own parameters that require grad, by their name in the layer.

        Raises:
            RuntimeError: one of them is computed from others, since the layer is observed.
        """
        found = {}
        own = self._parameters  # several times a step: getattr of a module takes far longer
        for name in self.observed_parameters:
            p = own[name] if name in own else getattr(self, name)
            if p is not None and p.requires_grad:
                if not p.is_leaf:
                    raise RuntimeError(
                        f"layer {self.observed_name!r}: {name} is no parameter any more, as after "
                        "pruning, weight_norm or torch.nn.utils.parametrize: do that before the "
                        "optimizer (or the observer) is made"
                    )
                found[name] = p
        return found

    def measures(self) -> bool:
        """Whether the coming forward call is to be measured.

        Raises:
            RuntimeError: in a transform of torch.func, whose gradients go another way.
        """
        if not torch.is_grad_enabled():
            return False
        own = self._parameters
        for name in self.observed_parameters:
            p = own[name] if name in own else getattr(self, name)
            if p is not None and p.requires_grad:
                break
        else:
            return False
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                f"layer {self.observed_name!r} is observed, which torch.func (grad, vmap, jvp, …) "
                "does not go through: give it copy.deepcopy(model), a plain model, or detach()"
            )
        return True

    def rows_of_samples(self, rows: int) -> tuple[int, int]:
        """(b, k) where so many rows are k of each of b samples, one sample after another.

        Raises:
            ValueError: they cannot be.
            RuntimeError: a folded layer outside of its model's forward pass, which alone knows b.
        """
        if not self.observed_folded:
            return rows, 1
        samples = self._observer.samples
        if samples is None:
            samples = self._observer.samples_again(self)
        k = rows // samples if samples else 1
        if k * samples != rows:
            raise ValueError(
                f"layer {self.observed_name!r} is folded, but its {rows} rows are no multiple of "
                f"the {samples} samples that the model was given"
            )
        return samples, k

    def by_samples(self, x: Tensor) -> Tensor:
        """An input [b·k, …] of a folded layer as [b, k, …]; of others as it is."""
        if not self.observed_folded:
            return x
        return x.reshape(*self.rows_of_samples(x.shape[0]), *x.shape[1:])

    def as_rows(self, y: Tensor) -> Tensor:
        """An output [b, k, …] of a folded layer as [b·k, …]; of others as it is."""
        return y.flatten(0, 1) if self.observed_folded else y

    def probe_and_call(self, x: Tensor, call: functional.Call) -> tuple[Tensor, functional.Call]:
        """The probe for a call with input x, and the call, with key 0 if nobody is notified."""
        values = self._observer.shared_values
        if values is not None:
            values.check_met([x], f"layer {self.observed_name!r} takes it")
        if torch.compiler.is_compiling():  # a key is a constant in the graph
            return self._observer.probe, call if self.notifies_from_graphs else call._replace(key=0)
        self._observer.on_forward(call)
        self.seen[call.key] = Seen(x.shape, x.dtype, x.requires_grad)
        return self._observer.probe_for(x), call

    def coordinate_probes(self) -> dict[str, Tensor]:
        """For each trainable parameter the tensor whose gradient is Σ_i c_i²."""
        if self._observer.coordinates and not torch.compiler.is_compiling():
            # Parameters may have been unfrozen since the last call.
            of = self._observer.coordinate_probe
            self._coordinate_probes = {name: of(p) for name, p in self.trainable().items()}
        return self._coordinate_probes

    @property
    def last_coordinate_probes(self) -> dict[str, Tensor]:
        """Those of the last call."""
        return self._coordinate_probes

    def probes(self, x: Tensor) -> tuple[Any, ...]:
        """(probe, weight_probe, bias_probe, call) for a call with input x."""
        probe, call = self.probe_and_call(x, self._call)
        of = self.coordinate_probes()
        return probe, of.get("weight"), of.get("bias"), call

    def weight_update(self, weight: Tensor) -> functional.WeightUpdate | None:
        """What may update the weight during the backward pass (eager mode)."""
        updater = self._observer.updater
        if updater is None or torch.compiler.is_compiling():
            return None
        return updater.update_of(self, weight)

    def used_once(self, call: functional.Call) -> bool:
        """Whether the layer's parameters get gradient from this call alone."""
        return self._observer.used_once(self, call)

    def used_again(self, calls: Counter[int]) -> bool:
        """Whether one of its parameters is used more than once by these calls, by their keys."""
        several = self._calls and any(calls[call.key] > 1 for call in self._calls.values())
        return calls[self._call.key] > 1 or bool(several)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are plain layers: an observer belongs to one model."""
        plain = self.plain_class.__new__(self.plain_class)
        state = {k: v for k, v in self.__dict__.items() if k not in OWN_ATTRIBUTES}
        plain.__dict__.update(state)
        return plain.__reduce_ex__(1)  # later ones insist on the object's own class


OWN_ATTRIBUTES = (
    "_observer",
    "_call",
    "_calls",
    "_coordinate_probes",
    "_homes",
    "_inside",
    "_settled",
    "_single",
    "_constants",
    "observed_unused",
    "observed_folded",
    "observed_counts",
    "takes_positions",
    "observed_sizes",
    "_uses",
    "_paddings",
    "observed_name",
    "observed_parameters",
    "plain_class",
    "seen",
    "notifies_from_graphs",
)
"""What observing adds to a module's own attributes."""
