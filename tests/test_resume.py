"""A run that is interrupted, even killed, ends like one that is not: same log, same weights."""

import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_experiments import Attack

import adagrad_kernels as ak
from adagrad_kernels.cli import main
from adagrad_kernels.experiments import checkpoint, training

RUN = ["train", "--batch-size", "4", "--max-batch-size", "48", "--max-micro-batch-size", "16"]


def log_of(folder: Path) -> bytes:
    return (folder / "log.jsonl").read_bytes()


def assert_same_state(a: Path, b: Path) -> None:
    """Weights, accumulators, batch size and place in the data, bit for bit."""
    one, other = (torch.load(f / "checkpoint.pt", weights_only=True) for f in (a, b))
    for state in (one, other):
        del state["seconds"], state["cpu_seconds"]
        for key in ("data_dir", "samples", "device"):
            del state["settings"][key]
    assert_identical(one, other, "")


def assert_identical(one: object, other: object, where: str) -> None:
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_identical(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, (x, y) in enumerate(zip(one, other, strict=True)):
            assert_identical(x, y, f"{where}/{i}")
    else:
        assert one == other, where


def signal_after(monkeypatch: pytest.MonkeyPatch, step: int, signum: int) -> None:
    """The process gets the signal during this step of the next run, once."""
    plain = training.RunState.step

    def interrupted(self: training.RunState, log) -> None:
        if self.steps == step - 1:
            monkeypatch.setattr(training.RunState, "step", plain)
            signal.raise_signal(signum)
        plain(self, log)

    monkeypatch.setattr(training.RunState, "step", interrupted)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("optimizer", ["adadagrad", "adadagradnorm", "adagrad", "sgd"])
def test_interrupted_and_resumed(tmp_path, monkeypatch, capsys, optimizer, signum):
    # The fixed batches take 20 samples: two micro-batches. 1500 samples: over an epoch's end.
    run = [*RUN, "--optimizer", optimizer, "--samples", "1500"]
    if optimizer in ("adagrad", "sgd"):
        run += ["--batch-size", "20"]
    whole, parts = tmp_path / "whole", tmp_path / "in parts"
    assert main([*run, "--out", str(whole)]) == 0
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    signal_after(monkeypatch, 7, signum)
    capsys.readouterr()
    assert main([*run, "--out", str(parts)]) == 130
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    assert log_of(parts) == b"".join(log_of(whole).splitlines(keepends=True)[:7])
    assert not json.loads((parts / "summary.json").read_text())["finished"]

    (line,) = capsys.readouterr().err.splitlines()
    again = shlex.split(line.partition("to go on: adagrad-kernels ")[2])
    assert again == [*run, "--out", str(parts), "--resume"]
    assert main(again) == 0
    assert log_of(parts) == log_of(whole)
    assert_same_state(parts, whole)
    first, second = (json.loads((f / "summary.json").read_text()) for f in (parts, whole))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


def test_killed_and_resumed(tmp_path):
    """SIGKILL at any moment: what the log had beyond the checkpoint is made again, once."""
    run = ["train", "--model", "logistic", "--max-batch-size", "16", "--samples", "20000"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*run, "--out", str(whole)]) == 0
    with subprocess.Popen(
        [sys.executable, "-m", "adagrad_kernels", *run, "--checkpoint-every", "40", "--out", parts],
        env={**os.environ, "PYTHONPATH": str(Path(ak.__file__).parents[1])},
        cwd=tmp_path,
    ) as process:
        deadline = time.monotonic() + 120
        while not (parts / "log.jsonl").exists() or log_of(parts).count(b"\n") < 100:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    saved = torch.load(parts / "checkpoint.pt", weights_only=True)
    assert saved["steps"] % 40 == 0
    assert saved["steps"] >= 80
    assert len(log_of(parts)) < len(log_of(whole))
    assert main([*run, "--out", str(parts), "--resume"]) == 0
    assert log_of(parts) == log_of(whole)
    assert_same_state(parts, whole)


def test_records_after_the_checkpoint_are_cut_off(tmp_path):
    run = [*RUN, "--model", "logistic", "--samples", "400", "--out"]
    assert main([*run, str(tmp_path / "run")]) == 0
    whole = log_of(tmp_path / "run")
    with (tmp_path / "run" / "log.jsonl").open("ab") as file:
        file.write(whole.splitlines(keepends=True)[-1] + b'{"step": 9')
    assert main([*run, str(tmp_path / "run"), "--resume"]) == 0
    assert log_of(tmp_path / "run") == whole


