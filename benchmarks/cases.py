"""All cases: the package's own with the peers added, and the larger models."""

from dataclasses import replace

import torch
from torch import Tensor

from adagrad_kernels.benchmark import op_cases, step_cases
from adagrad_kernels.benchmark.engine import Case

from .models import Transformer, resnet18
from .peers import PEERS

VOCABULARY = 1000


def tokens(batch: int) -> tuple[Tensor, Tensor]:
    """Random text: 64 tokens and the next ones."""
    text = torch.randint(VOCABULARY, (batch, 65))
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def ops() -> list[Case]:
    """The kernels."""
    return op_cases.cases()


def steps(compiled: bool = True) -> list[Case]:
    """Training steps, of ours and of the peers."""
    images = step_cases.images(3, 32, 32)
    larger = [
        step_cases.step_case("resnet18", "GroupNorm, 32×32", 16, resnet18, images, compiled),
        step_cases.step_case(
            "transformer", "4 layers, d 256, T 64", 16, Transformer, tokens, compiled
        ),
    ]
    every = [*step_cases.cases(compiled), *larger]
    return [replace(case, variants={**case.variants, **PEERS}) for case in every]


def collect(compiled: bool = True) -> list[Case]:
    """All of them."""
    return [*ops(), *steps(compiled)]
