"""`torch.nn.LSTMCell`, `GRUCell` and `RNNCell`, observed: two linear layers and their gates.

A cell is called once a position. Its calls are measured together after the backward pass, as those
of any layer that is called often (`shared.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.rnn import RNNCellBase

from .. import functional
from .base import unwatched
from .products import Products
from .recurrent import states_of_samples


class _ObservedCell(Products, RNNCellBase):
    observed_parameters = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")

    def attach(self, observer: Any, name: str) -> None:
        """See `ObservedLayer`: a call for each product, the first of which counts the samples."""
        super().attach(observer, name)
        self._calls = {n: functional.Call(functional.listen(self), n == "ih") for n in ("ih", "hh")}

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """As the plain module, for inputs with a sample dimension; states as of `nn.LSTM`."""
        return self._forward(input, states_of_samples(self.shared_values, hx, 0))

    @unwatched
    def _forward(self, input: Tensor, hx: Any) -> Any:
        if not self.measures():
            return self.plain_class.forward(self, input, hx)
        if input.dim() != 2:
            raise ValueError(
                f"layer {self.observed_name!r}: an input of shape {list(input.shape)} has no "
                "sample dimension"
            )
        if hx is None:
            hx = input.new_zeros(input.shape[0], self.hidden_size)
            hx = (hx, hx) if isinstance(self, nn.LSTMCell) else hx
        h = hx[0] if isinstance(hx, (tuple, list)) else hx
        return self._step(self._product("ih", input), self._product("hh", h), hx)

    def _product(self, name: str, x: Tensor) -> Tensor:
        x = self.by_samples(x)
        probe, call = self.probe_and_call(x, self._calls[name])
        weight, bias = f"weight_{name}", f"bias_{name}"
        of = self.coordinate_probes()
        y = functional.linear(
            x, getattr(self, weight), getattr(self, bias),
            probe, of.get(weight), of.get(bias), call,
        )  # fmt: skip
        return self.as_rows(y)

    def _step(self, from_x: Tensor, from_h: Tensor, hx: Any) -> Any:
        """The next state, from both products and the state before."""
        raise NotImplementedError


class ObservedLSTMCell(_ObservedCell, nn.LSTMCell):
    """A step of a long short-term memory that measures; inputs [b, I]."""

    def _step(self, from_x: Tensor, from_h: Tensor, hx: Any) -> Any:
        i, f, g, o = (from_x + from_h).chunk(4, 1)
        c = f.sigmoid() * hx[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class ObservedGRUCell(_ObservedCell, nn.GRUCell):
    """A step of a gated recurrent unit that measures; inputs [b, I]."""

    def _step(self, from_x: Tensor, from_h: Tensor, hx: Any) -> Any:
        (r_x, z_x, n_x), (r_h, z_h, n_h) = from_x.chunk(3, 1), from_h.chunk(3, 1)
        n = (n_x + (r_x + r_h).sigmoid() * n_h).tanh()
        return n + (z_x + z_h).sigmoid() * (hx - n)


class ObservedRNNCell(_ObservedCell, nn.RNNCell):
    """A step of a plain recurrent network that measures; inputs [b, I]."""

    def _step(self, from_x: Tensor, from_h: Tensor, hx: Any) -> Any:
        of = {"tanh": torch.tanh, "relu": torch.relu}[self.nonlinearity]
        return of(from_x + from_h)
