"""Several real processes: the statistics, decisions and weights of one that has all samples."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import distributed_scenarios as scenarios
import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from distributed_processes import run, torchrun
from per_sample import PerSample, per_sample
from tolerance import assert_close_to_truth
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.utils.data import TensorDataset
from training import network, weights

import adagrad_kernels as ak
from adagrad_kernels.cli import main
from adagrad_kernels.distributed import Ranks, check_same_gradient
from adagrad_kernels.experiments import data, models

CLOSE = {"rtol": 1e-9, "atol": 1e-12}  # float64; sums in another order, over hundreds of steps

Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run(scenarios.data_parallel, 2, tmp_path_factory.mktemp("ddp"))


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run(scenarios.sharded, 2, tmp_path_factory.mktemp("fsdp"))


def assert_statistics(found: dict[str, Any], truth: PerSample) -> None:
    """What every rank must know of the whole batch."""
    assert found["batch_size"] == len(truth.g)
    torch.testing.assert_close(found["grad_norm_sq"], truth.mean_norm_sq, **CLOSE)
    torch.testing.assert_close(found["variance_trace"], truth.variance_trace, **CLOSE)
    noise = truth.variance_trace / (truth.mean_norm_sq - truth.variance_trace / len(truth.g))
    if noise > 0:
        torch.testing.assert_close(found["noise_scale"], noise, **CLOSE)


def truth_of(samples: int, model: nn.Module | None = None) -> PerSample:
    x, y = scenarios.batch(samples)
    return per_sample(model or network(), F.mse_loss, x, y)


def assert_coordinates(found: dict[str, Any], truth: PerSample, prefix: str = "") -> None:
    for key, values in (("variance", truth.coordinate_variance), ("mean", truth.mean)):
        expected = {prefix + k: v for k, v in truth.by_parameter(values).items()}
        torch.testing.assert_close(found[f"coordinate_{key}"], expected, **CLOSE)


def assert_same_training(
    several: list[dict[str, Any]], one: dict[str, Any], grows: bool = True
) -> None:
    assert (len(set(one["sizes"])) > 2) == grows, "the problem is too easy: nothing grew"
    for found in several:
        assert found["sizes"] == one["sizes"]
        assert found["samples"] == one["samples"] == sum(one["sizes"])
        for key in ("ratios", "norms", "losses"):
            assert found[key] == pytest.approx(one[key], rel=1e-8), key
        torch.testing.assert_close(found["weights"], one["weights"], **CLOSE)
        for key in ("sizes", "ratios", "norms", "losses"):  # the same bits on all ranks
            assert found[key] == several[0][key]
        assert torch.equal(found["weights"], several[0]["weights"])


@pytest.mark.parametrize("kind", ["one backward", "compiled"])
def test_statistics_of_one_backward_pass(ddp: Results, kind: str) -> None:
    truth = truth_of(12)
    for rank, result in enumerate(ddp):
        found = result[kind]
        assert_statistics(found, truth)
        assert_coordinates(found, truth, prefix="module.")
        norms = truth.norms_sq[6 * rank : 6 * rank + 6]
        torch.testing.assert_close(found["sample_norms_sq"], norms, **CLOSE)
        torch.testing.assert_close(found["inner_products"], truth.inner_products, **CLOSE)
        torch.testing.assert_close(
            found["inner_product_variance"], truth.inner_products.var(), **CLOSE
        )
        assert found["names"] == [f"module.{name}" for name, _ in network().named_parameters()]


def test_statistics_of_micro_batches_that_are_averaged_one_by_one(ddp: Results) -> None:
    truth = truth_of(24)
    norms = truth.norms_sq.view(scenarios.MICRO_BATCHES, 2, 4)  # micro-batch, rank, sample
    for rank, result in enumerate(ddp):
        found = result["micro-batches"]
        assert_statistics(found, truth)
        assert_coordinates(found, truth)
        torch.testing.assert_close(found["sample_norms_sq"], norms[:, rank].flatten(), **CLOSE)


def assert_workers(several: list[dict[str, Any]], model: nn.Module) -> None:
    truth = truth_of(24, model)
    means = truth.g.view(2 * scenarios.MICRO_BATCHES, 4, -1).mean(1)
    for found in several:
        assert found["workers"] == len(means)
        assert found["batch_size"] == 24
        torch.testing.assert_close(found["grad_norm_sq"], truth.mean_norm_sq, **CLOSE)
        torch.testing.assert_close(found["variance_trace"], 4 * means.var(0).sum(), **CLOSE)


def test_variance_between_workers(ddp: Results) -> None:
    assert_workers([result["workers"] for result in ddp], network())


@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapped given", "module given"])
@pytest.mark.parametrize("kind", scenarios.KINDS)
def test_data_parallel_training(ddp: Results, kind: str, wrapped: bool) -> None:
    found = [result["training"][kind, wrapped] for result in ddp]
    one = scenarios.train_alone(kind, network(), world=2)
    assert_same_training(found, one)
    micro_batches = sum(-(-size // 16) for size in one["sizes"])
    assert len(one["sizes"]) < micro_batches, "nothing was accumulated"
    for result in found:  # averaged once a batch, if the optimizer knows the wrapper
        if wrapped:
            assert result["averaged"] == len(one["sizes"])
        else:
            assert result["averaged"] >= micro_batches


@pytest.mark.parametrize(
    ("name", "kind", "criterion", "grows"),
    [
        ("coordinates", "AdAdaGrad", ak.CoordinateNormTest(2.0, "quantile"), True),
        ("inner products", "AdAdaGrad", ak.InnerProductTest(0.3), True),
        (
            "all inner products",
            "AdAdaGrad",
            ak.InnerProductTest(0.3, every_sample=True),
            True,
        ),
        ("loss", "AdaptiveBatch", ak.CABS(), False),  # but the ratio tells of the loss
    ],
)
def test_data_parallel_training_with_other_tests(
    ddp: Results, name: str, kind: str, criterion: Any, grows: bool
) -> None:
    one = scenarios.train_alone(kind, network(), 2, criterion)
    assert_same_training([result[name] for result in ddp], one, grows)


def assert_clips(one: dict[str, Any]) -> None:
    """At some steps, not at all."""
    clipped = [norm_sq > scenarios.CLIP**2 for norm_sq in one["norms"]]
    assert any(clipped)
    assert not all(clipped)


@pytest.mark.parametrize("kind", scenarios.KINDS)
def test_clipped_training(ddp: Results, kind: str) -> None:
    """By the norm of the global gradient; the tests see it as it is."""
    one = scenarios.train_alone(kind, network(), world=2, max_grad_norm=scenarios.CLIP)
    assert_clips(one)
    assert_same_training([result["clipped"][kind] for result in ddp], one)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("norm", {"c10d.allreduce_": 1}),
        ("every second", {"c10d.allreduce_": 1}),
        ("workers", {"c10d.allreduce_": 1}),
        ("coordinates", {"c10d.allreduce_": 2}),  # one buffer of coordinates
        ("inner products", {"c10d.allreduce_": 1, "c10d.allgather_": 1}),
        ("clipped", {"c10d.allreduce_": 2}),  # the norm, before the update
    ],
)
def test_one_reduction_of_numbers_a_tested_step(
    ddp: Results, name: str, expected: dict[str, int]
) -> None:
    """None while a batch is accumulated, none of a step that is not tested."""
    for result in ddp:
        counts = result["collectives"][name]
        last_micro_batches = counts[3::2]  # of all batches but the first
        assert counts[2::2] == [{}] * len(last_micro_batches)
        if name == "every second":
            assert last_micro_batches == [{}, expected, {}]
        else:
            assert last_micro_batches == [expected] * 3


def test_parameters_without_gradient(ddp: Results) -> None:
    for result in ddp:
        assert_statistics(result["unused"], truth_of(12))


@pytest.mark.parametrize("variant", ["checkpoint", "static graph", "bucket views"])
def test_variants_of_data_parallel(ddp: Results, variant: str) -> None:
    for result in ddp:
        assert_statistics(result["variants"][variant], truth_of(12))


def local_steps_by_hand(world: int) -> dict[str, Any]:
    """The formulas of `LocalAdaptiveBatch` with all processes' models in this one."""
    nets = [network() for _ in range(world)]
    steppers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets]
    controllers = [ak.BatchSizeController(4, 120) for _ in nets]
    loaders = [
        ak.AdaptiveDataLoader(scenarios.dataset(), c, 8, seed=7, rank=rank, world_size=world)
        for rank, c in enumerate(controllers)
    ]
    sizes: list[int] = []
    ratios: list[float] = []
    local: list[list[Any]] = [[] for _ in nets]
    while True:
        for micro_batches in zip(*loaders, strict=True):
            for parts, micro_batch in zip(local, micro_batches, strict=True):
                parts.append(micro_batch)
            size, count = controllers[0].micro_batches()
            if len(local[0]) < count:
                continue
            sizes.append(size * count)
            gradients = []
            for net, stepper, parts in zip(nets, steppers, local, strict=True):
                x, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
                stepper.zero_grad()
                F.mse_loss(net(x), y).backward()
                gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
                stepper.step()
                parts.clear()
            decision = None
            if len(sizes) % scenarios.LOCAL_STEPS == 0:
                g, b = torch.stack(gradients), sizes[-1] // world
                needed = b * g.var(0).sum() / (0.7**2 * g.mean(0).square().sum())
                ratios.append(needed.item() / sizes[-1])
                wanted = max(math.ceil(needed), sizes[-1])
                decision = ak.Decision(wanted == sizes[-1], wanted, ratios[-1])
                mean = torch.stack([weights(net) for net in nets]).mean(0)
                for net in nets:
                    nn.utils.vector_to_parameters(mean.clone(), net.parameters())
            for controller in controllers:
                controller.advance(decision)
            if decision is not None and sum(sizes) >= 600:
                return {"sizes": sizes, "ratios": ratios, "weights": weights(nets[0])}


