"""Small networks of all supported layers, drawn by hypothesis.

A network is drawn layer by layer, along with the shape of what comes out of it: features last
([*leading, features]) or channels first ([channels, *spatial]), without the samples.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

VOCABULARY = 4  # so few that samples repeat tokens


class Attending(nn.Module):
    """Attention of a sequence to itself."""

    def __init__(self, width: int, heads: int, **options: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


@dataclass
class Network:
    """Layers, the shape of one sample's input, and the shape after the last layer."""

    input_shape: tuple[int, ...]
    shape: tuple[int, ...]
    channels_first: bool = False
    tokens: bool = False
    layers: list[nn.Module] = field(default_factory=list)

    def add(self, layer: nn.Module, shape: tuple[int, ...] | None = None) -> None:
        self.layers.append(layer)
        self.shape = self.shape if shape is None else shape

    def model(self) -> nn.Sequential:
        return nn.Sequential(*self.layers)

    def input(self, samples: int, dtype: torch.dtype) -> Tensor:
        if self.tokens:
            return torch.randint(VOCABULARY, (samples, *self.input_shape))
        return torch.randn(samples, *self.input_shape, dtype=dtype)


Draw = st.DrawFn
CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d
TRANSPOSED = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
BATCH_NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
INSTANCE_NORMS = nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d
PADDING_MODES = ("zeros", "zeros", "reflect", "replicate", "circular")


def number(draw: Draw, least: int, most: int) -> int:
    return draw(st.integers(least, most))


def flag(draw: Draw) -> bool:
    return draw(st.booleans())


def divisor(draw: Draw, *of: int) -> int:
    common = math.gcd(*of)
    return draw(st.sampled_from([d for d in range(1, common + 1) if common % d == 0]))


def linear(draw: Draw, net: Network) -> None:
    width = number(draw, 1, 6)
    net.add(nn.Linear(net.shape[-1], width, bias=flag(draw)), (*net.shape[:-1], width))


SEVERAL = 3  # with fewer values, what is normalised is constant but for its sign


def normalised_shape(draw: Draw, net: Network) -> tuple[int, ...]:
    found = [net.shape[-k:] for k in range(1, len(net.shape) + 1)]
    return draw(st.sampled_from([s for s in found if math.prod(s) >= SEVERAL]))


def layer_norm(draw: Draw, net: Network) -> None:
    net.add(nn.LayerNorm(normalised_shape(draw, net), bias=flag(draw)))


def rms_norm(draw: Draw, net: Network) -> None:
    net.add(nn.RMSNorm(normalised_shape(draw, net)))


def prelu(draw: Draw, net: Network) -> None:
    net.add(nn.PReLU(net.shape[0] if flag(draw) else 1))


def attention(draw: Draw, net: Network) -> None:
    heads = divisor(draw, net.shape[-1])
    net.add(Attending(net.shape[-1], heads, bias=flag(draw), add_zero_attn=flag(draw)))


