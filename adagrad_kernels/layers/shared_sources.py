"""Where values that all samples share come from, and how they are had once for each sample."""

from __future__ import annotations

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


class Source(Protocol):
    """Where a shared value comes from."""

    def rows(self, samples: int) -> Tensor:
        """The value once for each sample, [samples, *its shape], measured."""
        ...


class Once:
    """A source that makes its rows once, however often they are used.

    Args:
        make: makes them, for a number of samples.
    """

    def __init__(self, make: Callable[[int], Tensor]) -> None:
        self._make = make
        self._rows: Tensor | None = None

    def rows(self, samples: int) -> Tensor:
        """See `Source`."""
        if self._rows is None:
            self._rows = self._make(samples)
        return self._rows


class Own(Once):
    """One of a module's own parameters: its rows, or one function whose kernel measures it.

    Args:
        make: see `Once`.
        name: of the parameter in the module.
    """

    def __init__(self, make: Callable[[int], Tensor], name: str) -> None:
        super().__init__(make)
        self.name = name
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
            raise UnmeasuredUse(f"{self.name} is used in two ways")
        return super().rows(samples)


class Computed:
    """Computed from shared values alone.

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

    def rows(self, samples: int) -> Tensor:
        """See `Source`."""
        if self._rows is None:
            of_parents = [p.rows(samples) for p in self.parents if p is not None]
            self._rows = vmap(self._again, randomness="same")(*of_parents)
        return self._rows

    def _again(self, *values: Tensor) -> Tensor:
        of = iter(values)
        pairs = zip(self.leaves, self.parents, strict=True)
        leaves = [leaf if parent is None else next(of) for leaf, parent in pairs]
        args, kwargs = tree_unflatten(leaves, self.structure)
        found = self.function(*args, **kwargs)
        return found if self.select is None else found[self.select]


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


class UnmeasuredUse(Exception):
    """A shared value is used in a way that is not measured; says how."""
