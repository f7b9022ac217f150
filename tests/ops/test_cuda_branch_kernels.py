"""The CUDA kernels of a branch's passes, executed on the CPU by the emulation, against the reference.

Threads of a block run in order and in reverse; outputs start as NaN. A subset runs under the sanitizers as well.
"""

import itertools
import pickle

import pytest
import torch

from revkernels import reference
from revkernels.reference import accumulate_dtype
from revkernels.testing import relative_error
from tests.ops.test_cuda_emulation import (  # noqa: F401  fixtures
    DTYPES,
    Recorder,
    as_tensor,
    channels_last,
    contiguous,
    cropped,
    expanded,
    half_channels,
    library,
    off_by_one,
    one_thread,
    pytestmark,
    random,
    replay,
    run_sanitized,
    sanitized_library,
)

ACTS = ("identity", "hardswish")
EPSILON = {torch.float32: 1e-6, torch.float64: 1e-14, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# Whole vectors, 8 and 4 bytes of them, none; single pixels; vectors over several planes; layouts without vectors.
MAPS = (
    (contiguous, 2, 3, 8, 8),
    (contiguous, 3, 8, 7, 7),
    (contiguous, 2, 8, 1, 1),
    (contiguous, 1, 3, 1, 1),
    (contiguous, 2, 5, 6, 6),
    (half_channels, 2, 4, 14, 14),
    (half_channels, 2, 5, 7, 7),
    (channels_last, 2, 4, 9, 5),
    (cropped, 2, 2, 6, 11),
    (off_by_one, 1, 3, 16, 16),
    (expanded, 2, 2, 5, 12),
    (contiguous, 1, 2, 40, 56),
)


class Call:
    """A kernel call whose outputs are checked against tensors: ``expect`` allocates them, in the call's order."""

    def __init__(self, function, dtype):
        self.recorder, self.function = Recorder(), f"emulate_{function}"
        self.arguments = [DTYPES.index(dtype)]
        self.outputs, self.expected = [], []

    def add(self, *arguments):
        for value in arguments:
            if isinstance(value, torch.Tensor):
                value = self.recorder.map(value) if value.dim() == 4 else self.recorder.pointer(value.contiguous())
            self.arguments.append(value)
        return self

    def vectors(self, *tensors):
        self.arguments += [None if t is None else self.recorder.pointer(t.contiguous()) for t in tensors]
        return self

    def room(self, count, dtype):
        self.arguments.append(self.recorder.poisoned(count, dtype))
        return self

    def expect(self, wanted, dtype, start=None):
        """The next output; with ``start`` it is updated in place, from that."""
        if start is None:
            self.arguments.append(self.recorder.poisoned(wanted.numel(), dtype))
        else:
            self.arguments.append(self.recorder.pointer(start))
        self.outputs.append(self.arguments[-1][1])
        self.expected.append((wanted, dtype))
        return self

    @property
    def recorded(self):
        return {
            "function": self.function,
            "arguments": tuple(self.arguments),
            "buffers": self.recorder.buffers,
            "outputs": self.outputs,
        }

    def check(self, outputs, tolerance):
        assert len(outputs) == len(self.expected)
        for data, (wanted, dtype) in zip(outputs, self.expected, strict=True):
            out = as_tensor(data, torch.empty(wanted.shape, dtype=dtype))
            if dtype == torch.int64:
                assert torch.equal(out, wanted)
            else:
                assert relative_error(out, wanted) <= tolerance, self.function


def run(library, call, tolerance):  # noqa: F811
    results = [replay.run(library, call.recorded, reverse=reverse) for reverse in (False, True)]
    for first, second in zip(*results, strict=True):
        assert (first == second).all()
    call.check(results[0], tolerance)
    return results[0]


def vectors(n, c, dtype, count):
    """``count`` vectors [C], and two [N, C], in the type of sums."""
    wide = accumulate_dtype(dtype)
    return (
        *(random(c, dtype=wide) + i / 7 for i in range(count)),
        random(n, c, dtype=wide),
        random(n, c + 1, dtype=wide)[:, 1:],
    )


def exact(function, *arguments):
    return function(*(a.double() if isinstance(a, torch.Tensor) else a for a in arguments))


def bn_act(x, act, gated, packed=0):
    """``packed``: how much longer a channel's row is than its samples need, where the output is channel by channel."""
    n, c, h, w = x.shape
    scale, shift, gate, _ = vectors(n, c, x.dtype, 2)
    gate = gate if gated else None
    wanted = exact(reference.bn_act, x, scale, shift, gate, act)
    call = Call("bn_act", x.dtype).add(x).vectors(scale, shift, gate).add(ACTS.index(act))
    if packed:
        start = torch.full((c, n * h * w + packed), 7.0, dtype=x.dtype)
        rows = start.double().clone()
        rows[:, : n * h * w] = wanted.transpose(0, 1).flatten(1)
        return call.expect(rows, x.dtype, start).add(h * w, n * h * w + packed)
    return call.expect(wanted, x.dtype).add(c * h * w, h * w)


def bn_act_grad(x, dz, act, given):
    n, c, h, w = x.shape
    scale, shift, slope, offset, gate, dpool = vectors(n, c, x.dtype, 4)
    optional = [v if keep else None for v, keep in zip((gate, dpool, slope, offset), given, strict=True)]
    wanted = exact(reference.bn_act_grad, dz, x, scale, shift, *optional, act)
    call = (
        Call("bn_act_grad", x.dtype)
        .add(DTYPES.index(dz.dtype), dz, x)
        .vectors(scale, shift, *optional)
        .add(ACTS.index(act))
    )
    return call.expect(wanted, x.dtype).add(c * h * w, h * w)


def bn_act_squeeze(x, act):
    n, c = x.shape[:2]
    scale, shift, *_ = vectors(n, c, x.dtype, 2)
    wide = accumulate_dtype(x.dtype)
    wanted = exact(reference.bn_act_squeeze, x, scale, shift, act)
    call = Call("bn_act_squeeze", x.dtype).add(x).vectors(scale, shift).add(ACTS.index(act))
    return call.room(4 * n * c, wide).expect(wanted, wide)


def bn_act_grad_sums(x, dz, act, written=None):
    """``written``: z too, sample by sample or with channels that many values apart."""
    n, c, h, w = x.shape
    scale, shift, mean, gate, _ = vectors(n, c, x.dtype, 3)
    wide = accumulate_dtype(x.dtype)
    wanted = exact(reference.bn_act_grad_sums, dz, x, scale, shift, mean, act)
    call = Call("bn_act_grad_sums", x.dtype).add(dz, x).vectors(scale, shift, gate, mean).add(ACTS.index(act))
    call.room(4 * 5 * n * c, wide).expect(*apart(wanted, wide)).add(n * c + 3)
    if written is None:
        return call.add(None, 0, 0)
    z = exact(reference.bn_act, x, scale, shift, gate, act)
    if written == "samples":
        return call.expect(z, x.dtype).add(c * h * w, h * w)
    return call.expect(z.transpose(0, 1), x.dtype).add(h * w, n * h * w)


def apart(sums, dtype):
    """Sums with three numbers between one and the next, which stay as they are."""
    start = torch.full((len(sums), sums[0].numel() + 3), 7.0, dtype=dtype)
    wanted = start.double().clone()
    wanted[:, :-3] = sums.flatten(1)
    return wanted, dtype, start


def coupling_sums(p, du):
    n, c = p.shape[:2]
    wide = accumulate_dtype(p.dtype)
    mean, *_ = vectors(n, c, p.dtype, 1)
    (wanted,) = reference.couple_adjoint(du.double(), [p.double()], [mean.double()], [1], "nearest")[1]
    call = Call("coupling_sums", p.dtype).add(DTYPES.index(du.dtype), du, p).vectors(mean)
    return call.room(4 * 2 * n * c, wide).expect(*apart(wanted, wide)).add(n * c + 3)


def bn_stats(x, fold, name="bn_stats"):
    n, c, h, w = x.shape
    wide = accumulate_dtype(x.dtype)
    mean, var = exact(reference.bn_stats, x)
    call = Call(name, x.dtype).add(x).room(2 * n * c, torch.float64).expect(mean, wide).expect(var, wide)
    if not fold:
        return call.vectors(*[None] * 5).add(0.1, 1e-3).vectors(None, None, None)
    weight, bias, running_mean, running_var, *_ = vectors(n, c, x.dtype, 4)
    running_var = running_var.abs()
    moved = [v.double().clone() for v in (running_mean, running_var)]
    count = n * h * w
    results = reference.bn_fold(mean, var, weight.double(), bias.double(), *moved, None, 0.1, count, 1e-3)
    call.vectors(weight, bias).expect(moved[0], wide, running_mean).expect(moved[1], wide, running_var)
    call.expect(torch.tensor([8]), torch.int64, torch.tensor([7])).add(0.1, 1e-3)
    for wanted in results:
        call.expect(wanted, wide)
    return call


def bn_fold(c, dtype, track):
    mean, var, weight, bias, running, *_ = vectors(1, c, dtype, 5)
    var = var.square()
    buffers = [running, running.abs()] if track else [None, None]
    moved = [None if v is None else v.double().clone() for v in buffers]
    results = reference.bn_fold(*(v.double() for v in (mean, var, weight, bias)), *moved, None, 0.3, 37, 1e-3)
    call = Call("bn_fold", dtype).add(c).vectors(mean, var, weight, bias)
    if track:
        call.expect(moved[0], dtype, buffers[0]).expect(moved[1], dtype, buffers[1])
        call.expect(torch.tensor([4]), torch.int64, torch.tensor([3]))
    else:
        call.vectors(None, None, None)
    call.add(0.3, 37, 1e-3)
    for wanted in results:
        call.expect(wanted, dtype)
    return call


def bn_fold_grad(n, c, dtype, form, batch):
    sums = random(2 if form.startswith("two") else 5, n, c, dtype=dtype)
    mean, rstd, scale, gate, dpool = vectors(n, c, dtype, 3)
    strides = (c, 1)
    if form == "two kept":  # stochastic depth: one value per sample
        gate, strides = random(n, 1, dtype=dtype).expand(n, c), (1, 0)
    gate = None if form in ("two", "five") else gate
    dpool = dpool if form == "five pooled" else None
    wanted = exact(reference.bn_fold_grad, sums, gate, dpool, mean, rstd, scale, n * 6, batch)
    call = Call("bn_fold_grad", dtype).vectors(sums).add(int(len(sums) == 5))
    call.vectors(gate[:, :1] if form == "two kept" else gate).add(*strides).vectors(dpool, mean, rstd, scale)
    call.add(n, c, n * 6, int(batch))
    for vector in wanted:
        call.expect(vector, dtype)
    return call


def bn_grad(x, dz, form, batch, apart=False):
    """``form``: of a gated norm, or the coupling's ("kept"), whose sums are there; of either without sums ("alone")."""
    n, c, h, w = x.shape
    coupled, alone = form.startswith("kept"), form.endswith("alone")
    wide, act = accumulate_dtype(x.dtype), "identity" if coupled else "hardswish"
    scale, shift, mean, rstd, gate, dpool = vectors(n, c, x.dtype, 4)
    strides = (c, 1)
    if coupled:  # stochastic depth: one value per sample
        gate, strides = gate[:, :1].expand(n, c), (1, 0)
    if form != "gated":
        dpool = None
    if form == "alone":
        gate = None
    if coupled:
        (sums,) = reference.couple_adjoint(dz.double(), [x.double()], [mean.double()], [1], "nearest")[1]
    else:
        sums = exact(reference.bn_act_grad_sums, dz, x, scale, shift, mean, act)
    fold = sums, *(None if v is None else v.double() for v in (gate, dpool, mean, rstd, scale)), n * h * w, batch
    folded = reference.bn_fold_grad(*fold)
    dx = exact(reference.bn_act_grad, dz, x, scale, shift, gate, dpool, *folded[2:], act)
    call = Call("bn_grad", x.dtype).add(int(apart), DTYPES.index(dz.dtype), dz, x).vectors(scale, shift)
    call.add(ACTS.index(act)).vectors(gate[:, :1] if coupled else gate).add(*strides)
    call.vectors(dpool, mean, rstd).add(int(batch), int(not alone))
    if alone:
        call.expect(sums, wide)
    else:
        call.vectors(sums.to(wide))
    for vector in folded:
        call.expect(vector, wide)
    return call.expect(dx, x.dtype).add(c * h * w, h * w)


def squeezed(n, c, r, dtype):
    pooled, w1, b1 = 2 * random(n, c, dtype=dtype), random(r, c, dtype=dtype) / c**0.5, random(r, dtype=dtype)
    w2, b2 = 3 * random(c, r, dtype=dtype) / r**0.5, random(c, dtype=dtype)
    return pooled, w1, b1, w2, b2


def se_gate(n, c, r, dtype):
    pooled, *weights = squeezed(n, c, r, dtype)
    gate, hidden = exact(reference.se_gate, pooled, *weights)
    return Call("se_gate", dtype).vectors(pooled, *weights).add(n, c, r).expect(hidden, dtype).expect(gate, dtype)


def se_gate_act(x, r, apart=False):
    n, c, h, w = x.shape
    wide = accumulate_dtype(x.dtype)
    scale, shift, *_ = vectors(n, c, x.dtype, 2)
    _, *weights = squeezed(n, c, r, wide)
    pooled = exact(reference.bn_act_squeeze, x, scale, shift, "hardswish")
    gate, hidden = exact(reference.se_gate, pooled, *weights)
    z = exact(reference.bn_act, x, scale, shift, gate, "hardswish")
    call = Call("se_gate_act", x.dtype).add(int(apart), x).vectors(scale, shift, *weights).add(r)
    call.room(4 * n * c, wide)
    for wanted in (pooled, hidden, gate):
        call.expect(wanted, wide)
    return call.expect(z, x.dtype).add(c * h * w, h * w)


def se_gate_grad(n, c, r, dtype, pixels):
    pooled, w1, b1, w2, b2 = squeezed(n, c, r, dtype)
    gate, hidden = reference.se_gate(pooled, w1, b1, w2, b2)
    dgate = torch.sin(gate * 40)
    dpooled, *others = exact(reference.se_gate_grad, dgate, gate, hidden, pooled, w1, w2)
    call = Call("se_gate_grad", dtype).vectors(dgate, gate, hidden, pooled, w1, w2).add(n, c, r, pixels)
    call.room(n * r, dtype)
    for wanted in (dpooled / pixels, *others):
        call.expect(wanted, dtype)
    return call


def convert(x, to, factor, add, layout=contiguous):
    y = layout(*x.shape, to)
    wanted = factor * x.double() + (y.double() if add else 0)
    whole = torch.empty(0, dtype=to).set_(y.untyped_storage())
    kept = whole.double().clone()
    torch.as_strided(kept, y.shape, y.stride(), y.storage_offset()).copy_(wanted)
    types = (*DTYPES, torch.int16)
    call = Call("convert", torch.float32).add(x, types.index(to), y, float(factor), int(add))
    call.arguments[0] = types.index(x.dtype)
    call.outputs.append(call.arguments[3][1])
    call.expected.append((kept, to))
    return call


# --- against the reference ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_maps_match_the_reference(library, act, dtype):  # noqa: F811
    for index, (layout, *size) in enumerate(MAPS):
        x = layout(*size, dtype)
        run(library, bn_act(x, act, gated=index % 2 == 0), EPSILON[dtype])
        dz = (layout if index % 3 else channels_last)(*size, dtype) * 0.5
        given = [bool(index >> bit & 1) for bit in range(4)]
        run(library, bn_act_grad(x, dz, act, given), EPSILON[dtype])
        if dtype.itemsize == 2:  # a gradient of a float32 stream under autocast
            run(library, bn_act_grad(x, layout(*size, torch.float32), act, given), EPSILON[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(2, 3, 8, 8), (3, 8, 7, 7), (4, 5, 1, 1), (2, 2, 4, 5)], ids=str)
def test_a_map_is_written_channel_by_channel_and_nothing_beside_it(library, size, dtype):  # noqa: F811
    for packed in (8, 3):
        run(library, bn_act(contiguous(*size, dtype), "hardswish", True, packed), EPSILON[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_sums_over_planes_match_the_reference(library, act, dtype):  # noqa: F811
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for index, (layout, *size) in enumerate(MAPS):
        x = layout(*size, dtype)
        run(library, bn_act_squeeze(x, act), tolerance)
        dz = (layout if index % 3 else channels_last)(*size, dtype)
        run(library, bn_act_grad_sums(x, dz, act), tolerance)
        run(library, coupling_sums(x, layout(*size, dtype) * 0.5), tolerance)
        if dtype.itemsize == 2:
            run(library, coupling_sums(x, layout(*size, torch.float32)), tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("written", ["samples", "channels"])
def test_sums_come_with_the_map_that_they_are_of(library, written, dtype):  # noqa: F811
    for layout, *size in MAPS:
        x, dz = (layout(*size, dtype) for _ in range(2))
        with_map, alone = (bn_act_grad_sums(x, dz, "hardswish", w) for w in (written, None))
        sums, _ = run(library, with_map, max(EPSILON[dtype], 2e-6 * (dtype != torch.float64)))
        assert (sums == outputs(library, alone)[0]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["kept", "kept alone", "gated", "alone"])
def test_gradient_in_one_launch_is_that_in_three(library, form, dtype):  # noqa: F811
    tolerance = {torch.float32: 4e-6, torch.float64: 1e-12}.get(dtype, EPSILON[dtype])
    # the last one is too large for one block
    for index, (layout, *size) in enumerate((*MAPS, (contiguous, 37, 3, 2, 2), (contiguous, 3, 2, 56, 56))):
        x, dz = layout(*size, dtype), (layout if index % 3 else channels_last)(*size, dtype) * 0.5
        found = [run(library, bn_grad(x, dz, form, index % 4 != 0, apart), tolerance) for apart in (False, True)]
        for one, three in zip(*found, strict=True):
            assert (one == three).all()
        if dtype.itemsize == 2 and form.startswith("kept"):  # a gradient of a float32 stream under autocast
            run(library, bn_grad(x, layout(*size, torch.float32), form, True), tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fold", [False, True], ids=["statistics", "folded"])
def test_statistics_and_their_fold_match_the_reference(library, fold, dtype):  # noqa: F811
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    for layout, n, c, h, w in (*MAPS, (contiguous, 37, 3, 2, 2)):
        if layout is expanded or n * h * w == 1:
            continue  # nothing varies
        x = layout(n, c, h, w, dtype).add_(3)
        calls = [bn_stats(x, fold, name) for name in ("bn_stats", "bn_statistics")]
        for call in calls:
            run(library, call, tolerance)
        for two_launches, one in zip(*(outputs(library, call) for call in calls), strict=True):
            assert (two_launches == one).all()


def test_statistics_survive_a_large_mean(library):  # noqa: F811
    run(library, bn_stats(contiguous(3, 4, 9, 9, torch.float32) + 1000, True), 2e-5)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_folds_match_the_reference(library, dtype):  # noqa: F811
    tolerance = 1e-13 if dtype == torch.float64 else 3e-6
    for c, track in itertools.product((1, 48, 131), (False, True)):
        run(library, bn_fold(c, dtype, track), tolerance)
    forms = ("two", "two kept", "five", "five gated", "five pooled")
    for form, n, c in itertools.product(forms, (1, 19, 70), (1, 21)):
        run(library, bn_fold_grad(n, c, dtype, form, batch=n != 19), 20 * tolerance)  # offset: a difference


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    "size",
    [
        (1, 1, 1),
        (2, 48, 12),
        (19, 40, 7),
        (3, 130, 33),
        (70, 9, 3),
        (5, 300, 2),
        (3, 600, 30),
        (9, 300, 40),
        (9, 301, 39),
    ],
    ids=str,
)
def test_squeeze_excite_matches_the_reference(library, size, dtype):  # noqa: F811
    tolerance = 1e-13 if dtype == torch.float64 else 5e-6
    run(library, se_gate(*size, dtype), tolerance)
    run(library, se_gate_grad(*size, dtype, 49), tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_map_in_one_launch_is_that_in_three(library, dtype):  # noqa: F811
    tolerance = {torch.float32: 5e-6, torch.float64: 1e-12}.get(dtype, EPSILON[dtype])
    # the last ones are too large for one block: by their sample, by their weights
    for layout, *size in (*MAPS, (contiguous, 2, 41, 20, 21), (contiguous, 1, 1100, 1, 3)):
        x = layout(*size, dtype)
        found = [run(library, se_gate_act(x, size[1] // 4 + 1, apart), tolerance) for apart in (False, True)]
        for one, three in zip(*found, strict=True):
            assert (one == three).all()


CONVERSIONS = [(a, b) for a, b in itertools.product(DTYPES, DTYPES) if a == b or torch.float32 in (a, b)]
CONVERSIONS = [(a, b) for a, b in CONVERSIONS if torch.float64 not in (a, b) or a == b]
CONVERSIONS += [(torch.int16, b) for b in DTYPES]


@pytest.mark.parametrize(("source", "to"), CONVERSIONS, ids=str)
def test_conversions_match_the_reference(library, source, to):  # noqa: F811
    for index, (layout, *size) in enumerate(MAPS):
        x = layout(*size, torch.float64) * (300 if source == torch.int16 else 1)
        x = x.to(source) if layout is not off_by_one else layout(*size, torch.float32).to(source)
        factor = 2.0**-8 if source == torch.int16 else 1.0
        target = (contiguous, cropped, half_channels, channels_last)[index % 4]
        run(library, convert(x, to, factor, index % 2 == 1, target), EPSILON[to])


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("add", [False, True])
def test_parts_are_folded_in_order(library, dtype, add):  # noqa: F811
    for count, rows, size in ((1, 1, 5), (7, 3, 100)):
        partial, start = random(count, rows, size, dtype=dtype), random(rows, size + 2, dtype=dtype)
        wanted = start.clone()
        wanted[:, :size] *= int(add)
        for part in partial:
            wanted[:, :size] += part
        call = Call("fold_parts", dtype).vectors(partial).add(count, rows, size).expect(wanted, dtype, start)
        (out,) = run(library, call.add(size + 2, int(add)), 0.0)
        assert torch.equal(as_tensor(out, wanted), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tails_of_rows_are_zeroed_and_nothing_else(library, dtype):  # noqa: F811
    start = random(7, 40, dtype=dtype)
    wanted = start.double().clone()
    wanted[:, 33:] = 0
    run(library, Call("zero_tails", dtype).expect(wanted, dtype, start).add(7, 40, 33), 0.0)


# --- what an exact recomputation in chunks needs --------------------------------------------------------


def outputs(library, call):  # noqa: F811
    return replay.run(library, call.recorded, reverse=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("c", [8, 3])
@pytest.mark.parametrize("side", [7, 14, 1])
def test_a_sample_has_the_same_bits_in_every_chunk_and_layout(library, dtype, c, side):  # noqa: F811
    """Samples on their own, and maps whose planes start anywhere: other vectors, the same order of sums."""
    n = 5
    x = contiguous(n, c, side, side, dtype)
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    for make in (lambda t, k: bn_act(t, "hardswish", False), lambda t, k: bn_act_squeeze(t, "hardswish")):
        whole = outputs(library, make(x, None))[0]
        assert (outputs(library, make(shifted, None))[0] == whole).all()
        per_sample = len(whole) // n
        for first, count in ((0, 1), (3, 2), (1, 3)):
            part = outputs(library, make(x[first : first + count].clone(), None))[0]
            assert (part == whole[first * per_sample : (first + count) * per_sample]).all()


def test_a_gate_does_not_depend_on_its_batch(library):  # noqa: F811
    pooled, *weights = squeezed(33, 40, 10, torch.float32)

    def gates(values):
        n = len(values)
        call = Call("se_gate", torch.float32).vectors(values, *weights).add(n, 40, 10)
        call.expect(torch.empty(n, 10), torch.float32).expect(torch.empty(n, 40), torch.float32)
        return [as_tensor(data, torch.empty(n, w)) for data, w in zip(outputs(library, call), (10, 40), strict=True)]

    for n in (1, 2, 3, 7):
        for whole, part in zip(gates(pooled), gates(pooled[20 : 20 + n].clone()), strict=True):
            assert torch.equal(whole[20 : 20 + n], part)


def test_planes_of_many_pixels_are_summed_in_parts(library):  # noqa: F811
    for size in ((1, 2, 130, 130), (1, 1, 127, 131)):
        x = contiguous(*size, torch.float32)
        run(library, bn_act_squeeze(x, "hardswish"), 2e-6)
        run(library, bn_act_grad_sums(x, x * 0.5, "hardswish"), 2e-6)
        run(library, coupling_sums(x, x * 0.5), 2e-6)


# --- under the sanitizers ---------------------------------------------------------------------------------


def sanitized_calls():
    for dtype in (torch.float32, torch.bfloat16):
        for layout, *size in MAPS[1:9]:
            x = layout(*size, dtype)
            yield bn_act(x, "hardswish", True)
            yield bn_act(x.contiguous(), "hardswish", True, 3)
            yield bn_act_grad(x, x * 0.5, "hardswish", (True,) * 4)
            yield bn_act_squeeze(x, "hardswish")
            yield bn_act_grad_sums(x, x * 0.5, "hardswish")
            yield bn_act_grad_sums(x.contiguous(), x * 0.5, "hardswish", "channels")
            yield bn_grad(x, layout(*size, torch.float32), "kept", True)
            yield bn_grad(x, layout(*size, torch.float32), "kept alone", True)
            yield bn_grad(x, x * 0.5, "gated", False)
            yield bn_grad(x, x * 0.5, "alone", True)
            yield bn_stats(x, x.numel() > x.shape[1])  # one value per channel has no unbiased variance
            yield bn_stats(x, x.numel() > x.shape[1], "bn_statistics")
            yield coupling_sums(x, layout(*size, torch.float32))
            yield convert(x, torch.float32, 1.0, True, half_channels)
            yield convert((100 * x).to(torch.int16), dtype, 0.5, False)
    for size in ((1, 1, 1), (19, 40, 7), (5, 70, 18)):
        yield se_gate(*size, torch.float32)
        yield se_gate_act(contiguous(*size[:2], 3, 5, torch.float32), size[2])
        yield se_gate_grad(*size, torch.float32, 9)
        yield bn_fold_grad(*size[:2], torch.float32, "five pooled", True)


@pytest.mark.slow
def test_kernels_are_clean_under_the_sanitizers(sanitized_library, tmp_path):  # noqa: F811
    calls = list(sanitized_calls())
    done = run_sanitized(sanitized_library, [call.recorded for call in calls], tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    for results in pickle.loads((tmp_path / "results").read_bytes()):
        for call, found in zip(calls, results, strict=True):
            call.check(found, 2e-2)
