"""torch.compile of a converted model: what lies around its blocks is compiled, the blocks run as ever."""

import copy

import pytest
import torch

from revbifpn.dual_residual import DualResidualSequence, convert, runs_of
from revbifpn.memory import PeakMemory
from tests.dual_residual.networks import Encoder, attention_blocks, step, tokens
from tests.marks import covering, slow
from tests.networks import difference

pytestmark = covering


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def kept(model, x):
    model(x).sum().backward()  # compiled by now
    with PeakMemory() as meter:
        y = model(x)
        live = meter.live_bytes
    y.sum().backward()
    return live


EXACT = pytest.mark.parametrize("exact", [True, *slow([False])])
ON_GRID = 1e-3  # compiled layers round elsewhere, which moves values of an exact stream to the next point of its grid


@EXACT
def test_a_compiled_model_trains_as_it_does_and_keeps_as_little(exact):
    model = Encoder(depth=3, drop=0.1)
    convert(model, alpha=0.5, beta=0.5, exact=exact)
    compiled, x = torch.compile(copy.deepcopy(model), backend="aot_eager"), tokens(shape=(2, 40, 8))
    for _ in range(2):
        assert difference(step(compiled, x), step(model, x)) < (ON_GRID if exact else 1e-5)
    stored = copy.deepcopy(model)
    for run in runs_of(stored):
        run.reversible = False
    assert kept(compiled, x) < 1.3 * kept(model, x) < 0.7 * kept(stored, x)


@pytest.mark.slow
@pytest.mark.parametrize("exact", [True, False])
def test_a_compiled_stack_trains_as_it_does(exact):
    stack = DualResidualSequence(*attention_blocks(2), alpha=0.5, beta=0.5, exact=exact)
    compiled, x = torch.compile(copy.deepcopy(stack), backend="aot_eager"), tokens()
    for _ in range(2):
        assert difference(step(compiled, x), step(stack, x)) < (ON_GRID if exact else 1e-5)


def test_a_compiled_model_at_the_pretrained_point_is_itself():
    model = Encoder(depth=2).eval()
    x = tokens(shape=(2, 5, 8))
    with torch.no_grad():
        wanted = model(x)
        convert(model)
        assert difference([torch.compile(model, backend="eager")(x)], [wanted]) < 1e-6
