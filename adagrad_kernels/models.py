"""The models of experiments and benchmarks, as functions of the input shape (C, H, W)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

from torch import Tensor, nn

Shape = tuple[int, int, int]


def logistic(shape: Shape, classes: int) -> nn.Module:
    """Multinomial logistic regression: 7,850 parameters on MNIST."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), classes))


def mlp(shape: Shape, classes: int) -> nn.Module:
    """Two hidden layers of 1024 units."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(shape), 1024),
        nn.ReLU(),
        nn.Linear(1024, 1024),
        nn.ReLU(),
        nn.Linear(1024, classes),
    )


def cnn(shape: Shape, classes: int) -> nn.Module:
    """A small convolutional network: of its two forms the one for grey or for colour images."""
    return _grey_cnn(shape, classes) if shape[0] == 1 else _colour_cnn(shape, classes)


def _grey_cnn(shape: Shape, classes: int) -> nn.Module:
    """Two 5×5 convolutions with pooling: 28,938 parameters on MNIST, 14,538 on digits."""
    channels, height, width = shape
    return nn.Sequential(
        nn.Conv2d(channels, 16, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (height // 4) * (width // 4), classes),
    )


def _colour_cnn(shape: Shape, classes: int) -> nn.Module:
    """Three 3×3 convolutions with pooling, two linear layers: 541,094 parameters on CIFAR-10."""
    channels, height, width = shape
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (height // 8) * (width // 8), 500),
        nn.ReLU(),
        nn.Linear(500, classes),
    )


def resnet18(shape: Shape, classes: int) -> nn.Module:
    """ResNet-18 for small images: 3×3 stem, no pooling after it, 11,173,962 parameters on CIFAR-10.

    Group normalisation (32 groups) in place of batch normalisation, which would mix the samples
    of a batch: they would have no gradients of their own.
    """
    widths = (64, 64, 128, 256, 512)
    stages = [
        block
        for before, width in itertools.pairwise(widths)
        for block in (_Block(before, width, width // before), _Block(width, width, 1))
    ]
    return nn.Sequential(
        _conv(shape[0], 64, 3),
        nn.GroupNorm(32, 64),
        nn.ReLU(),
        *stages,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(512, classes),
    )


class _Block(nn.Module):
    """Two 3×3 convolutions beside a shortcut."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            _conv(before, width, 3, stride),
            nn.GroupNorm(32, width),
            nn.ReLU(),
            _conv(width, width, 3),
            nn.GroupNorm(32, width),
        )
        self.shortcut = (
            nn.Identity()
            if before == width
            else nn.Sequential(_conv(before, width, 1, stride), nn.GroupNorm(32, width))
        )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.residual(x) + self.shortcut(x))


def _conv(before: int, width: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, width, size, stride, padding=size // 2, bias=False)


MODELS: dict[str, Callable[[Shape, int], nn.Module]] = {
    "logistic": logistic,
    "cnn": cnn,
    "mlp": mlp,
    "resnet18": resnet18,
}
