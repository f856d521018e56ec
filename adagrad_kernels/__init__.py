"""AdaGrad optimizers whose batch size grows by itself, on kernels that measure per-sample gradients
during the backward pass.

Three lines of a training loop change: the optimizer, the loader, nothing else.
"""

from . import functional, ops, schedules
from ._version import __version__
from .batch_size import BatchSizeController
from .config import show_config
from .criteria import (
    CABS,
    AugmentedInnerProductTest,
    Averaged,
    CoordinateNormTest,
    Decision,
    InnerProductTest,
    NoiseScaleTarget,
    NormTest,
    OrthogonalityTest,
    WorkerNormTest,
    epsilon_from_theta_nu,
    theta_nu_from_epsilon,
)
from .data import AdaptiveDataLoader
from .layers.base import UnsupportedLayerError
from .observer import Observer, observe
from .optim import AdAdaGrad, AdAdaGradNorm, AdaptiveBatch, LocalAdaptiveBatch
from .statistics import GradientStatistics

__all__ = [
    "CABS",
    "AdAdaGrad",
    "AdAdaGradNorm",
    "AdaptiveBatch",
    "AdaptiveDataLoader",
    "AugmentedInnerProductTest",
    "Averaged",
    "BatchSizeController",
    "CoordinateNormTest",
    "Decision",
    "GradientStatistics",
    "InnerProductTest",
    "LocalAdaptiveBatch",
    "NoiseScaleTarget",
    "NormTest",
    "Observer",
    "OrthogonalityTest",
    "UnsupportedLayerError",
    "WorkerNormTest",
    "__version__",
    "epsilon_from_theta_nu",
    "functional",
    "observe",
    "ops",
    "schedules",
    "show_config",
    "theta_nu_from_epsilon",
]
