"""The command line as a user meets it: results, messages, exit codes."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import adagrad_kernels as ak
from adagrad_kernels import triton_kernels
from adagrad_kernels.cli import main
from adagrad_kernels.experiments import progress

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
    assert done.stderr == ""  # neither a bar where nobody watches nor lines of a quick run
    names = {path.name for path in (tmp_path / "here").iterdir()}
    assert names == {"log.jsonl", "summary.json", "checkpoint.pt", "run.png"}
    summary = json.loads((tmp_path / "here" / "summary.json").read_text())
    assert summary["finished"]
    assert summary["settings"]["model"] == "logistic"


def test_a_bar_on_a_terminal_also_without_a_size(tmp_path):
    ours, theirs = pty.openpty()  # of 0 columns and 0 lines, like that of `script` in a pipe
    env = {**os.environ, "PYTHONPATH": str(Path(ak.__file__).parents[1])}
    command = [sys.executable, "-m", "adagrad_kernels", *SMALL]
    with subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=theirs
    ) as process:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 1 << 16):
                shown += part
        except OSError:  # EIO: the other side was closed
            pass
        finally:
            os.close(ours)
    assert process.returncode == 0
    bar = shown.decode().split("\r")
    assert bar[1].startswith("adadagrad:   0%|")
    assert any(state.startswith("adadagrad: 100%|█") and ", batch " in state for state in bar)
    assert max(map(len, bar)) < 80


def test_lines_where_there_is_no_terminal(tmp_path, monkeypatch, capsys):
    """At every tenth, of a run that goes on at those that are left."""
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    run = [*SMALL, "--optimizer", "sgd", "--out", str(tmp_path / "run")]
    assert main([*run, "--samples", "400"]) == 0
    lines = capsys.readouterr().err.splitlines()
    expected = [f"sgd: {tenth}0% of 400 samples in " for tenth in range(1, 11)]
    assert [line[: len(start)] for line, start in zip(lines, expected, strict=True)] == expected
    assert all(", batch 8, loss " in line for line in lines)
    assert main([*run, "--samples", "800", "--resume"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["60%", "70%", "80%", "90%", "100%"]


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
    ("reason", "kernel"),
    [(triton_kernels.NO_DEVICE, "Triton, where there is a GPU"), ("turned off", "reference")],
)
def test_info_tells_what_a_gpu_would_run(monkeypatch, reason, kernel):
    if triton_kernels.load_error is None:
        pytest.skip("Triton kernels are loaded")
    monkeypatch.setattr(triton_kernels, "load_error", reason)
    report = ak.show_config()
    (line,) = [line for line in report.splitlines() if line.startswith("  conv_weight_grad ")]
    assert line.endswith(f" CUDA: {kernel}")
    assert f"Triton kernels: not loaded, {reason}" in report


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
        (["train", "--seed", "-1"], "seed must lie in [0, 2**63), got -1"),
        (["train", "--seed", "9" * 20], "seed must lie in [0, 2**63), got 9999"),
        (["train", "--checkpoint-every", "-1"], "checkpoint-every must not be negative, got -1"),
        (["train", "--device", "abacus"], "device 'abacus'"),
        (["train", "--dataset", "mnist"], "--dataset mnist needs --data-dir"),
        (["train", "--dataset", "cifar10", "--data-dir", "nowhere"], "nowhere is not a folder"),
        (["train", "--resume", "--overwrite"], "--overwrite: not allowed with argument --resume"),
        (["train", "--resume"], "nothing to resume: runs/digits-cnn-adadagrad/checkpoint.pt"),
        (
            ["train", "--resume", "--compare"],
            "nothing to resume: runs/digits holds none of",
        ),
        (["plot", "nowhere"], "nowhere holds no run"),
        (["bench", "--threads", "-2"], "argument --threads: must be at least 1, got -2"),
        (["bench", "--threads", "two"], "argument --threads: invalid int value: 'two'"),
        (["bench", "--seconds", "-1"], "argument --seconds: must be a positive number, got -1"),
        (["bench", "--seconds", "nan"], "argument --seconds: must be a positive number, got nan"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in error_line(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [[], ["train"], ["plot"], ["experiment"], ["profile"], ["info"], ["bench"]]
)
def test_help(arguments, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "usage: adagrad-kernels" in text
    for line in text.splitlines():  # a number is N or X, everywhere
        words = line.split()
        if words and words[0].startswith("--"):
            assert words[1] != words[0].strip("-").replace("-", "_").upper() or words[1] == "DEVICE"
            assert line.count("(default") <= 1, line


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


def test_plot_names_the_file_that_it_wrote(tmp_path, capsys, monkeypatch):
    """A name without an ending gets one, also where a folder has that name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    record = {"step": 1, "samples": 8, "batch_size": 8, "loss": 2.0}
    (tmp_path / "log.jsonl").write_text(json.dumps(record) + "\n")
    for out, written in (
        ("foo", "foo.png"), ("folder", "folder.png"), ("a.pdf", "a.pdf"), ("in/b", "in/b.png"),
        (".", "..png"),
    ):  # fmt: skip
        before = {path for path in tmp_path.rglob("*") if path.is_file()}
        assert main(["plot", "log.jsonl", "--out", out]) == 0
        assert capsys.readouterr().out == f"{written}\n"
        after = {path for path in tmp_path.rglob("*") if path.is_file()}
        assert after - before == {tmp_path / written}


