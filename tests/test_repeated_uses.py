"""Parameters used more than once: layers that are called again, and tied weights."""

import types
from typing import Any

import pytest
import torch
from layer_cases import Loop
from per_sample import per_sample
from test_observer import assert_statistics, squares, total, train_on
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import adagrad_kernels as ak
from adagrad_kernels import shared


class Twice(nn.Module):
    """A layer that is called twice, the second time on its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.repeated, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.repeated(self.repeated(x).tanh()).tanh())


class Tied(nn.Module):
    """An autoencoder whose decoder has the encoder's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x).tanh())


@pytest.mark.parametrize("make", [Twice, Tied])
@pytest.mark.parametrize("shape", [(4,), (3, 4)])
def test_parameters_used_twice(device: torch.device, make: type[nn.Module], shape) -> None:
    model = make().to(device)
    x = torch.randn(5, *shape, device=device)
    y = torch.randn_like(model(x).flatten(1))
    observer = ak.observe(model, coordinates=True, inner_products=True)
    for part in zip(x.split([3, 2]), y.split([3, 2]), strict=True):
        train_on(model, total, *part)
    assert_statistics(observer.statistics(), model, total, x, y, factor=5)


class ThreeTimes(nn.Module):
    """A layer whose uses make three pairs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(self.layer(x).tanh()).tanh())


@pytest.mark.parametrize("coordinates", [True, False])
@pytest.mark.parametrize("piece", [1 << 24, 40])
def test_convolutions_used_three_times(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, coordinates: bool, piece: int
) -> None:
    """Also where the gradients of three samples at a time are held."""
    monkeypatch.setattr(shared, "_PIECE", piece)
    model = ThreeTimes(nn.Conv1d(2, 2, 3, padding=1)).to(device)
    x, y = torch.randn(5, 2, 4, device=device), torch.randn(5, 8, device=device)
    observer = ak.observe(model, coordinates=coordinates)
    train_on(model, squares, x, y)
    assert_statistics(observer.statistics(), model, squares, x, y)


def test_a_checkpointed_layer_used_twice(device: torch.device) -> None:
    model = Twice().to(device)
    x, y = torch.randn(5, 4, device=device), torch.randn(5, 2, device=device)
    observer = ak.observe(model, coordinates=True)
    out = checkpoint(model, x, use_reentrant=False)
    squares(out, y).backward()  # type: ignore[arg-type]
    assert_statistics(observer.statistics(), model, squares, x, y)


class TwoEmbeddings(nn.Module):
    """One weight for two kinds of tokens, each with a padding token of its own or none."""

    def __init__(self, *padding: int | None) -> None:
        super().__init__()
        self.one, self.other = (nn.Embedding(4, 3, padding_idx=k) for k in padding)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x[:, 0]).sum(1).sin() + self.other(x[:, 1]).sum(1).cos()


@pytest.mark.parametrize("padding", [(None, 0), (0, None), (0, 1)])
def test_tied_embeddings_with_different_padding(
    device: torch.device, padding: tuple[int | None, int | None]
) -> None:
    model = TwoEmbeddings(*padding).to(device)
    with torch.no_grad():
        model.one.weight.normal_()  # the rows of padding, too
    x, y = torch.randint(4, (8, 2, 5), device=device), torch.randn(8, 3, device=device)
    observer = ak.observe(model)
    train_on(model, squares, x, y)
    assert_statistics(observer.statistics(), model, squares, x, y)


def test_tied_weights_with_one_use_frozen_out_of_the_loss(device: torch.device) -> None:
    model = Tied().to(device)
    x, y = torch.randn(5, 4, device=device), torch.randn(5, 4, device=device)
    observer = ak.observe(model)
    squares(model.decoder(x), y).backward()
    s = observer.statistics()
    observer.detach()
    alone = nn.Linear(4, 4).to(device)
    alone.load_state_dict(model.decoder.state_dict())
    assert_statistics(s, alone, squares, x, y)


def test_a_layer_called_often_is_measured_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not pair by pair: the work grows as the calls do."""
    calls = []
    plain = shared.ops.linear_weight_grad

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return plain(*arguments)

    model = Loop()
    observer = ak.observe(model, coordinates=True)
    monkeypatch.setattr(shared, "ops", types.SimpleNamespace(linear_weight_grad=counted))
    for positions in (3, 20):
        calls.clear()
        model.zero_grad()
        observer.reset()
        model(torch.randn(4, positions, 4)).square().sum().backward()
        assert len(calls) == 4  # of each layer all positions as one call, and by themselves
        assert observer.statistics().batch_size == 4


def test_tied_parameters_that_are_unfrozen_later(device: torch.device) -> None:
    model = Tied().double().to(device)
    model.encoder.weight.requires_grad_(False)
    observer, x = ak.observe(model), torch.randn(6, 4, device=device, dtype=torch.float64)
    for trainable in (False, True):
        model.encoder.weight.requires_grad_(trainable)
        model.zero_grad()
        observer.reset()
        model(x).sin().sum(1).mean().backward()
        truth = per_sample(model, lambda y: y.sin().sum(1).mean(), x)
        assert_close(observer.statistics().sample_norms_sq, truth.norms_sq)


def test_layers_that_are_tied_later(device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(device)
    observer = ak.observe(model)
    model[1].weight = model[0].weight
    model(torch.randn(6, 4, device=device)).square().sum().backward()
    with pytest.raises(RuntimeError, match=r"layers '0' and '1' share a parameter since the opt"):
        observer.statistics()


def test_reentrant_checkpoints_around_one_layer(device: torch.device) -> None:
    layer = nn.Linear(4, 4).to(device)
    observer = ak.observe(layer)
    x = torch.randn(6, 4, device=device, requires_grad=True)
    for _ in range(3):
        x = checkpoint(layer, x, use_reentrant=True).tanh()
    x.square().sum().backward()
    with pytest.raises(RuntimeError, match="ran several reentrant checkpoints"):
        observer.statistics()


@pytest.mark.parametrize("distance", [1e-2, 1e-4])
def test_uses_that_cancel(distance: float, device: torch.device) -> None:
    """Two views of each sample that are nearly equal: rounding makes no norm negative."""
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to(device)
    observer = ak.observe(model)
    for _ in range(3):  # the first time the gradient is explained, too
        model.zero_grad()
        observer.reset()
        x = torch.randn(16, 8, device=device)
        y = model(x) - model(x + distance * torch.randn_like(x))
        y.square().sum(1).mean().backward()
        assert (observer.statistics().sample_norms_sq >= 0).all()
