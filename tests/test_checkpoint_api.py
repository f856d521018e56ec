"""torch.distributed.checkpoint, and layers that are frozen and unfrozen in the middle of a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.utils.data import TensorDataset
from training import batches, mse

import adagrad_kernels as ak

# What torch says where there is one process.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or")

KINDS = ("AdAdaGrad", "AdAdaGradNorm", "AdaptiveBatch")
every_optimizer = pytest.mark.parametrize("kind", KINDS)


class Training(NamedTuple):
    """What a checkpoint holds: DCP takes and restores the objects themselves."""

    model: nn.Module
    optimizer: Any
    loader: ak.AdaptiveDataLoader


def fresh(kind: str, frozen: bool = False, seed: int = 0, **options: Any) -> Training:
    """A run at its beginning, with weights that depend on the seed."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    model[0].requires_grad_(not frozen)
    options = {
        "criterion": ak.Averaged(ak.NormTest(0.6), decay=0.5),
        "batch_size": 4, "max_batch_size": 64, "patience": 2, "lr_policy": "adascale", **options,
    }  # fmt: skip
    if kind == "AdaptiveBatch":
        # DCP fills only the state that is there: torch's Adagrad makes it at once, AdamW does not.
        inner = torch.optim.Adagrad([p for p in model.parameters() if p.requires_grad], lr=0.1)
        opt: Any = ak.AdaptiveBatch(model, inner, **options)
    else:
        opt = getattr(ak, kind)(model, lr=0.1, lr_decay=0.01, weight_decay=0.01, **options)
    data = TensorDataset(*batches(1, 150, torch.float32)[0])
    return Training(model, opt, ak.AdaptiveDataLoader(data, opt, max_micro_batch_size=16))


def advance(run: Training, updates: int) -> list[int]:
    """Trains; returns the size of every batch."""
    sizes: list[int] = []
    while True:
        for batch in run.loader:
            samples = run.optimizer.samples
            mse(run.model, batch).backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
            if run.optimizer.updated:
                sizes.append(run.optimizer.samples - samples)
            if len(sizes) == updates:
                return sizes


def everything(run: Training) -> dict[str, Any]:
    return {name: getattr(run, name).state_dict() for name in run._fields}


def assert_equal(a: Any, b: Any) -> None:
    """Bit for bit, whatever they consist of."""
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_equal(one, other)
    else:
        assert a == b


def save_and_load_objects(saved: Training, loaded: Training, path: Path) -> None:
    dcp.save(saved._asdict(), checkpoint_id=path)
    dcp.load(loaded._asdict(), checkpoint_id=path)


def save_and_load_dictionaries(saved: Training, loaded: Training, path: Path) -> None:
    dcp.save(everything(saved), checkpoint_id=path)
    state = everything(loaded)
    dcp.load(state, checkpoint_id=path)
    for name, value in state.items():
        getattr(loaded, name).load_state_dict(value)


SaveAndLoad = Callable[[Training, Training, Path], None]
every_way = pytest.mark.parametrize(
    "save_and_load", [save_and_load_objects, save_and_load_dictionaries]
)


@every_way
@every_optimizer
def test_a_resumed_run_is_bitwise_equal(
    kind: str, save_and_load: SaveAndLoad, tmp_path: Path
) -> None:
    straight = fresh(kind)
    sizes = advance(straight, 30)
    assert sizes[0] == 4
    assert sizes[8] < sizes[-1]  # it grows after the checkpoint, too
    first, resumed = fresh(kind), fresh(kind, seed=1)
    begun = advance(first, 9)
    save_and_load(first, resumed, tmp_path)
    assert_equal(everything(resumed), everything(first))
    assert begun + advance(resumed, 21) == sizes
    assert_equal(everything(resumed), everything(straight))


@pytest.mark.parametrize("kind", ["AdAdaGrad", "AdAdaGradNorm"])
def test_states_by_parameter_name(kind: str, tmp_path: Path) -> None:
    """torch's get_state_dict knows torch's part of the state; the batch size goes beside it."""

    def state_of(run: Training) -> dict[str, Any]:
        model, optimizer = get_state_dict(run.model, run.optimizer)
        batch = run.optimizer.cycle.state_dict()
        return {
            "model": model, "optimizer": optimizer, "batch": batch,
            "loader": run.loader.state_dict(),
        }  # fmt: skip

    straight = fresh(kind)
    advance(straight, 20)
    first, resumed = fresh(kind), fresh(kind, seed=1)
    advance(first, 9)
    dcp.save(state_of(first), checkpoint_id=tmp_path)
    state = state_of(resumed)
    dcp.load(state, checkpoint_id=tmp_path)
    set_state_dict(
        resumed.model, resumed.optimizer,
        model_state_dict=state["model"], optim_state_dict=state["optimizer"],
    )  # fmt: skip
    resumed.optimizer.cycle.load_state_dict(state["batch"])
    resumed.loader.load_state_dict(state["loader"])
    advance(resumed, 11)
    assert_equal(everything(resumed), everything(straight))