def convolution(draw: Draw, net: Network) -> None:
    channels, *size = net.shape
    dims = range(len(size))
    out = number(draw, 1, 6)
    groups = divisor(draw, channels, out)
    mode = draw(st.sampled_from(PADDING_MODES))
    dilation = [number(draw, 1, 2) for _ in dims]
    # Padding of the other modes is at most what there is to be repeated.
    limit = [2 if mode == "zeros" else n - (mode == "reflect") for n in size]
    padding = [number(draw, 0, min(2, most)) for most in limit]
    kernel = [
        number(draw, 1, max(1, min(3, (n + 2 * p - 1) // d + 1)))
        for n, p, d in zip(size, padding, dilation, strict=True)
    ]
    stride = [number(draw, 1, 3) for _ in dims]
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    same = flag(draw) and all(r < n for r, n in zip(reach, size, strict=True))
    if same:
        stride = [1] * len(size)
    make = CONVOLUTIONS[len(size) - 1]
    layer = make(
        channels, out, tuple(kernel), tuple(stride), "same" if same else tuple(padding),
        tuple(dilation), groups, flag(draw), mode,
    )  # fmt: skip
    after = size if same else [
        (n + 2 * p - r - 1) // s + 1
        for n, p, r, s in zip(size, padding, reach, stride, strict=True)
    ]  # fmt: skip
    net.add(layer, (out, *after))


def transposed(draw: Draw, net: Network) -> None:
    channels, *size = net.shape
    out = number(draw, 1, 6)
    options = []  # kernel, stride, padding, output_padding, dilation
    after = []
    for n in size:
        kernel, stride, dilation = number(draw, 1, 3), number(draw, 1, 2), number(draw, 1, 2)
        whole = (n - 1) * stride + dilation * (kernel - 1) + 1
        padding = number(draw, 0, min(2, (whole - 1) // 2))
        more = number(draw, 0, max(stride, dilation) - 1)
        options.append((kernel, stride, padding, more, dilation))
        after.append(whole - 2 * padding + more)
    kernel, stride, padding, more, dilation = zip(*options, strict=True)
    layer = TRANSPOSED[len(size) - 1](
        channels, out, kernel, stride, padding, more, divisor(draw, channels, out), flag(draw),
        dilation,
    )  # fmt: skip
    net.add(layer, (out, *after))


def group_norm(draw: Draw, net: Network) -> None:
    values = math.prod(net.shape)
    groups = [d for d in range(1, net.shape[0] + 1) if net.shape[0] % d == 0]
    groups = [d for d in groups if values // d >= SEVERAL]
    net.add(nn.GroupNorm(draw(st.sampled_from(groups)), net.shape[0]))


def instance_norm(draw: Draw, net: Network) -> None:
    make = INSTANCE_NORMS[len(net.shape) - 2]
    layer = make(net.shape[0], affine=True, track_running_stats=flag(draw))
    net.add(layer.eval())


def batch_norm(draw: Draw, net: Network) -> None:
    """In eval mode: samples of a batch in training mode have no gradients of their own."""
    layer = BATCH_NORMS[max(0, len(net.shape) - 2)](net.shape[0]).eval()
    with torch.no_grad():
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    net.add(layer)


def flatten(draw: Draw, net: Network) -> None:
    net.add(nn.Flatten(), (math.prod(net.shape),))
    net.channels_first = False


def again(draw: Draw, net: Network) -> None:
    """The last layer once more: its parameters are used twice."""
    net.add(net.layers[-2])


def choices(net: Network, deep: bool) -> list[Callable[[Draw, Network], None]]:
    """What can follow."""
    several = math.prod(net.shape) >= SEVERAL
    if net.channels_first:
        found = [convolution, transposed, prelu, batch_norm] + [group_norm] * several
        found += [instance_norm] * (math.prod(net.shape[1:]) >= SEVERAL) + [flatten] * deep
    else:
        found = [linear, linear, prelu] + [rms_norm, layer_norm] * several
        found += [attention] * (len(net.shape) == 2) + [batch_norm] * (len(net.shape) == 1)
    return found


@st.composite
def networks(draw: Draw) -> Network:
    """Two to four layers with tanh between them."""
    kind = draw(st.sampled_from(["features", "images", "tokens"]))
    if kind == "images":
        size = (number(draw, 1, 6), *(number(draw, 2, 5) for _ in range(number(draw, 1, 3))))
        net = Network(size, size, channels_first=True)
    elif kind == "features":
        size = (*(number(draw, 1, 4) for _ in range(number(draw, 0, 2))), number(draw, 2, 6))
        net = Network(size, size)
    else:
        size, width = (
            tuple(number(draw, 1, 5) for _ in range(number(draw, 1, 2))),
            number(draw, 2, 6),
        )
        padding_idx = draw(st.none() | st.integers(0, VOCABULARY - 1))
        net = Network(size, (*size, width), tokens=True)
        net.add(nn.Embedding(VOCABULARY, width, padding_idx))
    for _ in range(number(draw, 2, 4) - len(net.layers)):
        before = net.shape
        draw(st.sampled_from(choices(net, bool(net.layers))))(draw, net)
        net.add(nn.Tanh())
        if net.shape == before and len(net.layers) > 1 and number(draw, 0, 3) == 0:
            again(draw, net)
    return net
