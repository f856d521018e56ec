"""How the compiled parts are compiled, and what is added where there is an nvcc."""

from __future__ import annotations

import os
import re
from pathlib import Path

import find_cuda
import torch
import torch_range
from setuptools import Extension
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[1]
TORCH_INCLUDE = Path(torch.__file__).parent / "include"  # pybind11's headers lie in it, too

# libtorch's stable ABI of the oldest torch that the kernels run under.
TORCH_TARGET_VERSION = "0x{:02x}{:02x}{:012x}ULL".format(*torch_range.OLDEST, 0)
CXX_FLAGS = [
    "-O3",
    "-std=c++17",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
]
LINK_FLAGS = ["-Wl,-s"]
SANITIZE = os.environ.get("ADAGRAD_KERNELS_SANITIZE") == "1"
if SANITIZE:
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    CXX_FLAGS += ["-O1", "-fno-omit-frame-pointer", *checks]
    LINK_FLAGS = checks
CXX_QUIET_FLAGS = [  # those that say nothing of the result
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    f"-ffile-prefix-map={ROOT}/=",  # error messages say csrc/… and torch/…, wherever that was
    f"-ffile-prefix-map={TORCH_INCLUDE}/=",
    "-g0",
    "-isystem",
    str(TORCH_INCLUDE),
]
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fvisibility=hidden,-Wall"]


def sources(*patterns: str) -> list[str]:
    """The files under csrc/ that match, relative to the package's root."""
    csrc = ROOT / "csrc"
    return sorted(str(f.relative_to(ROOT)) for pattern in patterns for f in csrc.glob(pattern))


def add_cuda(kernels: Extension) -> tuple[str, list[str]]:
    """Adds the CUDA kernels, if they can be compiled; (what there is to say, architectures)."""
    toolkit, found = find_cuda.find(torch.version.cuda)
    if toolkit is None:
        return f"not compiled: {found}", []
    default = ";".join(find_cuda.default_archs(toolkit)) + "+PTX"
    os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or default
    # A torch for the CPU does not look for CUDA, nor follow the headers that .cu files include.
    cpp_extension.CUDA_HOME = str(toolkit)
    torch.version.cuda = torch.version.cuda or found
    kernels.sources += sources("cuda/*.cpp", "cuda/*.cu")
    kernels.include_dirs.append(str(toolkit / "include"))
    kernels.library_dirs += [str(toolkit / "lib64"), str(toolkit / "lib")]
    kernels.libraries += ["cudart_static", "pthread", "rt", "dl"]
    archs = re.findall(r",code=(\w+)", " ".join(cpp_extension._get_cuda_arch_flags()))
    return f"compiled by nvcc {found}", archs
