"""Compiles the CUDA kernels of csrc/cuda/ as C++ for the CPU (see emulation.h)."""

import re
import subprocess
from pathlib import Path

import torch
from torch.utils.cpp_extension import library_paths

HERE = Path(__file__).parent
CUDA = HERE.parents[1] / "csrc" / "cuda"
LAUNCH = re.compile(r"(\w+)<<<([^;]*?)>>>\(([^;]*?)\);")


def translate(source: Path) -> str:
    """A .cu file as C++: kernel launches become calls, everything else stays."""
    text, launches = LAUNCH.subn(r"emulation::run({\2}, [&] { \1(\3); });", source.read_text())
    assert launches == source.read_text().count("<<<") > 0
    return f'#include "emulation.h"\n#line 1 "{source}"\n{text}'


def build(folder: Path, toolkit: Path) -> Path:
    """Compiles everything in a new folder; returns the library."""
    ops = [HERE / "binding.cpp", CUDA / "optimizer_ops.cpp", CUDA / "statistics_ops.cpp"]
    files = [HERE / "emulation.cpp", *ops]
    for source in CUDA.glob("*.cu"):
        translated = folder / f"{source.stem}.cpp"
        translated.write_text(translate(source))
        files.append(translated)
    include = Path(torch.__file__).parent / "include"
    flags = [
        "-O1",
        "-std=c++17",
        "-fPIC",
        "-w",
        "-U_FORTIFY_SOURCE",
        "-DTORCH_TARGET_VERSION=0x020b000000000000ULL",
    ]
    folders = ["-I", HERE, "-I", CUDA, "-isystem", include, "-isystem", toolkit / "include"]
    jobs = []
    for source in files:
        one_device = ["-include", HERE / "one_device.h"] if source in ops else []
        output = ["-c", source, "-o", folder / f"{source.stem}.o"]
        command = ["c++", *flags, *folders, *one_device, *output]
        jobs.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for job in jobs:
        _, errors = job.communicate()
        assert job.returncode == 0, errors
    library = folder / "emulated.so"
    libraries = [f"-L{path}" for path in library_paths()] + ["-lc10", "-ltorch_cpu"]
    objects = [folder / f"{source.stem}.o" for source in files]
    # -Bsymbolic: the emulation's functions, not those of a CUDA runtime that torch has loaded.
    link = ["c++", "-shared", "-Wl,-Bsymbolic", "-o", library]
    subprocess.run([*link, *objects, *libraries], check=True)
    return library
