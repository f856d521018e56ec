"""What a call of a layer has contributed, computed after the backward pass from its operands.

Inner products with a gradient that is known then, and the cross terms of parameters that are used
more than once (`shared`), need the contributions c_i themselves, or products with them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional

_PIECE = 1 << 19
"""Elements of a response that are made at a time on the CPU. Larger ones often are fresh memory,
which the system clears first: of a convolution 3→16 of 100 images [32, 32] they took 5.6 to 9.3 ms
all at once, 1.2 to 2.0 in pieces. Smaller ones waste calls."""


def unrounded(t: Tensor) -> Tensor:
    """In a type whose sums are not rounded to 16 bits."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


class Form(NamedTuple):
    """How c_i of a weight comes from the operands x and grad_out of a call.

    Attributes:
        kind: "linear", Σ_t g_t x_tᵀ; "transposed", Σ_t x_t g_tᵀ; "embedding", the sum of g_t over
            the positions t of a token; "convolution"; or "" for all else.
        part: of the parameter, where calls use disjoint ones.
        padding: the token without gradient, or -1.
        options: of a convolution, with the sizes of an image and its output.
    """

    kind: str = ""
    part: str = ""
    padding: int = -1
    options: tuple[Any, ...] = ()


class Contributions:
    """c_i of a layer's calls, each given by itself and its operands, grad_out last.

    Its way is `respond`, in which a layer's class says what the layer computes; classes override
    what they have a shorter way to.
    """

    def trainable(self) -> dict[str, nn.Parameter]:
        """The layer's own parameters that require grad, by their name in the layer."""
        raise NotImplementedError

    def takes(self, call: functional.Call, name: str) -> bool:
        """Whether a call uses this parameter."""
        return True

    def part(self, call: functional.Call, name: str) -> str:
        """Which part of this parameter a call uses, where calls use disjoint ones; "" for all."""
        return ""

    def form(self, call: functional.Call, name: str, saved: tuple[Tensor, ...]) -> Form:
        """How c_i of this parameter comes from the operands of a call, for cross terms."""
        return Form()

    @property
    def sparse_gradient(self) -> bool:
        """Whether its weight's gradient holds the rows that occur alone."""
        return False

    def weight_statistics(
        self, x: Tensor, grad_out: Tensor, capacity: int, coordinates: bool
    ) -> tuple[Tensor, Tensor]:
        """The probe's gradient and Σ_i c_i² of a convolution's weight, for images [b, k, …]."""
        raise NotImplementedError

    def part_of(self, key: int, of: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias of the call with this key, out of tensors like the parameters."""
        raise NotImplementedError

    def respond(
        self, call: functional.Call, operands: tuple[Tensor, ...], params: Mapping[str, Any]
    ) -> Tensor:
        """The output of a call with these operands, with `params` in place of the parameters.

        Linear in params (a parameter that is missing there counts as zero), so that
        ⟨c_i, v⟩ = ⟨grad_out_i, respond(v)_i⟩.
        """
        raise NotImplementedError

    def contract(
        self, call: functional.Call, saved: tuple[Tensor, ...], params: Mapping[str, Tensor]
    ) -> Tensor:
        """⟨c_i, params⟩ for each sample of a call, [b]."""
        dtype = next(iter(params.values())).dtype

        def contracted(*operands: Tensor) -> Tensor:
            cast_to = (t.to(dtype) if t.is_floating_point() else t for t in operands)
            *inputs, grad_out = cast_to
            return (self.respond(call, tuple(inputs), params) * grad_out).flatten(1).sum(1)

        grad_out = saved[-1]
        pieces = math.ceil(grad_out.numel() / _PIECE) if grad_out.device.type == "cpu" else 1
        if pieces <= 1:
            return contracted(*saved)
        return torch.cat(
            [contracted(*p) for p in zip(*(t.chunk(pieces) for t in saved), strict=True)]
        )

    def contract_sum(self, saved: tuple[Tensor, ...], grads: Mapping[str, Tensor]) -> Tensor | None:
        """⟨c_i, Σ_j c_j⟩ over the samples of a call, [b], or None if `contract` is as cheap.

        Args:
            saved: the call's operands.
            grads: Σ_j c_j, by the parameter's name.
        """
        return None

    def sample_grads(
        self, call: functional.Call, saved: tuple[Tensor, ...], names: list[str]
    ) -> dict[str, Tensor]:
        """c_i itself for each sample of a call and each named parameter, [b, *shape]."""
        of = self.trainable()
        params = {  # whole ones, also of parameters that are sharded now
            k: torch.zeros(of[k].shape, dtype=of[k].dtype, device=of[k].device) for k in names
        }

        def product(p: dict[str, Tensor], one: tuple[Tensor, ...]) -> Tensor:
            return self.contract(call, tuple(t.unsqueeze(0) for t in one), p).sum()

        return torch.func.vmap(torch.func.grad(product), in_dims=(None, 0))(params, saved)
