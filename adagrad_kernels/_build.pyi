"""How this copy of adagrad_kernels was compiled (csrc/build_facts.cpp)."""

compiler: str
"""Name and version, such as "gcc 12.2.0"."""
flags: tuple[str, ...]
"""The flags that change the generated code."""
torch_version: str
"""The torch whose headers were used, such as "2.13.0+cpu"."""
cxx_standard: int
"""The value of __cplusplus, such as 201703."""
openmp: int
"""The value of _OPENMP (year and month of the standard), 0 without OpenMP."""
instruction_sets: tuple[str, ...]
"""What the CPU kernels were compiled for; the processor decides which one runs."""
cuda: str
"""Whether the CUDA kernels were compiled, and by what, or why not."""
cuda_archs: tuple[str, ...]
"""The CUDA architectures that kernels were compiled for, such as "sm_90"; compute_… is PTX."""
