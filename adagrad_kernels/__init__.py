"""AdaGrad optimizers whose batch size grows by itself, on kernels that measure per-sample gradients
during the backward pass.

Three lines of a training loop change: the optimizer, the loader, nothing else.
"""

from . import functional, ops
from ._version import __version__
from .attachment import UnsupportedLayerError
from .batch_size import BatchSizeController
from .config import show_config
from .criteria import Decision, NormTest
from .data import AdaptiveDataLoader
from .observer import Observer, observe
from .optim import AdAdaGrad, AdAdaGradNorm, AdaptiveBatch
from .statistics import GradientStatistics

__all__ = [
    "AdAdaGrad",
    "AdAdaGradNorm",
    "AdaptiveBatch",
    "AdaptiveDataLoader",
    "BatchSizeController",
    "Decision",
    "GradientStatistics",
    "NormTest",
    "Observer",
    "UnsupportedLayerError",
    "__version__",
    "functional",
    "observe",
    "ops",
    "show_config",
]
