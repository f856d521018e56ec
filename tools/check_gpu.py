"""make check-gpu: everything that needs a GPU, in one command, in less than nine minutes.

Compiles the kernels in place for this machine's GPU, runs the tests marked `gpu`, then
`python -m benchmarks.gpu`, and writes what came out to one file of JSON lines under
benchmarks/results/. It downloads and installs nothing: the interpreter that runs it must have
torch, triton, pytest, hypothesis, setuptools and ninja, and nvcc must be there. `--device cpu`
tries the program itself where there is no GPU.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree
from datetime import datetime, timezone
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 530  # for all steps together
LIMITS = {"build": 200, "tests": 260, "benchmark": SECONDS}


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

    def step(self, name: str, *command: str | Path) -> float:
        """Runs python with these arguments; returns the seconds it took."""
        left = SECONDS - (time.monotonic() - self.started)
        print(f"\n== {name}: python {' '.join(map(str, command))}", flush=True)
        started = time.monotonic()
        try:
            limit = max(1.0, min(left, LIMITS[name]))
            done = subprocess.run(
                [sys.executable, *command],
                cwd=ROOT,
                env=self.environment,
                timeout=limit,
                check=False,
            )
            outcome = f"exit status {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {limit:.0f} s"
        if outcome:
            self.failed.append(f"{name}: {outcome}")
        seconds = time.monotonic() - started
        print(f"== {name}: {outcome or 'ok'}, {seconds:.0f} s", flush=True)
        return seconds


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
        environment |= {"ADAGRAD_KERNELS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    date = datetime.now(timezone.utc)
    args.out.mkdir(parents=True, exist_ok=True)
    label = device.lower().replace(" ", "-")
    out = (args.out / f"{label}-{date:%Y%m%d-%H%M%S}.jsonl").resolve()
    check = Check(out, environment)
    facts = {"device": device, "torch": torch.__version__, "date": date.isoformat()}

    seconds = check.step("build", "setup.py", "--quiet", "build_ext", "--inplace")
    show = "import adagrad_kernels; print(adagrad_kernels.show_config())"
    report = subprocess.run(
        [sys.executable, "-c", show], cwd=ROOT, env=environment, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    print(report.stdout)
    check.record("build", seconds=seconds, config=report.stdout.splitlines(), **facts)

    if check.failed:
        return 1

    junit = out.with_suffix(".xml")
    # A module that this machine lacks something for must not keep the others from running.
    arguments = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    arguments += ["--continue-on-collection-errors", f"--junitxml={junit}"]
    arguments += ["-n", "4"] if importlib.util.find_spec("xdist") else []
    seconds = check.step("tests", *arguments)
    check.record("tests", seconds=seconds, **count_tests(junit), **facts)
    junit.unlink(missing_ok=True)

    arguments = ["-m", "benchmarks.gpu", "--device", args.device, "--out", str(out)]
    seconds = check.step("benchmark", *arguments, *([] if cuda else ["--small"]))
    check.record("benchmark", seconds=seconds, failed=check.failed, **facts)
    print(f"\n{out}\n" + ("\n".join(check.failed) or "all steps ok"))
    return 1 if check.failed else 0


if __name__ == "__main__":
    sys.exit(main())
