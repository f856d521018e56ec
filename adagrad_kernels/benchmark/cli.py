"""The command line: `adagrad-kernels bench`, and `python -m benchmarks` in the repository."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence

import torch

from . import op_cases, step_cases
from .engine import Case, matching, run_case
from .records import WRONG


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `main`."""
    parser.add_argument(
        "--only",
        metavar="PATTERN",
        help="only cases whose name contains this; * stands for anything",
    )
    parser.add_argument("--out", metavar="FILE", help="append records here, one JSON object a line")
    parser.add_argument(
        "--threads",
        type=_threads,
        metavar="N",
        help="of torch on the CPU (default: torch's own choice)",
    )
    parser.add_argument(
        "--seconds",
        type=_seconds,
        metavar="X",
        default=1.0,
        help="for each variant of each case (default: %(default)g)",
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out what torch.compile has to compile"
    )


def _threads(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return number


_threads.__name__, _seconds.__name__ = "int", "float"  # argparse says: invalid int value


def own_cases(compiled: bool = True) -> list[Case]:
    """The cases that need the package alone.

    Args:
        compiled: with the variants that torch.compile has to compile.
    """
    return [*op_cases.cases(), *step_cases.cases(compiled)]


def main(args: argparse.Namespace, collect: Callable[[bool], Sequence[Case]] = own_cases) -> int:
    """Runs the cases, prints the ratios, stores the records.

    Args:
        args: of a parser that `add_arguments` has prepared.
        collect: gives the cases, see `own_cases`.

    Returns:
        0; 1 if a variant computed something wrong; 2 if no case matches, or the records cannot be
        written.
    """
    threads_before = torch.get_num_threads()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        cases = matching(collect(not args.no_compile), args.only)
        _append(args.out, "")  # before anything is measured
        return _run(cases, args)
    except (LookupError, _CannotWrite) as error:
        print(error.args[0], file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads_before)


def _run(cases: Sequence[Case], args: argparse.Namespace) -> int:
    wrong = 0
    for case in cases:
        print(f"\n{case.name}  ({case.shape})")
        for record in run_case(case, args.seconds):
            print(record, flush=True)
            wrong += record.reason.startswith(WRONG)
            _append(args.out, json.dumps(record.as_dict()) + "\n")
    return 1 if wrong else 0


class _CannotWrite(Exception):
    """The records cannot be stored."""


def _append(path: str | None, text: str) -> None:
    """Adds to the file, if there is to be one."""
    if path is None:
        return
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise _CannotWrite(f"{path} cannot be written: {error.strerror}") from error
