"""Compiles the two binary parts of the package; everything else is in pyproject.toml.

`adagrad_kernels/_C.abi3.so`: the kernels, for the CPU and, where there is an nvcc, for CUDA. It
uses libtorch's stable ABI and no Python at all, so one file serves every Python and every torch
from TORCH_TARGET_VERSION on; it is loaded by path with `torch.ops.load_library`.
`adagrad_kernels/_build.*.so`: a pybind11 module that tells how the kernels were compiled.

ADAGRAD_KERNELS_CUDA=0|1 decides about the CUDA kernels (tools/find_cuda.py), and
TORCH_CUDA_ARCH_LIST for which architectures. ADAGRAD_KERNELS_SANITIZE=1 has the CPU kernels check
addresses and undefined behaviour (`make sanitize`).
"""

import os
import re
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    sys.exit(
        f"adagrad_kernels compiles against the torch installed for {sys.executable}, and it "
        f'does not import ({error}). Run: pip install "torch>=2.11,<2.15"'
    )

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))
import find_cuda  # noqa: E402

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
LINK_FLAGS = ["-Wl,-s"]
SANITIZE = os.environ.get("ADAGRAD_KERNELS_SANITIZE") == "1"
if SANITIZE:
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    CXX_FLAGS += ["-O1", "-fno-omit-frame-pointer", *checks]
    LINK_FLAGS = checks
WARNING_FLAGS = ["-Wall", "-Wextra", "-Wno-psabi"]
PATH_FLAGS = [
    f"-ffile-prefix-map={ROOT}/=",  # error messages say csrc/… and torch/…, wherever that was
    f"-ffile-prefix-map={TORCH_INCLUDE}/=",
    "-g0",
    "-isystem",
    str(TORCH_INCLUDE),
]
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fvisibility=hidden,-Wall"]

# A ninja that pip installed lies beside the interpreter, which PATH need not name.
os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])


def sources(*patterns: str) -> list[str]:
    """The files under csrc/ that match, relative to this directory."""
    csrc = ROOT / "csrc"
    return sorted(str(f.relative_to(ROOT)) for pattern in patterns for f in csrc.glob(pattern))


def add_cuda(kernels: Extension, toolkit: Path, version: str) -> list[str]:
    """Adds the CUDA kernels to the extension and returns their architectures."""
    default = ";".join(find_cuda.default_archs(toolkit)) + "+PTX"
    os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or default
    # A torch for the CPU does not look for CUDA, nor follow the headers that .cu files include.
    cpp_extension.CUDA_HOME = str(toolkit)
    torch.version.cuda = torch.version.cuda or version
    kernels.sources += sources("cuda/*.cpp", "cuda/*.cu")
    kernels.include_dirs.append(str(toolkit / "include"))
    kernels.library_dirs += [str(toolkit / "lib64"), str(toolkit / "lib")]
    kernels.libraries += ["cudart_static", "pthread", "rt", "dl"]
    return re.findall(r",code=(\w+)", " ".join(cpp_extension._get_cuda_arch_flags()))


kernels = Extension(
    "adagrad_kernels._C",
    sources("binding.cpp", "cpu/*.cpp"),
    define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
    extra_compile_args={"cxx": CXX_FLAGS + WARNING_FLAGS + PATH_FLAGS, "nvcc": NVCC_FLAGS},
    # The CUDA runtime stays inside: torch's own copy must not take its place, nor it torch's.
    extra_link_args=["-fopenmp", "-Wl,--as-needed", "-Wl,--exclude-libs,ALL", *LINK_FLAGS],
    library_dirs=cpp_extension.library_paths(),
    libraries=["c10", "torch_cpu"],  # found at run time because torch is imported first
    py_limited_api=True,
    language="c++",
)
toolkit, found = find_cuda.find(torch.version.cuda)
cuda_status = f"compiled by nvcc {found}" if toolkit else f"not compiled: {found}"
cuda_archs = add_cuda(kernels, toolkit, found) if toolkit else []
build_facts = Extension(
    "adagrad_kernels._build",
    sources("build_facts.cpp"),
    define_macros=[
        ("ADAGRAD_KERNELS_FLAGS", '"' + " ".join(CXX_FLAGS) + '"'),
        ("ADAGRAD_KERNELS_TORCH_VERSION", '"' + torch.__version__ + '"'),
        ("ADAGRAD_KERNELS_CUDA", '"' + cuda_status + '"'),
        ("ADAGRAD_KERNELS_CUDA_ARCHS", '"' + " ".join(cuda_archs) + '"'),
    ],
    extra_compile_args=CXX_FLAGS + WARNING_FLAGS + PATH_FLAGS,
    extra_link_args=["-Wl,-s"],
    language="c++",
)


class BuildKernels(cpp_extension.BuildExtension):
    """Parallel compilation by ninja in a directory that outlives the command (also under pip)."""

    def finalize_options(self) -> None:
        super().finalize_options()
        python, platform = sys.implementation.cache_tag, sysconfig.get_platform()
        name = f"{python}-{platform}-torch-{torch.__version__}" + "-sanitize" * SANITIZE
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
