"""The command `adagrad-kernels profile MODEL.py:make_model`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .experiments.errors import UsageError
from .layers.base import UnsupportedLayerError
from .profiling import profile

LOSSES = ("cross-entropy", "mean")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `main`."""
    parser.add_argument(
        "model",
        metavar="MODEL.py:FUNCTION",
        help="a Python file, and the function in it that returns the model when called without "
        "arguments",
    )
    parser.add_argument(
        "--input-shape",
        type=_shape,
        required=True,
        metavar="B,…",
        help="shape of the model's input, the samples first, such as 32,3,32,32; it is drawn at "
        "random",
    )
    parser.add_argument(
        "--input-dtype", choices=("float32", "int64"), help="int64 for tokens, with --vocab"
    )
    parser.add_argument("--vocab", type=int, metavar="N", help="tokens are drawn from 0 to N - 1")
    parser.add_argument(
        "--loss",
        choices=LOSSES,
        help="cross-entropy with random classes, as many as the output's last dimension has; or "
        "the output's mean",
    )
    parser.add_argument(
        "--coordinates", action="store_true", help="measure coordinate sums in the layers, too"
    )
    parser.add_argument(
        "--fallback",
        choices=("error", "vmap"),
        help="what to do about layers that are not supported: vmap measures them, too",
    )
    parser.add_argument(
        "--folded",
        action="append",
        metavar="MODULE",
        help="name of a module in which dimension 0 holds several rows of each sample, as frames "
        "of a video; may be given several times",
    )
    parser.add_argument("--device", help="where to run, as torch names it: cpu, cuda, cuda:1")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="of torch on the CPU (default: torch's own choice)"
    )
    parser.add_argument(
        "--repeats", type=int, metavar="N", help="turns of each comparison, whose medians are shown"
    )
    parser.set_defaults(
        input_dtype="float32", loss="cross-entropy", fallback="error", device="cpu", repeats=20
    )


def main(args: argparse.Namespace) -> int:
    """Prints what statistics cost on a model.

    Raises:
        UsageError: what the user can mend.
    """
    for name in ("repeats", "threads", "vocab"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}")
    if (args.input_dtype == "int64") != (args.vocab is not None):
        raise UsageError("--input-dtype int64 and --vocab go together: tokens and their number")
    torch.manual_seed(0)
    model, x = _moved(_make(args.model), _input(args.input_shape, args.vocab), args.device)
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads or before)
    try:
        loss = _checked_loss(model, x, args.loss)
        found = profile(
            model,
            x,
            loss=loss,
            coordinates=args.coordinates,
            fallback=args.fallback,
            repeats=args.repeats,
            folded=args.folded or (),
        )
    except UnsupportedLayerError as error:
        raise UsageError(f"{error} Here: --fallback vmap.") from error
    except (RuntimeError, ValueError) as error:  # of a model that cannot be observed as it is
        raise UsageError(_one_line(error)) from error
    finally:
        torch.set_num_threads(before)
    print(found)
    return 0


def _shape(text: str) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in text.split(","))
    if min(sizes) < 1:
        raise ValueError(text)
    return sizes


_shape.__name__ = "shape"  # argparse says: invalid shape value


def _input(shape: tuple[int, ...], vocab: int | None) -> Tensor:
    return torch.randn(shape) if vocab is None else torch.randint(vocab, shape)


def _moved(model: nn.Module, x: Tensor, device: str) -> tuple[nn.Module, Tensor]:
    try:
        return model.to(device), x.to(device)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).partition("\n")[0]
        raise UsageError(f"device {device!r}: {first_line}") from error


def _make(target: str) -> nn.Module:
    """The model of FILE.py:FUNCTION."""
    file, colon, name = target.rpartition(":")
    if not (colon and file and name):
        raise UsageError(f"expected MODEL.py:FUNCTION, got {target!r}")
    module = _import(Path(file))
    make = getattr(module, name, None)
    if not callable(make):
        own = [k for k, v in vars(module).items() if getattr(v, "__module__", "") == _NAME]
        raise UsageError(
            f"{file} has no function {name!r}"
            + (f"; it has {', '.join(own)}" if own else "; it has none at all")
        )
    try:
        model = make()
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise UsageError(f"{name}() of {file} failed: {_one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"{name}() of {file} returned {type(model).__name__}, not an nn.Module")
    return model


_NAME = "adagrad_kernels_profiled"


def _import(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"{path} does not exist")
    spec = importlib.util.spec_from_file_location(_NAME, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_NAME] = module  # dataclasses look their module up
    sys.path.insert(0, str(path.parent.absolute()))  # for what it imports from beside it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise UsageError(f"{path} cannot be imported: {_one_line(error)}") from error
    finally:
        sys.path.pop(0)
    return module


def _checked_loss(model: nn.Module, x: Tensor, name: str) -> Callable[[Any], Tensor]:
    """The loss as a function of the model's output, after one forward and backward pass."""
    kind = "int64" if x.dtype == torch.int64 else "float32"
    try:
        output = model(x)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise UsageError(
            f"the model fails on an input of shape {list(x.shape)}, {kind}: {_one_line(error)}"
        ) from error
    logits = _tensor(output)
    if name == "mean":
        loss = lambda output: _tensor(output).mean()  # noqa: E731
    elif logits.dim() < 2:
        raise UsageError(
            f"cross-entropy needs an output [samples, …, classes], the model's has the shape "
            f"{list(logits.shape)}: take --loss mean"
        )
    else:
        rows = logits.shape[:-1].numel()
        y = torch.randint(logits.shape[-1], (rows,), device=logits.device)
        loss = lambda output: F.cross_entropy(_tensor(output).flatten(0, -2), y)  # noqa: E731
    try:
        loss(output).backward()
    except RuntimeError as error:
        raise UsageError(f"no gradient of the model: {_one_line(error)}") from error
    model.zero_grad()
    return loss


def _tensor(output: Any) -> Tensor:
    """The tensor among a model's outputs: itself, `.logits`, or the first of several."""
    output = getattr(output, "logits", output)
    output = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(output, Tensor):
        raise UsageError(f"the model returns {type(output).__name__}, not a tensor")
    return output


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