def test_local_steps(ddp: Results) -> None:
    truth = local_steps_by_hand(world=2)
    assert len(set(truth["sizes"])) > 2, "the problem is too easy: nothing grew"
    for result in ddp:
        found = result["local"]
        assert found["sizes"] == truth["sizes"]
        assert found["ratios"] == pytest.approx(truth["ratios"], rel=1e-8)
        torch.testing.assert_close(found["weights"], truth["weights"], **CLOSE)
        assert torch.equal(found["weights"], ddp[0]["local"]["weights"])


def test_an_overflow_on_one_rank_is_seen_by_all(ddp: Results) -> None:
    for result in ddp:
        found = result["overflow"]
        assert found["updated"] == [False, False, False, True]
        assert torch.equal(found["weights"][2], found["initial"])
        assert not torch.equal(found["weights"][3], found["initial"])
        assert torch.equal(found["weights"][3], ddp[0]["overflow"]["weights"][3])
        assert found["scale"] == ddp[0]["overflow"]["scale"] < 1024


def test_ranks_with_models_of_their_own(ddp: Results) -> None:
    for rank, result in enumerate(ddp):
        assert_statistics(result["alone"], truth_of(4 + rank))


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("not averaged", "the gradients differ between the ranks"),
        ("unequal", "10 samples on 2 processes"),
        ("unmeasured", "parameter 'module.net.0.weight' has a gradient that the calls"),
    ],
)
def test_mistakes_are_errors_on_every_rank(ddp: Results, mistake: str, message: str) -> None:
    for result in ddp:
        assert message in result[mistake]


