"""Processes with sharded parameters, and with copies of shards: what one process has."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sharded_scenarios as scenarios
import torch
import torch.distributed.checkpoint as dcp
from distributed_processes import run
from distributed_results import (
    CLOSE,
    Results,
    assert_clips,
    assert_coordinates,
    assert_same_training,
    assert_statistics,
    assert_workers,
    truth_of,
)
from distributed_training import CLIP, KINDS, optimizer, train, train_alone, uneven
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from training import network, weights

import adagrad_kernels as ak
from adagrad_kernels.distributed import Ranks


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run(scenarios.sharded, 2, tmp_path_factory.mktemp("fsdp"))


@pytest.mark.parametrize("first", scenarios.ORDERS)
def test_statistics_of_sharded_parameters(fsdp: Results, first: str) -> None:
    truth = truth_of(12, uneven())
    for rank, result in enumerate(fsdp):
        found = result["statistics"][first]
        assert_statistics(found, truth)
        norms = truth.norms_sq[6 * rank : 6 * rank + 6]
        torch.testing.assert_close(found["sample_norms_sq"], norms, **CLOSE)
        torch.testing.assert_close(found["inner_products"], truth.inner_products, **CLOSE)
        assert found["names"] == [name for name, _ in uneven().named_parameters()]
        assert found["layers are sharded still"]
        assert found["layers are plain again"]


def alone(kind: str, criterion: Any = None, world: int = 2, **options: Any) -> dict[str, Any]:
    """What training with sharded parameters must be like."""
    samples = scenarios.SHARDED_SAMPLES
    return train_alone(kind, uneven(), world, criterion, samples, **options)


def assert_same_sharded_training(several: list[dict[str, Any]], one: dict[str, Any]) -> None:
    assert_same_training(several, one)
    for found in several:
        assert (found["accumulator"] is None) == (one["accumulator"] is None)
        if one["accumulator"] is not None:
            torch.testing.assert_close(found["accumulator"], one["accumulator"], **CLOSE)
            assert torch.equal(found["accumulator"], several[0]["accumulator"])


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_training(fsdp: Results, kind: str) -> None:
    one = alone(kind)
    assert_same_sharded_training([result["training"][kind] for result in fsdp], one)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_training_with_copies_of_shards(fsdp: Results, kind: str) -> None:
    one = alone(kind)
    assert_same_sharded_training([result["copies"][kind] for result in fsdp], one)


def test_sharded_training_by_inner_products(fsdp: Results) -> None:
    one = alone("AdAdaGrad", ak.InnerProductTest(0.3))
    assert_same_sharded_training([result["inner products"] for result in fsdp], one)


@pytest.mark.parametrize("kind", KINDS)
def test_clipped_training_with_shards(fsdp: Results, kind: str) -> None:
    one = alone(kind, max_grad_norm=CLIP)
    assert_clips(one)
    assert_same_sharded_training([result["clipped"][kind] for result in fsdp], one)


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name, (kinds, _) in scenarios.COORDINATES.items() for kind in kinds],
)
def test_sharded_training_by_coordinates(fsdp: Results, name: str, kind: str) -> None:
    one = alone(kind, scenarios.COORDINATES[name][1]())
    assert_same_sharded_training([result["coordinates"][name, kind] for result in fsdp], one)


def test_training_by_coordinates_with_copies_of_shards(fsdp: Results) -> None:
    one = alone("AdAdaGrad", scenarios.COORDINATES["quantile"][1]())
    assert_same_sharded_training([result["coordinates of copies"] for result in fsdp], one)


@pytest.mark.parametrize(("name", "make"), [("uneven", uneven), ("tied", scenarios.Tied)])
def test_coordinates_of_sharded_parameters(
    fsdp: Results, name: str, make: Callable[[], nn.Module]
) -> None:
    for result in fsdp:
        found, truth = result["by coordinate"][name], truth_of(12, make())
        assert_statistics(found, truth)
        assert_coordinates(found, truth)
        # One buffer of coordinates, one of numbers.
        assert sorted(found["collectives"].values()) == [1, 1]
        assert any("reduce_scatter" in op for op in found["collectives"])


@pytest.mark.parametrize("every", [True, False], ids=["every micro-batch", "the last"])
def test_when_the_gradients_of_shards_are_averaged(fsdp: Results, every: bool) -> None:
    """`set_requires_gradient_sync(False)` in all micro-batches but the last changes nothing."""
    assert_workers([result["batch"]["workers", every] for result in fsdp], uneven())
    for result in fsdp:
        assert_statistics(result["batch"]["norm", every], truth_of(24, uneven()))


def test_worker_training_with_shards(fsdp: Results) -> None:
    (one, *_) = [result["the same, not sharded"] for result in fsdp]
    assert_same_sharded_training([result["worker training"] for result in fsdp], one)


@pytest.mark.parametrize("name", scenarios.STATES)
def test_state_of_sharded_accumulators(fsdp: Results, name: str) -> None:
    """Straight on, from a state_dict, and from a distributed checkpoint."""
    for result in fsdp:
        found = result["states"][name]
        straight, resumed, loaded = found["weights"]
        assert torch.equal(resumed, straight)
        assert torch.equal(loaded, straight)
        assert found["sizes"][1] == found["sizes"][2] == found["sizes"][0]
        assert found["sizes"][0][-1] > 4


@pytest.mark.parametrize("name", scenarios.STATES)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or")
def test_one_process_goes_on_from_the_checkpoint_of_two(
    fsdp: Results, name: str, tmp_path: Path
) -> None:
    saved = fsdp[0]["states"][name]
    for file, content in saved["files"].items():
        (tmp_path / file).write_bytes(content)
    model = uneven()
    opt = optimizer("AdAdaGrad", model, criterion=scenarios.STATES[name](), multiple_of=2)
    dcp.load({"model": model, "optimizer": opt}, checkpoint_id=tmp_path)
    record = train(model, opt, micro=16, samples=200)
    assert record["sizes"] == saved["sizes"][0]
    torch.testing.assert_close(weights(model), saved["weights"][0], **CLOSE)


def test_one_process_of_its_own_group(tmp_path: Path) -> None:
    (result,) = run(scenarios.single, 1, tmp_path)
    one = train_alone("AdAdaGrad", network(), world=1)
    for views in (False, True):
        assert_same_training([result[views]], one)
    assert_same_sharded_training([result["sharded"]], alone("AdAdaGrad", None, world=1))


@pytest.mark.slow
def test_four_processes(tmp_path: Path) -> None:
    results = run(scenarios.four, 4, tmp_path)
    one = train_alone("AdAdaGrad", network(), world=4)
    assert_same_training([result["copies"] for result in results], one)
    quantile = scenarios.COORDINATES["quantile"][1]
    for name, kind, criterion in [
        ("shards", "AdAdaGrad", quantile()),
        ("both", "AdAdaGradNorm", None),
        ("both, coordinates", "AdAdaGrad", quantile()),
    ]:
        one = alone(kind, criterion, world=4)
        assert_same_sharded_training([result[name] for result in results], one)
    for result in results:
        assert "shard them over one dimension of their mesh" in result["sharded twice"]


class Eight(Ranks):
    size = 8  # type: ignore[assignment]


def test_copies_of_shards_beyond_their_mesh() -> None:
    """Two replicas of two shards each are four of the eight ranks; the others hold the same."""
    sizes = {None: 4, 0: 2, 1: 2}
    mesh = SimpleNamespace(size=lambda dimension=None: sizes[dimension])
    sharded: Any = SimpleNamespace(device_mesh=mesh, placements=[Replicate(), Shard(0)])
    assert Eight().copies(sharded) == 4
    assert Eight().copies(torch.zeros(1)) == 8
