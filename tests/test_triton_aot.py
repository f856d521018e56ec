"""Triton kernels compiled ahead of time for GPUs that are not here: registers, spills, memory.

The launches are those that the launchers would make. The tiles' registers are an estimate in the
sources; here ptxas has the word.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from adagrad_kernels import _library, ops, triton_kernels

pytest.importorskip("triton")
from triton_aot import (
    Binary,
    Launch,
    compile_launch,
    instructions_of_a_pass,
    record,
    specialisation,
)

from adagrad_kernels.triton_kernels import (
    adagrad,
    common,
    conv,
    embedding,
    finish,
    linear,
    linear_update,
    norm,
    pieces,
    statistics,
)

ARCHS = (80, 90, 100)
# Bytes that a block may have: on the smallest GPU that runs sm_80's code (sm_86, sm_89), and there.
SHARED = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
SPILL = 32  # bytes: ptxas gives up a few for the sake of fewer registers, one version here or there
PRODUCTS = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")  # tensor cores: sm_90, sm_100, sm_80

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def meta(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def linear_case(shape: tuple[int, ...], dtype: torch.dtype, coordinates: bool, method: str) -> Any:
    b, positions, rows, columns = shape
    g, x = meta(b, positions, rows, dtype=dtype), meta(b, positions, columns, dtype=dtype)
    return linear.linear_weight_grad, (g, x, 64, True, False, coordinates, method)


def conv_case(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    coordinates: bool,
    last: bool = False,
    groups: int = 1,
    dims: int = 2,
    method: str = "direct",
) -> Any:
    b, rows, columns, size = shape
    format_ = {2: torch.channels_last, 3: torch.channels_last_3d}[dims] if last else None
    g, x = (meta(b, c, *(size,) * dims, dtype=dtype) for c in (rows, columns))
    if format_ is not None:
        g, x = g.to(memory_format=format_), x.to(memory_format=format_)
    ones = (1,) * dims
    options = ((3,) * dims, ones, ones, ones, groups, 64, True, False, coordinates, method)
    return conv.conv_weight_grad, (g, x, *options)


def update_case(positions: int, dtype: torch.dtype, coordinates: bool, b: int = 64) -> Any:
    g = meta(b, positions, 1024, dtype=dtype)
    hyperparameters = (0.1, 1e-10, 0.01, False, 1.0)
    tensors = (g, g, meta(1024, 1024), meta(1024, 1024))
    return linear_update.linear_adagrad_, (*tensors, 64, False, coordinates, *hyperparameters)


def norm_case(
    shape: tuple[int, ...], statistics: tuple[int, ...], dtype: torch.dtype, last: bool = False
) -> Any:
    b, positions, channels, inner = shape
    g = meta(b, positions, inner, channels, dtype=dtype).transpose(2, 3) if last else None
    g = meta(*shape, dtype=dtype) if g is None else g
    tensors = (g, g, meta(*statistics), meta(*statistics), meta(channels))
    return norm.norm_backward, (*tensors, 64, True, True, False, False)


# name: launcher with arguments, float32 precision.
TILES: dict[str, tuple[Any, str]] = {
    "outer": (linear_case((64, 1, 1024, 1024), BF16, True, "outer"), "tf32"),
    "outer-exact": (linear_case((64, 1, 1024, 1024), F32, True, "outer"), "ieee"),
    "direct": (linear_case((16, 256, 1024, 1024), BF16, False, "direct"), "ieee"),
    "direct-coordinates": (linear_case((16, 256, 1024, 1024), BF16, True, "direct"), "ieee"),
    "direct-exact": (linear_case((16, 256, 1024, 1024), F32, True, "direct"), "ieee"),
    "direct-1000": (linear_case((16, 250, 1000, 1000), BF16, False, "direct"), "ieee"),
    "direct-coordinates-1000": (linear_case((16, 250, 1000, 1000), BF16, True, "direct"), "ieee"),
    "direct-exact-1000": (linear_case((16, 250, 1000, 1000), F32, True, "direct"), "ieee"),
    "direct-tf32-1000": (linear_case((16, 250, 1000, 1000), F32, False, "direct"), "tf32"),
    "conv": (conv_case((16, 128, 64, 16), BF16, True), "ieee"),
    "update": (update_case(256, BF16, True), "ieee"),
    "update-odd": (update_case(250, BF16, True), "ieee"),
    "update-outer-exact": (update_case(1, F32, True), "ieee"),
    "outer-tf32": (linear_case((64, 1, 1024, 1024), F32, True, "outer"), "tf32"),
    "outer-fp16": (linear_case((64, 1, 1024, 1024), F16, True, "outer"), "tf32"),
    "direct-tf32": (linear_case((16, 256, 1024, 1024), F32, False, "direct"), "tf32"),
    "direct-48": (linear_case((16, 64, 48, 48), BF16, True, "direct"), "ieee"),
    "direct-16": (linear_case((16, 64, 16, 768), BF16, True, "direct"), "ieee"),
    "gram": (linear_case((16, 128, 1024, 1024), BF16, False, "gram"), "ieee"),
    "gram-exact": (linear_case((16, 128, 1024, 1024), F32, False, "gram"), "ieee"),
    "conv-last": (conv_case((16, 128, 64, 16), BF16, True, last=True), "ieee"),
    "conv-large": (conv_case((16, 128, 128, 16), BF16, False, last=True), "ieee"),
    "conv-large-tf32": (conv_case((16, 128, 128, 16), F32, False), "tf32"),
    "conv-64": (conv_case((16, 64, 64, 32), BF16, False, last=True), "ieee"),
    "conv-64-tf32": (conv_case((16, 64, 64, 32), F32, True), "tf32"),
    "conv-odd": (conv_case((16, 100, 48, 9), BF16, True, last=True), "ieee"),
    "conv-odd-tf32": (conv_case((16, 100, 50, 9), F32, False), "tf32"),
    "conv-exact": (conv_case((16, 128, 64, 16), F32, True), "ieee"),
    "conv-tf32": (conv_case((16, 128, 64, 16), F32, True), "tf32"),
    "conv-first": (conv_case((16, 64, 3, 32), F32, False), "ieee"),
    "conv-depthwise": (conv_case((16, 64, 64, 16), BF16, False, groups=64), "ieee"),
    "conv3d": (conv_case((4, 128, 64, 8), F32, True, dims=3), "ieee"),
    "conv-gram": (conv_case((16, 512, 512, 4), BF16, False, method="gram"), "ieee"),
    "conv-gram-last": (conv_case((16, 512, 512, 4), F16, False, last=True, method="gram"), "ieee"),
    "conv-gram-exact": (conv_case((16, 512, 512, 8), F32, False, method="gram"), "ieee"),
    "conv-gram-tf32": (conv_case((16, 512, 512, 9), F32, False, method="gram"), "tf32"),
    "direct-50257": (linear_case((16, 256, 50257, 768), BF16, True, "direct"), "ieee"),
    "direct-odd": (linear_case((16, 250, 1001, 777), BF16, False, "direct"), "ieee"),
    "direct-odd-tf32": (linear_case((16, 250, 1001, 777), F32, False, "direct"), "tf32"),
    "update-outer": (update_case(1, BF16, False), "tf32"),
    "update-exact": (update_case(256, F32, False), "ieee"),
}
# dimensions, size, kernel_size, stride, padding: whether pixels of a patch follow each other
PATCHES = {
    (2, 32, 1, 1, 0): False,  # but for the ends of rows: there they do not
    (2, 32, 1, 2, 0): False,
    (2, 32, 3, 1, 1): False,
    (3, 16, 1, 1, 0): False,
    (1, 64, 1, 2, 0): False,
    (1, 64, 3, 1, 1): False,
    (1, 64, 1, 1, 0): True,
}
WEIGHTS = [meta(1000, 1000), meta(77)]
MEMORY_BOUND: dict[str, Any] = {
    "embedding": (
        embedding.embedding_weight_grad,
        (meta(4, 100, 768, dtype=BF16), meta(4, 100, dtype=torch.int64), 1000, -1, 64, True),
    ),
    "layer_norm": (
        norm.scale_weight_grad,
        (
            meta(4, 600, 768, 1),
            meta(4, 600, 768, 1),
            meta(4, 600, 1, 1),
            meta(4, 600, 1, 1),
            64,
            True,
            True,
            True,
        ),
    ),
    "group_norm": (
        norm.scale_weight_grad,
        (
            meta(4, 1, 64, 256),
            meta(4, 1, 64, 256),
            meta(4, 1, 64, 1),
            meta(4, 1, 64, 1),
            64,
            True,
            True,
            False,
        ),
    ),
    "layer_norm_backward": norm_case((8, 1024, 768, 1), (8, 1024, 1, 1), F32),
    "long_rows_backward": norm_case((8, 100, 8192, 1), (8, 100, 1, 1), BF16),
    "rows_of_4096_backward": norm_case((8, 100, 4000, 1), (8, 100, 1, 1), F32),
    "short_rows_backward": norm_case((8, 1000, 60, 1), (8, 1000, 1, 1), BF16),
    "group_norm_backward": norm_case((4, 1, 64, 256), (4, 1, 32, 1), F32),
    "batch_norm_backward": norm_case((4, 1, 64, 16), (1, 1, 64, 1), F32),
    "channels_last_backward": norm_case((4, 1, 256, 64), (4, 1, 32, 1), BF16, last=True),
    "many_pixels_backward": norm_case((1, 1, 3, 1 << 21), (1, 1, 3, 1), F32, last=True),
    "sample_statistics": (statistics.sample_statistics, (meta(64, 100_000, dtype=BF16),)),
    "pool_samples": (statistics.pool_samples, ([meta(2, 1024)] * 2, [1000, 1000])),
    "adagrad": (
        adagrad.adagrad_,
        (WEIGHTS, WEIGHTS, WEIGHTS, WEIGHTS, 0.1, 1e-10, 0.0, False, 1.0, 8),
    ),
    "adagrad_norm": (
        adagrad.adagrad_norm_,
        (
            WEIGHTS,
            WEIGHTS,
            meta(1, dtype=torch.float64),
            [],
            [0.1] * 2,
            1e-10,
            [0.0] * 2,
            False,
            1.0,
            8,
        ),
    ),
}


@pytest.fixture(autouse=True)
def no_precision_left_behind() -> Iterator[None]:
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [setting.fp32_precision for setting in settings]
    yield
    for setting, value in zip(settings, before, strict=True):
        setting.fp32_precision = value


def launches(
    patch: pytest.MonkeyPatch, case: Any, precision: str = "ieee", arch: int = 90
) -> list[Launch]:
    patch.setattr(common, "capability", lambda device: divmod(arch, 10))
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision
    launcher: Callable[..., Any] = case[0]
    return record(patch, launcher, *case[1])


def check(binary: Binary, launch: Launch, arch: int) -> None:
    name = launch.kernel.__name__
    assert binary.stack <= SPILL, f"{name} spills {binary.stack} bytes"
    assert binary.shared <= SHARED[arch], f"{name} takes {binary.shared} bytes of shared memory"
    assert binary.registers * 32 * launch.options["num_warps"] <= 1 << 16
    assert all(size < 1 << 16 for size in launch.grid[1:])  # the first axis has 31 bits
    assert "st.global" in binary.ptx, f"{name} stores nothing"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case", TILES)
def test_tiles_spill_nothing(monkeypatch: pytest.MonkeyPatch, case: str, arch: int) -> None:
    found = launches(monkeypatch, *TILES[case], arch)
    products = [launch for launch in found if "PRECISION" in launch.kernel.arg_names]
    assert products
    for launch in products:
        binary = compile_launch(launch, arch)
        check(binary, launch, arch)
        assert any(product in binary.ptx for product in PRODUCTS), "no tensor cores"
        if arch == 90 and launch.arguments.get("BM", launch.arguments.get("BT")) >= 64:
            assert "wgmma.mma_async" in binary.ptx


# Issue slots that a pass takes, over the cycles that the tensor cores of sm_90 need for it: above 1
# instructions bound the kernel. A fifth is left for other versions of Triton.
PASSES = {
    "direct": 0.5,
    "direct-coordinates": 0.9,
    "direct-1000": 0.8,
    "direct-tf32": 0.9,
    "gram": 0.9,
    "conv-large": 1.0,
    "conv-large-tf32": 1.2,
    "conv-64": 1.8,
}


@pytest.mark.parametrize("case", PASSES)
def test_a_pass_issues_few_instructions(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    (product,) = (
        launch
        for launch in launches(monkeypatch, *TILES[case])
        if "PRECISION" in launch.kernel.arg_names
    )
    sizes = product.arguments
    area = sizes["BT"] ** 2 if "BT" in sizes else sizes["BM"] * sizes["BN"]
    cycles = area * sizes["BK"] / (1024 if sizes["p_g"].dtype == F32 else 2048)
    issued = instructions_of_a_pass(compile_launch(product, 90)) * product.options["num_warps"] / 4
    assert issued <= PASSES[case] * cycles, f"{issued / cycles:.2f}"


@pytest.mark.parametrize("case", PATCHES)
def test_loads_of_patches_are_joined_only_where_they_follow_each_other(
    monkeypatch: pytest.MonkeyPatch, case: tuple[int, ...]
) -> None:
    """The kernel claims that they do, so that threads run along them."""
    dims, size, kernel, stride, padding = case
    out = (size + 2 * padding - kernel) // stride + 1
    g, x = meta(16, 64, *(out,) * dims), meta(16, 64, *(size,) * dims)
    options = ((n,) * dims for n in (kernel, stride, padding, 1))
    call = (g, x, *options, 1, 64, True, False, False, "direct")
    (product,) = (
        launch
        for launch in launches(monkeypatch, (conv.conv_weight_grad, call), "tf32")
        if "PRECISION" in launch.kernel.arg_names
    )
    ptx = compile_launch(product, 90).ptx
    sizes = set(re.findall(r"cp\.async\.\w+\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)", ptx))
    assert sizes == ({"0x10"} if PATCHES[case] else {"0x10", "0x4"})  # of g, and of x


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case", MEMORY_BOUND)
def test_memory_bound_kernels_leave_room_for_many_warps(
    monkeypatch: pytest.MonkeyPatch, case: str, arch: int
) -> None:
    found = {launch.kernel.__name__: launch for launch in launches(monkeypatch, MEMORY_BOUND[case])}
    assert found
    for launch in found.values():
        binary = compile_launch(launch, arch)
        check(binary, launch, arch)
        assert binary.registers <= 128, f"{launch.kernel.__name__} takes {binary.registers}"


@pytest.mark.parametrize("case", ["direct", "direct-exact", "conv", "conv-64", "conv-large-tf32"])
def test_as_many_programs_as_registers_allow(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """The estimate by which tiles are divided, against the machine code."""
    estimates, estimate = [], pieces.resident

    def resident(tile: Any, accumulators: int) -> int:
        estimates.append(estimate(tile, accumulators))
        return estimates[-1]

    monkeypatch.setattr(pieces, "resident", resident)
    found = launches(monkeypatch, *TILES[case])
    (product,) = (
        launch for launch in found if "BM" in launch.arguments and "BK" in launch.arguments
    )
    registers = -(-compile_launch(product, 90).registers // 8) * 8
    allowed = 65536 // (32 * product.options["num_warps"] * registers)
    assert allowed / 2 <= estimates[0] <= 1.5 * allowed


BATCHES = (1, 3, 16, 33, 40, 64)
GROWING: dict[str, Callable[[int], Any]] = {
    "outer": lambda b: linear_case((b, 1, 1024, 1024), BF16, True, "outer"),
    "direct": lambda b: linear_case((b, 256, 1000, 768), BF16, False, "direct"),
    "gram": lambda b: linear_case((b, 16, 1024, 1024), BF16, False, "gram"),
    "conv": lambda b: conv_case((b, 512, 512, 4), F32, True),
    "update": lambda b: update_case(16, BF16, True, b),
    "embedding": lambda b: (
        embedding.embedding_weight_grad,
        (meta(b, 100, 768, dtype=BF16), meta(b, 100, dtype=torch.int64), 1000, -1, 64, True),
    ),
    "layer_norm": lambda b: (
        norm.scale_weight_grad,
        (*(meta(b, 100, 768, 1),) * 2, *(meta(b, 100, 1, 1),) * 2, 64, True, True, True),
    ),
    "sample_statistics": lambda b: (statistics.sample_statistics, (meta(b, 1000),)),
}


@pytest.mark.parametrize("case", GROWING)
def test_one_compiled_kernel_serves_all_batch_sizes(
    monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Batches grow during training: what is compiled must not depend on them."""
    compiled: dict[str, list[Any]] = {}
    for b in BATCHES:
        found: dict[str, list[Any]] = {}
        for launch in launches(monkeypatch, GROWING[case](b)):
            found.setdefault(launch.kernel.__name__, []).append(specialisation(launch))
        for name, special in found.items():
            assert special == compiled.setdefault(name, special), f"{name} of {b} samples"
    assert compiled


