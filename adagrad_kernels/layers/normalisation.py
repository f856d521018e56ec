"""Layers with a scale and a shift by channel, observed: normalisations and PReLU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from .. import functional
from ..functional._affine import by_channel
from .base import ObservedLayer, unwatched
from .contributions import unrounded


class _Affine(ObservedLayer):
    observed_method = "sums by channel"
    takes_sample_grads = True

    @property
    def channels_axis(self) -> int:
        """The dimension of `by_samples(x)` that holds the channels of x [b, C, …]."""
        return 2 if self.observed_folded else 1

    def respond(
        self, call: functional.Call, operands: tuple[Tensor, ...], params: Mapping[str, Any]
    ) -> Tensor:
        """See `ObservedLayer`."""
        return affine_response(operands, params.get("weight"), params.get("bias"))

    def sample_grads(
        self, call: functional.Call, saved: tuple[Tensor, ...], names: list[str]
    ) -> dict[str, Tensor]:
        """See `ObservedLayer`."""
        *operands, grad = map(unrounded, saved)
        own, found = self.trainable(), {}
        for name in names:
            if name == "bias":
                by_channel = grad.sum((1, 3))
            else:
                one = grad.new_ones(grad.shape[2])
                by_channel = (affine_response(tuple(operands), one, None) * grad).sum((1, 3))
            shared = own[name].numel() < by_channel.shape[1]  # one scale for all channels
            by_channel = by_channel.sum(1) if shared else by_channel
            found[name] = by_channel.reshape(len(grad), *own[name].shape)
        return found


def affine_response(
    operands: tuple[Tensor, ...], weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """y = x · weight + bias; operands are x [b, T, C, S] and (mean and) rstd, if there are."""
    x, *statistics = operands
    if statistics:
        *mean, rstd = (by_channel(t, x.shape[2]) for t in statistics)
        x = (x - mean[0] if mean else x) * rstd
    y = torch.zeros_like(x) if weight is None else x * weight.reshape(1, 1, -1, 1)
    return y if bias is None else y + bias.reshape(1, 1, -1, 1)


def _check_several(number: int, what: str, input: Tensor) -> None:
    """As torch: one value has no deviation by which it could be divided."""
    if number == 1:
        raise ValueError(
            f"Expected more than 1 {what} when training, got input size {list(input.shape)}"
        )


class ObservedLayerNorm(_Affine, nn.LayerNorm):
    """Layer normalisation that measures; inputs [b, …, *normalized_shape]."""

    @unwatched
    def forward(self, input: Tensor) -> Tensor:
        """As `torch.nn.LayerNorm`."""
        if not self.measures():
            return super().forward(input)
        x = self.by_samples(input)
        return self.as_rows(
            functional.layer_norm(
                x, self.normalized_shape, self.weight, self.bias, self.eps, *self.probes(x)
            )
        )


class ObservedRMSNorm(_Affine, nn.RMSNorm):
    """Root-mean-square normalisation that measures; inputs [b, …, *normalized_shape]."""

    observed_parameters = ("weight",)

    @unwatched
    def forward(self, x: Tensor) -> Tensor:
        """As `torch.nn.RMSNorm`."""
        if not self.measures():
            return super().forward(x)
        x = self.by_samples(x)
        probe, weight_probe, _, call = self.probes(x)
        return self.as_rows(
            functional.rms_norm(
                x, self.normalized_shape, self.weight, self.eps, probe, weight_probe, call
            )
        )


class ObservedGroupNorm(_Affine, nn.GroupNorm):
    """Group normalisation that measures; inputs [b, C, …]."""

    @unwatched
    def forward(self, input: Tensor) -> Tensor:
        """As `torch.nn.GroupNorm`."""
        if not self.measures():
            return super().forward(input)
        values = input.shape[0] * input.shape[1:].numel() // self.num_groups
        _check_several(values, "value per channel", input)
        x = self.by_samples(input)
        y = functional.group_norm(
            x, self.num_groups, self.weight, self.bias, self.eps, *self.probes(x),
            axis=self.channels_axis,
        )  # fmt: skip
        return self.as_rows(y)


class _ObservedBatchNorm(_Affine, _BatchNorm):
    observed_method = "sums by channel; in training mode what a sample adds to the batch's gradient"

    @unwatched
    def forward(self, input: Tensor) -> Tensor:
        """As `torch.nn.BatchNorm1d`, `2d`, `3d`."""
        if not self.measures():
            return self.plain_class.forward(self, input)
        self._check_input_dim(input)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        of_batch = self.training or (self.running_mean is None and self.running_var is None)
        if of_batch:
            values = input.shape[0] * input.shape[2:].numel()
            _check_several(values, "value per channel", input)
        tracked = not self.training or self.track_running_stats
        x = self.by_samples(input)
        if self.observed_folded:  # [b, C, k, …]
            x = x.transpose(1, 2).contiguous()
        y = functional.batch_norm(
            x,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.weight, self.bias, of_batch, momentum, self.eps, *self.probes(x),
        )  # fmt: skip
        return self.as_rows(y.transpose(1, 2)) if self.observed_folded else y


class ObservedBatchNorm1d(_ObservedBatchNorm, nn.BatchNorm1d):
    """Batch normalisation that measures; inputs [b, C] or [b, C, L]."""


class ObservedBatchNorm2d(_ObservedBatchNorm, nn.BatchNorm2d):
    """Batch normalisation that measures; inputs [b, C, H, W]."""


class ObservedBatchNorm3d(_ObservedBatchNorm, nn.BatchNorm3d):
    """Batch normalisation that measures; inputs [b, C, D, H, W]."""


class _ObservedInstanceNorm(_Affine, _InstanceNorm):
    @unwatched
    def forward(self, input: Tensor) -> Tensor:
        """As `torch.nn.InstanceNorm1d`, `2d`, `3d`."""
        if not self.measures():
            return self.plain_class.forward(self, input)
        self._check_input_dim(input)
        if input.dim() == self._get_no_batch_dim():
            raise ValueError(
                f"layer {self.observed_name!r}: an input of shape {list(input.shape)} has no "
                "sample dimension"
            )
        if not self.track_running_stats:  # a group for each channel
            _check_several(input.shape[2:].numel(), "spatial element", input)
            x = self.by_samples(input)
            y = functional.group_norm(
                x, self.num_features, self.weight, self.bias, self.eps, *self.probes(x),
                axis=self.channels_axis,
            )  # fmt: skip
            return self.as_rows(y)
        normalised = F.instance_norm(
            input, self.running_mean, self.running_var, None, None,
            self.training or not self.track_running_stats,
            0.0 if self.momentum is None else self.momentum, self.eps,
        )  # fmt: skip
        x = self.by_samples(normalised)
        y = functional.scale(x, self.weight, self.bias, self.channels_axis, *self.probes(x))
        return self.as_rows(y)


class ObservedInstanceNorm1d(_ObservedInstanceNorm, nn.InstanceNorm1d):
    """Instance normalisation that measures; inputs [b, C, L]."""


class ObservedInstanceNorm2d(_ObservedInstanceNorm, nn.InstanceNorm2d):
    """Instance normalisation that measures; inputs [b, C, H, W]."""


class ObservedInstanceNorm3d(_ObservedInstanceNorm, nn.InstanceNorm3d):
    """Instance normalisation that measures; inputs [b, C, D, H, W]."""


class ObservedPReLU(_Affine, nn.PReLU):
    """PReLU that measures: max(x, 0) + weight · min(x, 0), by channel (dimension 1) or for all."""

    observed_parameters = ("weight",)

    @unwatched
    def forward(self, input: Tensor) -> Tensor:
        """As `torch.nn.PReLU`."""
        if not self.measures():
            return super().forward(input)
        x = input.unsqueeze(1) if input.dim() == 1 else input  # one number a sample
        x = self.by_samples(x)
        axis = self.channels_axis
        negative = functional.scale(x.clamp(max=0), self.weight, None, axis, *self.probes(x))
        return F.relu(input) + negative.reshape(input.shape)
