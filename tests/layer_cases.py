"""One small model for every supported layer and for the ways in which layers are put together."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.utils.parametrize
from torch import Tensor, nn


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of an input; integers below 11 where tokens is set
    tokens: bool = False
    fallback: str = "error"
    compiles: bool = True

    def input(self, device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
        if self.tokens:
            return torch.randint(11, self.shape, device=device)
        return torch.randn(self.shape, device=device, dtype=dtype)


class Language(nn.Module):
    """Embedding, normalisation, head; the head tied to the embedding or not."""

    def __init__(self, tied: bool = False, padding_idx: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6, padding_idx=padding_idx)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 11, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.embedding(tokens)))


class Bags(nn.Module):
    """A bag of words and a classifier."""

    def __init__(self, mode: str, **options) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(11, 6, mode=mode, **options), nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.bag(tokens))


class Attention(nn.Module):
    """Multi-head attention of a linear layer's output with itself, or with functions of it."""

    def __init__(self, cross: bool = False, need_weights: bool = True, **options) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 8)
        self.attention = nn.MultiheadAttention(8, 2, **options)
        self.cross, self.need_weights = cross, need_weights
        self.widths = options.get("kdim", 8), options.get("vdim", 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        batch_first = self.attention.batch_first
        y = y if batch_first else y.transpose(0, 1)
        key, value = (y.sin(), y.cos()) if self.cross else (y, y)
        if self.widths != (8, 8):
            key, value = key[..., : self.widths[0]], value[..., : self.widths[1]]
        mask = torch.ones(y.shape[-2 if batch_first else 0], dtype=torch.bool, device=x.device)
        mask = torch.diag(mask).logical_not().roll(1, 0)
        y = self.attention(y, key, value, attn_mask=mask, need_weights=self.need_weights)[0]
        return y if batch_first else y.transpose(0, 1)


class Twice(nn.Module):
    """A layer that is called on its own output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh())


class Loop(nn.Module):
    """A recurrent network written out: linear layers called once a position."""

    def __init__(self) -> None:
        super().__init__()
        self.of_input, self.of_state = nn.Linear(4, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 5)
        for t in range(x.shape[1]):
            state = torch.tanh(self.of_input(x[:, t]) + self.of_state(state))
        return state


class Cells(nn.Module):
    """Cells, one on top of the other, stepped along the positions."""

    def __init__(self, make: Callable[..., nn.Module], **options: Any) -> None:
        super().__init__()
        self.first, self.second = make(4, 5, **options), make(5, 3, **options)

    def forward(self, x: Tensor) -> Tensor:
        first, second = None, None
        for t in range(x.shape[1]):
            first = self.first(x[:, t], first)
            second = self.second(first[0] if isinstance(first, tuple) else first, second)
        return second[0] if isinstance(second, tuple) else second


class Within(nn.Module):
    """Layers that use one parameter in two places of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.layer = nn.RNNCell(4, 4), nn.GRU(4, 4, batch_first=True)
        self.cell.weight_hh = self.cell.weight_ih
        self.layer.bias_hh_l0 = self.layer.bias_ih_l0
        self.layer._flat_weights = [getattr(self.layer, n) for n in self.layer._flat_weights_names]

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x[:, 0], self.layer(x)[0][:, -1])


class Sizes(nn.Module):
    """A layer that is called on an image, on it again, and on half of it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        whole = self.layer(x).sin() + self.layer(x.cos())
        return whole.flatten(2).mean(2) + self.layer(x[..., ::2]).sin().flatten(2).mean(2)


class Strides(nn.Module):
    """One weight in two convolutions that differ in their strides, or a transposed one."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), other
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


class Decoder(nn.Module):
    """Something between an embedding and a head that is tied to it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 4), nn.Linear(4, 11)
        self.head.weight = self.embedding.weight
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y = self.embedding(x)
        y = self.layer(y) if isinstance(self.layer, nn.LSTM) else self.layer(y, y.sin())
        return self.head(y[0] if isinstance(y, tuple) else y)


class Queries(nn.Module):
    """Attention to itself, then of the result to the input, by the same layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(x, x, x)[0]
        z = self.attention(y, x, x)[0]
        return self.attention(z, y, x.sin())[0]


