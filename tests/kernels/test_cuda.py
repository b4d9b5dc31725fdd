"""Every op on a real GPU against its reference; a fallback is an error here."""

from collections.abc import Iterator

import pytest
import torch

from cases import _case
from vdit_quant.kernels import dispatch
from vdit_quant.kernels.hadamard import hadamard
from vdit_quant.kernels.int4_linear import int4_linear
from vdit_quant.kernels.quant_token import quant_token

pytestmark = pytest.mark.gpus(1)


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    with dispatch.use(mode="auto", strict=True):
        yield


globals().update(_case.tests("cuda"))


def test_nothing_fell_back() -> None:
    for op in dispatch.TWINS:
        if "fp8" in op and torch.cuda.get_device_capability() < (8, 9):
            continue
        expected = ("triton", dispatch.LIBRARIES[op][0]) if op in dispatch.LIBRARIES else ("triton",)
        assert dispatch.explain(op, "cuda").backend in expected


def test_inside_a_cuda_graph_and_on_a_side_stream(make_layer) -> None:
    a = make_layer(129, 1152, 3456, 64, dtype=torch.bfloat16, device="cuda")

    def layer() -> torch.Tensor:
        codes, scale = quant_token(hadamard(a.x, None, 128, "sylvester"))
        return int4_linear(codes, scale, a.packed, a.weight_scale, a.group_scale, a.bias, torch.bfloat16)

    want = layer()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = layer()
    got.zero_()
    graph.replay()
    assert torch.equal(got, want)
