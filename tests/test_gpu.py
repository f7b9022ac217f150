"""On a GPU: every op against the reference in float64 on the CPU, and what the fast model promises.

Skipped without one. Inputs are fresh in every run: a failure shows its seed, and ``REVBIFPN_TEST_SEED`` repeats it.
With ``REVBIFPN_TEST_DEVICE=cpu`` what does not need CUDA itself runs on the CPU's kernels, to try the tests.
"""

import copy
import itertools
import os
import time
import zlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import revbifpn
from revbifpn import GraphedStep, fast, fused
from revbifpn.memory import measure_sample
from revkernels import dispatch
from revkernels.reference import accumulate_dtype
from revkernels.registry import OPS
from revkernels.testing import relative_error
from tests.golden import values as golden
from tests.networks import error
from tests.ops.test_registry import KERNELS

DEVICE = os.environ.get("REVBIFPN_TEST_DEVICE", "cuda")
SEED = int(os.environ.get("REVBIFPN_TEST_SEED") or time.time_ns() % 2**31)
F64, F32 = torch.float64, torch.float32
DTYPES = (F32, F64, torch.float16, torch.bfloat16)
# By the output's dtype: what a sum in another order may add to twice the reference's own error.
EPSILON = {F32: 5e-6, F64: 1e-13, torch.float16: 1e-4, torch.bfloat16: 1e-4}

pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason=f"no GPU: torch {torch.__version__} sees none"
)
needs_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="about CUDA itself")
ops = pytest.mark.parametrize("op", KERNELS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


@pytest.fixture
def g(request):
    """A generator of its own for every test; pytest shows the line with the seed when the test fails."""
    print(f"REVBIFPN_TEST_SEED={SEED}")
    return torch.Generator().manual_seed(SEED + zlib.crc32(request.node.name.encode()))


@pytest.fixture(autouse=True)
def full_precision():
    """No TF32: errors are judged against float32's."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


# Arguments ------------------------------------------------------------------------------------------

MAPS = ((2, 3, 7, 9), (1, 5, 1, 1), (3, 17, 13, 31), (2, 4, 1, 33), (1, 2, 56, 56), (1, 3, 67, 130))
LOW_MAPS = ((2, 3, 3, 5), (1, 2, 1, 1), (3, 9, 7, 4), (1, 2, 9, 17))  # of the lowest resolution of a coupling
FACTORS = ((1,), (2,), (1, 2, 4), (8, 2), (2, 4, 8), (1, 1))
MODES = ("bilinear", "nearest")
KERNELS = ((3, 1), (5, 1), (3, 2), (5, 2), (7, 4), (15, 8), (1, 1), (9, 3))  # (kernel, stride)


def normal(g, *shape, dtype=F32):
    return torch.randn(shape, generator=g, dtype=F64).to(dtype)


def clear_of_kinks(x, scale, shift):
    """x, set to 0 where rounding would decide on which side of a kink of hardswish ``scale x + shift`` lies."""
    u = x.double() * scale[..., None, None].double() + shift[..., None, None].double()
    return x.masked_fill((u.abs() - 3).abs() < 1e-3, 0.0)


def arguments(op, dtype, g):
    """Arguments of an op on the CPU, for small maps of many sizes and every option."""
    acc = accumulate_dtype(dtype)

    def vector(*shape):
        return normal(g, *shape, dtype=acc)

    def optional(i, *shape):
        return None if i % 2 else vector(*shape)

    if op.startswith("se_gate"):
        if dtype != acc:
            return  # pooled values and gates are kept in float32
        for n, c, r in ((1, 1, 1), (2, 48, 12), (19, 40, 7), (3, 130, 33)):
            pooled, w1, w2 = 2 * vector(n, c), vector(r, c) / c**0.5, 3 * vector(c, r) / r**0.5
            gate = (vector(n, c) / 3 + 0.5).clamp(0, 1)
            yield (
                (pooled, w1, vector(r), w2, vector(c))
                if op == "se_gate"
                else (vector(n, c), gate, vector(n, r), pooled, w1, w2)
            )
    elif op.startswith("bn_fold"):
        if dtype != acc:
            return  # statistics are kept in float32
        for i, (n, c) in enumerate(((1, 1), (2, 48), (19, 131))):
            statistics = (vector(c), vector(c).abs(), vector(c), vector(c))
            buffers = (None, None, None)  # contiguous where there are any: see the network's own calls
            pooled = (vector(5, n, c), optional(i, n, c), optional(i // 2, n, c), vector(c), vector(c), vector(c))
            yield (*statistics, *buffers, 0.1, 60 * n, 1e-3) if op == "bn_fold" else (*pooled, 60 * n, i % 2 == 0)
    elif op.startswith("pointwise_conv"):
        for i, (n, c, h, w) in enumerate(MAPS):
            x, weight = normal(g, n, c, h, w, dtype=dtype), vector(i + 3, c, 1, 1)
            y = normal(g, n, i + 3, h, w, dtype=dtype)
            prologue = (None, None, None) if i % 2 else (vector(c), vector(c), optional(i // 2, n, c))
            yield (x, y, *prologue) if op.endswith("weight") else (y, x, weight, *prologue)
    elif op == "dequantize_":
        for i, (n, c, h, w) in enumerate(MAPS):
            y = torch.randint(-(2**15), 2**15, (n, c, h, w), dtype=torch.int16, generator=g)
            yield torch.empty(n, c, h, w, dtype=dtype), y, 3 * i
    elif op.startswith("couple"):
        for i, ((n, c, h, w), factors) in enumerate(itertools.product(LOW_MAPS, FACTORS)):
            largest, mode = max(factors), MODES[i % 2]
            h, w = h * largest, w * largest
            y = normal(g, n, c, h, w, dtype=dtype)
            p = [normal(g, n, c, h // f, w // f, dtype=dtype) for f in factors]
            if op == "couple_":
                kinds = ((c,), (n, c))
                scale = [optional(i + k, *kinds[k % 2]) for k in range(len(p))]
                shift = [optional(i // 2 + k, *kinds[k % 2]) for k in range(len(p))]
                yield y, p, scale, shift, list(factors), mode, bool(i % 3 == 0)
            else:
                wanted = [None if (i + k) % 3 == 2 else p_k for k, p_k in enumerate(p)]
                yield y, wanted, [optional(i + k, c) for k in range(len(p))], list(factors), mode
    elif op.startswith("upsample"):
        for (n, c, h, w), factor, mode in itertools.product(LOW_MAPS, (1, 2, 4, 8), MODES):
            f = factor if op == "upsample_adjoint" else 1
            yield normal(g, n, c, f * h, f * w, dtype=dtype), factor, mode
    elif op == "space_to_depth":
        for (n, c, h, w), block, extra in itertools.product(LOW_MAPS, (1, 2, 4, 8), (0, 1)):
            yield normal(g, n, c, block * h, block * w, dtype=dtype), 2 * c + extra, block
    elif op in ("depth_to_space", "space_to_depth_adjoint"):
        for (n, c, h, w), block, extra in itertools.product(LOW_MAPS, (1, 2, 4, 8), (0, 1)):
            yield normal(g, n, (2 * c + extra) * block**2, h, w, dtype=dtype), c, block
    elif op.startswith("depthwise"):
        for i, ((n, c, h, w), (k, s)) in enumerate(itertools.product(MAPS, KERNELS)):
            x, dy = normal(g, n, c, h, w, dtype=dtype), normal(g, n, c, -(-h // s), -(-w // s), dtype=dtype)
            weight = normal(g, c, 1, k, k, dtype=acc if i % 2 else dtype)
            affine = (vector(c), vector(c)) if i % 3 else (None, None)
            yield {
                "depthwise_conv": (x, weight, *affine, s),
                "depthwise_conv_grad_input": (dy, weight, h, w, s),
                "depthwise_conv_grad_weight": (x, dy, *affine, k, s),
            }[op]
    else:
        for i, ((n, c, h, w), act) in enumerate(itertools.product(MAPS, ("hardswish", "identity"))):
            scale, shift, mean = vector(c), vector(c), vector(c)
            x = clear_of_kinks(3 * normal(g, n, c, h, w, dtype=dtype), scale, shift)
            dz = normal(g, n, c, h, w, dtype=dtype)
            yield {
                "bn_stats": (x,),
                "bn_act": (x, scale, shift, optional(i, n, c), act),
                "bn_act_squeeze": (x, scale, shift, act),
                "bn_act_grad_sums": (dz, x, scale, shift, mean, act),
                "bn_act_grad": (
                    *(dz, x, scale, shift, optional(i, n, c), optional(i // 2, n, c)),
                    *(optional(i // 2, c), optional(i // 2, c), act),
                ),
            }[op]


def contiguous(x):
    return x


def half(x):
    """The second half of twice as many channels (entries of a vector: every other one)."""
    return torch.cat([x, torch.full_like(x, 7.0)], 1)[:, : x.shape[1]] if x.dim() > 1 else x.repeat_interleave(2)[::2]


def channels_last(x):
    if x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x.t().contiguous().t() if x.dim() == 2 else x


LAYOUTS = (contiguous, half, channels_last)
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)


def mapped(args, f):
    """``f`` of every tensor in the arguments."""
    nested = (mapped(a, f) if isinstance(a, (list, tuple)) else f(a) if isinstance(a, Tensor) else a for a in args)
    return list(nested) if isinstance(args, list) else tuple(nested)


def flat(out):
    if out is None or isinstance(out, Tensor):
        return [] if out is None else [out]
    return [t for o in out for t in flat(o)]


def outputs(call, args):
    """The results of an op; of ``couple_``, which returns nothing, the tensor that it updated."""
    out = call(*args)
    return [args[0]] if out is None else flat(out)


def poison():
    """Leave NaN in the memory that the next outputs come from."""
    for size in (1 << 22, 1 << 18, 1 << 14, 1 << 10):
        torch.full((size // 4,), float("nan"), device=DEVICE)


def check(op, args, layout=None):
    """The op on the device, on arguments given on the CPU: at most twice as wrong as the reference in that dtype.

    Without ``layout`` the arguments keep their own strides.
    """
    exact = outputs(OPS[op].reference, mapped(args, lambda t: t.double()))
    expected = outputs(OPS[op].reference, mapped(args, lambda t: t.clone()))
    placed = mapped(args, as_given if layout is None else lambda t: layout(t.clone().to(DEVICE)))
    poison()
    found = outputs(OPS[op].overload, placed)
    assert len(found) == len(exact)
    for out, plain, truth in zip(found, expected, exact, strict=True):
        assert out.device.type == DEVICE and out.shape == truth.shape and out.dtype == plain.dtype
        error, allowed = relative_error(out.cpu(), truth), 2 * relative_error(plain, truth) + EPSILON[out.dtype]
        shapes = [tuple(a.shape) if isinstance(a, Tensor) else a for a in flat_arguments(args)]
        assert error <= allowed, f"{op}: error {error:.2e}, allowed {allowed:.2e}, arguments {shapes}"


def as_given(t):
    """A copy on the device with the same strides; dimensions of stride 0 stay expanded."""
    own = t[tuple(slice(1) if stride == 0 else slice(None) for stride in t.stride())]
    return torch.empty_strided(own.shape, t.stride(), dtype=t.dtype, device=DEVICE).copy_(own).expand(t.shape)


def flat_arguments(args):
    return [x for a in args for x in (flat_arguments(a) if isinstance(a, (list, tuple)) else [a])]


# The network's own calls ----------------------------------------------------------------------------

# Scale: batch, resolution. A CPU, which only tries the test, takes less.
NETWORKS = {0: (2, 224), 3: (1, 288), 6: (1, 352)} if DEVICE == "cuda" else {0: (2, 64)}


class Calls(TorchDispatchMode):
    """Collects the distinct calls of ops as tuples, tensors as ``(shape, strides, dtype)``."""

    def __init__(self):
        super().__init__()
        self.found = {op: {} for op in OPS}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "revkernels":
            name = func.name().removeprefix("revkernels::").split(".")[0]
            self.found[name][frozen(mapped(tuple(args), Described))] = None
        return func(*args, **(kwargs or {}))


class Described(tuple):
    """A tensor's shape, strides and dtype, hashable."""

    def __new__(cls, t):
        return super().__new__(cls, (tuple(t.shape), t.stride(), t.dtype))


def frozen(args):
    """Lists as tuples, to be hashed."""
    return tuple(frozen(a) if isinstance(a, (list, tuple)) and not isinstance(a, Described) else a for a in args)


def drawn(described, g):
    """A random tensor of that description; dimensions of stride 0 stay expanded."""
    shape, strides, dtype = described
    own = [1 if stride == 0 else size for size, stride in zip(shape, strides, strict=True)]
    return torch.empty_strided(own, strides, dtype=dtype).copy_(normal(g, *own)).expand(shape)


def fill(call, g):
    """A call's arguments with random tensors for the described ones."""

    def value(a):
        if isinstance(a, Described):
            return drawn(a, g)
        return [value(b) for b in a] if isinstance(a, (list, tuple)) else a

    return tuple(map(value, call))


@pytest.fixture(scope="module")
def network_calls():
    """The distinct calls of every op in a training step of each scale, found on fake tensors."""
    found = {op: {} for op in OPS}
    with fused.chunks_of(fused.chunk_bytes(torch.device(DEVICE))):
        for scale, (batch, resolution) in NETWORKS.items():
            calls = Calls()
            with FakeTensorMode(allow_non_fake_inputs=True):
                model = getattr(fast, f"revbifpn_s{scale}")().train()
                with calls:
                    model(torch.randn(batch, 3, resolution, resolution)).sum().backward()
            for op in OPS:
                found[op] |= calls.found[op]
    return found


# Ops ------------------------------------------------------------------------------------------------


class TestOps:
    @needs_cuda
    @pytest.mark.parametrize("op", OPS)
    def test_op_runs_as_a_kernel_and_not_as_the_reference(self, op):
        reasons = [f"{name}: {dispatch.why_not(op, name, torch.device(DEVICE))}" for name in ("cuda", "triton")]
        assert dispatch.in_use(op, DEVICE) in ("cuda", "triton"), "; ".join(reasons)
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"revkernels::{op}", "CUDA")

    @ops
    @dtypes
    @layouts
    def test_op_equals_the_reference(self, op, dtype, layout, g):
        cases = list(arguments(op, dtype, g)) or pytest.skip("it takes float32 and float64 only")
        for args in cases:
            check(op, args, layout)

    @ops
    def test_op_equals_the_reference_on_the_networks_own_calls(self, op, network_calls, g):
        if not network_calls[op]:
            pytest.skip("a training step does not call it")
        for call in network_calls[op]:
            args = fill(call, g)
            if op == "bn_fold":
                args = (args[0], args[1].abs(), *args[2:])  # a variance
            if op in ("bn_act_grad", "bn_act_grad_sums"):
                dz, x, scale, shift, *rest = args
                args = dz, clear_of_kinks(x, scale, shift), scale, shift, *rest
            check(op, args)

    @ops
    @pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=lambda d: str(d)[6:])
    def test_fifty_runs_give_the_same_bits(self, op, dtype, g):
        cases = list(arguments(op, dtype, g)) or pytest.skip("it takes float32 and float64 only")
        for args in cases[-2:]:
            placed = mapped(args, lambda t: t.to(DEVICE))
            first = None
            for _ in range(50):
                poison()
                out = outputs(OPS[op].overload, mapped(placed, lambda t: t.clone()))
                first = out if first is None else first
                assert all(map(torch.equal, first, out))

    @needs_cuda
    @pytest.mark.parametrize(
        "op", ["bn_act", "bn_act_grad", "couple_", "depthwise_conv", "upsample", "upsample_adjoint"]
    )
    def test_maps_beyond_two_billion_elements(self, op):
        """Offsets that do not fit 32 bits: the last sample alone gives the same bits."""
        if torch.cuda.mem_get_info()[0] < 32 << 30:
            pytest.skip("needs 32 GiB of free GPU memory")

        def half_precision(*shape):
            return torch.randn(shape, device=DEVICE, dtype=torch.float16)

        one = torch.ones(1, device=DEVICE)
        small, large = (5, 1, 1 << 13, 1 << 14), (5, 1, 1 << 14, 1 << 15)
        weight = torch.randn(1, 1, 3, 3, device=DEVICE)
        call, maps, rest = {
            "bn_act": (lambda x: (x, one, one, None, "hardswish"), [large], None),
            "bn_act_grad": (lambda x, dz: (dz, x, one, one, None, None, one, one, "hardswish"), [large, large], None),
            "couple_": (lambda y, p: (y, [p], [one], [one], [2], "bilinear", False), [large, small], None),
            "depthwise_conv": (lambda x: (x, weight, None, None, 1), [large], None),
            "upsample": (lambda x: (x, 2, "bilinear"), [small], None),
            "upsample_adjoint": (lambda dy: (dy, 2, "bilinear"), [large], None),
        }[op]
        xs = [half_precision(*shape) for shape in maps]
        (last,) = outputs(OPS[op].overload, call(*(x[-1:].clone() for x in xs)))
        (whole,) = outputs(OPS[op].overload, call(*xs))
        assert torch.equal(whole[-1:], last) and last.isfinite().all()


