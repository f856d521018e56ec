"""`torch.nn.Conv2d`, observed: every stride, padding (also "same"), dilation, groups."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from .base import ObservedLayer


class ObservedConv2d(ObservedLayer, nn.Conv2d):
    """A convolution that measures; inputs [b, C, H, W]."""

    observed_method = "direct"

    def forward(self, input: Tensor) -> Tensor:
        """The cross-correlation of `torch.nn.Conv2d`."""
        if not self.measures():
            return super().forward(input)
        probes = self.probes(input)
        top, left, padding = self._paddings()
        if self.padding_mode != "zeros" or top or left:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            vertical, horizontal = (padding[0] + top, padding[0]), (padding[1] + left, padding[1])
            if self.padding == "same":  # torch puts the odd one at the end
                vertical, horizontal = vertical[::-1], horizontal[::-1]
            input, padding = F.pad(input, (*horizontal, *vertical), mode=mode), (0, 0)
        return functional.conv2d(
            input, self.weight, self.bias, *probes,
            self.stride, padding, self.dilation, self.groups,  # type: ignore[arg-type]
        )  # fmt: skip

    def _paddings(self) -> tuple[int, int, tuple[int, int]]:
        """(extra vertical, extra horizontal, both-sided padding) of "same", "valid" or numbers."""
        if self.padding == "valid":
            return 0, 0, (0, 0)
        if self.padding == "same":
            totals = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            return totals[0] % 2, totals[1] % 2, (totals[0] // 2, totals[1] // 2)
        vertical, horizontal = self.padding
        return 0, 0, (int(vertical), int(horizontal))
