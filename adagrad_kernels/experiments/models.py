"""The models of the experiments by name."""

from __future__ import annotations

from torch import nn

from ..models import MODELS, Shape, cnn, logistic, mlp, resnet18
from .errors import UsageError

__all__ = ["MODELS", "Shape", "build", "cnn", "logistic", "mlp", "resnet18"]


def build(name: str, shape: Shape, classes: int) -> nn.Module:
    """The named model, with weights from torch's global generator.

    Raises:
        UsageError: an unknown name.
    """
    if name not in MODELS:
        raise UsageError(f"unknown model {name!r}; there are {', '.join(MODELS)}")
    return MODELS[name](shape, classes)
