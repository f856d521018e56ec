"""The command line: `adagrad-kernels train | plot | experiment | profile | info | bench`."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

from . import profiling_cli, show_config
from ._version import __version__
from .distributed import Ranks
from .experiments import comparison, processes, report, reproduction_cli
from .experiments.data import DATASETS
from .experiments.errors import Interrupted, UsageError
from .experiments.methods import CRITERIA, OPTIMIZERS
from .experiments.models import MODELS
from .experiments.settings import LEARNING_RATES, TrainingRun
from .experiments.training import run

PROGRAM = "adagrad-kernels"
DEFAULTS = {field.name: field.default for field in fields(TrainingRun)}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the arguments, by default those of the process.

    Returns:
        The exit code: 0; 2 for what the user has to mend, said in one line on stderr; 130 after
        an interruption.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parser(with_bench=arguments[:1] == ["bench"]).parse_args(arguments)
        return args.command(args)
    except UsageError as error:
        _say(f"{PROGRAM}: {error}")
        return 2
    except Interrupted as error:
        goes_on = arguments[:1] == ["experiment"] or "--resume" in arguments
        resume = arguments if goes_on else [*arguments, "--resume"]
        _say(f"{error}; to go on: {PROGRAM} {shlex.join(resume)}")
        return 130
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _say(line: str) -> None:
    if processes.speaks():
        print(line, file=sys.stderr)


def train(args: argparse.Namespace) -> int:
    """`train`: one run, or four to compare; on all processes of torchrun, if it started this."""
    _show_each_warning_once()
    with processes.joined(args.device):
        return _train(args)


def _train(args: argparse.Namespace) -> int:
    lr = args.lr if args.lr is not None else LEARNING_RATES[args.optimizer]
    settings = TrainingRun(
        **{name: getattr(args, name) for name in DEFAULTS if name != "lr"}, lr=lr
    )
    kept = {name: getattr(args, name) for name in ("checkpoint_every", "resume", "tensorboard")}
    if args.compare:
        folder = args.out or Path("runs", args.dataset)
        runs = comparison.four_ways(settings, args.lr)
        summaries = comparison.compare(runs, folder, **kept)
        written = f"picture in {folder / 'comparison.png'}, logs in {folder}/*/log.jsonl"
    else:
        folder = args.out or Path("runs", f"{args.dataset}-{args.model}-{args.optimizer}")
        report.check()
        summary = run(settings, folder, folder.name, **kept)
        summaries = {folder.name: summary}
        if Ranks().index == 0:
            report.picture([folder], folder / "run.png")
        written = f"picture in {folder / 'run.png'}, log in {folder / 'log.jsonl'}"
    if Ranks().index == 0:
        print(report.table(summaries))
        print(written)
    return 0


def plot(args: argparse.Namespace) -> int:
    """`plot`: a picture of runs."""
    report.picture(report.runs_in(args.runs), args.out)
    print(args.out)
    return 0


def experiment(args: argparse.Namespace) -> int:
    """`experiment`: the paper's experiments."""
    _show_each_warning_once()
    return reproduction_cli.main(args)


def info(args: argparse.Namespace) -> int:
    """`info`: what is compiled and loaded."""
    print(show_config())
    return 0