@pytest.mark.parametrize("first", scenarios.ORDERS)
def test_statistics_of_sharded_parameters(fsdp: Results, first: str) -> None:
    truth = truth_of(12, scenarios.uneven())
    for rank, result in enumerate(fsdp):
        found = result["statistics"][first]
        assert_statistics(found, truth)
        norms = truth.norms_sq[6 * rank : 6 * rank + 6]
        torch.testing.assert_close(found["sample_norms_sq"], norms, **CLOSE)
        torch.testing.assert_close(found["inner_products"], truth.inner_products, **CLOSE)
        assert found["names"] == [name for name, _ in scenarios.uneven().named_parameters()]
        assert found["layers are sharded still"]
        assert found["layers are plain again"]


def alone(kind: str, criterion: Any = None, world: int = 2, **options: Any) -> dict[str, Any]:
    """What training with sharded parameters must be like."""
    samples = scenarios.SHARDED_SAMPLES
    return scenarios.train_alone(kind, scenarios.uneven(), world, criterion, samples, **options)


def assert_same_sharded_training(several: list[dict[str, Any]], one: dict[str, Any]) -> None:
    assert_same_training(several, one)
    for found in several:
        assert (found["accumulator"] is None) == (one["accumulator"] is None)
        if one["accumulator"] is not None:
            torch.testing.assert_close(found["accumulator"], one["accumulator"], **CLOSE)
            assert torch.equal(found["accumulator"], several[0]["accumulator"])


