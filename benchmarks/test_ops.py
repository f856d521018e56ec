import pytest

from . import cases
from .conftest import variants


@pytest.mark.benchmark
@variants(cases.ops())
def test_op(measure, case, name):
    measure(case, name)
