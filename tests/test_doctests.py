"""The examples in the docstrings run, and print what they say."""

import doctest
import importlib
import inspect
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
    if "triton_kernels" not in module.name  # needs triton
    and module.name.rpartition(".")[2] not in ("_C", "_build", "__main__")
]
OPTIONAL = ("lightning", "transformers", "accelerate", "tensorboard", "matplotlib", "sklearn")
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def import_(name: str) -> ModuleType:
    """The module, or a skipped test where it belongs to a library that is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in OPTIONAL:
            raise
        pytest.skip(f"{error.name} is not installed")


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")  # Lightning's
@pytest.mark.parametrize("name", NAMES)
def test_examples(name: str) -> None:
    module = import_(name)
    names = {"torch": torch, "nn": nn, "TensorDataset": TensorDataset, "ak": ak}
    names.update({n: getattr(ak, n) for n in ak.__all__})
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(optionflags=FLAGS)
    for example in finder.find(module, globs={**names, **vars(module)}):
        runner.run(example)
    assert runner.summarize(verbose=False).failed == 0


def public() -> dict[str, object]:
    """Every public class and function of the package, of `ops`, `functional` and `schedules`."""
    found = {name: getattr(ak, name) for name in ak.__all__}
    found |= {f"ops.{name}": getattr(ak.ops, name) for name in ak.ops.NAMES}
    found |= {f"functional.{name}": getattr(ak.functional, name) for name in ak.functional.__all__}
    here = {n: t for n, t in vars(ak.schedules).items() if not n.startswith("_")}
    found |= {
        f"schedules.{name}": thing
        for name, thing in here.items()
        if getattr(thing, "__module__", None) == ak.schedules.__name__
    }
    types = (ak.functional.Call, ak.functional.CallListener, ak.functional.WeightUpdate)
    return {
        name: thing
        for name, thing in found.items()
        if (inspect.isclass(thing) or inspect.isfunction(thing))
        and thing not in types  # shown by `listen`
    }


@pytest.mark.parametrize("name", public())
def test_everything_public_has_an_example(name: str) -> None:
    assert ">>>" in (public()[name].__doc__ or "")
