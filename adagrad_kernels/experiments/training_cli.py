"""`adagrad-kernels train`: one run, or four to compare, from the command line."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from ..distributed import Ranks
from . import comparison, report
from .data import DATASETS
from .methods import CRITERIA, OPTIMIZERS
from .models import MODELS
from .settings import LEARNING_RATES, TrainingRun
from .training import run

DEFAULTS = {field.name: field.default for field in fields(TrainingRun)}
_KEPT = ("checkpoint_every", "resume", "overwrite", "tensorboard")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `adagrad-kernels train`."""
    what = parser.add_argument_group("what to train")
    what.add_argument(
        "--dataset", choices=DATASETS, help="the data; digits comes with scikit-learn"
    )
    what.add_argument(
        "--data-dir", metavar="DIR", help="folder of the MNIST (IDX) or CIFAR-10 files"
    )
    what.add_argument("--model", choices=MODELS, help="the network")
    what.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        help="adadagrad and adadagradnorm adapt the batch size, the others keep it fixed",
    )
    what.add_argument(
        "--lr",
        type=float,
        metavar="X",
        help="learning rate (default: "
        + ", ".join(f"{rate:g} for {name}" for name, rate in LEARNING_RATES.items())
        + "; with --compare 0.1 for the large fixed batch)",
    )
    what.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="samples to train on, the total over all epochs; the step that reaches it is the last",
    )
    what.add_argument(
        "--seed", type=int, metavar="N", help="of the weights and of the order of the samples"
    )
    what.add_argument("--device", help="where to train, as torch names it: cpu, cuda, cuda:1")
    what.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="of torch on the CPU; 0 means one on digits, otherwise torch's own choice",
    )

    batch = parser.add_argument_group("batch size")
    batch.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="the first one of adaptive optimizers, the fixed one of the others",
    )
    batch.add_argument(
        "--max-batch-size", type=int, metavar="N", help="adaptive batch sizes grow no further"
    )
    batch.add_argument(
        "--max-micro-batch-size",
        type=int,
        metavar="N",
        help="larger batches are accumulated from micro-batches of at most this size",
    )
    batch.add_argument(
        "--criterion", choices=CRITERIA, help="the test that lets the batch size grow"
    )
    for name, letter, tests in (
        ("eta", "η", "norm and coordinate"),
        ("theta", "θ", "inner and augmented"),
        ("nu", "ν", "augmented"),
    ):
        batch.add_argument(
            f"--{name}",
            type=float,
            metavar="X",
            help=f"{letter} of --criterion {tests}: smaller {letter} gives larger batches",
        )

    where = parser.add_argument_group("runs")
    where.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the run (default: runs/DATASET-MODEL-OPTIMIZER, with --compare "
        "runs/DATASET)",
    )
    where.add_argument(
        "--compare",
        action="store_true",
        help="train four ways: fixed batches of --batch-size and of --max-batch-size with "
        "AdaGrad, then adadagrad and adadagradnorm; --optimizer is not used",
    )
    where.add_argument(
        "--checkpoint-every",
        type=int,
        default=0,
        metavar="N",
        help="also write a checkpoint every N steps, where N is not 0; one is always written at "
        "the end, after Ctrl-C and after SIGTERM",
    )
    where.add_argument(
        "--tensorboard",
        action="store_true",
        help="also write the log for TensorBoard, into the folder tensorboard of the run",
    )
    there = where.add_mutually_exclusive_group()
    there.add_argument(
        "--resume",
        action="store_true",
        help="go on from the checkpoint in --out, bit for bit; a finished run goes on with more "
        "--samples",
    )
    there.add_argument(
        "--overwrite",
        action="store_true",
        help="train anew even if --out holds a run, finished or not, or another log, which is lost",
    )
    parser.set_defaults(**{**DEFAULTS, "lr": None})


def main(args: argparse.Namespace) -> int:
    """Trains one run, or four to compare; prints a table of them and where the files are."""
    lr = args.lr if args.lr is not None else LEARNING_RATES[args.optimizer]
    settings = TrainingRun(
        **{name: getattr(args, name) for name in DEFAULTS if name != "lr"}, lr=lr
    )
    kept = {name: getattr(args, name) for name in _KEPT}
    if args.compare:
        folder = args.out or Path("runs", args.dataset)
        runs = comparison.four_ways(settings, args.lr)
        summaries = comparison.compare(runs, folder, **kept)
        written = f"picture in {folder / 'comparison.png'}, logs in {folder}/*/log.jsonl"
    else:
        folder = args.out or Path("runs", f"{args.dataset}-{args.model}-{args.optimizer}")
        report.check()
        summary = run(settings, folder, **kept)
        summaries = {folder.name: summary}
        if Ranks().index == 0:
            report.picture([folder], folder / "run.png")
        written = f"picture in {folder / 'run.png'}, log in {folder / 'log.jsonl'}"
    if Ranks().index == 0:
        print(report.table(summaries))
        print(written)
    return 0
