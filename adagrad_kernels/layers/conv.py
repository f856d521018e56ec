"""Convolutions and transposed convolutions of one to three dimensions, observed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .. import functional
from ..functional.conv import conv_statistics
from .base import ObservedLayer, unwatched
from .contributions import Form, unrounded

_CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_CONV_TRANSPOSE = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}


def _over_channels(bias: Tensor, like: Tensor) -> Tensor:
    return bias.reshape(1, -1, *(1,) * (like.dim() - 2)).expand_as(like)


class _AnyConv(ObservedLayer, _ConvNd):
    """What convolutions and transposed ones share."""

    takes_sample_grads = True

    def form(self, call: functional.Call, name: str, saved: tuple[Tensor, ...]) -> Form:
        """See `ObservedLayer`; three-dimensional ones cannot have several images a sample."""
        if name != "weight" or not self.foldable:
            return Form()
        dims = self.weight.dim() - 1  # of an image
        return Form("convolution", options=(*self._options(), *(t.shape[-dims:] for t in saved)))

    def _options(self) -> tuple[Any, ...]:
        """Stride, padding, dilation and groups; whether it is transposed."""
        raise NotImplementedError

    def weight_statistics(
        self, x: Tensor, grad_out: Tensor, capacity: int, coordinates: bool
    ) -> tuple[Tensor, Tensor]:
        """See `ObservedLayer`."""
        *options, transposed = self._options()
        images = (x, grad_out) if transposed else (grad_out, x)
        return conv_statistics(*images, self.weight, tuple(options), capacity, coordinates)

    def sample_grads(
        self, call: functional.Call, saved: tuple[Tensor, ...], names: list[str]
    ) -> dict[str, Tensor]:
        """See `ObservedLayer`."""
        found = {}
        if "bias" in names:
            grad = unrounded(saved[-1]).flatten(2 - self.weight.dim()).sum(-1)
            found["bias"] = grad.sum(1) if grad.dim() > 2 else grad
        if "weight" in names:
            found |= super().sample_grads(call, saved, ["weight"])
        return found


class _ObservedConv(_AnyConv):
    observed_method = "direct, Gram (few positions)"

    def _options(self) -> tuple[Any, ...]:
        return self.stride, self._paddings()[1], self.dilation, self.groups, False

    @unwatched
    def forward(self, input: Tensor) -> Tensor:
        """The cross-correlation of `torch.nn.Conv1d`, `Conv2d`, `Conv3d`."""
        if not self.measures():
            return self.plain_class.forward(self, input)
        explicit, padding = self._paddings()
        if explicit is not None:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = F.pad(input, explicit, mode=mode)
        x = self.by_samples(input)
        probe, weight_probe, bias_probe, call = self.probes(x)
        y = functional.conv(
            x, self.weight, self.bias, probe, weight_probe, bias_probe, call,
            self.stride, padding, self.dilation, self.groups,
        )  # fmt: skip
        return self.as_rows(y)

    def _paddings(self) -> tuple[list[int] | None, tuple[int, ...]]:
        """What `F.pad` has to do first, and the zeros on both sides that are left to do."""
        none = (0,) * len(self.stride)
        both = list(self._reversed_padding_repeated_twice)  # (before, after), last dimension first
        if self.padding_mode != "zeros" or both[::2] != both[1::2]:
            return (both, none) if any(both) else (None, none)
        return None, tuple(both[::2][::-1])

    def respond(
        self, call: functional.Call, operands: tuple[Tensor, ...], params: Mapping[str, Any]
    ) -> Tensor:
        """See `ObservedLayer`."""
        (x,) = operands  # the padded input: only zeros are left to pad
        if x.dim() > self.weight.dim():
            y = self.respond(call, (x.flatten(0, 1),), params)
            return y.unflatten(0, x.shape[:2])
        padding = self._paddings()[1]
        weight, bias = params.get("weight"), params.get("bias")
        of = _CONV[x.dim()]
        if weight is None:
            y = of(x, self.weight.detach().to(x.dtype), None, self.stride, padding, self.dilation,
                   self.groups)  # fmt: skip
            return _over_channels(bias, y)  # type: ignore[arg-type]
        return of(x, weight, bias, self.stride, padding, self.dilation, self.groups)


class ObservedConv1d(_ObservedConv, nn.Conv1d):
    """A 1-d convolution that measures; inputs [b, C, L]."""


class ObservedConv2d(_ObservedConv, nn.Conv2d):
    """A 2-d convolution that measures; inputs [b, C, H, W]."""


class ObservedConv3d(_ObservedConv, nn.Conv3d):
    """A 3-d convolution that measures; inputs [b, C, D, H, W]."""

    foldable = False


class _ObservedConvTranspose(_AnyConv, _ConvTransposeNd):
    observed_method = "direct, Gram (few positions); operands exchanged"

    def _options(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups, True

    @unwatched
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """The transposed convolution of `torch.nn.ConvTranspose1d`, `2d`, `3d`."""
        if not self.measures():
            return self.plain_class.forward(self, input, output_size)
        this = cast(Any, self)  # torch declares lists, and takes tuples
        output_padding = this._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size,
            len(self.stride), self.dilation,
        )  # fmt: skip
        x = self.by_samples(input)
        probe, weight_probe, bias_probe, call = self.probes(x)
        y = functional.conv_transpose(
            x, self.weight, self.bias, probe, weight_probe, bias_probe, call,
            self.stride, this.padding, tuple(output_padding), self.dilation, self.groups,
        )  # type: ignore[arg-type]  # fmt: skip
        return self.as_rows(y)

    def contract(
        self, call: functional.Call, saved: tuple[Tensor, ...], params: Mapping[str, Tensor]
    ) -> Tensor:
        """See `ObservedLayer`; the weight's part as a convolution of grad_out."""
        x, grad_out = (t.to(next(iter(params.values())).dtype) for t in saved)
        if x.dim() > self.weight.dim():
            of_rows = self.contract(call, (x.flatten(0, 1), grad_out.flatten(0, 1)), params)
            return of_rows.unflatten(0, x.shape[:2]).sum(1)
        total = x.new_zeros(x.shape[0])
        if "weight" in params:
            back = _CONV[x.dim()](
                grad_out, params["weight"], None, self.stride, self.padding, self.dilation,
                self.groups,
            )  # type: ignore[arg-type]  # fmt: skip
            back = back[(..., *map(slice, x.shape[2:]))]  # see functional.conv_transpose
            total = total + (x * back).flatten(1).sum(1)
        if "bias" in params:
            total = total + grad_out.flatten(2).sum(2) @ params["bias"]
        return total


class ObservedConvTranspose1d(_ObservedConvTranspose, nn.ConvTranspose1d):
    """A transposed 1-d convolution that measures; inputs [b, C, L]."""


class ObservedConvTranspose2d(_ObservedConvTranspose, nn.ConvTranspose2d):
    """A transposed 2-d convolution that measures; inputs [b, C, H, W]."""


class ObservedConvTranspose3d(_ObservedConvTranspose, nn.ConvTranspose3d):
    """A transposed 3-d convolution that measures; inputs [b, C, D, H, W]."""

    foldable = False
