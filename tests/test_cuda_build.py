"""What can be said of the CUDA kernels without a GPU: they compile, fit and register."""

import re
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from cuda_emulation.toolkit import find_cuda, needs_nvcc, toolkit

import adagrad_kernels
from adagrad_kernels import _build, _library

CSRC = Path(__file__).parents[1] / "csrc" / "cuda"
SOURCES = sorted(path.name for path in CSRC.glob("*.cu"))
ARCHS = ("80", "90", "100")
OPS = ("sample_statistics", "adagrad_", "adagrad_norm_", "grad_norm_sq")

needs_cuda_build = pytest.mark.skipif(not _build.cuda_archs, reason=f"CUDA kernels {_build.cuda}")


def compile_gated(source: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Compiles for every architecture; a register that is spilled to memory is an error."""
    command = [str(Path(str(toolkit), "bin", "nvcc")), "-O3", "-std=c++17", "-fatbin"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    command += ["-Xptxas=-v,-warn-spills,-Werror", "-o", str(folder / "out"), str(source)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# What a thread and a block may take (registers, bytes of shared memory), so that as many blocks
# of 256 threads as the launch bounds promise share an SM's 65536 registers.
ADAGRAD = r"\dadagrad(_norm_[a-z]+)?_kernelI"
LOW = "(6__half|13__nv_bfloat16)"
LIMITS = [
    (ADAGRAD + rf"(f|{LOW})\w*Lb0", 64, 64),  # four blocks
    (ADAGRAD + r"f\w*Lb1", 64, 64),
    (ADAGRAD + rf"{LOW}\w*Lb1", 80, 64),  # three, with coordinates
    (ADAGRAD + r"d\w*Lb0", 80, 64),
    (ADAGRAD + r"d\w*Lb1", 128, 64),  # two
    (r"\dsample_statistics_kernel", 128, 1024),
    (r"\dreduce_kernel", 64, 128),  # two blocks of 512 threads
    (r"\d(row_norms|column_sums)_kernel", 64, 64),
]


@needs_nvcc
@pytest.mark.parametrize("source", SOURCES)
def test_kernels_compile_without_spills(source: str, tmp_path: Path) -> None:
    done = compile_gated(CSRC / source, tmp_path)
    assert done.returncode == 0, done.stderr
    kernels = re.findall(
        r"entry function '(\w+)' for 'sm_(\d+)'.*?Used (\d+) registers(?:.*?(\d+) bytes smem)?",
        re.sub(r"\n(?!ptxas info\s+: Compiling)", " ", done.stderr),
    )
    assert {arch for _, arch, _, _ in kernels} == set(ARCHS)
    for name, arch, registers, shared in kernels:
        limits = [limit for pattern, *limit in LIMITS if re.search(pattern, name)]
        assert len(limits) == 1, f"{name}: {limits}"
        assert int(registers) <= limits[0][0], f"{name} for {arch}"
        assert int(shared or 0) <= limits[0][1], f"{name} for {arch}"


SPILLS = """
__global__ void __launch_bounds__(1024, 2) too_many_registers(float* x) {
  float v[64];
  for (int i = 0; i < 64; ++i) v[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
  for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = v[i] + v[63 - i] * v[i ^ 1];
}
"""


@needs_nvcc
def test_the_gate_sees_spills(tmp_path: Path) -> None:
    source = tmp_path / "spills.cu"
    source.write_text(SPILLS)
    done = compile_gated(source, tmp_path)
    assert done.returncode != 0
    assert "spilled" in done.stderr


@needs_cuda_build
def test_one_library_holds_and_registers_the_cuda_kernels() -> None:
    assert _library.load_error is None
    for name in OPS:
        qualified = f"{_library.NAMESPACE}::{name}"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CUDA")
        assert torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CPU")


def architectures(library: bytes) -> set[str]:
    """The architectures of the machine code and PTX in a library's fat binaries."""
    magic, found, start = struct.pack("<I", 0xBA55ED50), set(), 0
    while (start := library.find(magic, start)) >= 0:
        _, header, size = struct.unpack_from("<HHQ", library, start + 4)
        entry, start = start + header, start + header + size
        while entry < start:
            kind, _, header, size = struct.unpack_from("<HHIQ", library, entry)
            (arch,) = struct.unpack_from("<I", library, entry + 28)
            found.add(f"{'compute' if kind == 1 else 'sm'}_{arch}")
            entry += header + size
    return found


@needs_cuda_build
def test_build_facts_name_the_architectures_in_the_library() -> None:
    assert architectures(_library._PATH.read_bytes()) == set(_build.cuda_archs)


def test_show_config_tells_about_cuda() -> None:
    report = adagrad_kernels.show_config()
    assert f"CUDA kernels: {_build.cuda}" in report
    for arch in _build.cuda_archs:
        assert arch in report


@needs_cuda_build
@pytest.mark.skipif(_library._handle is None, reason="the library is not loaded")
def test_streams_are_found_where_torch_has_cuda() -> None:
    """torch loads its CUDA library with local scope, where a plain link would not reach."""
    assert _library._handle is not None
    found = bool(_library._handle.adagrad_kernels_has_cuda_streams())
    assert found == torch.backends.cuda.is_built()


@pytest.fixture
def fake_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An nvcc of CUDA 12.4, in a script that hands over to it."""
    script = tmp_path / "nvcc"
    script.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "release 12.4, V12.4.99"\n'
        '[ "$1" = --dryrun ] && echo "#$ _HERE_=/elsewhere/cuda/bin" >&2\nexit 0\n'
    )
    script.chmod(0o755)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("ADAGRAD_KERNELS_CUDA", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


@pytest.mark.usefixtures("fake_nvcc")
@pytest.mark.parametrize("torch_cuda", [None, "12.8"])
def test_an_nvcc_that_fits_is_taken(torch_cuda: str | None) -> None:
    assert find_cuda.find(torch_cuda) == (Path("/elsewhere/cuda"), "12.4")


@pytest.mark.usefixtures("fake_nvcc")
def test_an_nvcc_of_another_major_version_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_cuda.find("13.0") == (None, "nvcc is of CUDA 12.4, torch of CUDA 13.0")
    monkeypatch.setenv("ADAGRAD_KERNELS_CUDA", "1")
    with pytest.raises(SystemExit, match="ADAGRAD_KERNELS_CUDA=1, but nvcc is of CUDA 12"):
        find_cuda.find("13.0")


@pytest.mark.usefixtures("fake_nvcc")
def test_cuda_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing"))
    assert find_cuda.find(None) == (None, f"there is no nvcc in {tmp_path}/nothing/bin")
    monkeypatch.setenv("ADAGRAD_KERNELS_CUDA", "0")
    assert find_cuda.find(None) == (None, "turned off by ADAGRAD_KERNELS_CUDA=0")
