"""The folder of a run: what is kept in it, who may write, and what is said where nobody can."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import adagrad_kernels as ak
from adagrad_kernels.cli import main
from adagrad_kernels.experiments import training
from adagrad_kernels.loggers import JSONLLogger

TRAIN = ["train", "--model", "logistic", "--max-batch-size", "16"]
SHORT = [*TRAIN, "--samples", "300"]
ENV = {**os.environ, "PYTHONPATH": str(Path(ak.__file__).parents[1])}
COMMAND = [sys.executable, "-m", "adagrad_kernels"]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that refuses the command."""
    capsys.readouterr()
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("adagrad-kernels: ")
    return line


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def running(arguments: list[str], log: Path) -> Iterator[None]:
    """A process that runs the command and has written a hundred records; killed at the end."""
    with subprocess.Popen([*COMMAND, *arguments], env=ENV) as process:
        try:
            deadline = time.monotonic() + 120
            while not log.exists() or log.read_bytes().count(b"\n") < 100:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.001)
            yield
            assert process.poll() is None  # all the time
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL


# One process at a time


def test_a_folder_in_which_another_process_trains(tmp_path, capsys):
    run = [*TRAIN, "--samples", "2000000", "--out", str(tmp_path / "run")]
    log = tmp_path / "run" / "log.jsonl"
    with running(run, log):
        for more in ([], ["--seed", "1"], ["--resume"], ["--overwrite"]):
            line = refused([*run, *more], capsys)
            assert f"another process is training in {tmp_path / 'run'}" in line
        begin = log.read_bytes()
    assert log.read_bytes().startswith(begin)
    assert main([*run, "--samples", "300", "--overwrite"]) == 0  # the dead hold nothing


def test_a_comparison_in_which_another_process_trains(tmp_path, capsys):
    """In the last of its runs: the first is not trained before that is found."""
    run = [*SHORT, "--compare", "--batch-size", "8", "--out", str(tmp_path)]
    last = [*TRAIN, "--optimizer", "adadagradnorm", "--samples", "2000000"]
    folder = tmp_path / "adadagradnorm"
    with running([*last, "--out", str(folder)], folder / "log.jsonl"):
        for more in ([], ["--resume"], ["--overwrite"]):
            assert f"is training in {folder}" in refused([*run, *more], capsys)
        assert list(tmp_path.iterdir()) == [folder]


