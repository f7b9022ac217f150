"""The three ops of an MBConv: against their reference, in every dtype, on chunks; their memory; what they refuse."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import revkernels  # noqa: F401  defines the ops
from revkernels import reference_mbconv as reference
from revkernels import workspace
from revkernels.reference import accumulate_dtype
from tests.marks import covering
from tests.ops import test_mbconv_infer

pytestmark = covering

OPS = torch.ops.revkernels
EPS, MOMENTUM = [1e-3, 2e-3, 3e-3], [0.1, 0.2, 0.3]


@dataclass(frozen=True)
class Case:
    """An MBConv and what it is called on."""

    n: int = 3
    c: int = 6
    size: tuple[int, int] = (9, 7)
    expanded: int | None = None  # None: no expansion
    channels: int = 5
    hidden: int | None = 4
    kernel: int = 3
    stride: int = 1
    dtype: torch.dtype = torch.float32  # of x
    planes: torch.dtype | None = None  # None: of x
    fraction_bits: int | None = None
    chunk: int = 2
    batch: tuple[bool, bool, bool] = (True, True, True)
    keep: bool = False

    @property
    def acc(self) -> torch.dtype:
        return accumulate_dtype(self.plane_dtype)

    @property
    def plane_dtype(self) -> torch.dtype:
        return self.planes or (torch.float32 if self.dtype == torch.int16 else self.dtype)

    @property
    def e(self) -> int:
        return self.expanded or self.c

    @property
    def out_size(self) -> tuple[int, int]:
        return tuple(-(-s // self.stride) for s in self.size)

    @property
    def shape(self) -> workspace.MBConvShape:
        return workspace.MBConvShape(
            *(self.n, self.c, *self.size, self.e, self.channels, self.hidden or 0, self.kernel, self.stride),
            *(self.chunk, self.expanded is not None, self.plane_dtype.itemsize, self.acc.itemsize),
            scaled=self.fraction_bits is not None,
        )

    def input(self) -> Tensor:
        x = torch.randn(self.n, self.c, *self.size, dtype=torch.float64)
        if self.fraction_bits is not None:
            return (x * 2.0**self.fraction_bits).round().to(torch.int16)
        return x.to(self.dtype)

    def weights(self) -> dict[str, Tensor | None]:
        def randn(*shape: int, fan: int = 1) -> Tensor:
            return torch.randn(shape, dtype=self.acc) / fan**0.5

        def norm(k: int, c: int) -> dict[str, Tensor]:
            return {f"gamma{k}": 1 + 0.3 * randn(c), f"beta{k}": 0.3 * randn(c)}

        e, r, k = self.e, self.hidden, self.kernel
        found = {"expand": None, "gamma0": None, "beta0": None}
        if self.expanded is not None:
            found = {"expand": randn(e, self.c, 1, 1, fan=self.c), **norm(0, e)}
        found |= {"depthwise": randn(e, 1, k, k, fan=k * k), **norm(1, e)}
        se = dict.fromkeys(("squeeze", "squeeze_bias", "excite", "excite_bias"))
        if r is not None:
            se = {"squeeze": randn(r, e, 1, 1, fan=e), "squeeze_bias": randn(r)}
            se |= {"excite": randn(e, r, 1, 1, fan=r), "excite_bias": randn(e)}
        return found | se | {"project": randn(self.channels, e, 1, 1, fan=e), **norm(2, self.channels)}

    def running(self) -> dict[str, Tensor | None]:
        found = {}
        for k, c in enumerate((self.e, self.e, self.channels)):
            absent = k == 0 and self.expanded is None
            found[f"mean{k}"] = None if absent else 0.1 * torch.randn(c, dtype=self.acc)
            found[f"var{k}"] = None if absent else 1 + torch.rand(c, dtype=self.acc)
            found[f"batches{k}"] = None if absent else torch.tensor(7)
        return found

    def plane(self, channels: int, size: tuple[int, int]) -> Tensor:
        return torch.full((self.n, channels, *size), float("nan"), dtype=self.plane_dtype)


CONVOLUTIONS = ("expand", "depthwise", "squeeze", "squeeze_bias", "excite", "excite_bias", "project")


def memory(size: int) -> Tensor:
    """A workspace full of bytes that are NaN as any float."""
    return torch.full((size,), 0xFF, dtype=torch.uint8)


@dataclass
class Forward:
    p: Tensor
    d: Tensor
    norms: Tensor
    running: dict[str, Tensor | None]


def forward(case: Case, op: Any, x: Tensor, weights: dict, running: dict, norms: Tensor | None = None) -> Forward:
    running = {name: None if v is None else v.clone() for name, v in running.items()}
    p, d = case.plane(case.channels, case.out_size), case.plane(case.e, case.out_size)
    size = workspace.mbconv_bytes(case.shape, batch=any(case.batch[case.expanded is None :]), d=True)
    found = op(
        *(x, case.fraction_bits, *weights.values(), *running.values(), list(case.batch), MOMENTUM, EPS),
        *(case.stride, case.chunk, norms, p, d, memory(size)),
    )
    return Forward(p, d, found, running)


def recompute(case: Case, op: Any, x: Tensor, weights: dict, norms: Tensor, *, keep: bool) -> tuple:
    p, d, e = case.plane(case.channels, case.out_size), None, None
    if keep:
        d = case.plane(case.e, case.out_size)
        e = None if case.expanded is None else case.plane(case.e, case.size)
    size = workspace.mbconv_recompute_bytes(case.shape, d=d is not None, e=e is not None)
    convolutions = (weights[name] for name in CONVOLUTIONS)
    squeezed = op(x, case.fraction_bits, *convolutions, norms, case.stride, case.chunk, p, d, e, memory(size))
    return p, d, e, squeezed


def backward(
    case: Case,
    op: Any,
    x: Tensor,
    weights: dict,
    norms: Tensor,
    du: Tensor,
    keep: Tensor | None,
    dx: Tensor | None,
    *,
    add: bool = True,
    sums: Tensor | None = None,
    p: Tensor | None = None,
    d: Tensor | None = None,
    e: Tensor | None = None,
    squeezed: Tensor | None = None,
    dz: Tensor | None = None,
) -> tuple[Tensor, ...]:
    given = {name: v is not None for name, v in dict(sums=sums, p=p, d=d, e=e, squeezed=squeezed, dz=dz, dx=dx).items()}
    size = workspace.mbconv_backward_bytes(case.shape, add=add, **given)
    convolutions = (weights[name] for name in CONVOLUTIONS)
    return op(
        *(du, sums, x, case.fraction_bits, *convolutions, norms, list(case.batch), keep, case.stride, case.chunk),
        *(p, d, e, squeezed, dz, dx, add, memory(size)),
    )


def samples(dtype: torch.dtype = torch.float32) -> dict[str, tuple]:
    """Arguments of the ops that give every tensor."""
    torch.manual_seed(0)
    case = Case(dtype=dtype, expanded=8, keep=True)
    found: dict[str, tuple] = {}

    def note(name: str) -> Any:
        def call(*arguments: Any) -> Any:
            found[name] = tuple(a.clone() if isinstance(a, Tensor) else a for a in arguments)
            return getattr(OPS, name)(*arguments)

        return call

    x, weights = case.input(), case.weights()
    norms = forward(case, note("mbconv"), x, weights, case.running()).norms
    found["mbconv"] = tuple(norms.clone() if k == 29 else a for k, a in enumerate(found["mbconv"]))
    p, d, e, squeezed = recompute(case, note("mbconv_recompute"), x, weights, norms, keep=True)
    du, dx = torch.randn_like(p), torch.randn_like(x)
    kept = dict(sums=torch.randn(2, case.n, case.channels, dtype=case.acc), p=p, d=d, e=e, squeezed=squeezed)
    dz = case.plane(case.e, case.out_size)
    keep = torch.ones(case.n, dtype=case.acc)
    backward(case, note("mbconv_backward"), x, weights, norms, du, keep, dx, dz=dz, **kept)
    found["mbconv_infer_"] = tuple(test_mbconv_infer.network(dtype, n=1, h=8, w=8).values())
    return found


def close(found: Tensor, wanted: Tensor, case: Case, factor: float = 1.0) -> None:
    """Equal but for rounding: of planes where there are 16 bits."""
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    if wanted.numel() == 0:
        return
    error = (found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)
    bound = {torch.float64: 1e-12, torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[case.plane_dtype]
    assert error < bound * factor, f"relative error {error:.2e}"


CASES = {
    "plain": Case(),
    "expanded": Case(expanded=10),
    "same channels": Case(channels=6),
    "without squeeze-excite": Case(hidden=None, expanded=8),
    "strided": Case(stride=2, size=(9, 8), kernel=5),
    "expanded and strided": Case(expanded=9, stride=2, size=(11, 6), kernel=5),
    "stride 4": Case(stride=4, kernel=7, size=(16, 12)),
    "stride 8": Case(stride=8, kernel=15, size=(16, 17)),
    "any kernel": Case(kernel=9, stride=3, size=(10, 11), expanded=7),
    "one pixel": Case(size=(1, 1), expanded=8),
    "one sample": Case(n=1, expanded=8, chunk=1),
    "one chunk": Case(chunk=8, expanded=8, stride=2),
    "many samples": Case(n=19, chunk=5, size=(4, 5), expanded=8, keep=True),
    "wide": Case(c=200, channels=200, size=(5, 5), n=2, chunk=1),
    "running statistics": Case(batch=(False, False, False), expanded=8),
    "some statistics": Case(batch=(False, True, False), expanded=8),
    "kept": Case(keep=True),
    "float64": Case(dtype=torch.float64, expanded=10, keep=True),
    "float64 strided": Case(dtype=torch.float64, stride=2, kernel=5),
    "bfloat16 planes": Case(planes=torch.bfloat16, expanded=10),
    "bfloat16 planes, no expansion": Case(planes=torch.bfloat16, keep=True),
    "float16 planes": Case(planes=torch.float16, expanded=10, stride=2),
    "bfloat16": Case(dtype=torch.bfloat16, expanded=10),
    "int16": Case(dtype=torch.int16, fraction_bits=9),
    "int16 expanded": Case(dtype=torch.int16, fraction_bits=9, expanded=10, stride=2),
    "int16 with bfloat16 planes": Case(dtype=torch.int16, fraction_bits=7, planes=torch.bfloat16, expanded=10),
    "int16 with bfloat16 planes, no expansion": Case(dtype=torch.int16, fraction_bits=7, planes=torch.bfloat16),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@cases
def test_forward_is_the_reference(case: Case) -> None:
    x, weights, running = case.input(), case.weights(), case.running()
    found, wanted = (forward(case, op, x, weights, running) for op in (OPS.mbconv, reference.mbconv))
    close(found.d, wanted.d, case)
    close(found.p, wanted.p, case)
    close(found.norms, wanted.norms, case)
    for name, v in wanted.running.items():
        assert (v is None) == (found.running[name] is None)
        if v is not None:
            close(found.running[name].double(), v.double(), case)


@cases
@pytest.mark.parametrize("keep", [True, False], ids=["keeping", "lean"])
def test_recompute_gives_the_bits_of_the_forward(case: Case, keep: bool) -> None:
    x, weights = case.input(), case.weights()
    first = forward(case, OPS.mbconv, x, weights, case.running())
    p, d, e, squeezed = recompute(case, OPS.mbconv_recompute, x, weights, first.norms, keep=keep)
    assert torch.equal(p, first.p)
    if keep:
        assert torch.equal(d, first.d)
        assert e is None or e.isfinite().all()
    wanted = recompute(case, reference.mbconv_recompute, x, weights, first.norms, keep=keep)
    close(squeezed, wanted[-1], case)


@cases
@pytest.mark.parametrize("held", ["everything", "lean", "no sums", "no sums, lean", "stored", "nothing"])
def test_gradients_are_those_of_the_reference(case: Case, held: str) -> None:
    x, weights = case.input(), case.weights()
    norms = forward(case, reference.mbconv, x, weights, case.running()).norms
    du = torch.randn(case.n, case.channels, *case.out_size, dtype=case.acc)
    keep = (torch.rand(case.n) < 0.7).to(case.acc) / 0.7 if case.keep else None

    def pull(module: Any) -> tuple[tuple[Tensor, ...], Tensor]:
        p, d, e, squeezed = recompute(case, module.mbconv_recompute, x, weights, norms, keep="lean" not in held)
        center = norms[0, -case.channels :]
        sums = torch.ops.revkernels.couple_adjoint(du, [p], [center], [1], "nearest")[1][0]
        given = {"sums": sums, "p": p, "d": d, "e": e, "squeezed": squeezed}
        if held.startswith("no sums"):
            del given["sums"]
        if held == "stored":
            given = {"sums": sums, "p": p, "d": d}
        elif held == "nothing":
            given = {"dz": case.plane(case.e, case.out_size)}
        dx = torch.ones(x.shape, dtype=case.acc)
        return backward(case, module.mbconv_backward, x, weights, norms, du, keep, dx, **given), dx

    (found, dx), (wanted, dx_wanted) = pull(OPS), pull(reference)
    scale = max(float(g.norm()) for g in wanted)
    for f, w, weight in zip(found, wanted, weights.values(), strict=True):
        assert f.shape == w.shape == (torch.Size([0]) if weight is None else weight.shape)
        bias_of_norm = float(w.norm()) < 1e-3 * scale  # sums to zero but for rounding
        close(f, w, case, 1e3 if bias_of_norm else 10)
    close(dx, dx_wanted, case, 10)


@cases
def test_results_do_not_depend_on_chunks_or_threads(case: Case) -> None:
    x, weights, running = case.input(), case.weights(), case.running()
    first = forward(case, OPS.mbconv, x, weights, running)
    threads = torch.get_num_threads()
    try:
        for chunk, count in ((1, 1), (2, 2), (1 << 20, 3)):
            torch.set_num_threads(count)
            other = forward(replace(case, chunk=chunk), OPS.mbconv, x, weights, running)
            assert torch.equal(other.p, first.p) and torch.equal(other.norms, first.norms)
    finally:
        torch.set_num_threads(threads)


def test_gradients_may_be_written_over_what_was_read() -> None:
    case = Case(channels=6, dtype=torch.float64)
    x, weights = case.input(), case.weights()
    norms = forward(case, OPS.mbconv, x, weights, case.running()).norms
    du = torch.randn(case.n, case.channels, *case.out_size, dtype=case.acc)
    dx = torch.empty_like(x)
    dz = case.plane(case.e, case.out_size)
    wanted = backward(case, OPS.mbconv_backward, x, weights, norms, du, None, dx, add=False, dz=dz)

    over = du.clone()  # dz and dx over du
    found = backward(case, OPS.mbconv_backward, x, weights, norms, over, None, over, add=False, dz=over)
    assert torch.equal(over, dx) and all(map(torch.equal, found, wanted))

    for other in (case, replace(case, expanded=10), replace(case, stride=2)):  # dx over x
        case = other
        weights = case.weights()
        norms = forward(case, OPS.mbconv, x, weights, case.running()).norms
        du = torch.randn(case.n, case.channels, *case.out_size, dtype=case.acc)
        over, dx, dz = x.clone(), torch.empty_like(x), case.plane(case.e, case.out_size)
        wanted = backward(case, OPS.mbconv_backward, x, weights, norms, du, None, dx, add=False, dz=dz.clone())
        found = backward(case, OPS.mbconv_backward, over, weights, norms, du, None, over, add=False, dz=dz)
        assert torch.equal(over, dx) and all(map(torch.equal, found, wanted))


def test_norms_that_are_given_replace_running_statistics() -> None:
    case = Case(dtype=torch.float64, expanded=8, batch=(True, False, True))
    x, weights = case.input(), case.weights()
    norms = forward(case, OPS.mbconv, x, weights, case.running()).norms
    again = forward(case, OPS.mbconv, x, weights, dict.fromkeys(case.running()), norms)
    assert torch.equal(again.norms, norms)


def test_input_and_gradient_may_be_halves_of_streams() -> None:
    case = Case(expanded=8)
    whole, total = torch.randn(case.n, 2 * case.c, *case.size), torch.zeros(case.n, 2 * case.c, *case.size)
    x, weights = whole[:, case.c :], case.weights()
    found = [forward(case, OPS.mbconv, v, weights, case.running()) for v in (x, x.contiguous())]
    assert torch.equal(found[0].p, found[1].p)
    du, dz = torch.randn(case.n, case.channels, *case.size), case.plane(case.e, case.size)
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
    for v, into in ((x, total[:, case.c :]), (x.contiguous(), dx)):
        backward(case, OPS.mbconv_backward, v, weights, found[0].norms, du, None, into, dz=dz)
    assert torch.equal(total[:, case.c :], dx) and not total[:, : case.c].any()


@cases
def test_the_workspace_is_as_large_as_its_rule_says(case: Case) -> None:
    """One byte less is refused, with the number of bytes that it takes."""
    x, weights, running = case.input(), case.weights(), case.running()
    p, norms = case.plane(case.channels, case.out_size), forward(case, OPS.mbconv, x, weights, running).norms
    du, dx = torch.zeros(p.shape, dtype=case.acc), torch.zeros(x.shape, dtype=case.acc)
    convolutions = [weights[name] for name in CONVOLUTIONS]
    sizes = workspace.MBConvShape(*case.shape)
    absent = dict.fromkeys(("sums", "d", "e", "squeezed", "dz"), False)
    calls = {
        workspace.mbconv_bytes(sizes, batch=any(case.batch[case.expanded is None :]), d=False): lambda memory: (
            OPS.mbconv(
                *(x, case.fraction_bits, *weights.values(), *running.values(), list(case.batch), MOMENTUM, EPS),
                *(case.stride, case.chunk, None, p, None, memory),
            )
        ),
        workspace.mbconv_recompute_bytes(sizes, d=False, e=False): lambda memory: OPS.mbconv_recompute(
            x, case.fraction_bits, *convolutions, norms, case.stride, case.chunk, p, None, None, memory
        ),
        workspace.mbconv_backward_bytes(sizes, p=True, dx=True, add=True, **absent): lambda memory: OPS.mbconv_backward(
            *(du, None, x, case.fraction_bits, *convolutions, norms, list(case.batch), None, case.stride, case.chunk),
            *(p, None, None, None, None, dx, True, memory),
        ),
    }
    assert len(calls) == 3
    for size, call in calls.items():
        call(memory(size))
        with pytest.raises(RuntimeError, match=f"workspace: expected at least {size} bytes, got {size - 1}"):
            call(memory(size - 1))


@pytest.mark.slow
@pytest.mark.parametrize("case", [Case(), Case(expanded=8, keep=True)], ids=["plain", "expanded"])
def test_opcheck(case: Case) -> None:
    x, weights, running = case.input(), case.weights(), case.running()
    norms = forward(case, OPS.mbconv, x, weights, running).norms
    space = memory(1 << 16)
    p, d = torch.zeros(case.n, case.channels, *case.out_size), torch.zeros(case.n, case.e, *case.out_size)
    convolutions = [weights[name] for name in CONVOLUTIONS]
    tail = (case.stride, case.chunk)
    torch.library.opcheck(
        OPS.mbconv.default,
        (x, None, *weights.values(), *running.values(), list(case.batch), MOMENTUM, EPS, *tail, None, p, d, space),
    )
    torch.library.opcheck(OPS.mbconv_recompute.default, (x, None, *convolutions, norms, *tail, p, d, None, space))
    torch.library.opcheck(
        OPS.mbconv_backward.default,
        (p, None, x, None, *convolutions, norms, list(case.batch), None, *tail, p.clone(), None, None, None, None)
        + (torch.zeros_like(x), True, space),
    )


def freed(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


BAD = {
    "x: expected .*got": {"x": torch.zeros(2, 6, 4)},
    "fraction_bits: expected an int, as x is int16": {"x": torch.zeros(3, 6, 9, 7, dtype=torch.int16)},
    "fraction_bits: expected None": {"fraction_bits": 9},
    "fraction_bits: expected -8 to 24, got 30": {"x": torch.zeros(3, 6, 9, 7, dtype=torch.int16), "fraction_bits": 30},
    r"depthwise: expected \[6, 1, k, k\]": {"depthwise": torch.zeros(5, 1, 3, 3)},
    "depthwise: expected an odd kernel": {"depthwise": torch.zeros(6, 1, 4, 4)},
    r"project: expected \[5, 6, 1, 1\], got \[5, 7, 1, 1\]": {"project": torch.zeros(5, 7, 1, 1)},
    "project: expected float32, got": {"project": torch.zeros(5, 6, 1, 1, dtype=torch.float64)},
    r"squeeze: expected \[4, 6, 1, 1\]": {"squeeze": torch.zeros(4, 5, 1, 1)},
    "squeeze_bias, excite, excite_bias: expected tensors": {"excite": None},
    r"excite_bias: expected \[6\]": {"excite_bias": torch.zeros(5)},
    r"norms: expected \[4, 11\]": {"norms": torch.zeros(4, 12)},
    "stride: expected at least 1, got 0": {"stride": 0},
    "chunk: expected at least 1, got 0": {"chunk": 0},
    r"p: expected \[3, 5, 9, 7\], got \[3, 5, 9, 8\]": {"p": torch.zeros(3, 5, 9, 8)},
    "p: expected a contiguous tensor": {"p": torch.zeros(5, 3, 9, 7).transpose(0, 1)},
    "d: expected the planes' dtype, got": {"d": torch.zeros(3, 6, 9, 7, dtype=torch.bfloat16)},
    "e: there is no expansion": {"e": torch.zeros(3, 6, 9, 7)},
    "workspace: expected a contiguous uint8 tensor": {"workspace": torch.zeros(1 << 16)},
    "workspace: expected at least": {"workspace": torch.zeros(8, dtype=torch.uint8)},
    "x: .*freed": {"x": freed(torch.zeros(3, 6, 9, 7))},
    "project: .*freed": {"project": freed(torch.zeros(5, 6, 1, 1))},
    "p: .*freed": {"p": freed(torch.zeros(3, 5, 9, 7))},
    "workspace: .*freed": {"workspace": freed(torch.zeros(1 << 16, dtype=torch.uint8))},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message: str) -> None:
    case = Case()
    weights = case.weights()
    arguments = {"x": case.input(), "fraction_bits": None, **{name: weights[name] for name in CONVOLUTIONS}}
    arguments |= {
        "norms": torch.ones(4, 11),
        "stride": 1,
        "chunk": 2,
        "p": case.plane(5, case.size),
        "d": None,
        "e": None,
    }
    arguments["workspace"] = memory(1 << 16)
    OPS.mbconv_recompute(*arguments.values())
    with pytest.raises((RuntimeError, ValueError), match=message):
        OPS.mbconv_recompute(*(arguments | BAD[message]).values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_gradient_of_another_half_precision_is_named(dtype: torch.dtype) -> None:
    case = Case()
    weights = case.weights()
    norms = forward(case, OPS.mbconv, case.input(), weights, case.running()).norms
    p = case.plane(5, case.size)
    convolutions = [weights[name] for name in CONVOLUTIONS]
    with pytest.raises(RuntimeError, match="du: expected the planes' dtype or float32, got"):
        OPS.mbconv_backward(
            *(p.to(dtype), None, case.input(), None, *convolutions, norms, list(case.batch), None, 1, 2),
            *(p, None, None, None, None, None, False, memory(1 << 16)),
        )
