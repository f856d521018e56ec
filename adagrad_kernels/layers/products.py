"""What recurrent layers, their cells and attention share: several products a call of the layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .. import functional
from .base import ObservedLayer
from .contributions import Form
from .linear import linear_response, linear_sample_grads


class Products(ObservedLayer):
    """A layer whose calls are products, each with a weight and a bias, by their names in `_calls`.

    Product "ih" of a recurrent layer has the parameters weight_ih and bias_ih.
    """

    observed_method = "direct, Gram (few positions); products of inputs and of states"

    def takes(self, call: functional.Call, name: str) -> bool:
        """See `ObservedLayer`."""
        return name in self._names_with(call.key)

    def form(self, call: functional.Call, name: str, saved: tuple[Tensor, ...]) -> Form:
        """See `ObservedLayer`."""
        return Form("linear" if name.startswith("weight") else "")

    def sample_grads(
        self, call: functional.Call, saved: tuple[Tensor, ...], names: list[str]
    ) -> dict[str, Tensor]:
        """See `ObservedLayer`."""
        return {n: linear_sample_grads(*saved, of_bias=n.startswith("bias")) for n in names}

    def respond(
        self, call: functional.Call, operands: tuple[Tensor, ...], params: Mapping[str, Any]
    ) -> Tensor:
        """See `ObservedLayer`."""
        (x,) = operands
        return linear_response(x, *self.part_of(call.key, params))

    def part_of(self, key: int, of: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias of the product with this key, out of the parameters."""
        weight, bias = self._names_with(key)
        return of.get(weight), of.get(bias)

    def product_of(self, key: int) -> str:
        """The name of the product with this key."""
        (name,) = (name for name, call in self._calls.items() if call.key == key)
        return name

    def _names_with(self, key: int) -> tuple[str, str]:
        product = self.product_of(key)
        return f"weight_{product}", f"bias_{product}"
