"""`torch.nn.MultiheadAttention`, observed: its projections measure, the rest has no parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from .base import unwatched
from .contributions import Form
from .linear import linear_sample_grads
from .products import Products

_PROJECTIONS = ("q", "k", "v")


class ObservedMultiheadAttention(Products, nn.MultiheadAttention):
    """Multi-head attention that measures; `out_proj` is an observed linear layer of its own."""

    observed_method = "direct, Gram (few positions); input projections"
    observed_parameters = (
        "in_proj_weight",
        "q_proj_weight",
        "k_proj_weight",
        "v_proj_weight",
        "in_proj_bias",
    )

    @classmethod
    def refusal(cls, module: nn.Module) -> str:
        """See `ObservedLayer`."""
        assert isinstance(module, nn.MultiheadAttention)
        if module.bias_k is not None:
            return "add_bias_kv=True appends parameters to the keys, which is not supported"
        return ""

    def attach(self, observer: Any, name: str) -> None:
        """See `ObservedLayer`: a call for the joint projection and for each single one."""
        super().attach(observer, name)
        # The samples are counted once: by the joint projection or by that of the queries.
        counts = {"qkv": True, "q": True, "k": False, "v": False}
        self._calls = {n: functional.Call(functional.listen(self), c) for n, c in counts.items()}

    @unwatched
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `torch.nn.MultiheadAttention`, for inputs with a sample dimension."""
        measured = self.measures() or any(p.requires_grad for p in self.out_proj.parameters())
        if self.bias_k is not None or not (measured and torch.is_grad_enabled()):
            return super().forward(  # which does not call out_proj, but uses its weight
                query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
        if query.dim() != 3:
            raise ValueError(
                f"layer {self.observed_name!r}: an input of shape {list(query.shape)} has no "
                "sample dimension"
            )
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        same = query is key and key is value
        if not self.batch_first:
            query = query.transpose(0, 1)
            key, value = (query, query) if same else (key.transpose(0, 1), value.transpose(0, 1))
        q, k, v = (self._heads(t) for t in self._project(query, key, value, same))
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        mask = self._mask(q, k, key_padding_mask, attn_mask)
        weights = None
        if need_weights:
            y, weights = self._attend(q, k, v, mask)
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        return (y if self.batch_first else y.transpose(0, 1)), weights

    def _project(self, q: Tensor, k: Tensor, v: Tensor, same: bool) -> tuple[Tensor, ...]:
        if same and self.in_proj_weight is not None:
            return self._linear("qkv", q).chunk(3, dim=-1)
        inputs = zip(_PROJECTIONS, (q, k, v), strict=True)
        return tuple(self._linear(name, x) for name, x in inputs)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self._part(name, {n: getattr(self, n) for n in self.observed_parameters})
        assert weight is not None
        if not self.measures():
            return F.linear(x, weight, bias)
        x = self.by_samples(x)
        probe, call = self.probe_and_call(x, self._calls[name])
        weight_probe, bias_probe = self._part(name, self.coordinate_probes())
        return self.as_rows(
            functional.linear(x, weight, bias, probe, weight_probe, bias_probe, call)
        )

    def _part(self, name: str, of: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias of a projection, out of the parameters (or things shaped like them)."""
        weight, bias = of.get("in_proj_weight"), of.get("in_proj_bias")
        if name == "qkv":
            return weight, bias
        i, width = _PROJECTIONS.index(name), self.embed_dim
        rows = slice(i * width, (i + 1) * width)
        weight = of.get(f"{name}_proj_weight") if weight is None else weight[rows]
        return weight, None if bias is None else bias[rows]

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [b, heads, T, width]

    def _mask(
        self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> Tensor | None:
        """One additive mask, broadcastable to [b, heads, T, S]."""
        added = self.add_zero_attn
        parts = []
        if attn_mask is not None:
            mask = _additive(attn_mask, q.dtype)
            mask = mask if mask.dim() == 2 else mask.unflatten(0, (q.shape[0], self.num_heads))
            parts.append(F.pad(mask, (0, 1)) if added else mask)
        if key_padding_mask is not None:
            mask = _additive(key_padding_mask, q.dtype)[:, None, None, :]
            parts.append(F.pad(mask, (0, 1)) if added else mask)
        return sum(parts[1:], parts[0]) if parts else None

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
        weights = F.dropout(weights, self.dropout, self.training)
        return weights @ v, weights

    def takes(self, call: functional.Call, name: str) -> bool:
        """See `ObservedLayer`."""
        part = self.product_of(call.key)
        return name.startswith("in_proj") or name == f"{part}_proj_weight"

    def used_again(self, calls: Counter[int]) -> bool:
        """See `ObservedLayer`: the joint projection's parameters are those of the single ones."""
        joint, *single = (calls[call.key] for call in self._calls.values())
        return joint + max(single) > 1

    def part(self, call: functional.Call, name: str) -> str:
        """See `ObservedLayer`."""
        part = self.product_of(call.key)
        return part if name.startswith("in_proj") and part != "qkv" else ""

    def form(self, call: functional.Call, name: str, saved: tuple[Tensor, ...]) -> Form:
        """See `ObservedLayer`."""
        return Form() if name == "in_proj_bias" else Form("linear", self.part(call, name))

    def sample_grads(
        self, call: functional.Call, saved: tuple[Tensor, ...], names: list[str]
    ) -> dict[str, Tensor]:
        """See `ObservedLayer`."""
        own, found = self.trainable(), {}
        for name in names:
            grad = linear_sample_grads(*saved, of_bias=name == "in_proj_bias")
            found[name] = grad.new_zeros(grad.shape[0], *own[name].shape)
            parts = self.part_of(call.key, {name: found[name].movedim(0, -1)})
            next(part for part in parts if part is not None).copy_(grad.movedim(0, -1))
        return found

    def part_of(self, key: int, of: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias of the projection with this key, out of the parameters."""
        return self._part(self.product_of(key), of)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
