"""Tools that trace a model (``torch.jit.trace``, fvcore's and mmengine's counters) see ordinary operations."""

import io

import pytest
import torch

import revbifpn
from revbifpn import fast
from tests.marks import covering
from tests.networks import F32, TWO_LEVELS, image, narrow

pytestmark = covering

MODULES = pytest.mark.parametrize("module", [revbifpn, fast], ids=["plain", "fast"])


def traced(model, x):
    return torch.jit.trace(model, x, check_trace=False)


@MODULES
@pytest.mark.parametrize("classes", [7, None])
@pytest.mark.parametrize("options", [{}, {"reversible": False}, {"stream": "fixed16"}], ids=str)
def test_a_traced_model_computes_what_the_model_does(module, options, classes):
    model = narrow(module, F32, **(TWO_LEVELS | {"classes": classes} | options)).eval()
    x = image(F32)
    found = traced(model, x)(x)
    exact = "stream" not in options  # a trace has no streams to round
    with torch.no_grad():
        wanted = model(x)
    torch.testing.assert_close(
        found, wanted if classes else tuple(wanted), **({} if exact else {"rtol": 0.1, "atol": 0.1})
    )


@MODULES
def test_a_trace_has_pytorchs_operations_alone_and_can_be_saved(module):
    model, x = narrow(module, F32, **TWO_LEVELS).eval(), image(F32)
    with torch.no_grad():
        trace = traced(model, x)
    kinds = {node.kind() for node in trace.inlined_graph.nodes()}
    assert not [kind for kind in kinds if kind.startswith("revkernels") or kind == "prim::PythonOp"]
    file = io.BytesIO()
    torch.jit.save(trace, file)
    file.seek(0)
    assert torch.equal(torch.jit.load(file)(x), trace(x))


@MODULES
def test_fvcore_counts_the_network(module):
    fvcore = pytest.importorskip("fvcore.nn")
    x = image(F32)
    counts = [fvcore.FlopCountAnalysis(narrow(m, F32, **TWO_LEVELS).eval(), x).total() for m in (module, revbifpn)]
    assert counts[0] == counts[1] > 0
