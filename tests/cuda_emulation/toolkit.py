"""The CUDA toolkit on this machine, for the tests that need one."""

import importlib.util
from pathlib import Path

import pytest

_path = Path(__file__).parents[2] / "tools" / "find_cuda.py"
_spec = importlib.util.spec_from_file_location("find_cuda", _path)
assert _spec is not None
assert _spec.loader is not None
find_cuda = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(find_cuda)

toolkit, found = find_cuda.find(None)
needs_nvcc = pytest.mark.skipif(toolkit is None, reason=f"needs nvcc: {found}")
