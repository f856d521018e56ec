"""One small model for every way in which modules of other classes use their own parameters."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from layer_cases import Case, Twice, between
from torch import Tensor, nn


class Own(nn.Module):
    """A module with the parameters of these shapes as p0, p1, … and any forward pass."""

    def __init__(
        self, forward: Callable[["Own", Tensor], Tensor], *shapes: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.computes = forward
        for k, shape in enumerate(shapes):
            self.register_parameter(f"p{k}", nn.Parameter(torch.randn(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return self.computes(self, x)


class RMSNorm(nn.Module):
    """That of Llama, or with a weight around 1 that of Gemma."""

    def __init__(self, size: int, around_one: bool = False) -> None:
        super().__init__()
        self.weight, self.around_one = nn.Parameter(torch.randn(size)), around_one

    def forward(self, x: Tensor) -> Tensor:
        normalised = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        if self.around_one:
            return normalised * (1.0 + self.weight.to(x.dtype))
        return self.weight * normalised.to(x.dtype)


class Patches(nn.Module):
    """A class token and positions, both parameters, and a layer inside."""

    def __init__(self, repeat: bool = False) -> None:
        super().__init__()
        self.token, self.positions = (nn.Parameter(torch.randn(1, t, 6)) for t in (1, 5))
        self.project, self.repeat = nn.Linear(5, 6), repeat

    def forward(self, x: Tensor) -> Tensor:
        token = self.token
        token = token.repeat(len(x), 1, 1) if self.repeat else token.expand(x.shape[0], -1, -1)
        return torch.cat([token, self.project(x)], dim=1) + self.positions[:, : x.shape[1] + 1]


class Scales(nn.Module):
    """Parameters in lists, a table in six parts, and scalars."""

    def __init__(self) -> None:
        super().__init__()
        self.list = nn.ParameterList([torch.randn(5), torch.randn(1, 5)])
        self.dict = nn.ParameterDict({"sign": torch.randn(())})
        self.table, self.temperature = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, *_ = self.table.unsqueeze(0).chunk(6, dim=1)
        for scale in self.list:
            x = x * scale
        return (self.dict["sign"] * x + a) * (1 + b) / c + x * self.temperature.exp()


class Positions(nn.Module):
    """Tokens and positions, in one of the usual ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.tokens, self.way, self.head = nn.Embedding(11, 6), way, nn.Linear(6, 11, bias=False)
        self.positions: nn.Module = Learned() if way == "module" else nn.Embedding(9, 6)
        if way == "tied":
            self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        if self.way == "first":
            rows = self.positions(places)
            return self.head((rows + self.tokens(x)).tanh())
        tokens = self.tokens(x)
        if self.way == "row":
            return self.head((tokens + self.positions(places.unsqueeze(0))).tanh())
        if self.way == "module":
            return self.head((tokens + self.positions(x)).tanh())
        if self.way == "later":
            rows = F.dropout(self.positions(places), 0.0).unsqueeze(0) * 2.0
            return self.head((tokens + rows).tanh())
        return self.head((tokens + self.positions(places)).tanh())


class Learned(nn.Embedding):
    """Positions that are made inside, with an offset."""

    def __init__(self) -> None:
        super().__init__(11, 6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.arange(x.shape[1], device=x.device).unsqueeze(0) + 2)


class Relative(nn.Module):
    """A bias by the distance of positions, added to the scores of two layers, as in T5."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.bias = nn.Embedding(11, 8), nn.Embedding(5, 2)
        self.layers = nn.ModuleList(nn.Linear(8, 24) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        distance = (places[:, None] - places[None, :]).clamp(-2, 2) + 2
        bias = self.bias(distance).permute(2, 0, 1).unsqueeze(0)
        y = self.tokens(x)
        for layer in self.layers:
            q, k, v = layer(y).reshape(*x.shape, 3, 2, 4).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            y = y.transpose(1, 2).flatten(2)
        return y


class Doubled(nn.Linear):
    """A subclass that changes the input."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(2 * input)


class ScaledEmbedding(nn.Embedding):
    """A subclass that changes the output."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3.0


class Scaled(nn.Module):
    """Its embedding is a subclass and tied to the head, which a module with a bias holds."""

    def __init__(self, padding_idx: int | None = None) -> None:
        super().__init__()
        self.embedding = ScaledEmbedding(11, 6, padding_idx=padding_idx)
        self.head = Head(self.embedding.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x).sin())


class Head(nn.Module):
    """Its own bias is that of the layer in it, as in BERT."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.decoder, self.bias = nn.Linear(6, 11), nn.Parameter(torch.randn(11))
        self.decoder.weight, self.decoder.bias = weight, self.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(x)


class Factors(nn.Module):
    """Users and items: one token a sample for each embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items, self.bias = (nn.Embedding(11, d) for d in (4, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        product = self.users(x[:, 0]) * self.items(x[:, 1])
        return product + self.bias(x[:, 0])


class Borrowed(nn.Module):
    """Uses the weight of a layer inside without calling that, beside a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gain = nn.Linear(5, 5), nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.inner.weight, self.inner.bias).tanh() * self.gain


