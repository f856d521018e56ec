"""Parameters that are used more than once in a backward pass: what their uses have together.

Each use k adds its own part to a sample's contribution, c_i = Σ_k c_i^k, and measures ‖c_i^k‖² and
the squares of its coordinates by itself. What is missing in ‖c_i‖² and in the coordinate sums are
the cross terms

    ‖Σ_k c_i^k‖² − Σ_k ‖c_i^k‖²        Σ_i (Σ_k c_i^k)² − Σ_k Σ_i (c_i^k)²

computed here after the backward pass, from the operands of the calls. K calls of a linear layer
with T positions are one call with K·T, those of a convolution one with K images a sample: the
kernels that measured the calls measure the whole, and once more the calls, as if their samples were
different ones. So a layer costs two more weight gradients, however often it is called. Where a head
is tied to an embedding, the product of both is formed at the tokens of each sample alone. All other
uses form the gradients of a few samples at a time and add them up.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .functional import Call
from .layers import ObservedLayer
from .layers.contributions import Form

_PIECE = 1 << 24  # elements of per-sample gradients held at a time


class ObservedCall(NamedTuple):
    """One call that took part in a backward pass.

    Attributes:
        layer: whose call it was.
        call: which of its calls.
        samples: b.
        saved: its operands with grad_out last; empty if nobody needs them.
        sample_grads: instead of these c_i of its parameters, [b, …] by name, where they are kept.
    """

    layer: ObservedLayer
    call: Call
    samples: int
    saved: tuple[Tensor, ...]
    sample_grads: Mapping[str, Tensor] | None = None

    def contract(self, params: Mapping[str, Tensor]) -> Tensor:
        """⟨c_i, params⟩ for each sample, [b]; `params` are like some of the layer's parameters."""
        if self.sample_grads is None:
            return self.layer.contract(self.call, self.saved, params)
        total = next(iter(params.values())).new_zeros(self.samples)
        for name, c in self.sample_grads.items():
            if name in params:  # others were frozen since
                v = params[name]
                total = total + c.flatten(1).to(v.dtype) @ v.flatten()
        return total


class Use(NamedTuple):
    """One parameter in one call."""

    by: ObservedCall
    name: str

    @property
    def form(self) -> Form:
        """How the call's c_i of the parameter comes from its operands, if they were kept."""
        if self.by.sample_grads is not None:
            return Form()
        return self.by.layer.form(self.by.call, self.name, self.by.saved)


class Terms(NamedTuple):
    """Something for each sample [b], and for each coordinate or None."""

    norms: Tensor
    sums: Tensor | None

    def plus(self, other: Terms, factor: float = 1.0) -> Terms:
        """This and a multiple of the other."""
        sums = self.sums
        if sums is not None and other.sums is not None:
            sums = sums.add(other.sums, alpha=factor)
        return Terms(self.norms.add(other.norms, alpha=factor), sums)


def repeated_uses(calls: list[ObservedCall]) -> dict[nn.Parameter, list[Use]]:
    """The parameters that more than one of these calls used, but for those with disjoint parts."""
    uses: dict[nn.Parameter, list[Use]] = {}
    for by in calls:
        for name, parameter in by.layer.trainable().items():
            if by.layer.takes(by.call, name):
                uses.setdefault(parameter, []).append(Use(by, name))
    return {p: found for p, found in uses.items() if len(found) > 1 and not _are_disjoint(found)}


def _are_disjoint(uses: Sequence[Use]) -> bool:
    parts = [use.by.layer.part(use.by.call, use.name) for use in uses]
    return all(parts) and len(set(parts)) == len(parts)


def cross_terms(parameter: nn.Parameter, uses: Sequence[Use], coordinates: bool) -> Terms:
    """‖Σ c_i^k‖² − Σ ‖c_i^k‖² [b], and the same of the squares of coordinates, if wanted."""
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    forms: dict[Form, list[Use]] = {}
    for use in uses:
        forms.setdefault(use.form._replace(padding=-1), []).append(use)
    if not _are_known(forms):
        return _explicit(parameter, uses, coordinates, dtype)
    joined = [Joined(parameter, form, found, dtype) for form, found in forms.items()]
    terms = [of.within(coordinates) for of in joined if len(of.uses) > 1]
    if {form.kind for form in forms} == {"embedding", "linear"}:
        tokens, linear = sorted(joined, key=lambda of: of.form.kind)
        terms.append(_of_tied_head(tokens, linear, coordinates))
    return functools.reduce(Terms.plus, terms)


def _are_known(forms: dict[Form, list[Use]]) -> bool:
    """Whether there is a form for all, and for what each has with the others."""
    kinds = {form.kind for form in forms}
    if "" in kinds:
        return False
    if len(forms) == 1:
        return True
    if all(form.part for form in forms):  # disjoint ones
        return True
    return len(forms) == 2 and kinds == {"linear", "embedding"}