def test_chunks_of_a_norm_may_have_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """They grow with the batch, from 32 positions to 512."""
    compiled = []
    for b in (8, 33, 64, 100, 400):
        tensors = (*(meta(b, 512, 768, 1),) * 2, *(meta(b, 512, 1, 1),) * 2)
        case = norm.scale_weight_grad, (*tensors, 1024, True, True, True)
        first = launches(monkeypatch, case)[0]
        assert first.kernel is norm.scale_chunk_kernel
        compiled.append(specialisation(first))
    assert all(each == compiled[0] for each in compiled)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case", ["direct", "direct-coordinates", "conv-last"])
def test_what_follows_a_product_takes_few_registers(
    monkeypatch: pytest.MonkeyPatch, case: str, arch: int
) -> None:
    monkeypatch.setattr(common, "multiprocessors", lambda device: 7)  # for so few, tiles are cut
    after = [pieces.join_pieces_kernel, finish.finish_kernel]
    found = [
        launch for launch in launches(monkeypatch, *TILES[case], arch) if launch.kernel in after
    ]
    assert [launch.kernel for launch in found] == after
    for launch in found:
        binary = compile_launch(launch, arch)
        check(binary, launch, arch)
        assert binary.registers <= 128


def test_outer_products_leave_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """One position a sample: its norm does not come from tiles; 1 GB for 65,536 of 4096 × 4096."""
    found = launches(monkeypatch, linear_case((64, 1, 1024, 1024), F32, True, "outer"))
    assert [launch.arguments["parts"] for launch in found[:1]] == [0]


