"""What the functions share: listeners to backward passes, checks, autocast."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from .._library import NAMESPACE


class CallListener(Protocol):
    """Notified of every backward pass through a call that has a key."""

    def on_backward(
        self, call: Call, saved: tuple[Tensor, ...], sample_grads: Mapping[str, Tensor] | None
    ) -> None:
        """This call took part.

        Args:
            call: which one.
            saved: its operands, the samples in dim 0, grad_out last. They may require grad: detach
                what is kept.
            sample_grads: c_i of its parameters, [b, …] by name, if `wants_sample_grads` and the
                function has them.
        """

    def wants_sample_grads(self, call: Call) -> bool:
        """Whether this call's c_i would do instead of its operands (eager mode)."""
        ...


class WeightUpdate(Protocol):
    """Updates a weight in the backward pass of its layer, instead of returning its gradient."""

    def takes(self, call: Call, edge: Any) -> bool:
        """Whether to do so in the present pass; `edge` is where the gradient would go."""
        ...

    def __call__(
        self, grad_out: Tensor, input: Tensor, capacity: int, bias: bool
    ) -> tuple[Tensor, Tensor]:
        """Updates the weight; the gradient of the bias ([0] if not wanted), and the probe's."""
        ...


class Call(NamedTuple):
    """One use of a function in a layer.

    Attributes:
        key: from `listen`, 0 for nobody.
        counts: whether row 1 of the probe counts this call (one of a layer's calls should).
        context: what the layer needs beside the operands to compute this call's output again.
        compiled: whether its backward pass is part of a compiled graph.
    """

    key: int = 0
    counts: bool = True
    context: object = None
    compiled: bool = False


NO_LISTENER = Call()
"""The call without a listener."""

_listeners: dict[int, weakref.ref[CallListener]] = {}
_keys = itertools.count(1)


def listen(listener: CallListener) -> int:
    """A new key, of whose calls `listener` (held weakly) is notified.

    Example:
        >>> class Printer:
        ...     def on_backward(self, call, saved, sample_grads):
        ...         print("backward of", [list(t.shape) for t in saved])
        >>> printer, probe = Printer(), torch.zeros(2, 3).requires_grad_()
        >>> x, w = torch.ones(3, 2), torch.ones(1, 2).requires_grad_()
        >>> y = ak.functional.linear(x, w, None, probe, call=Call(listen(printer)))
        >>> y.sum().backward()
        backward of [[3, 2], [3, 1]]
    """
    key = next(_keys)
    _listeners[key] = weakref.ref(listener, lambda _: _listeners.pop(key, None))
    return key


def _listener(key: int) -> CallListener | None:
    reference = _listeners.get(key)
    return None if reference is None else reference()


def wants_sample_grads(call: Call) -> bool:
    """Whether to `notify` of c_i where they are cheap."""
    if not call.key or torch.compiler.is_compiling():
        return False
    listener = _listener(call.key)
    return listener is not None and listener.wants_sample_grads(call)


def notify(call: Call, *saved: Tensor, sample_grads: Mapping[str, Tensor] | None = None) -> None:
    """Notifies the call's listener of its backward pass; in a compiled graph `counted` does."""
    if call.key and not torch.compiler.is_compiling():
        _notify(call, saved, sample_grads)


def _notify(
    call: Call, saved: Sequence[Tensor], sample_grads: Mapping[str, Tensor] | None = None
) -> None:
    listener = _listener(call.key)
    if listener is not None:
        listener.on_backward(call, tuple(saved), sample_grads)


# A replayed CUDA graph would notify nobody.
@torch.library.custom_op(
    f"{NAMESPACE}::notify", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def _notify_from_graph(
    grad_probe: Tensor, key: int, counts: bool, saved: Sequence[Tensor]
) -> Tensor:
    """`notify` as a node of a compiled graph, which stays there because its result is used.

    The listener gets copies: the compiler reuses the memory of what the graph needs no longer.
    """
    _notify(Call(key, counts, compiled=True), [t.clone() for t in saved])
    return grad_probe.clone()


@_notify_from_graph.register_fake
def _(grad_probe: Tensor, key: int, counts: bool, saved: Sequence[Tensor]) -> Tensor:
    return torch.empty_like(grad_probe)


def check_probe(samples: int, probe: Tensor, name: str) -> None:
    """That the probe has a column for each sample."""
    if probe.dim() != 2 or probe.shape[0] != 2:
        raise ValueError(f"{name}: expected a probe [2, capacity], got {list(probe.shape)}")
    if samples > probe.shape[1]:
        raise ValueError(
            f"{name}: a batch of {samples} samples needs a probe of that many columns, got "
            f"{list(probe.shape)}; before compiling for larger batches, call observer.reserve()"
        )


def refuse_double_backward() -> None:
    """Statistics have no second derivative."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "per-sample statistics have no second derivative: an observed model cannot run "
            "backward(create_graph=True); call observer.detach() first"
        )


def counted(grad_probe: Tensor, probe: Tensor, call: Call, *saved: Tensor) -> Tensor:
    """The probe's gradient, without row 1 if the call does not count; `saved` as for `notify`."""
    if grad_probe.dtype != probe.dtype:
        grad_probe = grad_probe.to(probe.dtype)
    if call.key and torch.compiler.is_compiling():
        grad_probe = cast(Tensor, _notify_from_graph(grad_probe, call.key, call.counts, saved))
    if call.counts:
        return grad_probe
    return torch.stack([grad_probe[0], torch.zeros_like(grad_probe[1])])


def as_grad(grad: Tensor, dtype: torch.dtype | None, wanted: bool) -> Tensor | None:
    """A gradient in its tensor's dtype, or None if it is not wanted or there is no tensor."""
    if not wanted or dtype is None:
        return None
    return grad if grad.dtype == dtype else grad.to(dtype)


def dtypes(*tensors: Tensor | None) -> tuple[torch.dtype | None, ...]:
    """Of the tensors that are there."""
    return tuple([None if t is None else t.dtype for t in tensors])


def autocast(x: Tensor, *tensors: Tensor | None) -> tuple[Any, ...]:
    """The casts that autocast does, which reaches into no autograd function.

    Inputs are cast outside of the function, so that autograd sees it; weights and biases of linear
    layers and convolutions inside: their gradients, float32 as the kernels return them, then are
    not rounded to 16 bits and back.
    """
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return (x, *tensors)
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in (x, *tensors)
    )
