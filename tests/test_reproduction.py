"""The paper's experiments: runs skipped, resumed and recorded, and what is made of them."""

import json
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_experiments import idx
from torch.utils.data import TensorDataset

from adagrad_kernels import cli
from adagrad_kernels.benchmark.records import Record
from adagrad_kernels.experiments import (
    checkpoint,
    evaluation,
    models,
    reproduction,
    reproduction_report,
    speed,
    training,
)
from adagrad_kernels.experiments.augmentation import augment
from adagrad_kernels.experiments.data import Data
from adagrad_kernels.experiments.descent import Problem, Setting, descend
from adagrad_kernels.experiments.errors import UsageError
from adagrad_kernels.experiments.reproduction_pictures import draw
from adagrad_kernels.experiments.settings import TrainingRun
from adagrad_kernels.experiments.tasks import METHODS, TASKS, Task
from adagrad_kernels.experiments.training import run

METHOD_NAMES = ("sgd-large", "adadagrad-0.5")


@pytest.fixture(scope="module")
def digits_like(tmp_path_factory) -> Path:
    """MNIST files of generated images: the class is where the bright square lies."""
    folder = tmp_path_factory.mktemp("mnist")
    rng = np.random.default_rng(0)
    for part, n in (("train", 300), ("t10k", 100)):
        labels = rng.integers(0, 10, n, np.uint8)
        images = rng.integers(0, 100, (n, 28, 28), np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[4 * (label // 5) :, 5 * (label % 5) :][:4, :5] = 255
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return folder


@pytest.fixture(scope="module")
def trained(digits_like, tmp_path_factory) -> Path:
    """Two methods with two seeds, by the command line."""
    out = tmp_path_factory.mktemp("runs")
    assert cli.main(command(digits_like, out, "--seeds", "0", "1")) == 0
    return out


def command(data: Path, out: Path, *more: str) -> list[str]:
    given = ["--methods", *METHOD_NAMES, "--samples", "40000"]
    files = ["--data-dir", str(data), "--out", str(out)]
    return ["experiment", "mnist-logistic", *given, *files, *more]


def summary_of(out: Path, method: str, seed: int = 0) -> dict:
    return checkpoint.read_summary(out / method / f"seed-{seed}")


def tiny(**changes: object) -> Task:
    """A task on scikit-learn's digits."""
    base = replace(
        TASKS["mnist-logistic"].base, dataset="digits", samples=2000, max_batch_size=500, **changes
    )
    rates = dict.fromkeys(TASKS["mnist-logistic"].rates, 0.05)
    return Task(base, large=200, rates=rates)


# Runs


def test_runs_end_with_their_figures(trained):
    for method in METHOD_NAMES:
        for seed in (0, 1):
            s = summary_of(trained, method, seed)
            assert s["finished"]
            assert s["failed"] == ""
            assert s["settings"]["seed"] == seed
            curve = s["curve"]
            assert [p["samples"] for p in curve] == sorted({p["samples"] for p in curve})
            assert curve[-1]["samples"] == s["samples"] >= 40000
            assert curve[-1]["cpu_seconds"] <= s["cpu_seconds"]
            # all of the data is in the curve's subset: the last point is the end
            for name in evaluation.QUALITIES:
                assert s[name] == pytest.approx(curve[-1][name], rel=1e-6)
            assert s["training_accuracy"] > 0.9


def test_finished_runs_are_skipped(trained, digits_like, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        pytest.fail("trained again")

    monkeypatch.setattr(reproduction, "run", fail)
    assert cli.main(command(digits_like, trained, "--seeds", "0", "1")) == 0


def test_seed_by_seed_and_method_by_method(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(reproduction, "run_one", lambda s, *_: order.append((s.seed, s.optimizer)))
    reproduction.run_all(tiny(), tmp_path, ["sgd-small", "adadagrad-0.1"], [3, 4])
    assert order == [(3, "sgd"), (3, "adadagrad"), (4, "sgd"), (4, "adadagrad")]


def test_a_run_with_other_settings_is_not_taken_for_this_one(trained, digits_like, capsys):
    arguments = command(digits_like, trained, "--seeds", "0", "--samples", "30000")
    assert cli.main(arguments) == 2
    assert "has --samples 40000, not 30000" in capsys.readouterr().err


def test_a_run_that_another_process_holds_is_left_to_it(tmp_path, capsys):
    task = tiny()
    folder = reproduction.run_folder(tmp_path, "sgd-large", 0)
    checkpoint.make(folder)
    with reproduction.locked(folder / "lock") as free:
        assert free
        reproduction.run_all(task, tmp_path, ["sgd-large"], [0])
    assert "another process" in capsys.readouterr().err
    assert checkpoint.read_summary(folder) == {}
    reproduction.run_all(task, tmp_path, ["sgd-large"], [0])
    assert checkpoint.read_summary(folder)["finished"]


def test_killed_and_continued(tmp_path, digits_like, capfd):
    """SIGTERM in the middle; the same command again ends like one that was never stopped."""
    given = ["--methods", "adagrad-small", "--seeds", "0", "--samples", "12000"]
    parts, whole = tmp_path / "parts", tmp_path / "whole"

    def arguments(out: Path) -> list[str]:
        files = ["--data-dir", str(digits_like), "--out", str(out)]
        return ["experiment", "mnist-logistic", *given, *files]

    folder = parts / "adagrad-small" / "seed-0"
    process = subprocess.Popen([sys.executable, "-m", "adagrad_kernels", *arguments(parts)])
    while process.poll() is None:
        log = folder / "log.jsonl"
        if log.exists() and log.read_bytes().count(b"\n") > 100:
            break
        time.sleep(0.01)
    process.terminate()
    assert process.wait() == 130
    assert "to go on: adagrad-kernels experiment" in capfd.readouterr().err
    assert not checkpoint.read_summary(folder)["finished"]
    assert cli.main(arguments(parts)) == 0
    assert "goes on" in capfd.readouterr().err
    assert cli.main(arguments(whole)) == 0
    other = whole / "adagrad-small" / "seed-0"
    assert (folder / "log.jsonl").read_bytes() == (other / "log.jsonl").read_bytes()
    one, two = summary_of(parts, "adagrad-small"), summary_of(whole, "adagrad-small")
    for s in (one, two):
        for timed in (s, *s["curve"]):
            del timed["seconds"], timed["cpu_seconds"]
    assert one == two


def test_killed_before_its_first_checkpoint(tmp_path, digits_like, capfd):
    """SIGKILL in the first minute; the same command trains the run anew."""
    given = ["--methods", "adagrad-small", "--seeds", "0", "--samples", "12000"]
    files = ["--data-dir", str(digits_like), "--out", str(tmp_path)]
    arguments = ["experiment", "mnist-logistic", *given, *files]
    folder = tmp_path / "adagrad-small" / "seed-0"
    process = subprocess.Popen([sys.executable, "-m", "adagrad_kernels", *arguments])
    while process.poll() is None:
        log = folder / "log.jsonl"
        if log.exists() and log.read_bytes().count(b"\n") > 100:
            break
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "checkpoint.pt").exists()
    assert not checkpoint.read_summary(folder)["finished"]
    assert cli.main(arguments) == 0
    assert "has no checkpoint yet: its run begins anew" in capfd.readouterr().err
    assert checkpoint.read_summary(folder)["finished"]
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


def test_a_loss_that_is_not_finite_ends_the_run_but_not_the_others(tmp_path):
    task = tiny()
    task.rates["sgd-large"] = 3e38
    reproduction.run_all(task, tmp_path, ["sgd-large", "adagrad-large"], [0])
    failed = summary_of(tmp_path, "sgd-large")
    assert failed["failed"] == "the loss is not finite"
    assert failed["samples"] < task.base.samples
    assert summary_of(tmp_path, "adagrad-large")["failed"] == ""
    reproduction_report.update(task, tmp_path, tmp_path / "results", METHODS, [0])
    table = (tmp_path / "results" / "table.md").read_text()
    (line,) = [line for line in table.splitlines() if line.startswith("| sgd-large ")]
    assert "| 0 (1 failed) | – | – |" in line


def test_an_error_is_recorded_and_tried_again(tmp_path, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("out of\nmemory")

    with monkeypatch.context() as patch:
        patch.setattr(reproduction, "run", broken)
        reproduction.run_all(tiny(), tmp_path, ["sgd-large"], [0])
    assert summary_of(tmp_path, "sgd-large")["failed"] == "out of memory"
    reproduction.run_all(tiny(), tmp_path, ["sgd-large"], [0])
    assert summary_of(tmp_path, "sgd-large")["failed"] == ""


def test_thinning_and_curves_do_not_change_the_training(tmp_path):
    plain = TrainingRun(model="logistic", samples=3000, max_batch_size=64)
    thin = replace(plain, log_every=500, evaluations=6)
    whole, part = run(plain, tmp_path / "plain"), run(thin, tmp_path / "thin")
    weights = [
        torch.load(tmp_path / n / "checkpoint.pt", weights_only=True)["model"]
        for n in ("plain", "thin")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert part["training_loss"] == whole["training_loss"]
    logs = [
        [json.loads(line) for line in (tmp_path / n / "log.jsonl").read_text().splitlines()]
        for n in ("plain", "thin")
    ]
    records = {r["step"]: r for r in logs[0]}
    measured = {p["step"] for p in part["curve"]}
    logged, at, size = [], 0, 0
    for step, r in records.items():
        if step in measured or r["batch_size"] != size or r["samples"] - at >= 500:
            logged.append(step)
            at, size = r["samples"], r["batch_size"]
    assert [r["step"] for r in logs[1]] == logged
    assert len(logged) < len(records)
    for r in logs[1]:
        assert {**r, "accuracy": None} == {**records[r["step"]], "accuracy": None}


def test_points_of_a_curve():
    curve = evaluation.Curve(10, first=8, samples=1000)
    due = [n for n in range(1, 1001) if curve.due(n - 1, n)]
    wanted = {200, 400, 600, 800, 1000, *(int(8 * 125 ** (k / 4)) for k in range(5))}
    assert all(min(abs(n - w) for w in wanted) <= 1 for n in due)
    assert len(due) == 9
    assert curve.due(0, 1000)
    assert not evaluation.Curve(0, 8, 1000).due(0, 1000)


def test_the_subset_is_always_the_same(monkeypatch):
    monkeypatch.setattr(evaluation, "SUBSET", 5)
    dataset = TensorDataset(torch.arange(20))
    (first,), (second,) = evaluation.subset(dataset).tensors, evaluation.subset(dataset).tensors
    assert torch.equal(first, second)
    assert len(first.unique()) == 5


# Settings


def test_every_task_has_settings_for_its_methods():
    for task in TASKS.values():
        for method in task.methods:
            settings = task.settings(method, seed=2)
            assert settings.seed == 2
            assert settings.samples == task.base.samples
            fixed = METHODS[method].batch == "large"
            assert settings.batch_size == (task.large if fixed else task.base.batch_size)
            if settings.optimizer == "adadagrad":  # no retuning
                assert settings.lr == task.settings("adagrad-small", 0).lr
    assert TASKS["mnist-logistic"].settings("adadagrad-0.25", 0).eta == 0.25


def test_the_learning_rate_of_a_shorter_run_keeps_its_shape():
    task = TASKS["cifar10-resnet18"]
    whole, short = (
        task.settings("adagrad-small", 0),
        task.settings("adagrad-small", 0, samples=1000),
    )
    assert whole.lr_at(0) == 0
    assert whole.lr_at(500_000) == pytest.approx(0.025)
    assert whole.lr_at(1_000_000) == 0.05
    assert whole.lr_at(5_000_000) == pytest.approx((0.05 + 0.005) / 2)
    assert whole.lr_at(9_500_000) == pytest.approx(0.005)
    for part in (0.05, 0.3, 0.8, 1):
        assert short.lr_at(int(1000 * part)) == pytest.approx(whole.lr_at(int(10_000_000 * part)))


def test_the_learning_rate_is_that_of_the_schedule(tmp_path):
    settings = TrainingRun(
        optimizer="sgd", model="logistic", lr=0.4, final_lr=0.1, warmup=64, decay_until=256,
        batch_size=32, samples=320,
    )  # fmt: skip
    run(settings, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    rates = [r["lr"] for r in records]
    assert rates == [settings.lr_at(32 * k) for k in range(10)]
    assert rates[:3] == [0, 0.2, 0.4]
    assert rates[-1] == pytest.approx(0.1)


def test_augmented_images_are_shifted_and_flipped():
    image = torch.arange(1.0, 65).view(1, 1, 8, 8)
    found = augment(image.expand(300, 2, 8, 8), seed=1)
    assert torch.equal(found, augment(image.expand(300, 2, 8, 8), seed=1))
    padded = torch.nn.functional.pad(image[0, 0], (4, 4, 4, 4))
    possible = {}
    for top in range(9):
        for left in range(9):
            crop = padded[top : top + 8, left : left + 8]
            possible[tuple(crop.flatten().tolist())] = (top, left, False)
            possible[tuple(crop.flip(1).flatten().tolist())] = (top, left, True)
    seen = {possible[tuple(x.flatten().tolist())] for x in found[:, 0]}
    assert torch.equal(found[:, 0], found[:, 1])
    assert {s[0] for s in seen} == {s[1] for s in seen} == set(range(9))
    assert {s[2] for s in seen} == {False, True}


# Results


def test_the_table_has_mean_and_deviation_of_the_seeds(trained):
    lines = (trained / "results" / "table.md").read_text().splitlines()
    heads = [cell.strip() for cell in lines[0].split("|")[1:-1]]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert [row[0] for row in rows] == list(METHODS)
    by_method = {row[0]: dict(zip(heads, row, strict=True)) for row in rows}
    for method in METHOD_NAMES:
        pair = [summary_of(trained, method, seed) for seed in (0, 1)]
        losses = [s["training_loss"] for s in pair]
        deviation = abs(losses[0] - losses[1]) / 2**0.5
        row = by_method[method]
        mean, _, spread = row["training loss"].partition(" ± ")
        half = 0.51e-4  # rounded to four digits after the point
        assert float(mean) == pytest.approx(sum(losses) / 2, abs=half)
        assert float(spread) == pytest.approx(deviation, abs=half)
        steps = statistics.mean(s["steps"] for s in pair)
        assert row["steps"].startswith(f"{steps:,.0f} ±")
        assert row["seeds"] == "2"
        assert row["lr"] == f"{pair[0]['settings']['lr']:g}"
    assert set(by_method["sgd-small"].values()) == {"sgd-small", "–"}


def test_records_are_small_and_name_no_folder(trained, digits_like):
    text = (trained / "results" / "runs.jsonl").read_text()
    assert str(digits_like) not in text
    records = [json.loads(line) for line in text.splitlines()]
    assert [(r["method"], r["seed"]) for r in records] == [
        (m, s) for m in METHOD_NAMES for s in (0, 1)
    ]
    assert max(map(len, text.splitlines())) < 300_000 / 39
    for r in records:
        full = summary_of(trained, r["method"], r["seed"])
        assert r["training_loss"] == pytest.approx(full["training_loss"], rel=5e-6)
        assert r["curve"]["samples"] == [p["samples"] for p in full["curve"]]
        sizes = r["batch_sizes"]["batch_size"]
        assert len(sizes) <= 100
        assert sizes[0] == full["settings"]["batch_size"] or r["method"] == "sgd-large"


def pictures(folder: Path) -> set[str]:
    for path in folder.glob("*.png"):
        assert path.read_bytes()[:4] == b"\x89PNG", path
    return {path.stem for path in folder.glob("*.png")}


def test_pictures_are_drawn(trained, tmp_path):
    always = {"main", "batch_size", "generalisation_gap"}
    assert pictures(trained / "results") == always  # one η, one test: nothing to compare
    records = [
        json.loads(line) for line in (trained / "results" / "runs.jsonl").read_text().splitlines()
    ]
    for method, more in (("adadagrad-0.25", {"eta"}), ("adadagrad-inner", {"tests"})):
        others = [{**r, "method": method} for r in records if r["method"] == "adadagrad-0.5"]
        (tmp_path / method).mkdir()
        draw([*records, *others], "adadagrad-0.5", tmp_path / method)
        assert pictures(tmp_path / method) == always | more


def test_reports_merge_with_what_is_there(trained, digits_like, tmp_path, capsys):
    arguments = command(digits_like, trained, "--report", "--results", str(tmp_path))
    assert cli.main([*arguments, "--seeds", "0"]) == 0
    assert cli.main([*arguments, "--seeds", "1", "--methods", "sgd-large"]) == 0
    records = [json.loads(s) for s in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [(r["method"], r["seed"]) for r in records] == [
        ("sgd-large", 0), ("sgd-large", 1), ("adadagrad-0.5", 0),
    ]  # fmt: skip
    assert "| adadagrad-0.5 | 0.008 | 1 |" in (tmp_path / "table.md").read_text()
    again = [dict(r, training_loss=9.0) for r in records[:1]]
    merged = reproduction_report.merged(records, again)
    assert [r["training_loss"] == 9 for r in merged] == [True, False, False]
    other = dict(records[0], seed=7, settings={**records[0]["settings"], "samples": 5})
    with pytest.raises(UsageError, match=r"runs of 5 and of 40,000 samples"):
        reproduction_report.merged(records, [other])


def test_a_report_needs_runs(tmp_path, capsys):
    arguments = ["experiment", "mnist-cnn", "--report", "--out", str(tmp_path / "none")]
    assert cli.main([*arguments, "--results", str(tmp_path / "results")]) == 2
    assert "no run in" in capsys.readouterr().err


def test_thinned_batch_sizes_keep_the_changes():
    assert reproduction_report.thinned([2, 2, 2, 5, 5, 9]) == [0, 3, 5]
    assert reproduction_report.thinned([2, 2, 2]) == [0, 2]
    growing = list(range(1000))
    found = reproduction_report.thinned(growing, most=11)
    assert found == [round(99.9 * k) for k in range(11)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mnist-logistic"], "needs --data-dir"),
        (["mnist-logistic", "--methods", "adam"], "unknown method 'adam'; there are sgd-small"),
        (["imagenet"], "invalid choice: 'imagenet'"),
        (["mnist-logistic", "--threads", "0"], "threads must be at least 1"),
        (["mnist-logistic", "--rates", "0.1"], "--rates are those of a --sweep"),
        (["theorem", "--rates", "0.1"], "theorem has no --rates"),
    ],
)
def test_mistakes_are_said_in_one_line(arguments, message, capsys):
    assert cli.main(["experiment", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_theorems_samples_are_new_in_every_batch(caplog):
    """However large it is: no warning that it holds samples twice."""
    setting = Setting(Problem(convex=True), adaptive=False, batch_size=100_000, steps=1)
    assert descend(setting).batch_size.tolist() == [100_000]
    assert caplog.text == ""


# Speed, and the large model


def test_speed_is_measured_on_equal_work(tmp_path, monkeypatch):
    """All ways are checked against each other before they are timed."""
    monkeypatch.setattr(speed, "BATCHES", (4,))
    text = speed.measure("mnist-logistic", TASKS["mnist-logistic"], tmp_path, seconds=0.01)
    records = [json.loads(s) for s in (tmp_path / "speed.jsonl").read_text().splitlines()]
    assert [r["variant"] for r in records] == ["plain", *speed.VARIANTS]
    assert all(r["reason"] == "" and r["p50"] > 0 for r in records)
    assert text == (tmp_path / "speed.md").read_text()
    assert text.splitlines()[-1].startswith("| 4 | ")


def test_the_speed_table_has_medians_and_ratios():
    ours, official = speed.VARIANTS
    records = [
        Record("a", "plain", "", 8, 1, 2e-3, 1, 1.0),
        Record("a", ours, "", 8, 1, 3e-3, 1, 1.5),
        Record("a", official, "", 8, reason="cannot"),
    ]
    assert speed.table(records).splitlines()[-1] == "| 8 | 2 | 3, 1.50 | – |"


def test_batches_whose_gradients_are_too_large_are_left_out():
    names = [c.name for c in speed.cases("cifar10-resnet18", TASKS["cifar10-resnet18"])]
    assert names == ["experiment/cifar10-resnet18/8"]


@pytest.mark.parametrize("method", ["adagrad-small", "adadagrad-0.5", "adadagradnorm"])
def test_the_resnet_takes_a_few_steps(tmp_path, monkeypatch, method):
    """With augmentation and schedule, on generated images."""

    def images(*_: object) -> Data:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(24, 3, 32, 32, generator=generator)
        part = TensorDataset(x, torch.randint(10, (24,), generator=generator))
        return Data(part, part)

    monkeypatch.setattr(training, "load_data", images)
    task = TASKS["cifar10-resnet18"]
    summary = run(task.settings(method, 0, samples=24, evaluations=1), tmp_path)
    assert summary["failed"] == ""
    assert summary["samples"] >= 24
    assert np.isfinite(summary["training_loss"])
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    torch.manual_seed(0)
    before = models.build("resnet18", (3, 32, 32), 10).state_dict()
    assert not torch.equal(saved["0.weight"], before["0.weight"])
