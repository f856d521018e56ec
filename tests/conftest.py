"""Fixtures that all tests share.

Property tests draw the same examples in every run (hypothesis' `derandomize`), so that a failure
in CI is a failure on every machine. Look for new ones with `--hypothesis-profile=search`.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "reproducible", derandomize=True, max_examples=25, deadline=None, database=None
)
hypothesis.settings.register_profile("search", max_examples=300, deadline=None, print_blob=True)
hypothesis.settings.load_profile("reproducible")


# cuBLAS warns without it where PyTorch is told to be deterministic, as `nan_memory` does.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# matplotlib keeps a list of fonts, whose paths are those of the environment that made it.
os.environ.setdefault("MPLCONFIGDIR", str(Path(__file__).parents[1] / "build" / "matplotlib"))


class TorchRandom:
    """torch's generator, for hypothesis: every example starts from the same random numbers."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


torch_random = TorchRandom()  # hypothesis keeps a weak reference
hypothesis.register_random(torch_random)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device of a test's tensors: the same body runs on the CPU and, with `-m gpu`, on CUDA."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        # PyTorch lets cuDNN round the operands of float32 to 11 bits; tests compare float32.
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    return torch.device(request.param)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a CUDA device its tests are left out, unless they were asked for (then: skipped)."""
    if torch.cuda.is_available() or "gpu" in config.option.markexpr:
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=gpu)
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture(scope="module")
def nan_memory() -> Iterator[None]:
    """Fills every tensor that is made without values with NaN: what a kernel forgets shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads() -> Iterator[None]:
    """Gives the number of threads back that the test changed."""
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)
