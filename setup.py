"""Compiles the two binary parts of the package; everything else is in pyproject.toml.

`adagrad_kernels/_C.abi3.so`: the kernels. It uses libtorch's stable ABI and no Python at
all, so one file serves every Python and every torch from TORCH_TARGET_VERSION on; it is
loaded by path with `torch.ops.load_library`.
`adagrad_kernels/_build.*.so`: a pybind11 module that tells how the kernels were compiled.
"""

import os
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, library_paths
except ImportError as error:
    sys.exit(
        f"adagrad_kernels compiles against the torch installed for {sys.executable}, and it "
        f'does not import ({error}). Run: pip install "torch>=2.11,<2.14"'
    )

ROOT = Path(__file__).resolve().parent
TORCH_INCLUDE = Path(torch.__file__).parent / "include"  # pybind11's headers lie in it, too
TORCH_TARGET_VERSION = "0x020b000000000000ULL"  # the oldest torch that the kernels run under: 2.11

CXX_FLAGS = [
    "-O3",
    "-std=c++17",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
]
WARNING_FLAGS = ["-Wall", "-Wextra", "-Wno-psabi"]
PATH_FLAGS = [
    f"-ffile-prefix-map={ROOT}/=",  # error messages say csrc/… and torch/…, wherever that was
    f"-ffile-prefix-map={TORCH_INCLUDE}/=",
    "-g0",
    "-isystem",
    str(TORCH_INCLUDE),
]

# A ninja that pip installed lies beside the interpreter, which PATH need not name.
os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])


def sources(*patterns: str) -> list[str]:
    """The files under csrc/ that match, relative to this directory."""
    csrc = ROOT / "csrc"
    return sorted(str(f.relative_to(ROOT)) for pattern in patterns for f in csrc.glob(pattern))


kernels = Extension(
    "adagrad_kernels._C",
    sources("binding.cpp", "cpu/*.cpp"),
    define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
    extra_compile_args=CXX_FLAGS + WARNING_FLAGS + PATH_FLAGS,
    extra_link_args=["-fopenmp", "-Wl,--as-needed", "-Wl,-s"],
    library_dirs=library_paths(),
    libraries=["c10", "torch_cpu"],  # found at run time because torch is imported first
    py_limited_api=True,
    language="c++",
)
build_facts = Extension(
    "adagrad_kernels._build",
    sources("build_facts.cpp"),
    define_macros=[
        ("ADAGRAD_KERNELS_FLAGS", '"' + " ".join(CXX_FLAGS) + '"'),
        ("ADAGRAD_KERNELS_TORCH_VERSION", '"' + torch.__version__ + '"'),
    ],
    extra_compile_args=CXX_FLAGS + WARNING_FLAGS + PATH_FLAGS,
    extra_link_args=["-Wl,-s"],
    language="c++",
)


class BuildKernels(BuildExtension):
    """Parallel compilation by ninja in a directory that outlives the command (also under pip)."""

    def finalize_options(self) -> None:
        super().finalize_options()
        python, platform = sys.implementation.cache_tag, sysconfig.get_platform()
        self.build_temp = str(ROOT / "build" / f"{python}-{platform}-torch-{torch.__version__}")

    def build_extensions(self) -> None:
        count = len(kernels.sources)
        print(
            f"adagrad_kernels: CPU kernels ({count} files) for torch {torch.__version__}; "
            "CUDA kernels: none in this version",
            flush=True,
        )
        super().build_extensions()


setup(ext_modules=[kernels, build_facts], cmdclass={"build_ext": BuildKernels})
