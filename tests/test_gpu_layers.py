"""What only a GPU can show of the ops that layers call: streams, graphs, synchronisation, bits."""

import pytest
import torch
from op_cases import call, case
from torch import Tensor

from adagrad_kernels import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.parametrize("name", [n for n in ops.NAMES if n.endswith(("_grad", "_backward"))]),
]

DEVICE = torch.device("cuda")


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_host_does_not_wait(name: str) -> None:
    args = case(name, True, DEVICE)
    call(name, args)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(name, args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_current_stream_is_used(name: str) -> None:
    """Inputs that another stream still writes are read only after that."""
    args, stream = case(name, True, DEVICE), torch.cuda.Stream()
    wanted = call(name, args)
    tensors = [a for a in args if isinstance(a, Tensor)]
    values = [t.clone() for t in tensors]
    for t in tensors:
        t.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # some 0.1 s
        for t, value in zip(tensors, values, strict=True):
            t.copy_(value)
        found = call(name, args)
    stream.synchronize()
    assert same(found, wanted)


def test_a_captured_graph_repeats_the_call(name: str) -> None:
    args, stream = case(name, True, DEVICE), torch.cuda.Stream()
    wanted = call(name, args)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(name, args)  # warm-up, as torch asks for
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(name, args)
    for t in found:
        t.fill_(7)
    graph.replay()
    assert same(found, wanted)