def own(forward: Callable[[Own, Tensor], Tensor], *shapes: tuple[int, ...]) -> Case:
    return Case(lambda: between(Own(forward, *shapes), 5), (6, 4, 5), fallback="vmap")


def mixed(m: Own, x: Tensor) -> Tensor:
    """A parameter that is used twice, and one that decides elementwise."""
    shifted = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
    mix = x * m.p0 + shifted * (1 - m.p0)
    return torch.where(x.detach() > 0.3, m.p1, mix)


MODULE_CASES = {
    "own-rms-norm": Case(lambda: between(RMSNorm(6)), (6, 4, 5), fallback="vmap"),
    "own-rms-norm-around-one": Case(
        lambda: between(RMSNorm(6, around_one=True)), (6, 4, 5), fallback="vmap"
    ),
    "own-norm-twice": Case(
        lambda: between(Twice(RMSNorm(6))), (6, 4, 5), fallback="vmap", compiles=False
    ),
    "own-layer-norm": own(lambda m, x: F.layer_norm(x, (5,), m.p0, m.p1, 1e-5), (5,), (5,)),
    "own-layer-norm-no-bias": own(lambda m, x: F.layer_norm(x, (5,), m.p0), (5,)),
    "own-layer-norm-shifted": own(
        lambda m, x: F.layer_norm(x, (5,), m.p0 + 1, m.p1, 1e-5), (5,), (5,)
    ),
    "own-fused-rms-norm": own(lambda m, x: F.rms_norm(x, (5,), m.p0, 1e-5), (5,)),
    "own-linear": own(lambda m, x: F.linear(x, m.p0, m.p1), (5, 5), (5,)),
    "own-matrix": own(lambda m, x: x @ m.p0, (5, 5)),
    "own-matrix-transposed": own(lambda m, x: x @ m.p0.t() + m.p1, (5, 5), (5,)),
    "own-keywords": own(
        lambda m, x: torch.add(
            input=F.layer_norm(input=x, normalized_shape=(5,), weight=m.p0, bias=m.p1),
            other=F.linear(input=x, weight=m.p2),
        ),
        (5,), (5,), (5, 5),
    ),
    "own-keyword-table": Case(
        lambda: nn.Sequential(
            Own(lambda m, x: F.embedding(input=x, weight=m.p0, padding_idx=2), (11, 5)),
            nn.Linear(5, 3),
        ),
        (6, 4), tokens=True, fallback="vmap",
    ),
    "own-linear-transposed": own(lambda m, x: F.linear(x, m.p0.t()), (5, 5)),
    "own-mix": own(mixed, (5,), (1, 1, 5)),
    "own-in-place": own(lambda m, x: x.clone().add_(m.p0).sub_(m.p1), (5,), (4, 1)),
    "own-scales": Case(lambda: between(Scales(), 5), (6, 2, 5), fallback="vmap"),
    "own-tokens": Case(Patches, (6, 4, 5), fallback="vmap"),
    "own-tokens-repeated": Case(lambda: Patches(repeat=True), (6, 4, 5), fallback="vmap"),
    "own-one-sample": Case(Patches, (2, 4, 5), fallback="vmap"),
    "own-subclass": Case(lambda: nn.Sequential(Doubled(5, 4), nn.Tanh()), (6, 5), fallback="vmap"),
    "own-head": Case(Scaled, (6, 9), tokens=True, fallback="vmap", compiles=False),
    "own-head-padding": Case(
        lambda: Scaled(padding_idx=3), (6, 9), tokens=True, fallback="vmap", compiles=False
    ),
    "own-einsum": Case(
        lambda: between(Own(lambda m, x: torch.einsum("btd,de->bte", x, m.p0), (5, 5)), 5),
        (6, 4, 5), fallback="vmap", compiles=False,
    ),
    "own-borrowed": Case(
        lambda: between(Borrowed(), 5), (6, 4, 5), fallback="vmap", compiles=False
    ),
    "positions": Case(lambda: Positions("plain"), (6, 9), tokens=True),
    "positions-as-many-as-samples": Case(
        lambda: Positions("plain"), (6, 6), tokens=True, compiles=False
    ),
    "positions-row": Case(lambda: Positions("row"), (6, 9), tokens=True),
    "positions-first": Case(lambda: Positions("first"), (6, 9), tokens=True),
    "positions-later": Case(lambda: Positions("later"), (6, 9), tokens=True),
    "positions-tied": Case(lambda: Positions("tied"), (6, 9), tokens=True, compiles=False),
    "positions-module": Case(lambda: Positions("module"), (6, 9), tokens=True, fallback="vmap"),
    "positions-relative": Case(Relative, (4, 6), tokens=True),
    "one-token-a-sample": Case(Factors, (6, 2), tokens=True, compiles=False),
}  # fmt: skip
