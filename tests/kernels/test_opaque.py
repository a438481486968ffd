"""torch.compile calls the operator between two graphs; what records graphs is refused."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from moba_kernels import Full, MoBA, Pack, attend, key_conv, moba_attn_varlen, pool_sums, route

SPECS = [Full(), MoBA(8, 3)]


class Block(nn.Module):
    """Attention between two products, as a layer has it."""

    def __init__(self, spec):
        super().__init__()
        self.spec = spec
        self.project, self.after = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x, pack):
        q = self.project(x).view(-1, 4, 16)
        k = q[:, :2]
        return self.after(attend(q, k, k, self.spec, cu_seqlens=pack).out.flatten(1)).cos()


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_a_compiled_model_computes_the_same_and_has_a_graph_on_either_side(spec):
    graphs = []

    def note(graph, _inputs):
        graphs.append([node.name for node in graph.graph.nodes if node.op.startswith("call")])
        return graph

    torch.manual_seed(0)
    block = Block(spec)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend=note, dynamic=True)
    for documents in ([0, 60], [0, 10, 96], [0, 3, 50, 131], [0, 200]):
        pack, x = Pack(documents), torch.randn(documents[-1], 64)
        results = []
        for model in (block, compiled):
            given = x.clone().requires_grad_()
            out = model(given, pack)
            results.append((out, *torch.autograd.grad(out.square().sum(), (given, *block.parameters()))))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    before, after = graphs  # made once, whatever comes later
    assert "cos" in after and "cos" not in before


def test_one_graph_cannot_hold_it():
    torch._dynamo.reset()
    compiled = torch.compile(Block(Full()), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
        compiled(torch.randn(8, 64), Pack([0, 8]))


def test_an_unknown_argument_is_a_type_error_and_known_ones_can_be_asked_for():
    q = torch.randn(8, 2, 16)
    with pytest.raises(TypeError, match=r"attend.*'scale'"):
        attend(q, q, q, Full(), scale=1.0)
    with pytest.raises(TypeError, match=r"key_conv.*'halo'"):
        key_conv(q, torch.ones(2, 16, 3), document_offset=torch.arange(8), halo=None)
    assert "softmax_scale" in inspect.signature(attend).parameters and attend.__name__ == "attend"


def of_row(q, k):
    return attend(q, k, k, MoBA(8, 3)).out


CALLS = {
    "attend": of_row,
    "route": lambda q, k: route(q, k, MoBA(8, 3)).stored,
    "pool_sums": lambda q, k: pool_sums(k, pack=Pack([0, 32]), chunk_size=8),
    "moba_attn_varlen": lambda q, k: moba_attn_varlen(q, k, k, [0, 32], 32, 8, 3),
    "key_conv": lambda q, k: key_conv(k, k.new_ones(2, 16, 3), document_offset=torch.arange(32)),
}
RECORDERS = {
    "make_fx": make_fx,
    "make_fx of fake tensors": lambda call: make_fx(call, tracing_mode="fake"),
    "torch.jit.trace": lambda call: lambda *args: torch.jit.trace(call, args),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@pytest.mark.parametrize("recorder", RECORDERS)
@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_recorded_without_the_work_of_kernels(name, recorder):
    q, k = torch.randn(32, 4, 16), torch.randn(32, 2, 16)
    with pytest.raises(RuntimeError, match=f"{name} cannot be recorded .* fix: keep it out"):
        RECORDERS[recorder](CALLS[name])(q, k)


def test_nothing_is_exported_without_the_work_of_kernels():
    class Row(nn.Module):
        def forward(self, q, k):
            return of_row(q, k)

    with pytest.raises(RuntimeError, match="attend cannot be recorded"):
        torch.export.export(Row(), (torch.randn(32, 4, 16), torch.randn(32, 2, 16)))