@pytest.mark.parametrize("kind", scenarios.KINDS)
def test_sharded_training(fsdp: Results, kind: str) -> None:
    one = alone(kind)
    assert_same_sharded_training([result["training"][kind] for result in fsdp], one)


@pytest.mark.parametrize("kind", scenarios.KINDS[:2])
def test_training_with_copies_of_shards(fsdp: Results, kind: str) -> None:
    one = alone(kind)
    assert_same_sharded_training([result["copies"][kind] for result in fsdp], one)


def test_sharded_training_by_inner_products(fsdp: Results) -> None:
    one = alone("AdAdaGrad", ak.InnerProductTest(0.3))
    assert_same_sharded_training([result["inner products"] for result in fsdp], one)


@pytest.mark.parametrize("kind", scenarios.KINDS)
def test_clipped_training_with_shards(fsdp: Results, kind: str) -> None:
    one = alone(kind, max_grad_norm=scenarios.CLIP)
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


@pytest.mark.parametrize(("name", "make"), [("uneven", scenarios.uneven), ("tied", scenarios.Tied)])
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
    assert_workers([result["batch"]["workers", every] for result in fsdp], scenarios.uneven())
    for result in fsdp:
        assert_statistics(result["batch"]["norm", every], truth_of(24, scenarios.uneven()))


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
    model = scenarios.uneven()
    opt = scenarios.optimizer("AdAdaGrad", model, criterion=scenarios.STATES[name](), multiple_of=2)
    dcp.load({"model": model, "optimizer": opt}, checkpoint_id=tmp_path)
    record = scenarios.train(model, opt, micro=16, samples=200)
    assert record["sizes"] == saved["sizes"][0]
    torch.testing.assert_close(weights(model), saved["weights"][0], **CLOSE)


def test_one_process_of_its_own_group(tmp_path: Path) -> None:
    (result,) = run(scenarios.single, 1, tmp_path)
    one = scenarios.train_alone("AdAdaGrad", network(), world=1)
    for views in (False, True):
        assert_same_training([result[views]], one)
    assert_same_sharded_training([result["sharded"]], alone("AdAdaGrad", None, world=1))


@pytest.mark.slow
def test_four_processes(tmp_path: Path) -> None:
    results = run(scenarios.four, 4, tmp_path)
    one = scenarios.train_alone("AdAdaGrad", network(), world=4)
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


# The command line


