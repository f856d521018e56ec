"""Several real processes: the statistics, decisions and weights of one that has all samples."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import distributed_scenarios as scenarios
import pytest
import torch
import torch.nn.functional as F
from distributed_processes import run, torchrun
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
from distributed_training import CLIP, KINDS, MICRO_BATCHES, train_alone
from tolerance import assert_close_to_truth
from torch import nn
from torch.utils.data import TensorDataset
from training import dataset, network, weights

import adagrad_kernels as ak
from adagrad_kernels.cli import main
from adagrad_kernels.distributed import check_same_gradient
from adagrad_kernels.experiments import data, models


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run(scenarios.data_parallel, 2, tmp_path_factory.mktemp("ddp"))


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
    norms = truth.norms_sq.view(MICRO_BATCHES, 2, 4)  # micro-batch, rank, sample
    for rank, result in enumerate(ddp):
        found = result["micro-batches"]
        assert_statistics(found, truth)
        assert_coordinates(found, truth)
        torch.testing.assert_close(found["sample_norms_sq"], norms[:, rank].flatten(), **CLOSE)


def test_variance_between_workers(ddp: Results) -> None:
    assert_workers([result["workers"] for result in ddp], network())


@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapped given", "module given"])
@pytest.mark.parametrize("kind", KINDS)
def test_data_parallel_training(ddp: Results, kind: str, wrapped: bool) -> None:
    found = [result["training"][kind, wrapped] for result in ddp]
    one = train_alone(kind, network(), world=2)
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
    one = train_alone(kind, network(), 2, criterion)
    assert_same_training([result[name] for result in ddp], one, grows)


@pytest.mark.parametrize("kind", KINDS)
def test_clipped_training(ddp: Results, kind: str) -> None:
    """By the norm of the global gradient; the tests see it as it is."""
    one = train_alone(kind, network(), world=2, max_grad_norm=CLIP)
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
        ak.AdaptiveDataLoader(dataset(), c, 8, seed=7, rank=rank, world_size=world)
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
