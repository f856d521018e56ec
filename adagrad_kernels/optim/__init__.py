"""The optimizers: AdAdaGrad, AdAdaGradNorm, and AdaptiveBatch around any other."""

from .adadagrad import AdAdaGrad
from .adadagrad_norm import AdAdaGradNorm
from .adaptive_batch import AdaptiveBatch
from .local import LocalAdaptiveBatch

__all__ = ["AdAdaGrad", "AdAdaGradNorm", "AdaptiveBatch", "LocalAdaptiveBatch"]
