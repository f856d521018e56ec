"""Are the gradients what the backward passes have left? Clipped, replaced or cleared ones would be
compared with samples' gradients that they are not the mean of.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import faults
from .distributed import uses_processes


class _One(NamedTuple):
    """A gradient that outlives `forget`; `first`: no backward pass adds to others before it."""

    parameter: weakref.ref[nn.Parameter]
    grad: weakref.ref[Tensor]
    version: int
    first: bool


_Left = tuple[nn.Parameter, Tensor, int]


def _as_left(params: Iterable[nn.Parameter]) -> list[_Left]:
    grads = [(p, p.grad) for p in params]
    return [(p, grad, grad._version) for p, grad in grads if grad is not None]


def _changed(left: list[_Left]) -> bool:
    may_be_replaced = uses_processes()
    return any(
        grad._version != version or (p.grad is not grad and not may_be_replaced)
        for p, grad, version in left
    )


def at_the_end(function: Callable[[], None]) -> None:
    """Has it called when the present backward pass is over.

    Where processes are in use, after `DistributedDataParallel`, which has itself called by the
    same means during the pass, has written averages to the gradients.
    """
    queue = torch.autograd.Variable._execution_engine.queue_callback
    queue((lambda: queue(function)) if uses_processes() else function)


class GradientWatch:
    """The gradients as a backward pass has left them, on one process.

    One that another tensor has replaced says nothing where processes are in use:
    `DistributedDataParallel` does that, even with one process.
    """

    def __init__(self) -> None:
        self._left: list[_Left] = []
        self._late: list[_Left] = []
        self._one: _One | None = None

    def note(
        self,
        measured: Iterable[nn.Parameter],
        first: nn.Parameter | None = None,
        late: Iterable[nn.Parameter] | None = None,
    ) -> None:
        """At the end of a backward pass.

        Args:
            measured: the parameters whose gradients matter.
            first: one whose layer comes before all others in such a pass, if that is known.
            late: those that no pass adds to before that layer; all, if not given.
        """
        self._left = _as_left(measured)
        self._late = self._left if late is None else _as_left(late)
        self._one = None
        if first is not None and first.grad is not None:
            grad = first.grad
            self._one = _One(weakref.ref(first), weakref.ref(grad), grad._version, True)
        elif self._left:
            p, grad, version = self._left[0]
            self._one = _One(weakref.ref(p), weakref.ref(grad), version, False)

    def accept(self) -> None:
        """They have been written to, as they may be."""
        self.forget()
        self._one = None

    def forget(self) -> None:
        """A new batch begins: they are to be cleared."""
        self._left, self._late = [], []

    def changed(self) -> bool:
        """Whether one that comes late has been written to, replaced or cleared."""
        return _changed(self._late)

    def check(self) -> None:
        """Raises RuntimeError if they have been changed; not if all of them have been cleared."""
        if _changed(self._left) and any(p.grad is not None for p, _, _ in self._left):
            raise RuntimeError(faults.CHANGED)

    def fault(self, accumulating: bool, begins: bool) -> str:
        """Why the present backward pass must not add to them, or "".

        Args:
            accumulating: whether they hold other micro-batches of the same batch.
            begins: whether nothing has been added to yet.
        """
        if self._one is None:
            return ""
        p, grad = self._one.parameter(), self._one.grad()
        if not (begins and self._one.first):
            gone = p is not None and p.grad is not grad and not uses_processes()
            return faults.CLEARED if gone and accumulating else ""
        if accumulating and self.changed():
            return faults.CLEARED
        if p is None or (p.grad is not None and p.grad is not grad):
            return ""
        kept = grad is not None and p.grad is grad and grad._version == self._one.version
        if kept == accumulating:
            return ""
        return faults.NOT_ZEROED if kept else faults.CLEARED