class _Parser(argparse.ArgumentParser):
    """Tells an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        none = action.default is None or action.default is False or action.default == ""
        return action.help if none else super()._get_help_string(action)


def _parser(with_bench: bool) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        description="AdaGrad training whose batch size grows by itself.",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    command = commands.add_parser(
        "train",
        help="train a model on digits, MNIST or CIFAR-10",
        description="Trains a model and writes log, summary, checkpoint and picture.",
        formatter_class=_Formatter,
    )
    _add_train_arguments(command)
    command.set_defaults(command=train)

    command = commands.add_parser(
        "plot",
        help="draw runs, finished or not",
        description="Draws batch size and loss of any runs into one picture.",
        formatter_class=_Formatter,
    )
    command.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a run's folder or log, or a folder of runs",
    )
    command.add_argument(
        "--out", type=Path, metavar="FILE", default=Path("runs.png"), help="the picture"
    )
    command.set_defaults(command=plot)

    command = commands.add_parser(
        "experiment",
        help="reproduce the paper's experiments",
        description="Trains with every method and seed of an experiment, what is not done yet.",
        formatter_class=_Formatter,
    )
    reproduction_cli.add_arguments(command)
    command.set_defaults(command=experiment)

    about = "what statistics would cost on a model of yours"
    command = commands.add_parser(
        "profile",
        help=about,
        description=f"Measures {about}: by the layer, and for a whole training step.",
        formatter_class=_Formatter,
    )
    profiling_cli.add_arguments(command)
    command.set_defaults(command=profiling_cli.main)

    about = "which kernels are compiled and loaded, and why others are not"
    command = commands.add_parser("info", help=about, description=f"Shows {about}.")
    command.set_defaults(command=info)

    about = "time the kernels and whole training steps"
    command = commands.add_parser("bench", help=about, description=f"{about.capitalize()}.")
    if with_bench:
        from . import benchmark

        benchmark.add_arguments(command)
        command.set_defaults(command=benchmark.main)
    return parser


def _add_train_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to train")
    what.add_argument("--dataset", choices=DATASETS, help="digits needs no files")
    what.add_argument(
        "--data-dir", metavar="DIR", help="folder of the MNIST (IDX) or CIFAR-10 files"
    )
    what.add_argument("--model", choices=MODELS, help="network")
    what.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        help="the first two adapt the batch size, the others keep it fixed",
    )
    what.add_argument(
        "--lr",
        type=float,
        help="learning rate (default: "
        + ", ".join(f"{rate:g} for {name}" for name, rate in LEARNING_RATES.items())
        + "; with --compare 0.1 for the large fixed batch)",
    )
    what.add_argument(
        "--samples", type=int, help="train on so many samples, counting every epoch anew"
    )
    what.add_argument("--seed", type=int, help="of the weights and of the order of the samples")
    what.add_argument("--device", help="where to train, as torch names it")
    what.add_argument(
        "--threads",
        type=int,
        help="of torch on the CPU; 0: one on digits, otherwise torch's own choice",
    )

    batch = parser.add_argument_group("batch size")
    batch.add_argument("--batch-size", type=int, metavar="N", help="first, or fixed, batch size")
    batch.add_argument("--max-batch-size", type=int, metavar="N", help="it grows no further")
    batch.add_argument(
        "--max-micro-batch-size",
        type=int,
        metavar="N",
        help="larger batches are accumulated from micro-batches of at most this size",
    )
    batch.add_argument("--criterion", choices=CRITERIA, help="the test that lets the batch grow")
    batch.add_argument(
        "--eta", type=float, help="η of norm and coordinate: smaller, larger batches"
    )
    batch.add_argument("--theta", type=float, help="θ of inner and augmented, likewise")
    batch.add_argument("--nu", type=float, help="ν of augmented, likewise")

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
        metavar="STEPS",
        help="steps between checkpoints; one is always written at the end, after Ctrl-C and "
        "after SIGTERM",
    )
    where.add_argument(
        "--tensorboard",
        action="store_true",
        help="also write the log for TensorBoard, into the folder tensorboard of the run",
    )
    where.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint in --out, bit for bit"
    )
    parser.set_defaults(**{**DEFAULTS, "lr": None})


class _Once(logging.Filter):
    """Lets each message through once: a run that has gone astray repeats it at every step."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[object] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        new = record.msg not in self._seen
        self._seen.add(record.msg)
        return new


def _show_each_warning_once() -> None:
    logger = logging.getLogger("adagrad_kernels")
    if not logger.handlers and processes.speaks():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(f"{PROGRAM}: %(message)s"))
        handler.addFilter(_Once())
        logger.addHandler(handler)
