"""Compiles the two binary parts of the package; everything else is in pyproject.toml.

`adagrad_kernels/_C.abi3.so`: the kernels, for the CPU and, where there is an nvcc, for CUDA. It
uses libtorch's stable ABI and no Python at all, so one file serves every Python and every torch
from the oldest supported one on; it is loaded by path with `torch.ops.load_library`.
`adagrad_kernels/_build.*.so`: a pybind11 module that tells how the kernels were compiled.

ADAGRAD_KERNELS_CUDA=0|1 decides about the CUDA kernels (tools/find_cuda.py), and
TORCH_CUDA_ARCH_LIST for which architectures. ADAGRAD_KERNELS_SANITIZE=1 has the CPU kernels check
addresses and undefined behaviour (`make sanitize`).
"""

import os
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))
import torch_range  # noqa: E402

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    sys.exit(
        f"adagrad_kernels compiles against the torch installed for {sys.executable}, and it "
        f'does not import ({error}). Run: pip install "{torch_range.REQUIREMENT}"'
    )
import kernel_flags as flags  # noqa: E402

# A ninja that pip installed lies beside the interpreter, which PATH need not name.
os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])

cxx = flags.CXX_FLAGS + flags.CXX_QUIET_FLAGS
kernels = Extension(
    "adagrad_kernels._C",
    flags.sources("binding.cpp", "cpu/*.cpp"),
    define_macros=[("TORCH_TARGET_VERSION", flags.TORCH_TARGET_VERSION)],
    extra_compile_args={"cxx": cxx, "nvcc": flags.NVCC_FLAGS},
    # The CUDA runtime stays inside: torch's own copy must not take its place, nor it torch's.
    extra_link_args=["-fopenmp", "-Wl,--as-needed", "-Wl,--exclude-libs,ALL", *flags.LINK_FLAGS],
    library_dirs=cpp_extension.library_paths(),
    libraries=["c10", "torch_cpu"],  # found at run time because torch is imported first
    py_limited_api=True,
    language="c++",
)
cuda_status, cuda_archs = flags.add_cuda(kernels)
facts = {
    "FLAGS": " ".join(flags.CXX_FLAGS),
    "TORCH_VERSION": torch.__version__,
    "CUDA": cuda_status,
    "CUDA_ARCHS": " ".join(cuda_archs),
}
build_facts = Extension(
    "adagrad_kernels._build",
    flags.sources("build_facts.cpp"),
    define_macros=[(f"ADAGRAD_KERNELS_{name}", f'"{text}"') for name, text in facts.items()],
    extra_compile_args=cxx,
    extra_link_args=["-Wl,-s"],
    language="c++",
)


class BuildKernels(cpp_extension.BuildExtension):
    """Parallel compilation by ninja in a directory that outlives the command (also under pip)."""

    def finalize_options(self) -> None:
        super().finalize_options()
        python, platform = sys.implementation.cache_tag, sysconfig.get_platform()
        name = f"{python}-{platform}-torch-{torch.__version__}" + "-sanitize" * flags.SANITIZE
        self.build_temp = str(ROOT / "build" / name)

    def build_extensions(self) -> None:
        archs = f" for {', '.join(cuda_archs)}" if cuda_archs else ""
        print(
            f"adagrad_kernels: {len(kernels.sources)} files for torch {torch.__version__}; "
            f"CPU kernels: compiled; CUDA kernels: {cuda_status}{archs}",
            flush=True,
        )
        super().build_extensions()


setup(ext_modules=[kernels, build_facts], cmdclass={"build_ext": BuildKernels})
