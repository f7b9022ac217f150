"""torch.export and ONNX: a model of either class, in inference, is a graph of ordinary operations."""

import sys

import pytest
import torch
from torch.export import Dim, export

import revbifpn
from revbifpn import fast
from revbifpn.export import export_onnx, fold_norms
from tests.marks import product
from tests.networks import F32, TWO_LEVELS, image, narrow

MODULES = {"plain": revbifpn, "fast": fast}
STRIDE = 8  # of TWO_LEVELS
SHAPES = {
    "static": None,
    "batch": {0: Dim("n")},
    "size": {0: Dim("n"), 2: STRIDE * Dim("rows", min=1), 3: STRIDE * Dim("columns", min=1)},
}
GRAD = {"no_grad": torch.no_grad, "enable_grad": torch.enable_grad}
WITH_HEAD = {"classifier": {}, "pyramid": {"classes": None}}


def network(module=fast, **options):
    model = narrow(module, F32, **(TWO_LEVELS | options)).eval()
    for name, buffer in model.named_buffers():  # statistics that folding has to get right
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    return model


def images(shapes):
    """The example, and others where the graph takes them."""
    yield image(F32)
    if shapes != "static":
        yield image(F32, 3)
    if shapes == "size":
        yield image(F32, 3, 5 * STRIDE, 3 * STRIDE)


def close(found, wanted, tolerance=1e-5):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@product(
    "fast-batch-non_strict-no_grad",
    module=MODULES,
    shapes={name: name for name in SHAPES},
    strict={"strict": True, "non_strict": False},
    mode=GRAD,
)
def test_an_exported_program_computes_what_the_model_does(module, shapes, strict, mode):
    model = network(module)
    with mode():
        dynamic = SHAPES[shapes]
        program = export(model, (image(F32),), dynamic_shapes=dynamic and (dynamic,), strict=strict)
        for x in images(shapes):
            close(program.module()(x), model(x))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [target for target in targets if "revkernels" in target or "revbifpn" in target]


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_folded_norms_compute_the_same(module):
    model = network(module)
    folded = fold_norms(model)
    assert not [m for m in folded.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        close(folded(image(F32)), model(image(F32)))


@pytest.fixture
def run_onnx(tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "model.onnx"

    def run(x):
        outputs = onnxruntime.InferenceSession(path).run(None, {"image": x.numpy()})
        return [torch.from_numpy(y) for y in outputs]

    run.path, run.load = path, lambda: onnx.load(path)
    return run


@product("fast-static-classifier", module=MODULES, shapes={name: name for name in SHAPES}, options=WITH_HEAD)
def test_onnxruntime_agrees(module, shapes, options, run_onnx):
    model = network(module, **options)
    dynamic = {"dynamic_batch": shapes != "static", "dynamic_size": shapes == "size"}
    export_onnx(model, run_onnx.path, 64, batch=2, **dynamic)
    graph = run_onnx.load().graph
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    assert [out.name for out in graph.output] == (["map_0", "map_1"] if options else ["logits"])
    for x in images(shapes):
        with torch.no_grad():
            wanted = model(x)
        close(run_onnx(x), list(wanted) if options else [wanted])


@pytest.mark.slow
def test_onnxruntime_agrees_on_a_published_scale(run_onnx):
    torch.manual_seed(0)
    model = fast.revbifpn_s0().eval()
    export_onnx(model, run_onnx.path, 64, batch=2)
    with torch.no_grad():
        close(run_onnx(image(F32)), [model(image(F32))])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_exporter_of_traces_works_too(run_onnx):
    model = network()
    with torch.no_grad():
        torch.onnx.export(model, (image(F32),), run_onnx.path, dynamo=False, input_names=["image"])
        close(run_onnx(image(F32)), [model(image(F32))])


@pytest.mark.slow
def test_aot_inductor_compiles_a_model_to_a_file(tmp_path):
    model = network()
    with torch.no_grad():
        dynamic = ({0: Dim("n", min=1, max=16)},)
        program = export(model, (image(F32),), dynamic_shapes=dynamic)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        run = torch._inductor.aoti_load_package(path)
        for x in images("batch"):
            close(run(x), model(x))


def test_a_model_in_train_mode_is_refused(tmp_path):
    for call in (fold_norms, lambda model: export_onnx(model, tmp_path / "model.onnx")):
        with pytest.raises(ValueError, match=r"got one in train mode; call model.eval\(\)"):
            call(network().train())
    assert not list(tmp_path.iterdir())


def test_missing_onnx_is_one_line_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"export_onnx needs onnx and onnxscript: pip install 'revbifpn-fast\[onnx\]'"
    ):
        export_onnx(network(), "never.onnx")


def test_scripting_says_what_to_use():
    for module in (network().rev_stack, torch.nn.Sequential(network())):
        with pytest.raises(RuntimeError, match=r"use torch.export.export\(model, \(x,\)\), or torch.jit.trace"):
            torch.jit.script(module)