# Model ----------------------------------------------------------------------------------------------

NARROW = {"channels": [48, 16, 16, 32], "head_channels": [16, 16, 16, 32], "fc_features": 32, "num_ext_layers": 1}


def narrow(module, dtype=F32, **options):
    torch.manual_seed(0)
    options = NARROW | {"inv_blk_rep": 1, "head_dropout": 0.0, "classes": 10} | options
    return module.RevBiFPN(**options).to(DEVICE, dtype).train()


def images(dtype=F32, n=8, seed=1):
    return torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(seed), dtype=F64).to(DEVICE, dtype)


def loss_of(model, x):
    return F.cross_entropy(model(x).float() if x.dtype != F64 else model(x), torch.arange(len(x), device=DEVICE) % 10)


def gradients(model, x, autocast=None):
    with torch.autocast(DEVICE, autocast or torch.bfloat16, enabled=autocast is not None):
        loss = loss_of(model, x)
    loss.backward()
    return [p.grad.double() for p in model.parameters()]


class TestModel:
    @pytest.mark.parametrize("case", ["s0_4x64x64", "s1_2x96x64", "s3_2x64x64"])
    @pytest.mark.parametrize("reversible", [True, False], ids=["reversible", "stored"])
    @pytest.mark.parametrize("module", [revbifpn, fast], ids=["plain", "fast"])
    def test_outputs_gradients_and_statistics_are_the_published_ones(self, module, case, reversible):
        wanted = golden.read(case)
        model = golden.golden_model(module, wanted["scale"], F64, reversible).to(DEVICE)
        x = golden.golden_input(wanted["input"], F64).to(DEVICE)
        tolerance = 1e-7 if reversible else 1e-9
        with torch.no_grad():
            golden.assert_matches(model.eval()(x).cpu(), wanted["eval_logits"], tolerance)
        logits = model.train()(x)
        loss = F.cross_entropy(logits, torch.tensor([37 * n % 1000 for n in range(len(x))], device=DEVICE))
        loss.backward()
        golden.assert_matches(logits.cpu(), wanted["train_logits"], tolerance)
        assert golden.relative(loss.item(), wanted["train_loss"]) <= tolerance
        state = model.state_dict()
        for key, norm in (wanted["running_mean_l2"] | wanted["running_var_l2"]).items():
            assert golden.relative(state[key].norm().item(), norm) <= tolerance, key
        for name, parameter in model.named_parameters():
            norm, want = parameter.grad.norm().item(), wanted["grad_l2"][name]
            assert norm < 1e-10 if want < 1e-10 else golden.relative(norm, want) <= tolerance, name

    def test_gradients_equal_those_of_stored_activations(self):
        wanted = gradients(narrow(revbifpn, F64, reversible=False), images(F64))
        for module, reversible in ((fast, True), (fast, False), (revbifpn, True)):
            assert error(gradients(narrow(module, F64, reversible=reversible), images(F64)), wanted) < 1e-9
        assert error(gradients(narrow(fast), images()), wanted) < 1e-3

    def test_running_statistics_are_updated_once_and_equally(self):
        models = narrow(fast, F64), narrow(revbifpn, F64, reversible=False)
        for model in models:
            gradients(model, images(F64))
        ours, plain = (model.state_dict() for model in models)
        for key, value in plain.items():
            if "running_" in key or key.endswith("num_batches_tracked"):
                torch.testing.assert_close(
                    ours[key], value, rtol=1e-8, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}"
                )

    def test_two_forwards_before_two_backwards(self):
        model, first, second = narrow(fast, F64), images(F64), images(F64, n=5, seed=2)
        losses = [loss_of(model, x) for x in (first, second)]
        for loss in losses:
            loss.backward()
        stored = narrow(revbifpn, F64, reversible=False)
        for x in (first, second):
            loss_of(stored, x).backward()
        pairs = ([p.grad for p in m.parameters()] for m in (model, stored))
        assert error(*pairs) < 1e-9

    def test_random_masks_are_replayed(self):
        options = {"stochastic_depth": 0.5, "head_dropout": 0.5}
        found = []
        for reversible in (True, False):
            model = narrow(fast, F64, reversible=reversible, **options)
            torch.manual_seed(7)
            found.append(gradients(model, images(F64)))
        assert error(*found) < 1e-9

    def test_gradients_are_the_same_bits_every_time(self):
        model = narrow(fast)
        runs = []
        for _ in range(3):
            model.zero_grad()
            runs.append(gradients(model, images()))
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))

    def test_stack_is_inverted(self):
        model = narrow(fast, F64).eval()
        x = images(F64)
        with torch.no_grad():
            assert relative_error(model.inverse(model.forward_streams(x)), x) < 1e-9

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
    def test_autocast_gradients_are_as_accurate_as_stored_ones(self, dtype):
        wanted = gradients(narrow(revbifpn, F64, reversible=False), images(F64))
        stored = error(gradients(narrow(revbifpn, reversible=False), images(), dtype), wanted)
        assert 1e-5 < stored < 0.5, "16 bits are in use, and say something"
        assert error(gradients(narrow(fast), images(), dtype), wanted) <= 3 * stored

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16 with scaler"])
    def test_training_under_autocast_learns(self, dtype):
        model, x = narrow(fast), images()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10, enabled=dtype == torch.float16)
        losses = []
        for _ in range(12):
            optimizer.zero_grad()
            with torch.autocast(DEVICE, dtype):
                loss = loss_of(model, x)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0]
        assert all(p.isfinite().all() for p in model.parameters())
        assert dtype != torch.float16 or scaler.get_scale() > 1

    @needs_cuda
    def test_captured_training_step_equals_the_eager_one(self):
        """Forward, backward and optimizer in one CUDA graph, replayed on images that it was not captured with."""
        model = narrow(fast)
        x = images()

        def train(model, optimizer, x):
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(model, x)
            loss.backward()
            optimizer.step()
            return loss

        def optimizer_of(model):
            return torch.optim.SGD(model.parameters(), lr=0.01)

        optimizer = optimizer_of(model)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # kernels are compiled and libraries initialised outside the capture
                train(model, optimizer, x)
        torch.cuda.current_stream().wait_stream(side)
        optimizer.zero_grad(set_to_none=True)
        twin = copy.deepcopy(model)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = train(model, optimizer, x)
        for seed in (2, 3, 4):
            fresh = images(seed=seed)
            x.copy_(fresh)
            graph.replay()
            want = train(twin, optimizer_of(twin), fresh)
            torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
        for (name, ours), theirs in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
            assert relative_error(ours, theirs) < 1e-4, name

    @needs_cuda
    @pytest.mark.parametrize("stream, dtype", [("float32", None), ("fixed16", torch.bfloat16)])
    def test_graphed_steps_follow_learning_rate_and_momentum(self, stream, dtype):
        models = narrow(fast, stream=stream), narrow(fast, stream=stream)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9, fused=True) for m in models]
        step = GraphedStep(models[0], lambda y, t: F.cross_entropy(y.float(), t), optimizers[0])
        labels = torch.arange(8, device=DEVICE)
        for seed in range(8):
            for model, optimizer in zip(models, optimizers, strict=True):
                optimizer.param_groups[0]["lr"] = 0.01 / (seed + 1)
                for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
                    norm.momentum = 0.5 / (seed + 1)
            x = images(seed=seed)
            with torch.autocast("cuda", dtype, enabled=dtype is not None):
                found = step(x, labels)
                want = F.cross_entropy(models[1](x).float(), labels)
            want.backward()
            optimizers[1].step()
            optimizers[1].zero_grad()
            torch.testing.assert_close(found, want.detach(), rtol=1e-2 if dtype else 1e-4, atol=1e-5)
        assert step.captured == 1
        for (name, ours), theirs in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
            assert relative_error(ours, theirs) < (1e-1 if dtype else 1e-3), name

    @needs_cuda
    @pytest.mark.parametrize("reversible", [True, False], ids=["reversible", "stored"])
    def test_memory_per_sample_is_what_the_cpu_meter_says(self, reversible):
        """Within 15 %, what the allocator's rounding may add; both in chunks of the GPU's size."""
        model = fast.revbifpn_s0(reversible=reversible)
        with fused.chunks_of(fused.chunk_bytes(torch.device(DEVICE))):
            metered = measure_sample(model, (3, 224, 224), batch=16, fake=True).bytes_per_sample
        allocated = measure_sample(model, (3, 224, 224), batch=16, device=DEVICE).bytes_per_sample
        assert allocated == pytest.approx(metered, rel=0.15)
