"""Whether the CUDA kernels are compiled, and with which toolkit.

In this order: ADAGRAD_KERNELS_CUDA=0 leaves them out, 1 makes their absence an error; then,
whether there is an nvcc (below CUDA_HOME if that is set, in PATH otherwise); then, whether it has
the major version of torch's CUDA. A torch for the CPU has none, and any nvcc will do: the kernels
are compiled, and so checked, on every machine with a compiler. Whether a GPU is there does not
matter.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

DEFAULT_ARCHS = {"sm_80": "8.0", "sm_90": "9.0", "sm_100": "10.0"}


def output(*command: str | Path) -> str:
    """What a command prints."""
    done = subprocess.run(
        command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    return done.stdout


def find(torch_cuda: str | None) -> tuple[Path | None, str]:
    """(toolkit, its version), or (None, why the CUDA kernels are not compiled)."""
    switch, home = os.environ.get("ADAGRAD_KERNELS_CUDA"), os.environ.get("CUDA_HOME")
    if switch == "0":
        return None, "turned off by ADAGRAD_KERNELS_CUDA=0"
    nvcc = shutil.which("nvcc", path=str(Path(home, "bin")) if home else None)
    if nvcc is None:
        reason = f"there is no nvcc in {home}/bin" if home else "there is no nvcc"
    else:
        version = re.search(r"release (\d+\.\d+)", output(nvcc, "--version"))[1]
        if torch_cuda is None or torch_cuda.split(".")[0] == version.split(".")[0]:
            # The nvcc in PATH may be a script: only nvcc itself knows where it lies.
            dry_run = output(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull)
            return Path(re.search("_HERE_=(.*)", dry_run)[1]).parent, version
        reason = f"nvcc is of CUDA {version}, torch of CUDA {torch_cuda}"
    if switch == "1":
        sys.exit(f"adagrad_kernels: ADAGRAD_KERNELS_CUDA=1, but {reason}")
    return None, reason


def default_archs(toolkit: Path) -> list[str]:
    """The default architectures that this toolkit can compile for, as in TORCH_CUDA_ARCH_LIST."""
    known = output(toolkit / "bin" / "nvcc", "--list-gpu-code").split()
    return [number for arch, number in DEFAULT_ARCHS.items() if arch in known]
