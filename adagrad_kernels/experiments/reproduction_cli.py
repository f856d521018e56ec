"""`adagrad-kernels experiment`: the paper's experiments from the command line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from . import reproduction, reproduction_report, speed, theorem
from .errors import UsageError
from .tasks import METHODS, SEEDS, TASKS, check_methods


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `adagrad-kernels experiment`."""
    names = (*TASKS, "theorem")
    parser.add_argument("name", choices=names, metavar="NAME", help="one of " + ", ".join(names))
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="instead, try learning rates with one seed: small batches with a small budget",
    )
    parser.add_argument(
        "--rates",
        nargs="+",
        type=float,
        metavar="LR",
        help="the learning rates of the sweep (default: powers of √10 around the likely ones)",
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="train nothing, only write tables and pictures of the runs that are there",
    )
    parser.add_argument(
        "--speed",
        action="store_true",
        help="train nothing, time steps against plain ones and against the official method",
    )
    parser.add_argument(
        "--data-dir", metavar="DIR", help="folder of the MNIST (IDX) or CIFAR-10 files"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the runs (default: runs/experiments/NAME)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="DIR",
        help="folder of records, tables and pictures (default: docs/results/NAME below the working "
        "directory; with --samples the folder results in --out)",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="only these (default: those of the experiment) of " + ", ".join(METHODS),
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        metavar="N",
        help=f"a run of each method with each of them (default: {' '.join(map(str, SEEDS))}; "
        "mnist-cnn-full: 0)",
    )
    parser.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="of each run, the total over all epochs (default: the experiment's budget)",
    )
    parser.add_argument(
        "--device", default="cpu", help="where to train, as torch names it: cpu, cuda, cuda:1"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        metavar="N",
        help="of torch on the CPU; seconds are comparable with 1",
    )


def main(args: argparse.Namespace) -> int:
    """Trains what has not been trained yet."""
    if args.name == "theorem":
        return _theorem(args)
    task = TASKS[args.name]
    if args.threads < 1:
        raise UsageError(f"threads must be at least 1, got {args.threads}")
    methods, seeds = args.methods or task.methods, args.seeds or task.seeds
    check_methods(methods)
    out = args.out or Path("runs", "experiments", args.name)
    default = Path("docs", "results", args.name) if args.samples is None else out / "results"
    results = args.results or default
    if args.rates and not args.sweep:
        raise UsageError("--rates are those of a --sweep")
    if args.speed:
        print(speed.measure(args.name, task, results, args.threads), end="")
        return 0
    if not args.report:
        changes = _changes(args)
        if args.sweep:
            swept = args.methods or tuple(reproduction.SWEEP)
            print(reproduction.sweep(task, out / "sweep", swept, args.rates or (), **changes))
            return 0
        reproduction.run_all(task, out, methods, seeds, **changes)
    print(reproduction_report.update(task, out, results, methods, seeds), end="")
    print(f"records and pictures in {results}")
    return 0


def _changes(args: argparse.Namespace) -> dict[str, Any]:
    """What all runs have from the command line."""
    if args.data_dir is None:
        raise UsageError(f"{args.name} needs --data-dir, the folder with the files of its data")
    changes = {"data_dir": args.data_dir, "threads": args.threads, "device": args.device}
    return changes if args.samples is None else {**changes, "samples": args.samples}


def _theorem(args: argparse.Namespace) -> int:
    others = ("sweep", "rates", "report", "speed", "data_dir", "results", "methods", "samples")
    given = [name for name in others if getattr(args, name)]
    if given:
        raise UsageError(f"theorem has no --{given[0].replace('_', '-')}: its problem is made here")
    if args.threads < 1:
        raise UsageError(f"threads must be at least 1, got {args.threads}")
    torch.set_num_threads(args.threads)
    out = args.out or Path("runs", "experiments", args.name)
    theorem.run(out, args.seeds or theorem.SEEDS)
    print(f"picture and records in {out}")
    return 0
