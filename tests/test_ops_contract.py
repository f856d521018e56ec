"""What holds for every op: torch's own checks, compilation, threads, instruction sets, memory."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import op_cases
import pytest
import torch
from op_cases import call, case, double
from tolerance import assert_close_to_truth
from torch import Tensor

from adagrad_kernels import _library, ops, reference

every_op = pytest.mark.parametrize("name", ops.NAMES)
compiled = pytest.mark.skipif(_library.load_error is not None, reason="no compiled kernels")


def assert_correct(name: str, large: bool, found: list[Tensor]) -> None:
    """Found on the CPU or elsewhere: within the tolerance of the float64 reference."""
    args = case(name, large)
    truth = call(name, double(args), reference)
    plain = call(name, args, reference)
    sizes = [None] * len(truth)
    if name.endswith("weight_grad"):  # sums of terms that cancel
        positive = [a.abs() if isinstance(a, Tensor) else a for a in double(args)]
        sizes = call(name, tuple(positive), reference)
    for k, (a, t, p, size) in enumerate(zip(found, truth, plain, sizes, strict=True)):
        a, p = a.cpu(), p.cpu()
        if p.dtype == torch.float64:  # added up in float64 from numbers of float32
            a, p = a.float(), p.float()
        if a.dim() and a.shape[0] == 4 and "adagrad" in name:
            for one in zip(a, t, p, strict=True):
                assert_close_to_truth(*one, what=f"{name} {k}")
        else:
            assert_close_to_truth(a, t, p, size, f"{name} {k}")


@every_op
@pytest.mark.parametrize("large", [False, True])
def test_result(device: torch.device, name: str, large: bool) -> None:
    args = case(name, large)
    moved = [
        [t.to(device) if isinstance(t, Tensor) else t for t in a] if isinstance(a, list)
        else a.to(device) if isinstance(a, Tensor) else a
        for a in args
    ]  # fmt: skip
    assert_correct(name, large, call(name, tuple(moved)))


@every_op
def test_opcheck(device: torch.device, name: str) -> None:
    """Schema (what is mutated), fake tensors, autograd registration, dynamic shapes."""
    torch.library.opcheck(
        getattr(torch.ops.adagrad_kernels, name).default, case(name, False, device)
    )


FLAGS = {
    "linear_weight_grad": ("weight", "bias", "coordinates"),
    "linear_adagrad_": ("bias", "coordinates"),
    "conv_weight_grad": ("weight", "bias", "coordinates"),
    "conv_sample_grads": ("weight", "bias"),
    "embedding_weight_grad": ("coordinates",),
    "scale_weight_grad": ("weight", "bias", "coordinates"),
    "norm_backward": ("weight", "bias", "coordinates", "samples"),
}
"""Arguments that say which results are wanted."""
LESS: list[tuple[str, dict[str, object]]] = [
    ("adagrad_", {"coordinate_sums": []}),
    ("adagrad_norm_", {"coordinate_sums": []}),
    ("scale_weight_grad", {"mean": None}),
    ("scale_weight_grad", {"rstd": None}),
    ("norm_backward", {"mean": None}),
    *(
        (name, dict.fromkeys(unwanted, False))
        for name, flags in FLAGS.items()
        for number in range(1, len(flags) + 1)
        for unwanted in itertools.combinations(flags, number)
    ),
]


@pytest.mark.parametrize(
    ("name", "changed"), LESS, ids=[f"{name}-{'-'.join(changed)}" for name, changed in LESS]
)
def test_opcheck_with_less(device: torch.device, name: str, changed: dict[str, object]) -> None:
    """Without something optional the fake returns what the kernel does, too."""
    op = getattr(torch.ops.adagrad_kernels, name).default
    names = [argument.name for argument in op._schema.arguments]
    args = dict(zip(names, case(name, False, device), strict=True))
    assert all(args[argument] is not value for argument, value in changed.items())
    torch.library.opcheck(op, tuple({**args, **changed}.values()))


def test_every_flag_is_left_out_once() -> None:
    """Ops declared later, too: what is optional is a bool, None or a list that may be empty."""
    for name in ops.NAMES:
        arguments = getattr(torch.ops.adagrad_kernels, name).default._schema.arguments
        optional = {
            argument.name
            for argument in arguments
            if argument.name == "coordinate_sums"
            or str(argument.type) in ("bool", "Optional[Tensor]")
        }
        tried = {argument for other, changed in LESS if other == name for argument in changed}
        assert tried == optional - {"maximize"}


def compiled_like_eager(name: str, device: torch.device, backend: str) -> None:
    torch.compiler.reset()
    args = case(name, False, device)
    op = getattr(torch.ops.adagrad_kernels, name).default
    compiled_ops = SimpleNamespace(
        **{name: torch.compile(op, fullgraph=True, backend=backend, dynamic=False)}
    )
    for one, other in zip(call(name, args, compiled_ops), call(name, args), strict=True):
        assert torch.equal(one, other)


@every_op
def test_fullgraph_compilation(device: torch.device, name: str) -> None:
    compiled_like_eager(name, device, "aot_eager")


# torch's own import of Triton and Inductor warns.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", ["adagrad_", "linear_weight_grad"])
def test_inductor(device: torch.device, name: str) -> None:
    compiled_like_eager(name, device, "inductor")


@every_op
@pytest.mark.parametrize("large", [False, True])
def test_the_same_result_twice(device: torch.device, name: str, large: bool) -> None:
    args = case(name, large, device)
    first = call(name, args)
    for _ in range(3):
        for one, other in zip(first, call(name, args), strict=True):
            assert torch.equal(one, other)


@compiled
@every_op
@pytest.mark.usefixtures("threads")
def test_the_same_result_with_any_number_of_threads(name: str) -> None:
    args = case(name, True)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(call(name, args))
    for other in results[1:]:
        for k, (a, b) in enumerate(zip(results[0], other, strict=True)):
            assert torch.equal(a, b), f"result {k}"


@compiled
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("shape", [(5, 2, 300, 500), (40, 9, 30, 130), (3, 300, 20, 30)])
def test_linear_with_any_number_of_threads(shape: tuple[int, ...]) -> None:
    """Large weights, small ones, few samples: each is split in its own way."""
    b, positions, out, features = shape
    grad_out, x = torch.randn(b, positions, out), torch.randn(b, positions, features)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(ops.linear_weight_grad(grad_out, x, b, coordinates=True))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@compiled
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa: str, tmp_path: Path) -> None:
    """In a process of its own, whose fresh memory is full of large numbers."""
    file = tmp_path / "results.pt"
    env = {**os.environ, "ADAGRAD_KERNELS_ISA": isa, "MALLOC_PERTURB_": "1"}
    subprocess.run([sys.executable, op_cases.__file__, str(file)], env=env, check=True)
    results = torch.load(file)
    assert results.keys() == {(name, large) for name in ops.NAMES for large in (False, True)}
    for (name, large), found in results.items():
        assert_correct(name, large, found)


def test_a_lower_instruction_set_is_used_when_asked_for() -> None:
    program = "from adagrad_kernels import _library; print(_library.instruction_set())"
    env = {**os.environ, "ADAGRAD_KERNELS_ISA": "baseline"}
    found = subprocess.check_output([sys.executable, "-c", program], env=env, text=True)
    assert found.strip() == ("baseline" if _library.load_error is None else "None")
