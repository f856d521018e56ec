import pytest

from . import cases
from .conftest import variants


@pytest.mark.benchmark(max_time=0.5, min_rounds=3)
@variants(cases.steps(compiled=False))
def test_step(measure, case, name):
    measure(case, name)
