"""Compiles what a launcher would launch, ahead of time: no GPU takes part.

`record` runs a launcher on meta tensors and keeps its kernel launches; `compile_launch` compiles
one as Triton's just-in-time compiler would, with the same types, specialised values and options,
and reads the machine code's registers, stack (spills) and shared memory.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


@dataclass(frozen=True)
class Launch:
    """One kernel launch: arguments by name, and the compiler's options."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class Binary:
    """What became of a launch on one architecture."""

    registers: int
    stack: int
    shared: int
    ptx: str
    cubin: bytes


def record(
    monkeypatch: Any, launcher: Callable[..., Any], *arguments: Any, **named: Any
) -> list[Launch]:
    """The launches of launcher(*arguments, **named), which are not carried out."""
    launches: list[Launch] = []

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **given: Any) -> None:
        values = dict(zip(kernel.arg_names, args, strict=False))
        options = {k: v for k, v in given.items() if k not in kernel.arg_names}
        values |= {k: v for k, v in given.items() if k in kernel.arg_names}
        assert set(values) == set(kernel.arg_names), kernel.__name__
        launches.append(Launch(kernel, tuple(grid), values, options))

    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        launcher(*arguments, **named)
    return launches


def specialisation(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """What the launch is compiled for: (types, constants, alignments) of its arguments."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        special = not parameter.do_not_specialize
        aligned = isinstance(value, torch.Tensor)
        if parameter.is_constexpr or (special and type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = special and value % 16 == 0
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compile_launch(launch: Launch, arch: int) -> Binary:
    """Compiles for sm_<arch>."""
    signature, constants, attributes = specialisation(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    usage = _run_tool("cuobjdump", "-res-usage", compiled.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    asm = compiled.asm
    shared = compiled.metadata.shared
    return Binary(int(found[1]), int(found[2]), shared, asm["ptx"], asm["cubin"])


def instructions_of_a_pass(binary: Binary) -> int:
    """How many a warp issues in a pass through the loop around the matrix products.

    Branches ahead inside the loop are taken: they skip what is done at the end of a sample.
    """
    names: list[tuple[str, str]] = []  # instruction and operands
    labels: dict[str, int] = {}
    for line in _run_tool("nvdisasm", "-c", binary.cubin).splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(names)
        if found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)(.*)", line):
            names.append((found[1], found[2]))

    def target(k: int) -> int | None:
        label = re.search(r"\.L_x_\d+", names[k][1]) if names[k][0].startswith("BRA") else None
        return labels[label[0]] if label else None

    loops = [(to, k) for k in range(len(names)) if (to := target(k)) is not None and to < k]
    products = [k for k, (name, _) in enumerate(names) if "GMMA" in name]
    around = [(to, k) for to, k in loops if any(to <= product <= k for product in products)]
    first, last = max(around, key=lambda loop: loop[1] - loop[0])
    count, k = 0, first
    while k <= last:
        to, count = target(k), count + 1
        k = to if to is not None and k < to <= last else k + 1
    return count


def _run_tool(name: str, option: str, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
