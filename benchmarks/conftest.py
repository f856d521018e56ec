import pytest
import torch

from adagrad_kernels import UnsupportedLayerError
from adagrad_kernels.benchmark.engine import Case, Unavailable


@pytest.fixture
def measure(benchmark):
    """Checks a case's variant, then times it; skips it where it cannot exist."""

    def run(case: Case, name: str) -> None:
        benchmark.group = case.name
        inputs = case.inputs()
        try:
            variant = {**case.plain, **case.variants}[name](inputs)
            variant.check()
        except (UnsupportedLayerError, Unavailable) as error:
            pytest.skip(str(error))
        benchmark.extra_info.update(shape=case.shape, threads=torch.get_num_threads())
        benchmark(variant.run)

    return run


def variants(cases: list[Case]) -> pytest.MarkDecorator:
    """Parametrises a test with every variant of every case."""
    return pytest.mark.parametrize(
        ("case", "name"),
        [
            pytest.param(case, name, id=f"{case.name}: {name}")
            for case in cases
            for name in (*case.plain, *case.variants)
        ],
    )