@every_way
@pytest.mark.parametrize("aggregate", ["quantile", "adagrad"])
def test_averages_of_coordinates(
    aggregate: str, save_and_load: SaveAndLoad, tmp_path: Path
) -> None:
    """Two tensors as large as the model, which a new run has before its first step."""
    criterion = ak.CoordinateNormTest(0.6, aggregate=aggregate)

    def run(seed: int = 0) -> Training:
        return fresh("AdAdaGrad", seed=seed, criterion=ak.Averaged(criterion, decay=0.5))

    straight, first, resumed = run(), run(), run(seed=1)
    sizes = advance(straight, 12)
    begun = advance(first, 5)
    save_and_load(first, resumed, tmp_path)
    assert_equal(everything(resumed), everything(first))
    assert begun + advance(resumed, 7) == sizes
    assert_equal(everything(resumed), everything(straight))


def test_a_state_before_the_first_step_changes_nothing() -> None:
    """The averages in it are zeros, not the first step's."""
    runs = [fresh("AdAdaGrad", criterion=ak.Averaged(ak.CoordinateNormTest(0.6))) for _ in range(2)]
    averages = runs[0].optimizer.state_dict()["adaptive"]["criterion"]["averages"]
    for side in averages[0].values():
        shapes = {name: p.shape for name, p in runs[0].model.named_parameters()}
        assert {name: value.shape for name, value in side.items()} == shapes
        assert not any(value.any() for value in side.values())
    for run in runs:
        advance(run, 4)
    assert_equal(everything(runs[0]), everything(runs[1]))


def unfreeze(run: Training) -> None:
    run.model[0].requires_grad_(True)
    group = {"params": list(run.model[0].parameters()), "lr": 0.03}
    run.optimizer.add_param_group(group)


def freeze_last(run: Training) -> None:
    run.model[4].requires_grad_(False)


@every_way
@pytest.mark.parametrize("kind", ["AdAdaGrad", "AdAdaGradNorm"])
def test_layers_unfrozen_and_frozen_in_the_middle(
    kind: str, save_and_load: SaveAndLoad, tmp_path: Path
) -> None:
    """A checkpoint in each phase; the run that loads it goes through the same changes first."""
    phases: list[Callable[[Training], None]] = [lambda _: None, unfreeze, freeze_last]
    straight = fresh(kind, frozen=True)
    for number, change in enumerate(phases):
        before = {name: p.clone() for name, p in straight.model.named_parameters()}
        change(straight)
        advance(straight, 4)

        resumed = fresh(kind, frozen=True, seed=1)
        for earlier in phases[: number + 1]:
            earlier(resumed)
        save_and_load(straight, resumed, tmp_path / str(number))
        assert_equal(everything(resumed), everything(straight))
        advance(straight, 4)
        advance(resumed, 4)
        assert_equal(everything(resumed), everything(straight))

        frozen = {0: "0.", 2: "4."}.get(number, "none")
        for name, p in straight.model.named_parameters():
            assert torch.equal(p, before[name]) == name.startswith(frozen)
        measured = [record.name for record in straight.optimizer.cycle.observer.coverage()
                    if record.method]  # fmt: skip
        assert not any(name.startswith(frozen) for name in measured)


def test_saving_keeps_the_averages_of_coordinates_beside_unfrozen_ones() -> None:
    criterion = ak.Averaged(ak.CoordinateNormTest(0.6), decay=0.5)
    run = fresh("AdAdaGrad", frozen=True, criterion=criterion)

    def averages() -> list[dict[str, Tensor]]:
        (sides,) = run.optimizer.state_dict()["adaptive"]["criterion"]["averages"]
        return list(sides.values())

    advance(run, 3)
    before = [dict(side) for side in averages()]
    unfreeze(run)
    for side, old in zip(averages(), before, strict=True):
        assert side.keys() == dict(run.model.named_parameters()).keys()
        for name, average in side.items():
            assert torch.equal(average, old.get(name, torch.zeros_like(average)))
            assert average.any() == (name in old)


@pytest.mark.parametrize("kind", ["AdAdaGrad", "AdAdaGradNorm"])
def test_a_checkpoint_of_another_phase_is_refused(kind: str) -> None:
    first = fresh(kind, frozen=True)
    advance(first, 2)
    earlier = first.optimizer.state_dict()
    unfreeze(first)
    with pytest.raises(ValueError, match=r"its param groups hold \[4\] parameters"):
        first.optimizer.load_state_dict(earlier)
    assert advance(first, 2)
