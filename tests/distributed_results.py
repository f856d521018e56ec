"""What the results of several processes are compared with."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed_training import CLIP, MICRO_BATCHES, batch
from per_sample import PerSample, per_sample
from torch import nn
from training import network

CLOSE = {"rtol": 1e-9, "atol": 1e-12}  # float64; sums in another order, over hundreds of steps

Results = list[dict[str, Any]]


def assert_statistics(found: dict[str, Any], truth: PerSample) -> None:
    """What every rank must know of the whole batch."""
    assert found["batch_size"] == len(truth.g)
    torch.testing.assert_close(found["grad_norm_sq"], truth.mean_norm_sq, **CLOSE)
    torch.testing.assert_close(found["variance_trace"], truth.variance_trace, **CLOSE)
    noise = truth.variance_trace / (truth.mean_norm_sq - truth.variance_trace / len(truth.g))
    if noise > 0:
        torch.testing.assert_close(found["noise_scale"], noise, **CLOSE)


def truth_of(samples: int, model: nn.Module | None = None) -> PerSample:
    x, y = batch(samples)
    return per_sample(model or network(), F.mse_loss, x, y)


def assert_coordinates(found: dict[str, Any], truth: PerSample, prefix: str = "") -> None:
    for key, values in (("variance", truth.coordinate_variance), ("mean", truth.mean)):
        expected = {prefix + k: v for k, v in truth.by_parameter(values).items()}
        torch.testing.assert_close(found[f"coordinate_{key}"], expected, **CLOSE)


def assert_same_training(
    several: list[dict[str, Any]], one: dict[str, Any], grows: bool = True
) -> None:
    assert (len(set(one["sizes"])) > 2) == grows, "the problem is too easy: nothing grew"
    for found in several:
        assert found["sizes"] == one["sizes"]
        assert found["samples"] == one["samples"] == sum(one["sizes"])
        for key in ("ratios", "norms", "losses"):
            assert found[key] == pytest.approx(one[key], rel=1e-8), key
        torch.testing.assert_close(found["weights"], one["weights"], **CLOSE)
        for key in ("sizes", "ratios", "norms", "losses"):  # the same bits on all ranks
            assert found[key] == several[0][key]
        assert torch.equal(found["weights"], several[0]["weights"])


def assert_workers(several: list[dict[str, Any]], model: nn.Module) -> None:
    truth = truth_of(24, model)
    means = truth.g.view(2 * MICRO_BATCHES, 4, -1).mean(1)
    for found in several:
        assert found["workers"] == len(means)
        assert found["batch_size"] == 24
        torch.testing.assert_close(found["grad_norm_sq"], truth.mean_norm_sq, **CLOSE)
        torch.testing.assert_close(found["variance_trace"], 4 * means.var(0).sum(), **CLOSE)


def assert_clips(one: dict[str, Any]) -> None:
    """At some steps, not at all."""
    clipped = [norm_sq > CLIP**2 for norm_sq in one["norms"]]
    assert any(clipped)
    assert not all(clipped)
