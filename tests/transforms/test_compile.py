"""torch.compile without a graph break, in both directions, with the same values and gradients."""

import pytest
import torch

from pyro_flowguides.transforms import (
    InverseAutoregressive,
    MaskedAutoregressive,
    OrthogonalSylvester,
    Planar,
    TriangularSylvester,
)
from tests.transforms.families import CONTEXT_DIM, DEFAULT, name, randomize

AUTOREGRESSIVE = InverseAutoregressive, MaskedAutoregressive


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compare(case, direction, dim, backend):
    if torch.__version__ < (2, 5) and (case.conditional or case.family in AUTOREGRESSIVE):
        pytest.skip("the compiler of this version fails on buffers")
    module = case.build(dim, 0.5)
    x = torch.randn(4, dim, requires_grad=True)
    context = torch.randn(4, CONTEXT_DIM, requires_grad=True)

    def call(x, context):
        flow = module.condition(context) if case.conditional else module
        return getattr(flow, direction)(x)

    expected, compiled = call(x, context), torch.compile(call, fullgraph=True, backend=backend)(x, context)
    inputs = [x, context, *(p for p in module.parameters() if p.numel())]
    weights = torch.randn(4, dim), torch.randn(4)
    gradients = [
        torch.autograd.grad(
            sum((o * w).sum() for o, w in zip(outputs, weights, strict=True)), inputs, allow_unused=True
        )
        for outputs in (expected, compiled)
    ]
    for one, other in zip(expected, compiled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("case", DEFAULT, ids=name)
def test_forward(case):
    """Down to the operations of forward and backward, for every formula; a context only changes numbers in it."""
    compare(case, "forward_and_ladj", 2, "eager" if case.conditional else "aot_eager")


@pytest.mark.parametrize("case", DEFAULT, ids=name)
def test_inverse(case):
    """Down to the operations, for one family of each solver."""
    solvers = Planar, InverseAutoregressive, TriangularSylvester
    compare(case, "inverse_and_ladj", 2, "aot_eager" if case.family in solvers else "eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch._prims_common.check:FutureWarning")  # inductor on its own code
def test_machine_code():
    """With code generation, for the flow with the most unusual operation: a QR factorization."""
    flow, x = randomize(OrthogonalSylvester(3), 0.5), torch.randn(4, 3)
    with torch.no_grad(), torch._inductor.config.patch({"compile_threads": 1, "cpp.simdlen": 1}):
        compiled = torch.compile(flow.forward_and_ladj, fullgraph=True)(x)
    for one, other in zip(compiled, flow.forward_and_ladj(x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
