"""make check-gpu: everything that needs a GPU, in one command, in less than nine minutes.

Compiles the kernels in place for this machine's GPU, runs the tests marked `gpu`, then
`python -m benchmarks.gpu`, and writes what came out to one file of JSON lines under
benchmarks/results/. Each file of tests runs in a process of its own, several at a time: most of
their time goes into compiling Triton kernels, and an error that leaves CUDA unusable, or a test
that hangs, costs its own file alone. Whatever fails, the rest still runs. It downloads and
installs nothing: the interpreter that runs it must have torch, triton, pytest, hypothesis,
setuptools and ninja, and nvcc must be there. `--device cpu` tries the program itself where there is
no GPU.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 530  # for all steps together
LIMITS = {"build": 180, "tests": 200, "benchmark": SECONDS}
# Before 77 setuptools could not read how pyproject.toml names the license. Compiling in place needs
# nothing that stands there.
WITHOUT_PYPROJECT = """
import runpy, sys
from setuptools.config import pyprojecttoml
pyprojecttoml.apply_configuration = lambda distribution, *_: distribution
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Check:
    """Runs the steps, each within the time that is left, and keeps the records."""

    def __init__(self, out: Path, environment: dict[str, str]) -> None:
        self.out = out
        self.environment = environment
        self.started = time.monotonic()
        self.failed: list[str] = []

    def record(self, kind: str, **values: object) -> None:
        """Appends one line to the file of results."""
        with self.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, **values}) + "\n")

    def left(self, name: str) -> float:
        """Seconds that a step may take from now on."""
        left = SECONDS - (time.monotonic() - self.started)
        return max(1.0, min(left, LIMITS[name]))

    def step(self, name: str, *command: str | Path) -> float:
        """Runs python with these arguments; returns the seconds it took."""
        shown = " ".join(str(part) for part in command if "\n" not in str(part))
        print(f"\n== {name}: python {shown}", flush=True)
        started = time.monotonic()
        outcome = self.run(command, self.left(name))
        if outcome:
            self.failed.append(f"{name}: {outcome}")
        seconds = time.monotonic() - started
        print(f"== {name}: {outcome or 'ok'}, {seconds:.0f} s", flush=True)
        return seconds

    def run(self, command: Sequence[str | Path], limit: float, log: Path | None = None) -> str:
        """Runs python with these arguments; returns what went wrong, or ""."""
        with log.open("w") if log else contextlib.nullcontext() as file:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=self.environment, stdout=file,
                stderr=subprocess.STDOUT if file else None, start_new_session=True,
            )  # fmt: skip
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                return f"stopped after {limit:.0f} s"
            finally:
                stop(process)
        return f"exit status {status}" if status else ""

    def tests(self) -> None:
        """Runs the tests marked `gpu`, and records their numbers by file."""
        started, limit = time.monotonic(), self.left("tests")
        files = gpu_test_files(self.environment)
        print(f"\n== tests: {len(files)} files", flush=True)
        with tempfile.TemporaryDirectory() as folder:

            def run(file: str) -> tuple[str, str, Path]:
                log = Path(folder, Path(file).stem)
                command = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", file]
                left = limit - (time.monotonic() - started)
                junit = f"--junitxml={log.with_suffix('.xml')}"
                return file, self.run([*command, junit], max(1.0, left), log), log

            with ThreadPoolExecutor(max(2, min(8, (os.cpu_count() or 2) // 2))) as pool:
                for file, outcome, log in pool.map(run, files):
                    numbers = count_tests(log.with_suffix(".xml"))
                    print(f"-- {file}: {outcome or 'ok'}, {numbers}", flush=True)
                    if outcome:
                        self.failed.append(f"{file}: {outcome}")
                        print(log.read_text()[-6000:], flush=True)
                    self.record("tests", file=file, outcome=outcome or "ok", **numbers)
        print(f"== tests: {time.monotonic() - started:.0f} s", flush=True)
        if not files:
            self.failed.append("tests: none were found")


def build_command() -> list[str]:
    """Arguments for python that compile the kernels in place."""
    command = ["setup.py", "--quiet", "build_ext", "--inplace"]
    if int(metadata.version("setuptools").split(".")[0]) < 77:
        return ["-c", WITHOUT_PYPROJECT, *command]
    return command


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and what it started, which must not run on beside measurements."""
    # Interrupted, pytest still writes its report.
    for sign in (signal.SIGINT, signal.SIGKILL) if process.poll() is None else (signal.SIGKILL,):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, sign)
            process.wait(8)


def gpu_test_files(environment: dict[str, str]) -> list[str]:
    """The test files that hold a test marked `gpu`."""
    # A module that this machine lacks something for must not keep the others from being found.
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-q"]
    found = subprocess.run(
        [*command, "-p", "no:cacheprovider", "--continue-on-collection-errors", "tests"],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, check=False,
    )  # fmt: skip
    tests = [line.split("::")[0] for line in found.stdout.splitlines() if "::" in line]
    files = [name for name in dict.fromkeys(tests) if name.endswith(".py")]
    return sorted(files, key=tests.count, reverse=True)  # the longest first


def count_tests(report: Path) -> dict[str, int]:
    """The numbers of pytest's JUnit report; empty if there is none."""
    if not report.exists():
        return {}
    suite = xml.etree.ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    return {key: int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    cuda = args.device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no CUDA device", file=sys.stderr)
        return 1
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    device = "cpu"
    if cuda:
        device = torch.cuda.get_device_name()
        major, minor = torch.cuda.get_device_capability()
        nvcc = Path("/usr/local/cuda/bin/nvcc")
        if shutil.which("nvcc") is None and "CUDA_HOME" not in environment and nvcc.exists():
            environment["CUDA_HOME"] = str(nvcc.parents[1])
        environment |= {"ADAGRAD_KERNELS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    date = datetime.now(timezone.utc)
    args.out.mkdir(parents=True, exist_ok=True)
    label = device.lower().replace(" ", "-")
    out = (args.out / f"{label}-{date:%Y%m%d-%H%M%S}.jsonl").resolve()
    check = Check(out, environment)
    facts = {"device": device, "torch": torch.__version__, "date": date.isoformat()}

    seconds = check.step("build", *build_command())
    show = "import adagrad_kernels; print(adagrad_kernels.show_config())"
    report = subprocess.run(
        [sys.executable, "-c", show], cwd=ROOT, env=environment, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    print(report.stdout)
    check.record("build", seconds=seconds, config=report.stdout.splitlines(), **facts)

    check.tests()
    arguments = ["-m", "benchmarks.gpu", "--device", args.device, "--out", str(out)]
    arguments += ["--seconds", f"{check.left('benchmark') - 60:.0f}"]
    seconds = check.step("benchmark", *arguments, *([] if cuda else ["--small"]))
    check.record("benchmark", seconds=seconds, failed=check.failed, **facts)
    print(f"\n{out}\n" + ("\n".join(check.failed) or "all steps ok"))
    return 1 if check.failed else 0


if __name__ == "__main__":
    sys.exit(main())