def train_digits(samples: int, dtype: torch.dtype) -> tuple[list[int], dict[str, torch.Tensor]]:
    """What the command line below does, on one process."""
    digits = data.digits()
    torch.manual_seed(0)
    model = models.build("cnn", digits.shape, digits.classes).to(dtype)
    opt = ak.AdAdaGradNorm(
        model, lr=1.0, criterion=ak.NormTest(0.8), batch_size=8, max_batch_size=96, multiple_of=2
    )
    images, labels = digits.train.tensors
    train = TensorDataset(images.to(dtype), labels)
    loader = ak.AdaptiveDataLoader(train, opt, max_micro_batch_size=32, seed=0)
    sizes: list[int] = []
    losses: list[float] = []
    parts: list[float] = []
    for x, y in loader:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        parts.append(loss.item())
        opt.step()
        opt.zero_grad()
        if opt.updated:
            sizes.append(opt.statistics.batch_size)
            losses.append(sum(parts) / len(parts))
            parts = []
            if opt.samples >= samples:
                break
    return sizes, {"losses": torch.tensor(losses, dtype=dtype), **model.state_dict()}


def test_command_line(tmp_path: Path, caplog: pytest.LogCaptureFixture, threads: None) -> None:
    run = [
        "train", "--optimizer", "adadagradnorm", "--batch-size", "8", "--max-batch-size", "96",
        "--max-micro-batch-size", "16", "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    done = torchrun(*run, "--samples", 700, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation accuracy") == 1  # one process speaks
    assert done.stderr == ""
    log = (tmp_path / "run" / "log.jsonl").read_text()
    records = [json.loads(line) for line in log.splitlines()]

    torch.set_num_threads(1)
    sizes, truth = train_digits(700, torch.float64)
    plain_sizes, plain = train_digits(700, torch.float32)
    assert [record["batch_size"] for record in records] == sizes == plain_sizes
    assert max(record["micro_batches"] for record in records) > 1
    found = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    found["losses"] = torch.tensor([record["loss"] for record in records])
    assert found.keys() == truth.keys()
    for name, values in found.items():
        assert_close_to_truth(values, truth[name], plain[name], what=name)

    # One process goes on where two have stopped.
    assert main([*run, "--samples", "1000", "--resume"]) == 0
    assert "another number of processes, 1 instead of 2" in caplog.text
    longer = (tmp_path / "run" / "log.jsonl").read_text()
    assert longer.startswith(log)
    last = json.loads(longer.splitlines()[-1])
    assert last["samples"] >= 1000
    assert last["step"] == len(longer.splitlines()) > len(records)