def test_of_two_that_begin_together_one_trains(tmp_path):
    both = [
        subprocess.Popen(
            [*COMMAND, *TRAIN, "--samples", "3000", "--seed", seed, "--out", "run"],
            cwd=tmp_path, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for seed in ("1", "2")
    ]  # fmt: skip
    errors = [process.communicate()[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2], errors
    assert errors[codes.index(2)].count("\n") == 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["settings"]["seed"] == 1 + codes.index(0)
    records = [json.loads(s) for s in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(1, summary["steps"] + 1))


def test_a_run_that_was_made_while_another_began(tmp_path, monkeypatch, capsys):
    """The folder was free when the second looked, and is when it begins to write."""
    plain = training.load_data

    def slow(*arguments):
        monkeypatch.setattr(training, "load_data", plain)
        assert main([*SHORT, "--out", str(tmp_path)]) == 0
        before.update(contents(tmp_path))
        return plain(*arguments)

    before: dict[str, bytes] = {}
    monkeypatch.setattr(training, "load_data", slow)
    line = refused([*SHORT, "--seed", "1", "--out", str(tmp_path)], capsys)
    assert "holds another run (--seed 0, not 1)" in line
    assert contents(tmp_path) == before


# What is kept


def test_a_log_of_ones_own_is_kept(tmp_path, capsys):
    path = tmp_path / "runs" / "mine" / "log.jsonl"
    with JSONLLogger(path) as logger:
        logger.log({"loss": 3.0}, step=1, samples=8)
    run = [*SHORT, "--out", str(path.parent)]
    before = contents(tmp_path)
    assert f"{path} is there already" in (line := refused(run, capsys))
    assert "--out" in line
    assert "--overwrite" in line
    assert "nothing to resume" in refused([*run, "--resume"], capsys)
    assert contents(tmp_path) == before
    assert main([*run, "--overwrite"]) == 0


@pytest.mark.parametrize("text", ['{"lr": 3}', "[]", '{"settings": 5, "finished": false}'])
def test_a_summary_of_something_else_is_kept(tmp_path, capsys, text):
    path = tmp_path / "summary.json"
    path.write_text(text)
    for more in ([], ["--compare"]):
        line = refused([*SHORT, *more, "--out", str(tmp_path)], capsys)
        assert str(path) in line
        assert "--overwrite" in line
    assert contents(tmp_path) == {"summary.json": text.encode()}
    for more in (["--compare"], []):
        assert main([*SHORT, *more, "--out", str(tmp_path), "--overwrite"]) == 0


def test_killed_before_its_first_checkpoint(tmp_path, capsys):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run = [*TRAIN, "--samples", "30000", "--out"]
    assert main([*run, str(whole)]) == 0
    with running([*run, str(killed)], killed / "log.jsonl"):
        pass
    before = contents(killed)
    assert before.keys() == {"log.jsonl", "summary.json"}
    assert "holds an unfinished run: continue it with --resume" in refused(
        [*run, str(killed)], capsys
    )
    other = [*run, str(killed), "--seed", "1", "--resume"]
    assert "has --seed 0, not 1" in refused(other, capsys)
    assert contents(killed) == before
    assert main([*run, str(killed), "--resume"]) == 0
    assert capsys.readouterr().err == f"{killed} has no checkpoint yet: its run begins anew\n"
    assert (killed / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()


def test_a_comparison_killed_before_its_first_checkpoint(tmp_path, capsys):
    run = [*TRAIN, "--compare", "--batch-size", "4", "--samples", "4000", "--out"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main([*run, str(whole)]) == 0
    with running([*run, str(killed)], killed / "fixed-4" / "log.jsonl"):
        pass
    assert "holds an unfinished run" in refused([*run, str(killed)], capsys)
    assert main([*run, str(killed), "--resume"]) == 0
    for name in ("fixed-4", "fixed-16", "adadagrad", "adadagradnorm"):
        log = (killed / name / "log.jsonl").read_bytes()
        assert log == (whole / name / "log.jsonl").read_bytes()


# Files that are not what they must be


@pytest.mark.parametrize("text", ["[]", "null", "3", '{"runs": 3}', "{"])
def test_a_summary_that_is_none(tmp_path, capsys, text):
    run = [*SHORT, "--out", str(tmp_path / "run")]
    assert main(run) == 0
    (tmp_path / "run" / "summary.json").write_text(text)
    assert "holds an unfinished run: continue it with --resume" in refused(run, capsys)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "summary.json").write_text(text)
    assert "runs holds no run" in refused(["plot", str(tmp_path / "runs")], capsys)
    assert main([*run, "--resume"]) == 0


@pytest.mark.parametrize("name", ["checkpoint.pt", "summary.json", "log.jsonl"])
def test_a_folder_in_place_of_a_file(tmp_path, capsys, name):
    run = [*SHORT, "--out", str(tmp_path)]
    assert main(run) == 0
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    assert "--overwrite" in refused(run, capsys)
    line = refused([*run, "--overwrite"], capsys)
    assert line.endswith(f"{tmp_path / name}: Is a directory")
    if name == "checkpoint.pt":
        assert "Is a directory" in refused([*run, "--resume"], capsys)


# Files that cannot be written


def limited(kib: int, arguments: list[str]) -> str:
    """The one line on stderr of a process whose files may not be larger."""
    shell = f"ulimit -f {kib}; exec {shlex.join([*COMMAND, *arguments])}"
    done = subprocess.run(
        ["bash", "-c", shell], env=ENV, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize(("kib", "name"), [(1, "log.jsonl"), (40, "checkpoint.pt")])
def test_a_full_disk(tmp_path, kib, name):
    """What can be written stays whole, and the command that is told goes on."""
    run = ["train", "--samples", "1000", "--out"]
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert main([*run, str(whole)]) == 0
    line = limited(kib, [*run, str(folder)])
    start, _, again = line.partition("; to go on when it can be written: adagrad-kernels ")
    assert start == f"adagrad-kernels: cannot write {folder / name}: File too large"
    assert contents(folder).keys() == {"log.jsonl", "summary.json"}
    assert main(shlex.split(again)) == 0
    assert (folder / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()


def test_a_failing_write_leaves_the_old_checkpoint(tmp_path):
    run = [*SHORT, "--out", str(tmp_path)]
    assert main(run) == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    again = [*run, "--samples", "320", "--resume"]
    line = limited(10, again)
    assert f"cannot write {tmp_path / 'checkpoint.pt'}: File too large" in line
    assert line.endswith(shlex.join(again))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not (tmp_path / "checkpoint.pt.new").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_log_that_takes_nothing(tmp_path, capsys):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    line = refused([*SHORT, "--out", str(tmp_path)], capsys)
    assert f"cannot write {tmp_path / 'log.jsonl'}: No space left on device" in line
