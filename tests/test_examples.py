"""The programs in examples/ run as a user runs them, and come to what they promise."""

import ast
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PROGRAMS = sorted(path.name for path in EXAMPLES.glob("*.py"))


def start(*command: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def output(process: subprocess.Popen[str]) -> str:
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, out + errors
    return out


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """The programs that need nobody's attention, all at once."""
    picture = tmp_path_factory.mktemp("noise") / "noise.png"
    arguments = {
        "quickstart_digits.py": ["--samples", 12000],
        "adaptive_adamw.py": ["--samples", 9000],
        "noise_scale_adamw.py": ["--samples", 960, "--plot", picture],
        "sample_statistics_backend.py": ["--samples", 32, "--width", 16],
    }
    processes = {name: start(EXAMPLES / name, *given) for name, given in arguments.items()}
    yield processes
    for process in processes.values():
        with process:
            process.kill()


def rows(out: str) -> list[list[float]]:
    """The lines that are numbers only."""
    found = [line.split() for line in out.splitlines()]
    return [list(map(float, row)) for row in found if row and row[0].isdigit() and len(row) > 2]


def accuracy(out: str) -> float:
    found = re.search(r"accuracy (\S+)", out)
    assert found, out
    return float(found[1])


def test_quickstart(started: dict[str, subprocess.Popen[str]]) -> None:
    out = output(started["quickstart_digits.py"])
    table = rows(out)
    assert table[-1][0] >= 12000
    assert table[-1][1] > 100  # from 8
    assert table[-1][2] < 0.5 * table[0][2]
    assert accuracy(out) > 0.85


def test_noise_scale(started: dict[str, subprocess.Popen[str]]) -> None:
    process = started["noise_scale_adamw.py"]
    table = rows(output(process))
    assert [row[0] for row in table] == [96.0 * i for i in range(1, 11)]
    assert table[-1][1] < 0.8 * table[0][1]  # it learns
    assert table[-1][2] > table[0][2] > 0
    assert isinstance(process.args, list)
    assert Path(process.args[-1]).stat().st_size > 5000  # the picture


def test_sample_statistics_backend(started: dict[str, subprocess.Popen[str]]) -> None:
    out = output(started["sample_statistics_backend.py"])
    assert "by_vmap: g [32, 1210], results agree" in out  # 64·16 + 16 + 16·10 + 10
    assert float(re.findall(r"tr Σ̂ (\S+),", out)[0]) > 0
    assert re.search(r"factor \d", out)


def test_resume(tmp_path: Path) -> None:
    """Ctrl-C at a moment that nobody chose, then on from there, bit for bit."""
    program, state = EXAMPLES / "resume.py", tmp_path / "state.pt"
    interrupted = start(program, "--samples", 10**9, "--state", state)
    assert interrupted.stdout is not None
    assert "samples, batch size" in interrupted.stdout.readline()  # it is under way
    interrupted.send_signal(signal.SIGINT)
    reached = re.search(r"interrupted at (\d+) samples", output(interrupted))
    assert reached
    samples = int(reached[1]) + 3000
    straight = start(program, "--samples", samples, "--state", tmp_path / "straight.pt")
    resumed = output(start(program, "--samples", samples, "--state", state))
    assert f"resumed at {reached[1]} samples" in resumed
    finished = output(straight).splitlines()[-1]
    assert re.fullmatch(r"finished at \d+ samples, weights -?0x1\.\S+", finished)
    assert resumed.splitlines()[-1] == finished


def test_adaptive_adamw(started: dict[str, subprocess.Popen[str]]) -> None:
    out = output(started["adaptive_adamw.py"])
    table = rows(out)
    rates = [row[2] for row in table]
    assert table[-1][1] == 256  # from 16
    assert rates[-1] == pytest.approx(1e-3 * 0.1 * (256 / 16) ** 0.5, rel=0.01)
    assert max(rates) > 5 * rates[-1]
    assert accuracy(out) > 0.9


@pytest.mark.slow
def test_distributed() -> None:
    command = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2
    out = output(start(*command, EXAMPLES / "distributed.py", "--samples", 4000))
    found = re.search(r"(\d+) of (\d+) samples on each of 2 processes", out)
    assert found
    assert 2 * int(found[1]) == int(found[2]) >= 4000
    assert "the same weights on all of them" in out
    assert accuracy(out) > 0.6
    sizes = [int(size) for size in re.findall(r"batch size (\d+)", out)]
    assert sizes[-1] > 50  # from 8


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_says_how_to_run_it(name: str) -> None:
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    doc = ast.get_docstring(ast.parse(text))
    assert doc is not None
    assert f"examples/{name}" in doc
    assert "Expect" in doc
    assert len(text.splitlines()) <= 80
    assert f"`{name}`" in (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert f'"{name}"' in Path(__file__).read_text(encoding="utf-8")  # and is tested above
