import pytest

from . import cases
from .conftest import variants


# torch's word on vmap over attention, which is what the official method does.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.benchmark(max_time=0.5, min_rounds=3)
@variants(cases.steps(compiled=False))
def test_step(measure, case, name):
    measure(case, name)
