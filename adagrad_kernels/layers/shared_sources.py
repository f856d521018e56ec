"""Where values that all samples share come from, and how they are had once for each sample."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

_CASTS = {Tensor.to, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.type_as}
_TRANSPOSITIONS = {
    Tensor.t, torch.t, Tensor.T.__get__, Tensor.mT.__get__,  # type: ignore[attr-defined]
}  # fmt: skip


class UnmeasuredUse(Exception):
    """A shared value is used in a way that is not measured: how, and the layer it comes from."""


class Source(Protocol):
    """Where a shared value comes from."""

    @property
    def owner(self) -> Any:
        """The layer whose parameter it is, or is computed from."""
        ...

    def rows(self, samples: int) -> Tensor:
        """The value once for each sample, [samples, *its shape], measured."""
        ...


class Once:
    """A source that makes its rows once, however often they are used.

    Args:
        make: makes them, for a number of samples.
        owner: see `Source`.
    """

    def __init__(self, make: Callable[[int], Tensor], owner: Any) -> None:
        self._make, self.owner = make, owner
        self._rows: Tensor | None = None

    def rows(self, samples: int) -> Tensor:
        """See `Source`."""
        if self._rows is None:
            self._rows = self._make(samples)
        return self._rows


class ModuleCall:
    """One call of a module.

    Attributes:
        counted: whether one of its measured calls has counted the samples.
    """

    def __init__(self) -> None:
        self.counted = False


class Own(Once):
    """One of a module's own parameters: its rows, or one function whose kernel measures it.

    Args:
        name: of the parameter in the module.
        owner: the module.
        call: which of its calls.
    """

    def __init__(self, name: str, owner: Any, call: ModuleCall) -> None:
        super().__init__(lambda samples: owner.expanded(self, samples), owner)
        self.name, self.call = name, call
        self._taken = False

    @property
    def used(self) -> bool:
        """Whether anything measures it."""
        return self._taken or self._rows is not None

    def take(self) -> bool:
        """Whether the function that asks may measure it: the first and only one."""
        free = not self._taken and self._rows is None
        self._taken = True
        return free

    def rows(self, samples: int) -> Tensor:
        """See `Source`."""
        if self._taken:
            raise UnmeasuredUse(f"{self.name} is used in two ways", self.owner)
        return super().rows(samples)


class Computed:
    """Computed from shared values alone, and computed again from their rows.

    Args:
        function: what computed it.
        arguments: with which positional and keyword arguments.
        parents: for each of their leaves where it comes from; None for everything else.
        select: which of several outputs it is, or None.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, Any],
        parents: list[Source | None],
        select: int | None,
    ) -> None:
        self.function, self.parents, self.select = function, parents, select
        self.leaves, self.structure = tree_flatten(arguments)
        self._rows: Tensor | None = None
        self._compiling = torch.compiler.is_compiling()
        if not self._compiling:
            self._versions = [t._version if isinstance(t, Tensor) else 0 for t in self.leaves]
            self._autocast = _autocast_state(self.leaves)

    @property
    def owner(self) -> Any:
        """See `Source`."""
        return next(parent for parent in self.parents if parent is not None).owner

    def rows(self, samples: int) -> Tensor:
        """See `Source`."""
        if self._rows is None:
            of_parents = [p.rows(samples) for p in self.parents if p is not None]
            again = vmap(self._again, randomness="same")
            if not self._compiling:
                again = functools.partial(self._as_before, again)
            self._rows = again(*of_parents)
        return self._rows

    def _as_before(self, again: Callable[..., Tensor], *of_parents: Tensor) -> Tensor:
        """With constants that have not changed since, in the same mixed precision."""
        for leaf, parent, version in zip(self.leaves, self.parents, self._versions, strict=True):
            if parent is None and isinstance(leaf, Tensor) and leaf._version != version:
                raise UnmeasuredUse("what it was computed with has been written to", self.owner)
        state = _autocast_state(self.leaves)
        same = contextlib.nullcontext() if state == self._autocast else _autocast(*self._autocast)
        try:
            with same:
                return again(*of_parents)
        except RuntimeError as error:
            name = getattr(self.function, "__name__", str(self.function))
            raise UnmeasuredUse(f"{name} fails for each sample ({error})", self.owner) from error

    def _again(self, *values: Tensor) -> Tensor:
        of = iter(values)
        pairs = zip(self.leaves, self.parents, strict=True)
        leaves = [leaf if parent is None else next(of) for leaf, parent in pairs]
        args, kwargs = tree_unflatten(leaves, self.structure)
        found = self.function(*args, **kwargs)
        return found if self.select is None else found[self.select]


def _autocast_state(leaves: list[Any]) -> tuple[str, bool, torch.dtype]:
    device = next(leaf.device.type for leaf in leaves if isinstance(leaf, Tensor))
    return device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _autocast(device: str, enabled: bool, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device, dtype=dtype, enabled=enabled)


def matrix_of(source: Source | None) -> tuple[Own, bool] | None:
    """The parameter that this is but for its type, and whether it is transposed."""
    if isinstance(source, Own):
        return source, False
    if not isinstance(source, Computed):
        return None
    function, first = source.function, source.parents[0]
    before = matrix_of(first) if function in _CASTS or function in _TRANSPOSITIONS else None
    if before is None or any(p is not None for p in source.parents[1:]):
        return None
    return before[0], before[1] != (function in _TRANSPOSITIONS)
