"""What runs in eager mode, whatever calls it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def outside_graphs(function: Callable[P, T]) -> Callable[P, T]:
    """Decorates what a compiled function runs in eager mode: decisions and transfers.

    `torch.compiler.disable`, without importing the compiler, seconds, where nothing else has.
    """
    disabled = torch._disable_dynamo(function)

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        return (disabled if "torch._dynamo" in sys.modules else function)(*args, **kwargs)

    return run