class Joined:
    """The operands of all uses of one form.

    Args:
        parameter: theirs.
        form: theirs, but for the padding.
        uses: at least one.
        dtype: to compute in.
    """

    def __init__(
        self, parameter: nn.Parameter, form: Form, uses: Sequence[Use], dtype: torch.dtype
    ) -> None:
        self.form, self.uses, self._shape = form, uses, parameter.shape
        self._layer = uses[0].by.layer
        self._pairs = [self._operands(use, dtype) for use in uses]

    def _operands(self, use: Use, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """x and grad_out, [b, T, …] both."""
        x, grad = use.by.saved
        grad = grad.to(dtype)
        kind = self.form.kind
        if kind == "convolution":
            images = (t if t.dim() > len(self._shape) else t.unsqueeze(1) for t in (x, grad))
            x, grad = images
            return x.to(dtype), grad
        grad = grad.reshape(grad.shape[0], -1, grad.shape[-1])
        if kind != "embedding":
            return x.to(dtype).reshape(x.shape[0], -1, x.shape[-1]), grad
        tokens = x.flatten(1).long()
        padding = use.form.padding
        if padding >= 0:
            grad = grad.masked_fill((tokens == padding).unsqueeze(-1), 0)
        return tokens, grad

    @property
    def whole(self) -> tuple[Tensor, Tensor]:
        """The operands of all uses as those of one."""
        xs, grads = zip(*self._pairs, strict=True)
        return torch.cat(xs, 1), torch.cat(grads, 1)

    def within(self, coordinates: bool) -> Terms:
        """The cross terms of these uses."""
        found = self._measure(*self.whole, coordinates)
        by_positions: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for x, grad in self._pairs:
            by_positions.setdefault(x.shape[1], []).append((x, grad))
        for pairs in by_positions.values():
            xs, grads = zip(*pairs, strict=True)
            alone = self._measure(torch.cat(xs), torch.cat(grads), coordinates)
            norms = alone.norms.view(len(pairs), len(found.norms)).sum(0)
            found = found.plus(Terms(norms, alone.sums), -1)
        return found

    def _measure(self, x: Tensor, grad: Tensor, coordinates: bool) -> Terms:
        """‖c_i‖² of these samples and Σ_i c_i²."""
        n, sums = x.shape[0], None
        if self.form.kind == "embedding":
            rows = self._shape[0]
            if self._layer.sparse_gradient:  # of the rows that occur
                known, x = torch.unique(x, return_inverse=True)
                rows = len(known)
            _, probe, sums = ops.embedding_weight_grad(grad, x, rows, -1, n, coordinates)
        elif self.form.kind == "convolution":
            probe, sums = self._layer.weight_statistics(x, grad, n, coordinates)
        else:
            g, a = (x, grad) if self.form.kind == "transposed" else (grad, x)
            _, _, probe, sums, _ = ops.linear_weight_grad(g, a, n, True, False, coordinates)
        return Terms(probe[0], self._in_place(sums) if coordinates else None)

    def _in_place(self, sums: Tensor) -> Tensor:
        """Those of a part, where it lies in the parameter."""
        if not self.form.part:
            return sums
        use, full = self.uses[0], sums.new_zeros(self._shape)
        part, _ = self._layer.part_of(use.by.call.key, {use.name: full})
        assert part is not None
        part.copy_(sums)
        return full


def _of_tied_head(tokens: Joined, linear: Joined, coordinates: bool) -> Terms:
    """2 Σ_k,l ⟨c_i^k, c_i^l⟩ of an embedding's uses k and a linear layer's uses l.

    Row r of the first is Σ of v_s over the positions s with token r; so the rows of the second,
    Σ_t u_t[r] x_t, are needed at these tokens alone.
    """
    ids, v = tokens.whole
    x, u = linear.whole
    picked = u.gather(2, ids.unsqueeze(1).expand(-1, u.shape[1], -1))  # u_t at token s
    product = v * (picked.mT @ x)
    norms = 2 * product.sum((1, 2))
    if not coordinates:
        return Terms(norms, None)
    rows = u.shape[2]
    sums, _, _ = ops.embedding_weight_grad(product, ids, rows, -1, len(ids), False)
    return Terms(norms, 2 * sums)


def _explicit(
    parameter: nn.Parameter, uses: Sequence[Use], coordinates: bool, dtype: torch.dtype
) -> Terms:
    """From the gradients of a few samples at a time."""
    samples = uses[0].by.samples
    norms = torch.zeros(samples, dtype=dtype, device=parameter.device)
    sums = norms.new_zeros(parameter.numel()) if coordinates else None
    piece = max(1, _PIECE // max(1, parameter.numel()))
    for first in range(0, samples, piece):
        rows, total = slice(first, first + piece), None
        for use in uses:
            own = _sample_grads(use, rows).to(dtype)
            total = own if total is None else total + own
            norms[rows] -= own.square().sum(1)
            if sums is not None:
                sums -= own.square().sum(0)
        assert total is not None
        norms[rows] += total.square().sum(1)
        if sums is not None:
            sums += total.square().sum(0)
    return Terms(norms, None if sums is None else sums.view(parameter.shape))


def _sample_grads(use: Use, rows: slice) -> Tensor:
    """c_i of some samples, [samples, P]."""
    if use.by.sample_grads is not None:
        return use.by.sample_grads[use.name][rows].flatten(1)
    saved = tuple(t[rows] for t in use.by.saved)
    found: Any = use.by.layer.sample_grads(use.by.call, saved, [use.name])
    return found[use.name].flatten(1)
