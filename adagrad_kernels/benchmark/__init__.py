"""`adagrad-kernels bench`: the library's speed on this machine, as ratios to plain PyTorch.

Every variant is first checked to compute the right thing, then timed in turn with the plain
one, in the same run and with the same threads. The cases here need the package alone;
`python -m benchmarks` in the repository adds larger models and other libraries.
"""

from .cli import add_arguments, main

__all__ = ["add_arguments", "main"]