@pytest.mark.parametrize("samples", ["300", "100"])
def test_nothing_to_train_is_said(tmp_path, capsys, samples):
    run = [*RUN, "--model", "logistic", "--out", str(tmp_path)]
    assert main([*run, "--samples", "300"]) == 0
    done, log = json.loads((tmp_path / "summary.json").read_text())["samples"], log_of(tmp_path)
    capsys.readouterr()
    assert main([*run, "--samples", samples, "--resume"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"nothing to train: {tmp_path} has {done} samples already")
    assert line.endswith(f"--samples {samples} asks for no more")
    assert log_of(tmp_path) == log
    assert main([*run, "--samples", "600", "--resume"]) == 0
    assert capsys.readouterr().err == ""


def test_an_overwriting_run_goes_on_without_overwriting(tmp_path, monkeypatch, capsys):
    run = [*RUN, "--model", "logistic", "--samples", "300", "--out", str(tmp_path)]
    assert main(run) == 0
    whole = log_of(tmp_path)
    signal_after(monkeypatch, 5, signal.SIGINT)
    capsys.readouterr()
    assert main([*run, "--overwrite"]) == 130
    (line,) = capsys.readouterr().err.splitlines()
    again = shlex.split(line.partition("to go on: adagrad-kernels ")[2])
    assert again == [*run, "--resume"]
    assert main(run) == 2
    assert "holds an unfinished run" in capsys.readouterr().err
    assert main(again) == 0
    assert log_of(tmp_path) == whole


def test_a_longer_run_continues_a_finished_one(tmp_path):
    run = [*RUN, "--model", "logistic", "--out"]
    assert main([*run, str(tmp_path / "long"), "--samples", "4000"]) == 0
    assert main([*run, str(tmp_path / "grown"), "--samples", "1500"]) == 0
    assert main([*run, str(tmp_path / "grown"), "--samples", "4000", "--resume"]) == 0
    logs = [
        [json.loads(line) for line in log_of(tmp_path / name).splitlines()]
        for name in ("long", "grown")
    ]
    for record in itertools.chain(*logs):
        del record["accuracy"]  # measured also where the first part ended
    assert logs[0] == logs[1]


def test_an_interrupted_comparison_goes_on(tmp_path, monkeypatch, capsys):
    run = [*RUN, "--model", "logistic", "--compare", "--samples", "300", "--out"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*run, str(whole)]) == 0
    signal_after(monkeypatch, 8, signal.SIGINT)  # the second run has but 7 steps: in the first
    assert main([*run, str(parts)]) == 130
    assert [path.name for path in parts.iterdir()] == ["fixed-4"]
    assert main([*run, str(parts)]) == 2
    assert "unfinished run: continue it with --resume" in capsys.readouterr().err
    signal_after(monkeypatch, 5, signal.SIGINT)
    assert main([*run, str(parts), "--resume"]) == 130
    assert main([*run, str(parts), "--resume"]) == 0
    for name in ("fixed-4", "fixed-48", "adadagrad", "adadagradnorm"):
        assert log_of(parts / name) == log_of(whole / name)
        assert_same_state(parts / name, whole / name)
    other = [*run, str(parts), "--seed", "1"]
    signal_after(monkeypatch, 8, signal.SIGINT)
    assert main([*other, "--overwrite"]) == 130  # the other three are still those of seed 0
    assert main([*other, "--resume"]) == 0
    for name in ("fixed-4", "fixed-48", "adadagrad", "adadagradnorm"):
        assert log_of(parts / name) != log_of(whole / name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "mlp"], "has --model logistic, not mlp"),
        (["--seed", "3"], "has --seed 0, not 3"),
        (["--optimizer", "adadagradnorm"], "has --optimizer adadagrad, not adadagradnorm"),
    ],
)
def test_other_settings_are_refused(tmp_path, capsys, options, message):
    run = ["train", "--model", "logistic", "--lr", "0.1", "--samples", "50", "--out"]
    assert main([*run, str(tmp_path / "run")]) == 0
    log = log_of(tmp_path / "run")
    capsys.readouterr()
    assert main([*run, str(tmp_path / "run"), "--resume", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert log_of(tmp_path / "run") == log


def test_a_checkpoint_of_another_model_is_refused(tmp_path, capsys):
    """Same settings, other shapes: a checkpoint of another version of this package."""
    run = ["train", "--model", "logistic", "--samples", "50", "--out", str(tmp_path)]
    assert main(run) == 0
    state = checkpoint.read(tmp_path)
    state["model"]["1.weight"] = state["model"]["1.weight"][:, :60]
    checkpoint.write(tmp_path, state)
    capsys.readouterr()
    assert main([*run, "--resume"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is of another model or version" in line
    assert "1.weight" in line


def test_damaged_checkpoints_are_refused(tmp_path, capsys):
    run = ["train", "--model", "logistic", "--samples", "50", "--out", str(tmp_path)]
    assert main(run) == 0
    path = tmp_path / "checkpoint.pt"
    content = path.read_bytes()
    log = log_of(tmp_path)

    def message() -> str:
        capsys.readouterr()
        assert main([*run, "--resume"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    for damaged in (b"", b"rubbish", content[: len(content) // 2], content[100:]):
        path.write_bytes(damaged)
        assert "checkpoint.pt is damaged" in message()
    torch.save({"model": 1}, path)
    assert "not the checkpoint of a run" in message()
    torch.save([1], path)
    assert "checkpoint.pt is damaged" in message()
    torch.save(Attack(tmp_path / "proof"), path)
    assert "checkpoint.pt is damaged" in message()
    assert not (tmp_path / "proof").exists()
    path.write_bytes(content)
    (tmp_path / "log.jsonl").write_bytes(log[:-10])
    assert "log.jsonl is missing or shorter" in message()