def test_command_line_errors_are_said_once(tmp_path: Path) -> None:
    done = torchrun("train", "--lr", "0", cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("lr must be a positive number, got 0") == 1
    assert not list(tmp_path.iterdir())


# The loader: each part of a test is one process


def parts(world: int, state: dict[str, Any] | None = None, **options: Any) -> list[Any]:
    """Loaders and controllers of all ranks."""
    found = []
    for rank in range(world):
        controller = ak.BatchSizeController(6, 60)
        loader = ak.AdaptiveDataLoader(
            TensorDataset(torch.arange(50)), controller, 8, seed=3, rank=rank, world_size=world,
            **options,
        )  # fmt: skip
        if state is not None:
            loader.load_state_dict(state)
        found.append((loader, controller))
    return found


def serve(loader: Any, controller: Any, number: int) -> list[list[int]]:
    """So many micro-batches, while every finished batch asks for a larger one."""
    served: list[list[int]] = []
    left = controller.micro_batches()[1]
    while True:
        for (indices,) in loader:
            served.append(indices.tolist())
            left -= 1
            if not left:
                controller.advance(ak.Decision(False, controller.batch_size + 5, 2.0))
                left = controller.micro_batches()[1]
            if len(served) == number:
                return served


def stream(length: int) -> list[int]:
    """The samples in order, as one process gets them."""
    ((loader, controller),) = parts(1)
    return [i for micro in serve(loader, controller, length) for i in micro][:length]


@pytest.mark.parametrize(("world", "num_workers"), [(2, 0), (3, 0), (5, 0), (2, 1)])
def test_ranks_share_the_samples_in_order(world: int, num_workers: int) -> None:
    served = [serve(*part, 12) for part in parts(world, num_workers=num_workers)]
    together: list[int] = []
    for micro_batches in zip(*served, strict=True):
        assert len({len(micro) for micro in micro_batches}) == 1, "ranks got unequal parts"
        assert 1 <= len(micro_batches[0]) <= 8
        together += [i for micro in micro_batches for i in micro]
    assert together == stream(len(together))


@pytest.mark.parametrize("world", [2, 3, 4, 7])
def test_batches_divide_among_ranks(world: int) -> None:
    loader, controller = parts(world)[0]
    for _ in range(40):
        size, count = controller.micro_batches()
        assert size * count == controller.batch_size <= 60
        assert size % world == 0
        assert size // world <= 8
        controller.advance(ak.Decision(False, controller.batch_size + 1, 2.0))
    assert controller.batch_size == 60 - 60 % world
    assert len(loader) == -(-50 // controller.batch_size) * controller.micro_batches()[1]


def test_resumed_with_another_number_of_ranks(caplog: pytest.LogCaptureFixture) -> None:
    first = parts(2)
    served = [serve(*part, 5) for part in first]
    together = [i for micro in zip(*served, strict=True) for one in micro for i in one]
    state = first[0][0].state_dict()
    assert state == first[1][0].state_dict()
    together = together[: state["samples"]]
    assert "another number" not in caplog.text
    served = [serve(*part, 5) for part in parts(3, state)]
    assert "another number of processes, 3 instead of 2" in caplog.text
    together += [i for micro in zip(*served, strict=True) for one in micro for i in one]
    assert together == stream(len(together))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "give rank and world_size together"),
        ({"world_size": 2}, "give rank and world_size together"),
        ({"rank": 2, "world_size": 2}, r"rank must lie in \[0, world_size\), got 2 of 2"),
        ({"rank": -1, "world_size": 2}, "got -1 of 2"),
        ({"rank": 0, "world_size": 16}, r"max_batch_size \(8\) is smaller than one sample for"),
    ],
)
def test_parts_that_do_not_exist(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ak.AdaptiveDataLoader(
            TensorDataset(torch.arange(50)), ak.BatchSizeController(8, 8), **options
        )


class Eight(Ranks):
    size = 8  # type: ignore[assignment]


def test_copies_of_shards_beyond_their_mesh() -> None:
    """Two replicas of two shards each are four of the eight ranks; the others hold the same."""
    sizes = {None: 4, 0: 2, 1: 2}
    mesh = SimpleNamespace(size=lambda dimension=None: sizes[dimension])
    sharded: Any = SimpleNamespace(device_mesh=mesh, placements=[Replicate(), Shard(0)])
    assert Eight().copies(sharded) == 4
    assert Eight().copies(torch.zeros(1)) == 8


def test_gradients_that_differ_a_little_are_not_the_same() -> None:
    same, other = 0.1, 0.1 * (1 + 1e-3)
    two: Any = SimpleNamespace(size=2)
    check_same_gradient(two, same + same, 2 * same**2 * (1 + 1e-12))
    with pytest.raises(RuntimeError, match="the gradients differ between the ranks"):
        check_same_gradient(two, same + other, same**2 + other**2)


THREADS = """
import gc, pathlib, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import adagrad_kernels as ak

def threads():
    tasks = pathlib.Path("/proc/self/task").iterdir()
    return [name for task in tasks if "gloo" in (name := (task / "comm").read_text())]

def train():
    model = DistributedDataParallel(nn.Linear(4, 2))
    opt = ak.AdAdaGrad(model, batch_size=8, max_batch_size=8)
    model(torch.randn(8, 4)).square().mean().backward()
    opt.step()
    opt.zero_grad()

dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 1), rank=0, world_size=1)
train()
assert threads()
gc.collect()
dist.destroy_process_group()
print(threads())
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no list of threads")
def test_no_thread_of_gloo_outlives_the_process_group(tmp_path: Path) -> None:
    """One that lets go of a tensor while Python ends would abort the process."""
    command = [sys.executable, "-c", THREADS, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