class Scaled(nn.Module):
    """A parameter without dimensions, and an output without features."""

    def __init__(self) -> None:
        super().__init__()
        self.factor, self.inner = nn.Parameter(torch.randn(())), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.inner(x).tanh().sum(1)


class Custom(nn.Module):
    """A parameter of its own, and a layer inside."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.inner = nn.Parameter(torch.randn(4, 3)), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x @ self.matrix).sigmoid()


class First(nn.Module):
    """The first of a layer's outputs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Recurrent(nn.Module):
    """A recurrent layer whose outputs and last state are both looked at."""

    def __init__(self, kind: type[nn.RNNBase], given: bool = False, **options) -> None:
        super().__init__()
        self.layer, self.given = kind(4, 5, **options), given

    def forward(self, x: Tensor) -> Tensor:
        first = self.layer.batch_first
        x = x.tanh()
        inputs = (x if first else x.transpose(0, 1),)
        if self.given:  # a state before the first position
            state = x.mean(1).repeat(1, 2)[:, :5].unsqueeze(0)
            inputs += ((state, state.cos()) if isinstance(self.layer, nn.LSTM) else state,)
        y, end = self.layer(*inputs)
        ends = end if isinstance(end, tuple) else (end,)
        looked_at = [y if first else y.transpose(0, 1), *(e.transpose(0, 1) for e in ends)]
        return torch.cat([t.flatten(1) for t in looked_at], 1)


def between(layer: nn.Module, width: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, width), layer, nn.Linear(width, 2))


def between_convolutions(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), layer, nn.Conv2d(4, 2, 1))


def convolutions(dims: int, **options) -> nn.Sequential:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return nn.Sequential(
        kind(4, 6, 3, stride=2, groups=2, **options), nn.Tanh(), kind(6, 3, 2, bias=False)
    )


def transposed(dims: int) -> nn.Sequential:
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    first = kind(4, 6, 3, padding=1, stride=2, groups=2, output_padding=1)
    return nn.Sequential(first, nn.Tanh(), kind(6, 3, 2, dilation=2, bias=False))


def separable() -> nn.Sequential:
    """Depthwise and pointwise convolution."""
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding="same", groups=4), nn.ReLU6(), nn.Conv2d(8, 4, 1), nn.SiLU()
    )


def frozen_projections() -> nn.Module:
    """Of an attention only what follows it is trained."""
    model = Attention(batch_first=True)
    for p in (model.attention.in_proj_weight, model.attention.in_proj_bias):
        p.requires_grad_(False)
    return model


class Symmetric(nn.Module):
    """A matrix that is its own transpose."""

    def forward(self, matrix: Tensor) -> Tensor:
        return matrix.triu() + matrix.triu(1).mT


def parametrized() -> nn.Module:
    """A layer whose weight is computed whenever it is asked for."""
    layer = nn.Linear(5, 5)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", Symmetric())
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(5, 2))


def encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