@pytest.mark.parametrize(("samples", "n", "most"), [(8, 16, 16), (1 << 16, 100, 8192)])
def test_last_launch_has_not_a_program_for_every_short_row(
    monkeypatch: pytest.MonkeyPatch, samples: int, n: int, most: int
) -> None:
    vectors, device = meta(1, samples, 1, n), torch.device("meta")
    arguments = (device, meta(samples, 9), vectors, samples, samples + 1024, False)
    found = record(monkeypatch, finish.finish, *arguments)
    assert found[0].grid[0] <= most


ONE = [meta(1)]
ONES: dict[str, Any] = {
    "outer": linear_case((1, 1, 1, 1), F32, True, "outer"),
    "direct": linear_case((1, 2, 1, 1), F32, True, "direct"),
    "gram": linear_case((1, 2, 1, 1), F32, False, "gram"),
    "conv": conv_case((1, 1, 1, 1), F32, True, dims=1),
    "embedding": (
        embedding.embedding_weight_grad,
        (meta(1, 1), meta(1, dtype=torch.int64), 1, 1, 1, True),
    ),
    "scale": (norm.scale_weight_grad, (meta(1, 1, 1, 1),) * 4 + (1, True, True, True)),
    "adagrad": (adagrad.adagrad_, (ONE, ONE, ONE, ONE, 1.0, 1.0, 1.0, True, 1.0, 1)),
    "update": (
        linear_update.linear_adagrad_,
        (*(meta(1, 1),) * 4, 1, True, True, 1.0, 1.0, 1.0, False, 1.0),
    ),
}


