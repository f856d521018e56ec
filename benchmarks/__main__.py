"""python -m benchmarks: like `adagrad-kernels bench`, with peers and larger models."""

import argparse
import sys

from adagrad_kernels.benchmark import add_arguments, main

from .cases import collect

parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
add_arguments(parser)
sys.exit(main(parser.parse_args(), collect))
