"""Random flips and shifts of training images, the same ones again after a resume."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MARGIN = 4
"""The largest shift, in pixels."""


def augment(images: Tensor, seed: int) -> Tensor:
    """Each image flipped with probability ½ and shifted, zeros moving in from outside.

    Args:
        images: [n, C, H, W].
        seed: the result depends on nothing else.
    """
    n, _, height, width = images.shape
    generator = torch.Generator().manual_seed(seed)
    top, left = torch.randint(0, 2 * MARGIN + 1, (2, n), generator=generator).to(images.device)
    flip = (torch.rand(n, generator=generator) < 0.5).to(images.device)
    padded = F.pad(images, (MARGIN,) * 4)
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.arange(width, device=images.device)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    image = torch.arange(n, device=images.device)[:, None, None]
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