@pytest.mark.parametrize("case", ONES)
def test_ones_compile(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Triton compiles arguments that are 1 as constants: other code than with any other size."""
    for launch in launches(monkeypatch, ONES[case]):
        assert "st.global" in compile_launch(launch, 90).ptx


def test_every_kernel_is_registered_once() -> None:
    """Where the compiled library has no CUDA kernel, the Triton kernel takes its place."""
    key = "CUDA"

    def has(name: str) -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"{_library.NAMESPACE}::{name}", key)

    compiled = {name for name in ops.NAMES if has(name)}
    registration = triton_kernels.register()
    try:
        assert all(has(name) for name in triton_kernels.FAMILIES)
    finally:
        registration._destroy()
    assert {name for name in ops.NAMES if has(name)} == compiled


def test_unsuitable_arguments_go_to_the_reference() -> None:
    assert triton_kernels.suits(meta(2, 3), meta(2, 3))
    assert triton_kernels.suits([meta(2, 3), meta(0)], [meta(2, 3), meta(0)])
    assert not triton_kernels.suits(meta(2, 3, dtype=torch.float64), meta(2, 3))
    assert not triton_kernels.suits([meta(2), meta(2, dtype=torch.float64)], [meta(2), meta(2)])
    assert not triton_kernels.suits(meta(0, 3), meta(0, 3))
    assert triton_kernels.suits([meta(2, 3)], [2])
    assert not triton_kernels.suits(meta(2, 2**31), meta(2, 3))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the kernels are loaded")
def test_says_why_it_is_not_loaded() -> None:
    assert triton_kernels.load_error == "no CUDA device"
