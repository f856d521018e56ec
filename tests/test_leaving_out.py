"""Micro-batches and batches that are left out: optimizer and loader go on together."""

import copy
import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from training import Make, all_optimizers, dataset, mse, network, weights

import adagrad_kernels as ak

Micro = tuple[Tensor, Tensor]


class Loop:
    """Batches of 24 in micro-batches of 8, and what each update consisted of."""

    def __init__(self, make: Make, workers: int = 0) -> None:
        self.model = network()
        self.opt = make(self.model, batch_size=24, max_batch_size=24)
        self.loader = ak.AdaptiveDataLoader(
            dataset(), self.opt, max_micro_batch_size=8, num_workers=workers, seed=5
        )
        self.served: list[Tensor] = []
        self.updates: list[Tensor] = []

    def micro_batches(self) -> Iterator[Micro]:
        while True:
            for x, y in self.loader:
                self.served.append(x)
                yield x, y

    def step(self) -> None:
        self.opt.step()
        if self.opt.updated:
            self.updates.append(torch.cat(self.served[-3:]))
            assert self.loader.batch_complete
        self.opt.zero_grad()

    def state(self) -> dict[str, Any]:
        parts = {"model": self.model, "opt": self.opt, "loader": self.loader}
        return copy.deepcopy({name: part.state_dict() for name, part in parts.items()})

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.opt.load_state_dict(state["opt"])
        self.loader.load_state_dict(state["loader"])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("bad", [3, 4, 5])  # which micro-batch, the batch begins with 3
def test_zero_grad_without_a_step_leaves_the_whole_batch_out(
    bad: int, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    def diagonal(model: nn.Module, **options: Any) -> ak.AdAdaGrad:
        return ak.AdAdaGrad(model, lr=0.1, **options)

    loop = Loop(diagonal, workers)
    with caplog.at_level(logging.WARNING, "adagrad_kernels"):
        for number, (x, y) in enumerate(islice(loop.micro_batches(), 13)):
            if number == bad:
                (mse(loop.model, (x, y)) * torch.nan).backward()
                loop.opt.zero_grad()
                continue
            mse(loop.model, (x, y)).backward()
            loop.step()
    assert ("a batch is left out" in caplog.text) == (bad > 3)
    assert weights(loop.model).isfinite().all()
    assert len(loop.updates) == 1 + (13 - bad - 1) // 3
    order = torch.cat(loop.served).split(8)
    for k, batch in enumerate(loop.updates[1:]):
        assert torch.equal(batch, torch.cat(order[bad + 1 + 3 * k : bad + 4 + 3 * k]))


@all_optimizers
def test_after_an_error_in_a_batch_the_next_one_is_whole(make: Make) -> None:
    loop = Loop(make)
    for number, batch in enumerate(islice(loop.micro_batches(), 14)):
        mse(loop.model, batch).backward()
        if number == 4:
            nn.utils.clip_grad_norm_(loop.model.parameters(), 1e-3)
            with pytest.raises(RuntimeError, match="changed between"):
                loop.opt.step()
            loop.opt.zero_grad()
            continue
        loop.step()
    assert len(loop.updates) == 4
    assert loop.opt.samples == 4 * 24
    assert loop.loader.samples == 14 * 8


def test_after_a_micro_batch_that_was_skipped_states_still_fit_together() -> None:
    def diagonal(model: nn.Module, **options: Any) -> ak.AdAdaGrad:
        return ak.AdAdaGrad(model, lr=0.1, **options)

    loop, states = Loop(diagonal), []
    for number, batch in enumerate(islice(loop.micro_batches(), 19)):
        if number == 1:
            continue
        mse(loop.model, batch).backward()
        loop.step()
        if loop.opt.updated:
            states.append(loop.state())
    assert loop.opt.samples == 6 * 24
    again = Loop(diagonal)
    again.load(states[0])
    for batch in islice(again.micro_batches(), 15):
        mse(again.model, batch).backward()
        again.step()
    assert torch.equal(weights(again.model), weights(loop.model))
    assert again.loader.samples == loop.loader.samples


def test_a_new_loader_begins_with_the_optimizers_next_batch() -> None:
    model = network()
    opt = ak.AdAdaGrad(model, batch_size=24, max_batch_size=24)
    first = ak.AdaptiveDataLoader(dataset(), opt, max_micro_batch_size=8)
    mse(model, next(iter(first))).backward()
    opt.step()
    second = ak.AdaptiveDataLoader(dataset(), opt, max_micro_batch_size=8)
    complete = []
    for batch in islice(second, 8):
        mse(model, batch).backward()
        opt.step()
        opt.zero_grad()
        complete.append(opt.updated and second.batch_complete)
    assert complete == [False, True, False, False, True, False, False, True]


@pytest.mark.parametrize("bad", [3, 4])
def test_local_steps_leave_batches_out_alike(bad: int) -> None:
    def local(model: nn.Module, **options: Any) -> ak.LocalAdaptiveBatch:
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        return ak.LocalAdaptiveBatch(model, inner, local_steps=2, **options)

    loop = Loop(local)
    for number, batch in enumerate(islice(loop.micro_batches(), 13)):
        loop.opt.zero_grad()  # before a backward pass it changes nothing
        if number == bad:
            (mse(loop.model, batch) * torch.nan).backward()
            loop.opt.zero_grad()
            continue
        mse(loop.model, batch).backward()
        loop.step()
    assert weights(loop.model).isfinite().all()
    assert len(loop.updates) == 1 + (13 - bad - 1) // 3
    order = torch.cat(loop.served).split(8)
    for k, batch in enumerate(loop.updates[1:]):
        assert torch.equal(batch, torch.cat(order[bad + 1 + 3 * k : bad + 4 + 3 * k]))


def test_local_steps_go_on_after_an_error() -> None:
    def local(model: nn.Module, **options: Any) -> ak.LocalAdaptiveBatch:
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        return ak.LocalAdaptiveBatch(model, inner, local_steps=2, **options)

    loop = Loop(local)
    for number, batch in enumerate(islice(loop.micro_batches(), 11)):
        mse(loop.model, batch).backward()
        if number == 4:
            loop.model.zero_grad()
            with pytest.raises(RuntimeError, match="without gradients"):
                loop.opt.step()
            continue
        loop.step()
    assert len(loop.updates) == 3


@pytest.mark.parametrize("seed", [2**64 - 59, 10**16, -1])
def test_any_whole_number_is_a_seed(seed: int) -> None:
    data = TensorDataset(torch.arange(50))
    orders = []
    for each in (seed, seed, 0):
        loader = ak.AdaptiveDataLoader(data, ak.BatchSizeController(50, 50), seed=each)
        orders.append(next(iter(loader))[0])
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


@pytest.mark.parametrize("seed", [None, 1.5])
def test_other_seeds_are_refused_at_once(seed: Any) -> None:
    with pytest.raises(TypeError, match="seed"):
        ak.AdaptiveDataLoader(dataset(), ak.BatchSizeController(8, 8), seed=seed)


def test_a_second_loader_with_other_micro_batches_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    controller = ak.BatchSizeController(8, 64)
    with caplog.at_level(logging.WARNING, "adagrad_kernels"):
        ak.AdaptiveDataLoader(dataset(), controller, max_micro_batch_size=8)
        ak.AdaptiveDataLoader(dataset(), controller, max_micro_batch_size=8)
        assert not caplog.records
        ak.AdaptiveDataLoader(dataset(), controller, max_micro_batch_size=16)
    assert "at most 16 samples, for all loaders" in caplog.text
