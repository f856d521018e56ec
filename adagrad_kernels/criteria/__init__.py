"""The tests: from the statistics of a step to a suggested batch size. Pure functions.

A test asks whether the batch's gradient is accurate enough; where it is not, it says how many
samples would have been. What becomes of the suggestion is the controller's business
(`batch_size.py`).
"""

from .averaged import Averaged
from .base import (
    NEEDS,
    UNBOUNDED,
    Comparison,
    Criterion,
    Decision,
    GradientTest,
    StatefulCriterion,
    VarianceTest,
)
from .cabs import CABS
from .coordinate import CoordinateNormTest
from .inner_product import (
    AugmentedInnerProductTest,
    InnerProductTest,
    OrthogonalityTest,
    epsilon_from_theta_nu,
    theta_nu_from_epsilon,
)
from .norm import NoiseScaleTarget, NormTest
from .worker import WorkerNormTest

__all__ = [
    "CABS",
    "NEEDS",
    "UNBOUNDED",
    "AugmentedInnerProductTest",
    "Averaged",
    "Comparison",
    "CoordinateNormTest",
    "Criterion",
    "Decision",
    "GradientTest",
    "InnerProductTest",
    "NoiseScaleTarget",
    "NormTest",
    "OrthogonalityTest",
    "StatefulCriterion",
    "VarianceTest",
    "WorkerNormTest",
    "epsilon_from_theta_nu",
    "theta_nu_from_epsilon",
]
