"""The command line as a user meets it: results, messages, exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import adagrad_kernels as ak
from adagrad_kernels.cli import main

SMALL = ["train", "--model", "logistic", "--samples", "300"]


def command(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(Path(ak.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-m", "adagrad_kernels", *map(str, arguments)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The only line on stderr."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("adagrad-kernels: ")
    return lines[0]


def test_train_from_the_shell(tmp_path):
    done = command(*SMALL, "--out", "here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "validation accuracy" in done.stdout
    assert done.stderr == ""  # no progress bar where nobody watches
    names = {path.name for path in (tmp_path / "here").iterdir()}
    assert names == {"log.jsonl", "summary.json", "checkpoint.pt", "run.png"}
    summary = json.loads((tmp_path / "here" / "summary.json").read_text())
    assert summary["finished"]
    assert summary["settings"]["model"] == "logistic"


def test_errors_from_the_shell_are_one_line(tmp_path):
    done = command("train", "--dataset", "mnist", "--data-dir", tmp_path, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    missing = tmp_path / "train-images-idx3-ubyte"
    assert done.stderr == f"adagrad-kernels: {missing} does not exist\n"
    assert not (tmp_path / "runs").exists()


def test_info_shows_the_configuration(capsys):
    assert main(["info"]) == 0
    assert capsys.readouterr().out == ak.show_config() + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["train", "--model", "gpt"], "invalid choice: 'gpt'"),
        (["train", "--lr", "quick"], "invalid float value: 'quick'"),
        (["train", "--lr", "0"], "lr must be a positive number, got 0"),
        (["train", "--lr", "nan"], "lr must be a positive number, got nan"),
        (["train", "--eta", "0"], "eta must be a positive number, got 0.0"),
        (["train", "--eta", "-1"], "eta must be a positive number, got -1.0"),
        (["train", "--criterion", "inner", "--theta", "0"], "theta must be"),
        (["train", "--criterion", "augmented", "--nu", "-1"], "nu must be"),
        (["train", "--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["train", "--batch-size", "0", "--optimizer", "sgd"], "batch_size must be at least 1"),
        (["train", "--batch-size", "64", "--max-batch-size", "32"], "(32) is smaller than"),
        (["train", "--max-micro-batch-size", "0"], "max_micro_batch_size must be at least 1"),
        (["train", "--samples", "0"], "samples must be at least 1, got 0"),
        (["train", "--threads", "-1"], "threads must not be negative, got -1"),
        (["train", "--checkpoint-every", "-1"], "checkpoint-every must not be negative, got -1"),
        (["train", "--device", "abacus"], "device 'abacus'"),
        (["train", "--dataset", "mnist"], "--dataset mnist needs --data-dir"),
        (["train", "--dataset", "cifar10", "--data-dir", "nowhere"], "nowhere is not a folder"),
        (["train", "--resume"], "nothing to resume: runs/digits-cnn-adadagrad/checkpoint.pt"),
        (["plot", "nowhere"], "nowhere holds no run"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in error_line(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["train"], ["plot"], ["info"], ["bench"]])
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--help"])
    assert caught.value.code == 0
    assert "usage: adagrad-kernels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "arguments", "name"),
    [
        ("matplotlib", SMALL, "matplotlib"),
        ("sklearn.datasets", SMALL, "scikit-learn"),
        ("PIL.Image", ["train", "--dataset", "cifar10", "--data-dir", "data"], "pillow"),
    ],
)
def test_missing_packages(module, arguments, name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train_jpeg.npz").touch()
    monkeypatch.setitem(sys.modules, module, None)
    assert main(arguments) == 2
    line = error_line(capsys)
    assert f"{name} is needed" in line
    assert 'pip install "adagrad_kernels[experiments]"' in line


def test_compare_and_plot(tmp_path, capsys):
    folder = tmp_path / "four"
    arguments = [*SMALL, "--compare", "--batch-size", "4", "--max-batch-size", "32"]
    assert main([*arguments, "--out", str(folder)]) == 0
    table = capsys.readouterr().out
    names = ["fixed-4", "fixed-32", "adadagrad", "adadagradnorm"]
    assert [line.split()[0] for line in table.splitlines()[2:6]] == names
    summaries = json.loads((folder / "summary.json").read_text())["runs"]
    assert list(summaries) == names
    for name in names:
        records = (folder / name / "log.jsonl").read_text().splitlines()
        assert len(records) == summaries[name]["steps"]
        assert 300 <= summaries[name]["samples"] < 332
    assert summaries["fixed-4"]["mean_batch_size"] == 4
    assert summaries["fixed-32"]["mean_batch_size"] == 32
    assert summaries["adadagrad"]["final_batch_size"] > 4
    image = np.asarray(Image.open(folder / "comparison.png").convert("RGB"))
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 50

    # A comparison draws its four runs; a run named a second time changes nothing.
    assert main(["plot", str(folder), "--out", str(tmp_path / "again.png")]) == 0
    again = np.asarray(Image.open(tmp_path / "again.png").convert("RGB"))
    np.testing.assert_array_equal(again, image)
    assert main(["plot", str(folder / "adadagrad"), "--out", str(tmp_path / "one.png")]) == 0
    one = np.asarray(Image.open(tmp_path / "one.png").convert("RGB"))
    assert one.shape == image.shape
    assert (one != image).any()
    capsys.readouterr()
    assert main(["plot", str(folder), "--out", str(tmp_path / "picture.xyz")]) == 2
    assert "picture.xyz cannot be written" in error_line(capsys)


def test_a_run_is_not_overwritten_by_another_one(tmp_path, capsys):
    arguments = [*SMALL, "--out", str(tmp_path / "run")]
    assert main(arguments) == 0
    first = (tmp_path / "run" / "log.jsonl").read_bytes()
    capsys.readouterr()
    assert main([*arguments, "--seed", "1"]) == 2
    assert "holds another run (--seed 0, not 1)" in error_line(capsys)
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == first
    assert main(arguments) == 0  # the same one again is the same again
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == first


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main([*SMALL, "--out", str(tmp_path / "file" / "run")]) == 2
    assert "cannot write to" in error_line(capsys)
