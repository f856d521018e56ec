"""Cross terms of a parameter that is used more than once in a backward pass.

Each use k adds its own part to a sample's contribution, c_i = Σ_k c_i^k, and measures its own
‖c_i^k‖². What is missing in ‖c_i‖² are the products 2⟨c_i^k, c_i^l⟩ of every two uses, and in
the coordinate sums 2 Σ_i c_i^k ⊙ c_i^l. They are computed here after the backward pass, from the
operands of the calls. Two linear layers (or a linear layer and an embedding) need no per-sample
gradient for the norms: with c_i^k = Σ_t u_t v_tᵀ,

    ⟨c_i^k, c_i^l⟩ = Σ_{t,t'} ⟨u_t, u'_t'⟩ ⟨v_t, v'_t'⟩

where for an embedding ⟨u_t, u'_t'⟩ picks one element of u' by the token. Everything else forms
the gradients of a few samples at a time.
"""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .functional import Call
from .layers import ObservedLayer

_PIECE = 1 << 24  # elements of per-sample gradients held at a time


class ObservedCall(NamedTuple):
    """One call that took part in a backward pass.

    Attributes:
        layer: whose call it was.
        call: which of its calls.
        samples: b.
        saved: its operands with grad_out last; empty if nobody needs them.
    """

    layer: ObservedLayer
    call: Call
    samples: int
    saved: tuple[Tensor, ...]


class Use(NamedTuple):
    """One parameter in one call."""

    by: ObservedCall
    name: str


def repeated_uses(calls: list[ObservedCall]) -> dict[nn.Parameter, list[Use]]:
    """The parameters that more than one of these calls used."""
    uses: dict[nn.Parameter, list[Use]] = {}
    for by in calls:
        for name, parameter in by.layer.trainable().items():
            if by.layer.takes(by.call, name):
                uses.setdefault(parameter, []).append(Use(by, name))
    return {p: found for p, found in uses.items() if len(found) > 1}


def cross_terms(
    parameter: nn.Parameter, uses: list[Use], coordinates: bool
) -> tuple[Tensor, Tensor | None]:
    """(2 Σ ⟨c_i^k, c_i^l⟩ [b], 2 Σ_i Σ c_i^k ⊙ c_i^l or None) over all pairs of uses."""
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    norms = torch.zeros(uses[0].by.samples, dtype=dtype, device=parameter.device)
    sums = norms.new_zeros(parameter.shape) if coordinates else None
    for a, b in combinations(uses, 2):
        if a.by.layer is b.by.layer and a.by.layer.in_parts and a.by.call.key != b.by.call.key:
            continue  # different parts of the parameter
        if sums is None and _factors(a)[0] and _factors(b)[0]:
            norms += 2 * _products(a, b, dtype)
        else:
            _add_explicit(a, b, norms, sums)
    return norms, sums


def _factors(use: Use) -> tuple[str, int]:
    return use.by.layer.factors(use.by.call, use.name)


def _rows(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype).reshape(t.shape[0], -1, t.shape[-1])  # [b, T, features]


def _products(a: Use, b: Use, dtype: torch.dtype) -> Tensor:
    """Σ_{t,t'} ⟨u_t, u'_t'⟩⟨v_t, v'_t'⟩ for each sample; of an embedding u are tokens."""
    if _factors(b)[0] == "embedding":
        a, b = b, a
    if _factors(a)[0] == "linear":
        (x, g), (y, h) = a.by.saved, b.by.saved
        left = _rows(g, dtype) @ _rows(h, dtype).mT
        right = _rows(x, dtype) @ _rows(y, dtype).mT
        return (left * right).sum((1, 2))
    ids, v = _tokens(a, dtype)
    if _factors(b)[0] == "embedding":
        other_ids, w = _tokens(b, dtype)
        left = (ids.unsqueeze(2) == other_ids.unsqueeze(1)).to(dtype)
        return (left * (v @ w.mT)).sum((1, 2))
    x, h = b.by.saved
    u = _rows(h, dtype)
    picked = u.gather(2, ids.unsqueeze(1).expand(-1, u.shape[1], -1))  # u'_t' at token t
    return (picked * (_rows(x, dtype) @ v.mT)).sum((1, 2))


def _tokens(use: Use, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The tokens of an embedding [b, T] and v [b, T, D], 0 where there is no gradient."""
    tokens, grad = use.by.saved
    ids, padding = tokens.flatten(1).long(), _factors(use)[1]
    v = _rows(grad, dtype)
    return ids, v if padding < 0 else v.masked_fill((ids == padding).unsqueeze(-1), 0)


def _add_explicit(a: Use, b: Use, norms: Tensor, sums: Tensor | None) -> None:
    piece = max(1, _PIECE // max(1, a.by.layer.trainable()[a.name].numel()))
    for first in range(0, len(norms), piece):
        rows = slice(first, first + piece)
        left, right = (
            use.by.layer.sample_grads(
                use.by.call, tuple(t[rows] for t in use.by.saved), [use.name]
            )[use.name]
            for use in (a, b)
        )
        product = 2 * left.to(norms.dtype) * right.to(norms.dtype)
        norms[rows] += product.reshape(len(product), -1).sum(1)
        if sums is not None:
            sums += product.sum(0)
