"""Runs the files triton_*_cases.py in processes of their own: in Triton's interpreter, on a GPU."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")


FILES = sorted(Path(__file__).parent.glob("triton_*_cases.py"))


def run_cases(interpret: str) -> None:
    def run(file: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
            env={**os.environ, "TRITON_INTERPRET": interpret},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    assert FILES
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # side by side: most of it is compiling
        for done in pool.map(run, FILES):
            assert done.returncode == 0, done.stdout


def test_kernels_in_the_interpreter() -> None:
    run_cases("1")


@pytest.mark.skipif(
    triton.__version__.startswith("3.6."), reason="its interpreter needs an older numpy"
)
def test_other_tiles_are_tried(tmp_path: Path) -> None:
    """The program that chooses tiles on a GPU, on two small products."""
    out = tmp_path / "tiles.jsonl"
    command = [sys.executable, "-m", "benchmarks.gpu_tiles", "--small", "--device", "cpu"]
    subprocess.run(
        [*command, "--out", str(out)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[1],
        check=True,
    )
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert {record["kind"] for record in records} == {"limit", "kernel"}
    variants = [record["variant"] for record in records if record["kind"] == "kernel"]
    assert len(variants) == 14
    assert sum("(chosen)" in variant for variant in variants) == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kernels_on_the_gpu() -> None:
    run_cases("0")
