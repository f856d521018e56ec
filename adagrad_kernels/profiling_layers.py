"""A model's layers by themselves, as they are called in it: what `profiling` times."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .coverage import Coverage

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def calls(
    model: nn.Module, inputs: tuple[Tensor, ...], coverage: Coverage
) -> Iterator[tuple[str, nn.Module, Arguments]]:
    """Name, layer and arguments of what is measured; a layer inside another one is part of it.

    Without embeddings of positions, which by themselves have no samples.
    """
    owners = {record.owner for record in coverage if record.method and not record.positions}
    outer = [n for n in owners if not any(n != o and inside(n, o) for o in owners)]
    arguments: dict[str, Arguments] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values = _detached(args), {k: _detached(v) for k, v in kwargs.items()}
            arguments.setdefault(name, values)  # type: ignore[arg-type]

        return hook

    plain = copy.deepcopy(model)
    modules = {name: module for name, module in plain.named_modules() if name in outer}
    hooks = [
        module.register_forward_pre_hook(keep(name), with_kwargs=True)
        for name, module in modules.items()
    ]
    plain(*inputs)
    for hook in hooks:
        hook.remove()
    for name, module in modules.items():
        if name in arguments:
            yield name, module, arguments[name]


class Folded(nn.Module):
    """A folded layer in a model whose first argument, unused, counts the samples."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, samples: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's output."""
        return self.layer(*args, **kwargs)


def inside(name: str, other: str) -> bool:
    """Whether a module lies in another one, by their names."""
    return other == "" or name.startswith(other + ".")


def _detached(value: Any) -> Any:
    """Tensors as leaves that require grad where they did."""
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(value.requires_grad)
    return tuple(_detached(v) for v in value) if isinstance(value, tuple) else value


def forward_and_backward(module: nn.Module, call: Arguments) -> Callable[[], None]:
    """What does both, each time from gradients that are None and with the same of the outputs."""
    args, kwargs = call
    outputs = _outputs(module(*args, **kwargs))
    grads = [torch.randn_like(y) for y in outputs]
    leaves = [t for t in (*args, *kwargs.values(), *module.parameters()) if isinstance(t, Tensor)]

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        torch.autograd.backward(_outputs(module(*args, **kwargs)), grads)

    return run


def _outputs(output: Any) -> list[Tensor]:
    found = output if isinstance(output, (tuple, list)) else (output,)
    return [y for y in found if isinstance(y, Tensor) and y.requires_grad]
