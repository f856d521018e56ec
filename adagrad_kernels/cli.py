"""The command line: `adagrad-kernels train | plot | experiment | profile | info | bench`."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from . import profiling_cli, show_config
from ._version import __version__
from .experiments import processes, report, reproduction_cli, training_cli
from .experiments.errors import Interrupted, UsageError, WriteError

PROGRAM = "adagrad-kernels"


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
    except WriteError as error:
        again = shlex.join(_going_on(arguments))
        _say(f"{PROGRAM}: {error}; to go on when it can be written: {PROGRAM} {again}")
        return 2
    except UsageError as error:
        _say(f"{PROGRAM}: {error}")
        return 2
    except Interrupted as error:
        _say(f"{error}; to go on: {PROGRAM} {shlex.join(_going_on(arguments))}")
        return 130
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _going_on(arguments: list[str]) -> list[str]:
    """The command that continues what this one has begun."""
    if arguments[0] == "experiment" or "--resume" in arguments:
        return arguments
    kept = [argument for argument in arguments if not argument.startswith("--ov")]  # or shortened
    return [*kept, "--resume"]


def _say(line: str) -> None:
    if processes.speaks():
        print(line, file=sys.stderr)


def train(args: argparse.Namespace) -> int:
    """`train`: one run, or four to compare; on all processes of torchrun, if it started this."""
    _show_each_warning_once()
    with processes.joined(args.device):
        return training_cli.main(args)


def plot(args: argparse.Namespace) -> int:
    """`plot`: a picture of runs."""
    print(report.picture(report.runs_in(args.runs), args.out))
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
        epilog=f"The options of a command: {PROGRAM} COMMAND --help",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    command = commands.add_parser(
        "train",
        help="train a model on digits, MNIST or CIFAR-10",
        description="Trains a model and writes log, summary, checkpoint and picture into a folder.",
        formatter_class=_Formatter,
    )
    training_cli.add_arguments(command)
    command.set_defaults(command=train)

    command = commands.add_parser(
        "plot",
        help="draw runs, finished or not",
        description="Draws any runs into one picture of four panels: batch size above training "
        "loss, over samples at the left and over steps at the right. The loss is a running mean.",
        formatter_class=_Formatter,
    )
    command.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="folder of a run, a log itself, or a folder with runs in it",
    )
    command.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        default=Path("runs.png"),
        help="where the picture goes; its ending, .png or .pdf or .svg, says in which format",
    )
    command.set_defaults(command=plot)

    command = commands.add_parser(
        "experiment",
        help="reproduce the paper's experiments",
        description="Trains with every method and every seed of an experiment, then writes tables "
        "and pictures. Finished runs are skipped, interrupted ones go on.",
        formatter_class=_Formatter,
    )
    reproduction_cli.add_arguments(command)
    command.set_defaults(command=experiment)

    about = "what statistics would cost on a model of yours"
    command = commands.add_parser(
        "profile",
        help=f"measure {about}",
        description=f"Measures {about}: by the layer, and for a whole training step.",
        formatter_class=_Formatter,
    )
    profiling_cli.add_arguments(command)
    command.set_defaults(command=profiling_cli.main)

    about = "which kernels are compiled and loaded, and why others are not"
    command = commands.add_parser(
        "info", help=f"show {about}", description=f"Shows {about}.", formatter_class=_Formatter
    )
    command.set_defaults(command=info)

    about = "the kernels and whole training steps against plain PyTorch"
    command = commands.add_parser(
        "bench",
        help=f"time {about}",
        description=f"Times {about}, as ratios.",
        formatter_class=_Formatter,
    )
    if with_bench:
        from . import benchmark

        benchmark.add_arguments(command)
        command.set_defaults(command=benchmark.main)
    return parser


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
