"""What optimizers are given and criteria return, checked."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..batch_size import BatchSizeController
from ..criteria import NEEDS, Criterion, Decision
from ..criteria.base import ceil


def check_criterion(criterion: Criterion | None) -> None:
    """Raises TypeError for anything else than a criterion."""
    is_one = hasattr(criterion, "evaluate") and not isinstance(criterion, type)
    if criterion is not None and not is_one:
        raise TypeError(f"criterion must be one such as NormTest(0.1), got {criterion!r}")
    needs = getattr(criterion, "needs", None)
    if criterion is not None and not (isinstance(needs, frozenset | set) and needs <= NEEDS):
        raise TypeError(
            f"needs of {criterion!r} must be a set out of {', '.join(sorted(NEEDS))}, got {needs!r}"
        )


def checked(decision: object, criterion: Criterion) -> Decision:
    """A criterion's decision, with a whole number of samples.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(decision, Decision) or not decision.batch_size >= 1:
        raise TypeError(
            f"evaluate() of {criterion!r} must return a Decision with a batch_size of at least 1, "
            f"got {decision!r}"
        )
    size = decision.batch_size
    return decision if type(size) is int else replace(decision, batch_size=ceil(size))


def check_options(options: Mapping[str, Any]) -> None:
    """That the controller knows them.

    Raises:
        TypeError: otherwise.
    """
    known = list(inspect.signature(BatchSizeController).parameters)[2:]
    for name in options:
        if name not in known:
            others = "fallback, process_group, observe_layers, folded"
            raise TypeError(f"unexpected argument {name!r}; there are {', '.join(known)}, {others}")


def inner_products_for(criterion: Criterion) -> bool | str:
    """What `observe` is to measure for this test."""
    return "all" if "all_inner_products" in criterion.needs else "inner_products" in criterion.needs
