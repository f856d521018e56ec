"""Known architectures, narrow and shallow enough for a test, with a task that each can learn."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

VOCABULARY, LENGTH, CLASSES = 16, 8, 4


class _Block(nn.Module):
    def __init__(
        self, before: int, width: int, stride: int, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(before, width, stride), norm(width)
        self.conv2, self.norm2 = _conv(width, width, 1), norm(width)
        self.around: nn.Module = nn.Identity()
        if before != width:
            conv = nn.Conv2d(before, width, 1, stride, bias=False)
            self.around = nn.Sequential(conv, norm(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(y)) + self.around(x)).relu()


def _conv(before: int, width: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(before, width, 3, stride, padding=1, bias=False)


def _group_norm(width: int) -> nn.Module:
    return nn.GroupNorm(2, width)


def resnet18(norm: Callable[[int], nn.Module] = _group_norm, width: int = 4) -> nn.Module:
    """The ResNet-18 for small images, `width` instead of 64 channels."""
    widths = (width, width, 2 * width, 4 * width, 8 * width)
    stages = [
        block
        for before, after in itertools.pairwise(widths)
        for block in (_Block(before, after, after // before, norm), _Block(after, after, 1, norm))
    ]
    return nn.Sequential(
        _conv(3, width, 1), norm(width), nn.ReLU(), *stages,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, CLASSES),
    )  # fmt: skip


def separable(width: int = 8) -> nn.Module:
    """Depthwise convolutions, each followed by a 1×1 convolution, as in MobileNet."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1)]
    for before, after, stride in ((width, 2 * width, 1), (2 * width, 2 * width, 2)):
        layers += [
            nn.Conv2d(before, before, 3, stride, padding=1, groups=before, bias=False),
            _group_norm(before),
            nn.Hardswish(),
            nn.Conv2d(before, after, 1, bias=False),
            _group_norm(after),
            nn.Hardswish(),
        ]
    head = nn.Linear(2 * width, CLASSES)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def cnn() -> nn.Module:
    """Two convolutions with pooling and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32, CLASSES),
    )  # fmt: skip


class _Layer(nn.Module):
    """Causal attention and a feed-forward net, normalised first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.net = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.queries_keys_values(self.norm1(x)).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in qkv)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(mixed.transpose(1, 2).flatten(2))
        return x + self.net(self.norm2(x))


class Transformer(nn.Module):
    """A causal language model of four layers: tokens [b, T] to logits [b, T, vocabulary]."""

    def __init__(self, tied: bool, width: int = 16, depth: int = 4, heads: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(LENGTH, width)
        self.layers = nn.Sequential(*(_Layer(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        if tied:
            nn.init.normal_(self.tokens.weight, std=width**-0.5)
            self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        where = torch.arange(x.shape[1], device=x.device).repeat(len(x), 1)
        return self.head(self.norm(self.layers(self.tokens(x) + self.positions(where))))


class Encoder(nn.Module):
    """torch's own transformer encoder over a sequence, its mean classified."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.tokens(x)).mean(1))


def images(number: int = 120) -> TensorDataset:
    """Four pictures, each seen through noise."""
    generator = torch.Generator().manual_seed(4)
    pictures = torch.randn(CLASSES, 3, 8, 8, generator=generator)
    labels = torch.randint(CLASSES, (number,), generator=generator)
    noise = torch.randn(number, 3, 8, 8, generator=generator)
    return TensorDataset(pictures[labels] + noise, labels)


def texts(number: int = 120) -> TensorDataset:
    """Tokens that count upwards, with one in four replaced; the next token is to be told."""
    generator = torch.Generator().manual_seed(5)
    start = torch.randint(VOCABULARY, (number, 1), generator=generator)
    text = (start + torch.arange(LENGTH + 1)) % VOCABULARY
    other = torch.randint(VOCABULARY, text.shape, generator=generator)
    text = torch.where(torch.rand(text.shape, generator=generator) < 0.25, other, text)
    return TensorDataset(text[:, :-1], text[:, 1:])


def sequences(number: int = 120) -> TensorDataset:
    """Texts of tokens that are mostly of their class."""
    generator = torch.Generator().manual_seed(6)
    labels = torch.randint(CLASSES, (number,), generator=generator)
    own = torch.randint(CLASSES, (number, LENGTH), generator=generator) * CLASSES
    any_ = torch.randint(VOCABULARY, (number, LENGTH), generator=generator)
    mostly = torch.rand(number, LENGTH, generator=generator) < 0.5
    return TensorDataset(torch.where(mostly, own + labels[:, None], any_), labels)


def cross_entropy(out: Tensor, y: Tensor) -> Tensor:
    """Mean over samples and positions."""
    return F.cross_entropy(out.flatten(0, -2), y.flatten())


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    data: Callable[[], TensorDataset]
    independent: bool = True  # whether samples have gradients of their own


CASES = {
    "resnet18, GroupNorm": Case(resnet18, images),
    "resnet18, BatchNorm": Case(lambda: resnet18(nn.BatchNorm2d), images, independent=False),
    "depthwise-separable": Case(separable, images),
    "transformer, tied": Case(lambda: Transformer(tied=True), texts),
    "encoder": Case(Encoder, sequences),
}