CASES = {
    "linear": Case(lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), (6, 5)),
    "linear-positions": Case(lambda: between(nn.Tanh()), (6, 4, 2, 5)),
    "linear-few-positions": Case(lambda: nn.Linear(48, 64), (6, 4, 48)),
    "conv1d": Case(lambda: convolutions(1, padding=1), (4, 4, 8)),
    "conv2d": Case(lambda: convolutions(2, padding=(1, 0), dilation=(1, 2)), (4, 4, 8, 9)),
    "conv2d-few-positions": Case(lambda: nn.Conv2d(40, 48, 3, padding=1), (4, 40, 2, 2)),
    "conv2d-circular": Case(
        lambda: convolutions(2, padding=1, padding_mode="circular"), (4, 4, 6, 6)
    ),
    "conv3d": Case(lambda: convolutions(3, padding=1), (4, 4, 4, 5, 6)),
    "separable": Case(separable, (4, 4, 6, 6)),
    "transposed1d": Case(lambda: transposed(1), (4, 4, 3)),
    "transposed2d": Case(lambda: transposed(2), (4, 4, 3, 3)),
    "transposed3d": Case(lambda: transposed(3), (4, 4, 2, 3, 2)),
    "transposed-output-padding": Case(  # pixels of the output that no pixel of the input reaches
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 2, 2, dilation=3, output_padding=2)
        ),
        (4, 3, 2, 3),
    ),
    "attention-frozen-projections": Case(frozen_projections, (4, 5, 4)),
    "embedding": Case(Language, (6, 9), tokens=True),
    "embedding-padding": Case(lambda: Language(padding_idx=3), (6, 9), tokens=True),
    "embedding-bag": Case(lambda: Bags("sum"), (6, 9), tokens=True),
    "embedding-bag-mean": Case(lambda: Bags("mean", padding_idx=3), (6, 9), tokens=True),
    "embedding-bag-max": Case(lambda: Bags("max"), (6, 9), tokens=True),
    "layer-norm": Case(lambda: between(nn.LayerNorm(6)), (6, 4, 5)),
    "layer-norm-two": Case(lambda: between(nn.LayerNorm((4, 6), bias=False)), (6, 4, 5)),
    "rms-norm": Case(lambda: between(nn.RMSNorm(6)), (6, 4, 5)),
    "group-norm": Case(lambda: between_convolutions(nn.GroupNorm(2, 4)), (6, 3, 5, 5)),
    "instance-norm": Case(
        lambda: between_convolutions(nn.InstanceNorm2d(4, affine=True)), (6, 3, 5, 5)
    ),
    "group-norm-channels-last": Case(
        lambda: between_convolutions(nn.GroupNorm(2, 4)).to(memory_format=torch.channels_last),
        (6, 3, 5, 5),
    ),
    "instance-norm-tracked": Case(
        lambda: between_convolutions(
            nn.InstanceNorm2d(4, affine=True, track_running_stats=True).eval()
        ),
        (6, 3, 5, 5),
    ),
    "batch-norm-eval": Case(lambda: between_convolutions(nn.BatchNorm2d(4).eval()), (6, 3, 5, 5)),
    "batch-norm-eval-flat": Case(lambda: between(nn.BatchNorm1d(6).eval()), (6, 5)),
    "prelu": Case(lambda: between(nn.PReLU()), (6, 4, 5)),
    "prelu-channels": Case(lambda: between_convolutions(nn.PReLU(4)), (6, 3, 5, 5)),
    "attention": Case(lambda: Attention(batch_first=True), (4, 5, 4)),
    "attention-sequence-first": Case(lambda: Attention(cross=True, bias=False), (4, 5, 4)),
    "attention-widths": Case(
        lambda: Attention(cross=True, need_weights=False, kdim=3, vdim=5, batch_first=True),
        (4, 5, 4),
    ),
    "attention-zero": Case(
        lambda: Attention(need_weights=False, add_zero_attn=True, batch_first=True), (4, 5, 4)
    ),
    "encoder": Case(encoder, (4, 5, 8)),
    "lstm": Case(
        lambda: Recurrent(nn.LSTM, given=True, batch_first=True), (4, 5, 4), compiles=False
    ),
    "lstm-deep": Case(
        lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True), (4, 3, 4), compiles=False
    ),
    "lstm-projected": Case(
        lambda: Recurrent(nn.LSTM, num_layers=2, proj_size=3, bias=False),
        (4, 3, 4),
        compiles=False,
    ),
    "gru": Case(
        lambda: Recurrent(nn.GRU, num_layers=2, bidirectional=True, batch_first=True),
        (4, 3, 4),
        compiles=False,
    ),
    "gru-no-bias": Case(
        lambda: Recurrent(nn.GRU, given=True, bias=False), (4, 1, 4), compiles=False
    ),
    "gru-one-sample": Case(lambda: Recurrent(nn.GRU, given=True), (2, 1, 4), compiles=False),
    "lstm-one-sample": Case(lambda: Recurrent(nn.LSTM, given=True), (2, 1, 4), compiles=False),
    "rnn": Case(lambda: Recurrent(nn.RNN, num_layers=2), (4, 3, 4), compiles=False),
    "rnn-relu": Case(
        lambda: Recurrent(nn.RNN, nonlinearity="relu", batch_first=True),
        (4, 3, 4),
        compiles=False,
    ),
    "tied": Case(lambda: Language(tied=True), (6, 9), tokens=True, compiles=False),
    "tied-padding": Case(
        lambda: Language(tied=True, padding_idx=3), (6, 9), tokens=True, compiles=False
    ),
    "twice": Case(lambda: Twice(nn.Linear(5, 5)), (6, 5), compiles=False),
    "twice-positions": Case(lambda: Twice(nn.Linear(5, 5)), (6, 3, 5), compiles=False),
    "twice-conv": Case(lambda: Twice(nn.Conv2d(3, 3, 3, padding=1)), (6, 3, 5, 5), compiles=False),
    "twice-conv-images": Case(
        lambda: Twice(nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False)),
        (6, 3, 5, 5),
        compiles=False,
    ),
    "twice-conv3d": Case(
        lambda: Twice(nn.Conv3d(2, 2, 3, padding=1)), (4, 2, 3, 4, 3), compiles=False
    ),
    "twice-transposed": Case(
        lambda: Twice(nn.ConvTranspose2d(3, 3, 3, padding=1)), (4, 3, 5, 5), compiles=False
    ),
    "twice-group-norm": Case(lambda: Twice(nn.GroupNorm(2, 4)), (6, 4, 5, 5), compiles=False),
    "twice-attention": Case(Queries, (4, 5, 4), compiles=False),
    "tied-decoder": Case(
        lambda: Decoder(nn.TransformerDecoderLayer(4, 2, 8, dropout=0.0, batch_first=True)),
        (6, 5),
        tokens=True,
        compiles=False,
    ),
    "tied-lstm": Case(
        lambda: Decoder(nn.LSTM(4, 4, batch_first=True)),
        (6, 5),
        tokens=True,
        compiles=False,
    ),
    "tied-within": Case(Within, (6, 3, 4), compiles=False),
    "loop": Case(Loop, (6, 5, 4), compiles=False),
    "lstm-cell": Case(lambda: Cells(nn.LSTMCell), (6, 3, 4), compiles=False),
    "gru-cell": Case(lambda: Cells(nn.GRUCell), (6, 3, 4), compiles=False),
    "rnn-cell": Case(
        lambda: Cells(nn.RNNCell, nonlinearity="relu", bias=False), (6, 3, 4), compiles=False
    ),
    "cell-once": Case(lambda: Cells(nn.RNNCell), (6, 1, 4)),
    "sizes": Case(lambda: Sizes(nn.Conv1d(3, 4, 3, padding=1)), (4, 3, 6), compiles=False),
    "sizes-norm": Case(lambda: Sizes(nn.InstanceNorm1d(3, affine=True)), (4, 3, 8), compiles=False),
    "tied-strides": Case(
        lambda: Strides(nn.Conv2d(3, 3, 3, stride=2)), (4, 3, 7, 7), compiles=False
    ),
    "tied-transposed": Case(
        lambda: Strides(nn.ConvTranspose2d(3, 3, 3, bias=False)), (4, 3, 5, 5), compiles=False
    ),
    "twice-norm": Case(lambda: Twice(nn.LayerNorm(5)), (6, 3, 5), compiles=False),
    "vmap": Case(lambda: between(Custom(), 4)[:2], (6, 5), fallback="vmap", compiles=False),
    "vmap-scalar": Case(
        lambda: nn.Sequential(nn.Linear(4, 4), Scaled(), nn.Unflatten(0, (-1, 1))),
        (6, 4),
        fallback="vmap",
        compiles=False,
    ),
    "vmap-parametrized": Case(parametrized, (6, 5), fallback="vmap", compiles=False),
    "recurrent-twice": Case(
        lambda: Twice(First(nn.GRU(4, 4, batch_first=True))), (4, 3, 4), compiles=False
    ),
    "vmap-whole": Case(Custom, (6, 4), fallback="vmap", compiles=False),
}
