"""A first forward pass that may be given up halfway: what it has changed by then is undone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .base import CallRecorder


class Attempt:
    """What a module's forward pass starts from: random numbers, buffers, counted calls.

    Args:
        module: the module.
        observer: what counts calls.
        args: of the forward pass.
        kwargs: likewise.
    """

    def __init__(
        self,
        module: nn.Module,
        observer: CallRecorder,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        self._module, self._observer = module, observer
        self._calls = observer.counted_calls()
        self._device = next(module.parameters()).device
        self._random = [torch.get_rng_state()]
        if self._device.type == "cuda":
            self._random.append(torch.cuda.get_rng_state(self._device))
        self._buffers = [(b, b.detach().clone()) for b in module.buffers()]
        inputs = tree_leaves((args, dict(kwargs)))
        self._inputs = [(t, t._version) for t in inputs if isinstance(t, Tensor)]

    def undo(self) -> None:
        """As it was before.

        Raises:
            RuntimeError: an input has been written to.
        """
        if any(t._version != version for t, version in self._inputs):
            raise RuntimeError(
                f"{type(self._module).__name__} writes to its input, and then does what cannot be "
                "measured but by torch.func.vmap: run this batch again"
            )
        self._observer.restore_calls(self._calls)
        torch.set_rng_state(self._random[0])
        for state in self._random[1:]:
            torch.cuda.set_rng_state(state, self._device)
        with torch.no_grad():
            for buffer, before in self._buffers:
                buffer.copy_(before)

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Tries the forward pass out: a checkpoint must not see one that is given up halfway."""
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            yield
        self.undo()


def in_checkpoint() -> bool:
    """Whether `torch.utils.checkpoint` looks at what is saved for the backward pass."""
    if torch.compiler.is_compiling():
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks  # type: ignore[attr-defined]
    return hooks(True) is not None