def test_a_picture_names_no_unit_of_a_loss_that_is_any(tmp_path, monkeypatch):
    """A log of one's own may hold any loss."""
    labels = []
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *_, **__: labels.extend(ax.get_ylabel() for ax in self.axes)
    )
    records = ({"step": n, "samples": 8 * n, "batch_size": 8, "loss": 40 / n} for n in (1, 2, 3))
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert main(["plot", str(tmp_path), "--out", str(tmp_path / "mine.png")]) == 0
    sizes, _, losses, _ = labels
    assert sizes == "batch size (samples)"
    assert losses.startswith("training loss (exponential mean")


def test_a_run_is_not_overwritten(tmp_path, capsys):
    arguments = [*SMALL, "--out", str(tmp_path / "run")]

    def refused(*options: str) -> str:
        capsys.readouterr()
        assert main([*arguments, *options]) == 2
        assert log.read_bytes() == first
        return error_line(capsys)

    assert main(arguments) == 0
    log = tmp_path / "run" / "log.jsonl"
    first = log.read_bytes()
    assert "holds another run (--seed 0, not 1)" in refused("--seed", "1")
    for same in ([], ["--samples", "600"]):  # a longer one is the same one
        line = refused(*same)
        assert "holds this run, finished after 3" in line
        assert all(way in line for way in ("--resume", "--samples", "--out", "--overwrite"))
    log.write_bytes(b"")
    assert main([*arguments, "--overwrite"]) == 0  # the same one again is the same again
    assert log.read_bytes() == first
    assert main([*arguments, "--seed", "1", "--overwrite"]) == 0
    assert log.read_bytes() != first
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["settings"]["seed"] == 1


def test_a_comparison_is_refused_before_it_begins(tmp_path, capsys):
    """What its last run would overwrite is found before its first is trained."""
    sizes = ["--batch-size", "4", "--max-batch-size", "32"]
    last = tmp_path / "adadagradnorm"
    assert main([*SMALL, *sizes, "--optimizer", "adadagradnorm", "--out", str(last)]) == 0
    capsys.readouterr()
    compare = [*SMALL, *sizes, "--compare", "--out", str(tmp_path)]
    assert main(compare) == 2
    assert f"{last} holds this run" in error_line(capsys)
    assert list(tmp_path.iterdir()) == [last]
    for _ in range(2):
        assert main([*compare, "--overwrite"]) == 0
    assert (tmp_path / "comparison.png").exists()


def test_damaged_arguments_do_not_overwrite(tmp_path, capsys):
    """The old run is there until a new one can begin."""
    arguments = [*SMALL, "--out", str(tmp_path / "run")]
    assert main(arguments) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    for wrong in (["--dataset", "mnist", "--data-dir", "nowhere"], ["--eta", "0"]):
        assert main([*arguments, "--overwrite", *wrong]) == 2
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main([*SMALL, "--out", str(tmp_path / "file" / "run")]) == 2
    assert "cannot write to" in error_line(capsys)
