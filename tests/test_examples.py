"""The examples in the docstrings run, and print what they say."""

import doctest
import importlib
import pkgutil
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import adagrad_kernels as ak

NAMES = [
    module.name
    for module in pkgutil.walk_packages(ak.__path__, "adagrad_kernels.")
    if not module.name.rpartition(".")[2].startswith("_")
    and "triton_kernels" not in module.name  # needs triton
]


@pytest.mark.parametrize("name", NAMES)
def test_examples(name: str) -> None:
    module: ModuleType = importlib.import_module(name)
    names = {"torch": torch, "nn": nn, "TensorDataset": TensorDataset, "ak": ak}
    names.update({n: getattr(ak, n) for n in ak.__all__})
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(optionflags=flags)
    for example in finder.find(module, globs={**names, **vars(module)}):
        runner.run(example)
    assert runner.summarize(verbose=False).failed == 0


@pytest.mark.parametrize("name", [n for n in ak.__all__ if n in dir(ak.criteria)])
def test_every_criterion_has_an_example(name: str) -> None:
    thing = getattr(ak, name)
    if name not in ("Decision",):
        assert ">>>" in thing.__doc__
