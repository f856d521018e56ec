"""Accelerate with batches that grow, and everything that holds for all integrations."""

import contextlib
import importlib
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import integration_cases as cases
import pytest
import torch
import torch.nn.functional as F
from distributed_processes import run
from integration_scenarios import train_accelerate, train_transformers
from torch import nn
from torch.utils.data import DataLoader
from training import weights

import adagrad_kernels as ak

pytest.importorskip("accelerate")
pytest.importorskip("sklearn")
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from adagrad_kernels.integrations.accelerate import prepare


class Run:
    """The loop of a user of accelerate."""

    def __init__(self, kind: str = "AdAdaGrad", folder: Path | None = None, **options: Any) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        dtype = torch.float32 if "mixed_precision" in options else torch.float64
        self.accelerator = Accelerator(cpu=True, **options)
        self.net = cases.network(dtype)
        self.opt = cases.optimizer(kind, self.net, max_grad_norm=0.3)
        inner = getattr(self.opt, "optimizer", self.opt)
        self.schedule = torch.optim.lr_scheduler.ConstantLR(inner, factor=1.0)
        self.loader = ak.AdaptiveDataLoader(
            cases.digits(dtype=dtype), self.opt, max_micro_batch_size=cases.MICRO
        )
        self.model, self.optimizer, self.batches, self.scheduler = prepare(
            self.accelerator, self.net, self.opt, self.loader, self.schedule
        )
        self.seen: list[cases.Batch] = [[]]
        self.complete = 0

    def train(
        self, epochs: int = 2, accumulate: bool = False, save: tuple[int, Path] | None = None
    ) -> None:
        accelerator, inside = self.accelerator, contextlib.nullcontext
        while self.batches.epoch < epochs:
            for x, y in self.batches:
                with accelerator.accumulate(self.model) if accumulate else inside():
                    accelerator.backward(F.cross_entropy(self.model(x), y))
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
                self.seen[-1].append((x, y))
                assert self.opt.updated == self.batches.batch_complete
                if self.batches.batch_complete:
                    self.complete += accelerator.sync_gradients
                    self.seen.append([])
                    if save and save[0] == self.opt.controller.steps:
                        accelerator.save_state(str(save[1]))
                else:
                    assert accumulate or not accelerator.sync_gradients


@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("kind", ["AdAdaGrad", "AdaptiveBatch"])
def test_the_weights_of_plain_torch(kind: str, accumulate: bool) -> None:
    run = Run(kind)
    run.train(accumulate=accumulate)
    batches = [batch for batch in run.seen if batch]
    cases.assert_plain_training(batches, run.net, kind, max_grad_norm=0.3)
    steps = run.opt.controller.steps
    assert steps == run.complete == len(batches) == run.schedule.last_epoch
    samples = sum(len(x) for batch in batches for x, _ in batch)
    assert run.opt.samples == run.batches.samples == samples


def test_bf16() -> None:
    run = Run(mixed_precision="bf16")
    run.train()
    own = cases.network(torch.float32)
    opt = cases.optimizer("AdAdaGrad", own, max_grad_norm=0.3)
    loader = ak.AdaptiveDataLoader(run.loader.dataset, opt, max_micro_batch_size=cases.MICRO)
    cases.our_loop(own, opt, loader, lambda: loader.epoch >= 2, autocast=True)
    assert opt.samples == run.opt.samples
    assert run.opt.batch_size > 8
    assert torch.equal(weights(run.net), weights(own))


@pytest.mark.parametrize("kind", cases.KINDS)
def test_a_resumed_run_continues_bit_for_bit(kind: str, tmp_path: Path) -> None:
    whole = Run(kind)
    whole.train(epochs=3, save=(4, tmp_path / "state"))
    resumed = Run(kind)
    resumed.accelerator.load_state(str(tmp_path / "state"))
    assert resumed.opt.controller.steps == 4
    assert resumed.opt.batch_size > 8
    resumed.train(epochs=3)
    assert torch.equal(weights(whole.net), weights(resumed.net))
    assert whole.opt.controller.state_dict() == resumed.opt.controller.state_dict()
    assert whole.batches.state_dict() == resumed.batches.state_dict()
    assert whole.schedule.last_epoch == resumed.schedule.last_epoch == whole.opt.controller.steps


def test_clipping_by_hand_is_refused() -> None:
    run = Run()
    for clip in (run.accelerator.clip_grad_norm_, run.accelerator.clip_grad_value_):
        with pytest.raises(RuntimeError, match=r"max_grad_norm= to AdAdaGrad"):
            clip(run.model.parameters(), 1.0)
    other = nn.Linear(2, 1)
    other(torch.ones(1, 2)).backward()
    run.accelerator.clip_grad_norm_(other.parameters(), 0.5)
    norm = torch.stack([p.grad.square().sum() for p in other.parameters()]).sum().sqrt()
    torch.testing.assert_close(norm, torch.tensor(0.5))


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps=4.*max_micro_batch_size"):
        Run(gradient_accumulation_steps=4)
    run = Run()
    model, data = cases.network(), cases.digits()
    opt = cases.optimizer("AdAdaGrad", model)
    loader = ak.AdaptiveDataLoader(data, opt)
    with pytest.raises(TypeError, match=r"AdaptiveBatch around any other.*SGD"):
        prepare(run.accelerator, model, cases.plain_optimizer(model), loader)
    with pytest.raises(TypeError, match=r"loader must be.*DataLoader"):
        prepare(run.accelerator, model, opt, DataLoader(data))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="another optimizer"):
        prepare(run.accelerator, model, opt, run.loader)
    two = ak.AdaptiveDataLoader(data, opt, rank=0, world_size=2)
    with pytest.raises(ValueError, match=r"2 of 1 processes.*after the Accelerator"):
        prepare(run.accelerator, model, opt, two)


def test_two_processes(tmp_path: Path) -> None:
    one = _two(0, 1)
    for found in one.values():
        assert len(set(found["sizes"])) > 2
        assert found["samples"] == sum(found["sizes"])
    for result in run(_two, 2, tmp_path):
        for name, found in result.items():
            assert found["sizes"] == one[name]["sizes"], name
            assert found["samples"] == one[name]["samples"]
            torch.testing.assert_close(found["weights"], one[name]["weights"], **cases.CLOSE)


def _two(rank: int, world: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return _train(world, folder)


def _train(world: int, folder: str) -> dict[str, Any]:
    return {
        "accelerate": train_accelerate(world, False),
        "accelerate, accumulate": train_accelerate(world, True),
        "transformers": train_transformers(world, folder),
    }


def test_without_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "adagrad_kernels.integrations.accelerate"
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"pip install \"adagrad_kernels\[transformers\]\""):
        importlib.import_module(name)


def test_the_package_imports_none_of_them() -> None:
    code = (
        "import sys, adagrad_kernels, adagrad_kernels.integrations;"
        "assert not {'lightning', 'transformers', 'accelerate'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
