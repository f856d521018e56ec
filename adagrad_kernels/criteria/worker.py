"""The worker-level norm test: from mean gradients of parts of the batch, none of single samples."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..statistics import GradientStatistics
from .base import Comparison
from .norm import NormTest


@dataclass(frozen=True)
class WorkerNormTest(NormTest):
    """The norm test with the variance between J workers' mean gradients g_j of N/J samples each.

        tr Σ̂ = N/J · Σ_j‖g_j − ḡ‖² / (J − 1),   then as `NormTest`

    A worker is one micro-batch on one process: J = M·W with M micro-batches on W processes, and
    at least 2 or nothing is tested (on one process, let the loader's max_micro_batch_size be half
    the first batch). Unbiased like the variance between samples, but with J − 1
    instead of N − 1 degrees of freedom. No layer is observed: any model and any layer will do,
    and the plain backward pass runs, at the price of reading each gradient once more. Dimension
    0 of the first tensor that the model is called with counts the samples. Under
    `DistributedDataParallel` and `fully_shard` each process's gradient is measured before it is
    averaged.

    Args:
        eta: see `NormTest`; debiased and dataset_size likewise.
        printed: the form that is printed in the source, Σ_j‖g_j − ḡ‖²/J in place of tr Σ̂. It
            lacks the factor N/(J − 1), so that the batch size stops growing near (J − 1)/η²,
            whatever the noise.

    Raises:
        ValueError: as `NormTest`; in `evaluate`, statistics of single samples.

    Source:
        DDP-Norm and FSDP-Norm, arXiv 2412.21124.

    Example:
        >>> s = GradientStatistics(8, sum_norms_sq=7 * 12.0 + 8, mean_norm_sq=1.0, workers=4)
        >>> WorkerNormTest(eta=0.5).evaluate(s)  # tr Σ̂ = 12
        Decision(passed=False, batch_size=48, ratio=6.0, reason='')
        >>> WorkerNormTest(eta=0.5, printed=True).evaluate(s)  # 12 · (4 − 1)/8
        Decision(passed=False, batch_size=18, ratio=2.25, reason='')
    """

    printed: bool = field(default=False, kw_only=True)

    @property
    def needs(self) -> frozenset[str]:
        """The mean gradients of the workers."""
        return frozenset({"workers"})

    def undecidable(self, statistics: GradientStatistics) -> str:
        """Also needs two workers."""
        if statistics.workers == 1:
            return (
                "one micro-batch on one process has no variance between workers: lower "
                "max_micro_batch_size to at most half of the batch"
            )
        return super().undecidable(statistics)

    def _compare(self, statistics: GradientStatistics) -> tuple[Comparison, ...]:
        s = statistics
        if not s.workers:
            raise ValueError("WorkerNormTest: the statistics are those of single samples")
        noise = s.variance * (s.workers - 1) / s.batch_size if self.printed else s.variance
        return (Comparison(noise, s.mean_norm_sq, self.eta**2),)
