"""`torch.nn.LSTM`, `GRU` and `RNN`, observed: one measured call for each product with a weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .. import functional
from .base import Seen, unwatched
from .products import Products
from .shared_values import SharedValues

_PRODUCTS = ("ih", "hh", "hr")


def states_of_samples(values: SharedValues | None, hx: Any, dim: int) -> Any:
    """Initial states whose dimension `dim` counts the samples, measured where they are shared."""
    if values is None or hx is None or not torch.is_grad_enabled():
        return hx
    if isinstance(hx, (tuple, list)):
        return type(hx)(values.along(state, dim) for state in hx)
    return values.along(hx, dim)


class ObservedRecurrent(Products, nn.RNNBase):
    """A recurrent layer that measures; its weights are those of linear layers at T positions.

    The samples are dimension 0 of the input, or dimension 1 without `batch_first`. Each layer and
    direction runs by itself, so that dropout between the layers draws other random numbers than
    the plain module does.
    """

    def attach(self, observer: Any, name: str) -> None:
        """See `ObservedLayer`: a call for each product, the first of which counts the samples."""
        super().attach(observer, name)
        self.observed_parameters = tuple(self._flat_weights_names)
        self._calls = {
            f"{product}{part}": functional.Call(functional.listen(self), product + part == "ih_l0")
            for part in self._parts()
            for product in _PRODUCTS
            if hasattr(self, f"weight_{product}{part}")
        }

    def forward(self, input: Any, hx: Any = None) -> Any:
        """As the plain module, for tensors with a sample dimension.

        Initial states may be parameters of the module around this one, repeated for the samples.
        """
        return self._forward(input, states_of_samples(self.shared_values, hx, 1))

    @unwatched
    def _forward(self, input: Any, hx: Any) -> Any:
        if not self.measures():
            return super().forward(input, hx)
        self._check(input)
        x = input if self.batch_first else input.transpose(0, 1)
        states = self._initial(x, hx)
        last: list[tuple[Tensor, ...]] = []
        for layer in range(self.num_layers):
            if layer and self.dropout and self.training:
                x = F.dropout(x, self.dropout)
            outputs = []
            for part in self._parts(layer):
                backwards = part.endswith("reverse")
                y, *end = self._run(part, x.flip(1) if backwards else x, states[len(last)])
                outputs.append(y.flip(1) if backwards else y)
                last.append(tuple(end))
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        y = x if self.batch_first else x.transpose(0, 1)
        ends = tuple(torch.stack(found) for found in zip(*last, strict=True))
        return y, ends if self.mode == "LSTM" else ends[0]

    def _parts(self, layer: int | None = None) -> list[str]:
        """The suffixes of the parameters' names, of one layer or of all."""
        layers = range(self.num_layers) if layer is None else (layer,)
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return [f"_l{k}{direction}" for k in layers for direction in directions]

    def _check(self, input: Any) -> None:
        name = f"layer {self.observed_name!r} ({self.plain_class.__name__})"
        if torch.compiler.is_compiling():
            raise RuntimeError(f"{name} cannot be compiled; run it without torch.compile")
        if isinstance(input, PackedSequence):
            raise ValueError(
                f"{name}: a packed sequence has no sample dimension; give the padded tensor"
            )
        if input.dim() != 3:
            raise ValueError(
                f"{name}: an input of shape {list(input.shape)} has no sample dimension"
            )
        if not input.shape[1 if self.batch_first else 0]:
            raise ValueError(f"{name}: an input of shape {list(input.shape)} has no positions")

    def _initial(self, x: Tensor, hx: Any) -> list[tuple[Tensor, ...]]:
        """The state before each part."""
        count, lstm = len(self._parts()), self.mode == "LSTM"
        if hx is None:
            h = x.new_zeros(count, len(x), self.proj_size or self.hidden_size)
            hx = (h, x.new_zeros(count, len(x), self.hidden_size)) if lstm else h
        self.check_forward_args(x.transpose(0, 1) if not self.batch_first else x, hx, None)
        return list(zip(*hx, strict=True)) if lstm else [(h,) for h in hx]

    def _run(self, part: str, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, state = self.by_samples(x), tuple(map(self.by_samples, state))
        names = self._names(part)
        weights = [getattr(self, n, None) for n in names]
        probe = self._observer.probe_for(x)
        of = self.coordinate_probes()
        widths = {
            "ih": x.shape[-1],
            "hh": self.proj_size or self.hidden_size,
            "hr": self.hidden_size,
        }
        calls = []
        for product in _PRODUCTS:
            call = self._calls.get(product + part)
            if call is not None:
                self._observer.on_forward(call)
                shape = torch.Size((*x.shape[:-1], widths[product]))
                self.seen[call.key] = Seen(shape, x.dtype, x.requires_grad or product != "ih")
                calls.append(call)
        found = functional.recurrent(
            self.mode, x, state, weights, probe, [of.get(n) for n in names], calls
        )
        return tuple(map(self.as_rows, found))

    @staticmethod
    def _names(part: str) -> list[str]:
        """The parameters of a part, as `functional.recurrent` takes them."""
        return [f"{kind}{part}" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh",
                                             "weight_hr")]  # fmt: skip


class ObservedLSTM(ObservedRecurrent, nn.LSTM):
    """A long short-term memory that measures."""


class ObservedGRU(ObservedRecurrent, nn.GRU):
    """A gated recurrent unit that measures."""


class ObservedRNN(ObservedRecurrent, nn.RNN):
    """A plain recurrent network that measures."""
