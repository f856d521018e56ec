"""Networks of drawn layers and shapes: every statistic against float64 per-sample autograd."""

import copy

import pytest
import torch
from drawn_networks import Network, networks
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from per_sample import PerSample, per_sample
from tolerance import assert_close_to_truth
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import adagrad_kernels as ak


def loss(y: Tensor) -> Tensor:
    """The sum over samples, so that micro-batches may be of different sizes."""
    return y.sin().sum()


def measured(s: ak.GradientStatistics, names: list[str]) -> dict[str, Tensor]:
    assert s.coordinate_variance is not None
    assert s.inner_products is not None
    assert sorted(s.coordinate_variance) == sorted(names)
    return {
        "sample_norms_sq": s.sample_norms_sq,
        "grad_norm_sq": s.grad_norm_sq,
        "variance_trace": s.variance_trace,
        "inner_products": s.inner_products,
        "coordinate_variance": torch.cat([s.coordinate_variance[n].flatten() for n in names]),
    }


def expected(truth: PerSample, last: int) -> dict[str, Tensor]:
    return {
        "sample_norms_sq": truth.norms_sq,
        "grad_norm_sq": truth.mean_norm_sq,
        "variance_trace": truth.variance_trace,
        "inner_products": truth.inner_products[-last:],
        "coordinate_variance": truth.coordinate_variance,
    }


def relative(found: dict[str, Tensor], truth: PerSample, dtype: torch.dtype) -> Tensor:
    """All numbers in one vector, each relative to the size of what was added up for it."""
    n = len(truth.g)
    size = truth.norms_sq.max().clamp(min=1e-30)
    sizes = dict.fromkeys(found, size)
    sizes["variance_trace"] = size * n / (n - 1)
    sizes["coordinate_variance"] = truth.g.square().max().clamp(min=1e-30) * n / (n - 1)
    return torch.cat([(t.double() / sizes[k]).reshape(-1) for k, t in found.items()]).to(dtype)


def shifted(t: Tensor, by: float) -> Tensor:
    """Each number larger or smaller by this part of it."""
    if not t.is_floating_point():
        return t
    return t.double() * (1 + by * torch.randn(t.shape, dtype=torch.float64).sign())


def nudged(model: nn.Module, by: float) -> nn.Module:
    """A copy in float64 whose parameters and buffers are shifted."""
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            t.copy_(shifted(t, by))
    return model


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(
    networks(), st.lists(st.integers(1, 3), min_size=1, max_size=3), st.booleans(),
    st.sampled_from([torch.float32, torch.float64]), st.data(),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_statistics(
    net: Network, parts: list[int], checkpointed: bool, dtype: torch.dtype, data: st.DataObject
) -> None:
    n = sum(parts)
    assume(n > 1)
    model, x = net.model().to(dtype), net.input(n, dtype)
    parameters = dict(model.named_parameters())
    # Those of the last layer stay: before a normalisation gradients may be nothing but rounding.
    last = list(parameters)[-1].rpartition(".")[0] if parameters else ""
    for name, p in parameters.items():
        p.requires_grad_(name.startswith(last) or data.draw(st.integers(0, 3)) > 0)
    names = [name for name, p in parameters.items() if p.requires_grad]
    assume(names)
    observer = ak.observe(model, coordinates=True, inner_products=True)
    for part in x.split(parts):
        y = checkpoint(model, part, use_reentrant=False) if checkpointed else model(part)
        loss(y).backward()
    s = observer.statistics(gradient_scale=1 / n)
    assert s.batch_size == n
    found = measured(s, names)
    observer.detach()
    truth = per_sample(model, loss, x)
    wanted = expected(truth, parts[-1])
    if dtype == torch.float64:
        torch.testing.assert_close(relative(found, truth, dtype), relative(wanted, truth, dtype))
        return
    # Ill-conditioned networks: as wrong as plain PyTorch, or as a rounding a layer makes the truth.
    nudge = len(net.layers) * torch.finfo(dtype).eps
    plain = [per_sample(model, loss, x, dtype=dtype)]
    plain += [per_sample(nudged(model, nudge), loss, shifted(x, nudge)) for _ in range(2)]
    exact = relative(wanted, truth, torch.float64)
    vectors = [relative(expected(p, parts[-1]), truth, torch.float64) for p in plain]
    errors = torch.stack([(v - exact).abs() for v in vectors]).amax(0)
    assert_close_to_truth(
        relative(found, truth, dtype), exact, (exact + errors).to(dtype), scale=len(net.layers)
    )
