"""The CUDA kernels, executed on the CPU by ``tests/emulation``, against the reference.

Every call runs twice, with a block's threads in order and in reverse: the results must be the same bits.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from revkernels.reference import accumulate_dtype
from revkernels.registry import OPS
from revkernels.testing import relative_error
from tests.marks import covering

ROOT = Path(__file__).resolve().parents[2]
EMULATION = ROOT / "tests" / "emulation"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
EPSILON = {torch.float32: 1e-6, torch.float64: 1e-14, torch.float16: 1e-4, torch.bfloat16: 1e-4}
MODES = ("bilinear", "nearest")
SANITIZERS = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")

# (kernel, stride): those with tiled kernels, then others.
TILED = ((3, 1), (5, 1), (3, 2), (5, 2), (7, 4), (15, 8))
DEPTHWISE = (*TILED, (1, 1), (7, 1), (3, 4), (9, 3), (11, 5))

spec = importlib.util.spec_from_file_location("replay", EMULATION / "replay.py")
replay = importlib.util.module_from_spec(spec)
spec.loader.exec_module(replay)

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or not sys.platform.startswith("linux"), reason="needs g++ on Linux"
)


def build(cache: Path, *flags: str) -> Path:
    """Compile the kernels and their driver as C++ into a shared library, unless ``cache`` has it."""
    cuda = ROOT / "csrc" / "cuda"
    sources = [*sorted(cuda.glob("*.cu")), *sorted(EMULATION.glob("*.cpp"))]
    headers = [*cuda.glob("*.h"), *cuda.glob("*.cuh"), *(ROOT / "csrc").glob("*.h"), EMULATION / "cuda_emulation.h"]
    flags = ("-std=c++17", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Werror", "-DREVK_EMULATE", *flags)
    content = repr(flags).encode() + b"".join(path.read_bytes() for path in sorted([*sources, *headers]))
    folder = cache / hashlib.sha256(content).hexdigest()[:16]
    library = folder / "emulated.so"
    if library.exists():
        return library
    folder.mkdir(exist_ok=True)
    includes = [f"-I{path}" for path in (ROOT / "csrc", cuda, EMULATION)]

    def compile(source: Path) -> str:
        output = str(folder / f"{source.name}.o")
        subprocess.run(["g++", *flags, *includes, "-x", "c++", "-c", str(source), "-o", output], check=True)
        return output

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile, sources))
    unfinished = folder / f"{os.getpid()}.so"
    subprocess.run(["g++", "-shared", *flags, "-o", str(unfinished), *objects], check=True)
    return unfinished.rename(library)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The references run on tiny maps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def library(pytestconfig):
    return replay.load(build(pytestconfig.cache.mkdir("cuda_emulation"), "-O1"))


# --- from an op's arguments to a kernel call --------------------------------------------------------


class Recorder:
    """Collects a call's buffers; tensors keep their storage, so strides and offsets are the op's."""

    def __init__(self):
        self.buffers: list[np.ndarray] = []

    def _add(self, t: Tensor) -> int:
        self.buffers.append(torch.tensor(t.untyped_storage(), dtype=torch.uint8).numpy())
        return len(self.buffers) - 1

    def map(self, t: Tensor) -> tuple:
        return "map", self._add(t), t.storage_offset() * t.element_size(), tuple(t.shape), tuple(t.stride())

    def pointer(self, t: Tensor | None) -> tuple | None:
        return None if t is None else ("pointer", self._add(t), t.storage_offset() * t.element_size())

    def poisoned(self, count: int, dtype: torch.dtype) -> tuple:
        self.buffers.append(np.full(count * dtype.itemsize, 0xFF, np.uint8))  # NaN in every format
        return "pointer", len(self.buffers) - 1, 0


def record(op: str, *args) -> tuple[dict, Tensor]:
    """The kernel call of an op, and a tensor of the output's shape and dtype."""
    out = OPS[op].fake(*args)
    first, recorder = args[0], Recorder()
    y = recorder.poisoned(out.numel(), out.dtype)
    function, dtype = f"emulate_{op}", DTYPES.index(first.dtype)
    if op in ("upsample", "upsample_adjoint"):
        arguments = (recorder.map(first), y, args[1], MODES.index(args[2]))
    elif op == "space_to_depth":
        arguments = (recorder.map(first), y, *args[1:])
    elif op in ("depth_to_space", "space_to_depth_adjoint"):
        function = "emulate_depth_to_space"
        arguments = (recorder.map(first), y, *args[1:], int(op == "space_to_depth_adjoint"))
    elif op == "depthwise_conv":
        x, weight, scale, shift, stride = args
        filter_ = (recorder.pointer(weight), int(weight.dtype != x.dtype), weight.shape[-1], stride)
        arguments = (recorder.map(x), *filter_, recorder.pointer(scale), recorder.pointer(shift), y)
    elif op == "depthwise_conv_grad_input":
        dy, weight, height, width, stride = args
        filter_ = (recorder.pointer(weight), int(weight.dtype != dy.dtype), weight.shape[-1], stride)
        channels = dy.shape[1]
        strides = channels * height * width, height * width
        arguments = (recorder.map(dy), *filter_, y, *strides, height, width, 0)
    else:
        x, dy, scale, shift, kernel, stride = args
        partial = recorder.poisoned(x.shape[0] * out.numel(), out.dtype)
        affine = (recorder.pointer(scale), recorder.pointer(shift))
        arguments = (recorder.map(x), recorder.map(dy), *affine, kernel, stride, partial, y)
    call = {"function": function, "arguments": (dtype, *arguments), "buffers": recorder.buffers, "outputs": [y[1]]}
    return call, out


def as_tensor(data: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(data).view(like.dtype).reshape(like.shape)


def check(out: Tensor, op: str, *args) -> None:
    """At most twice the reference's own error, both against the reference in float64."""
    exact = OPS[op].reference(*(a.double() if isinstance(a, Tensor) else a for a in args))
    expected = OPS[op].reference(*args)
    assert out.shape == expected.shape and out.dtype == expected.dtype
    bound = 2 * relative_error(expected, exact) + EPSILON[args[0].dtype]
    assert relative_error(out, exact) <= bound


def run_and_check(library, op: str, *args) -> None:
    call, like = record(op, *args)
    outputs = [replay.run(library, call, reverse=reverse)[0] for reverse in (False, True)]
    assert (outputs[0] == outputs[1]).all()
    check(as_tensor(outputs[0], like), op, *args)


# --- cases --------------------------------------------------------------------------------------------


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(s * 31**i for i, s in enumerate(shape)))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def contiguous(n, c, h, w, dtype):
    return random(n, c, h, w, dtype=dtype)


def half_channels(n, c, h, w, dtype):
    return random(n, 2 * c, h, w, dtype=dtype)[:, c:]


def channels_last(n, c, h, w, dtype):
    return random(n, c, h, w, dtype=dtype).to(memory_format=torch.channels_last)


def cropped(n, c, h, w, dtype):
    return random(n, c, h + 1, w + 3, dtype=dtype)[:, :, 1:, 2:-1]


def off_by_one(n, c, h, w, dtype):
    return random(n * c * h * w + 1, dtype=dtype)[1:].view(n, c, h, w)


def expanded(n, c, h, w, dtype):
    return random(1, c, h, w, dtype=dtype).expand(n, c, h, w)


# (layout, N, C, H, W): the network's sizes in small, odd ones, single pixels, more channels than a block takes.
MAPS = (
    (contiguous, 2, 3, 8, 8),
    (half_channels, 2, 5, 7, 7),
    (channels_last, 1, 4, 9, 5),
    (cropped, 2, 2, 6, 11),
    (off_by_one, 1, 3, 16, 16),
    (expanded, 2, 2, 5, 12),
    (half_channels, 3, 2, 1, 1),
    (contiguous, 1, 50, 2, 3),
    (contiguous, 1, 2, 24, 56),
)


def depthwise_arguments(op: str, kernel: int, stride: int, dtype: torch.dtype, index: int, case: tuple) -> tuple:
    """Arguments of a depthwise op; prologue and wide weights on every other case each."""
    layout, n, c, h, w = case
    wide = accumulate_dtype(dtype)
    out = -(-h // stride), -(-w // stride)
    weight = random(c, 1, kernel, kernel, dtype=wide if index % 2 else dtype)
    affine = (random(c, dtype=wide), random(c, dtype=wide)) if index // 2 % 2 == 0 else (None, None)
    if op == "depthwise_conv":
        return layout(n, c, h, w, dtype), weight, *affine, stride
    if op == "depthwise_conv_grad_input":
        return layout(n, c, *out, dtype), weight, h, w, stride
    return layout(n, c, h, w, dtype), layout(n, c, *out, dtype), *affine, kernel, stride


DEPTHWISE_OPS = ("depthwise_conv", "depthwise_conv_grad_input", "depthwise_conv_grad_weight")


@covering
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kernel", "stride"), DEPTHWISE, ids=lambda v: str(v))
@pytest.mark.parametrize("op", DEPTHWISE_OPS)
def test_depthwise_kernels_match_the_reference(library, op, kernel, stride, dtype):
    maps = MAPS if (kernel, stride) in TILED else MAPS[:5]  # the others know no tiles, and are slow
    for index, case in enumerate(maps):
        run_and_check(library, op, *depthwise_arguments(op, kernel, stride, dtype, index, case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kernel", "stride"), [*TILED, (9, 3)], ids=lambda v: str(v))
def test_input_gradients_are_added_to_planes_anywhere(library, kernel, stride, dtype):
    """Into every second channel of a map: the others stay, and each value is rounded once."""
    for _, n, c, h, w in MAPS[:5]:
        dy = contiguous(n, c, -(-h // stride), -(-w // stride), dtype)
        weight, start = random(c, 1, kernel, kernel, dtype=dtype), random(n, 2 * c, h, w, dtype=dtype)
        call, _ = record("depthwise_conv_grad_input", dy, weight, h, w, stride)
        call["buffers"][call["outputs"][0]] = start.contiguous().view(torch.uint8).flatten().numpy()
        *head, _, _, height, width, _ = call["arguments"]
        call["arguments"] = (*head, 2 * c * h * w, 2 * h * w, height, width, 1)
        wanted = start.double().clone()
        exact = OPS["depthwise_conv_grad_input"].reference(dy.double(), weight.double(), h, w, stride)
        wanted[:, ::2] += exact
        results = [as_tensor(replay.run(library, call, reverse=r)[0], start) for r in (False, True)]
        assert torch.equal(*results)
        assert torch.equal(results[0][:, 1::2], start[:, 1::2])
        unit = torch.finfo(dtype).eps
        assert (results[0].double() - wanted).abs().max() <= unit * (wanted.abs().max() + 8 * exact.abs().max())


# Larger than a tile: cut by rows, then also by columns.
@pytest.mark.parametrize("op", DEPTHWISE_OPS)
@pytest.mark.parametrize(
    ("kernel", "stride", "height", "width"),
    [
        (3, 1, 90, 98),
        (5, 1, 61, 130),
        (3, 1, 3, 2100),
        (5, 2, 70, 150),
        (7, 4, 9, 1500),
        (15, 8, 100, 99),
        (15, 8, 9, 700),
    ],
)
def test_maps_larger_than_a_tile(library, op, kernel, stride, height, width):
    case = (contiguous, 1, 2, height, width)
    run_and_check(library, op, *depthwise_arguments(op, kernel, stride, torch.float32, 0, case))


@pytest.mark.parametrize("n", [2, 9, 600])
def test_weight_gradient_sums_slices_of_samples(library, n):
    x, dy = contiguous(n, 2, 1, 2, torch.float32), contiguous(n, 2, 1, 2, torch.float32) * 0.5
    run_and_check(library, "depthwise_conv_grad_weight", x, dy, None, None, 3, 1)


def test_outputs_do_not_depend_on_the_batch(library):
    """Bit by bit: what an exact recomputation in chunks of samples needs."""
    x, weight = contiguous(5, 3, 14, 14, torch.float32), random(3, 1, 5, 5, dtype=torch.float32)
    call, like = record("depthwise_conv", x, weight, None, None, 1)
    whole = as_tensor(replay.run(library, call, reverse=False)[0], like)
    for n in range(5):
        call, like = record("depthwise_conv", x[n : n + 1], weight, None, None, 1)
        assert torch.equal(as_tensor(replay.run(library, call, reverse=False)[0], like), whole[n : n + 1])


RESAMPLED = (
    (contiguous, 2, 3, 4, 4),
    (half_channels, 2, 2, 7, 7),
    (channels_last, 1, 3, 3, 5),
    (cropped, 1, 2, 5, 6),
    (off_by_one, 1, 2, 1, 9),
    (contiguous, 2, 2, 1, 1),
    (contiguous, 1, 40, 2, 2),
    (expanded, 2, 1, 3, 14),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("factor", [1, 2, 3, 4, 8])
def test_upsampling_matches_the_reference(library, factor, mode, dtype):
    for layout, n, c, h, w in RESAMPLED:
        run_and_check(library, "upsample", layout(n, c, h, w, dtype), factor, mode)
        run_and_check(library, "upsample_adjoint", layout(n, c, factor * h, factor * w, dtype), factor, mode)


@pytest.mark.parametrize(("factor", "height", "width"), [(2, 120, 130), (8, 104, 120), (4, 8, 1800)])
def test_adjoint_of_maps_larger_than_a_tile(library, factor, height, width):
    run_and_check(library, "upsample_adjoint", contiguous(1, 2, height, width, torch.float32), factor, "bilinear")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [1, 2, 3, 4, 8])
def test_space_to_depth_family_matches_the_reference(library, block, dtype):
    for (layout, n, c, h, w), extra in itertools.product(RESAMPLED, (0, 1)):
        planes = 2 * c + extra
        run_and_check(library, "space_to_depth", layout(n, c, block * h, block * w, dtype), planes, block)
        y = layout(n, planes * block * block, h, w, dtype)
        run_and_check(library, "depth_to_space", y, c, block)
        run_and_check(library, "space_to_depth_adjoint", y, c, block)


def sanitized_cases():
    """Every kernel in float32 and bfloat16, with layouts and sizes in turn."""
    for dtype in (torch.float32, torch.bfloat16):
        for op, (kernel, stride), index in itertools.product(DEPTHWISE_OPS, (*TILED, (3, 4)), (1, 3, 6)):
            yield op, *depthwise_arguments(op, kernel, stride, dtype, index, MAPS[index])
        for factor, mode, (layout, n, c, h, w) in itertools.product((2, 3, 4, 8), MODES, RESAMPLED[1:6:2]):
            yield "upsample", layout(n, c, h, w, dtype), factor, mode
            yield "upsample_adjoint", layout(n, c, factor * h, factor * w, dtype), factor, mode
        for block, (layout, n, c, h, w) in itertools.product((2, 3, 4), RESAMPLED[1:6:2]):
            yield "space_to_depth", layout(n, c, block * h, block * w, dtype), 2 * c + 1, block
            yield "space_to_depth_adjoint", layout(n, (2 * c + 1) * block * block, h, w, dtype), c, block


def run_sanitized(library: Path, calls: list[dict], folder: Path) -> subprocess.CompletedProcess:
    """Replay calls in a Python of its own, with the sanitizer's runtime loaded first."""
    names = ("libasan.so", "libubsan.so")
    runtimes = [subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip() for name in names]
    (folder / "calls").write_bytes(pickle.dumps(calls))
    environment = {**os.environ, "LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, str(EMULATION / "replay.py"), *map(str, (library, folder / "calls", folder / "results"))]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="session")
def sanitized_library(pytestconfig):
    return build(pytestconfig.cache.mkdir("cuda_emulation"), *SANITIZERS)


@pytest.mark.slow
def test_kernels_are_clean_under_address_and_undefined_behaviour_sanitizers(sanitized_library, tmp_path):
    cases = list(sanitized_cases())
    recorded = [record(*case) for case in cases]
    done = run_sanitized(sanitized_library, [call for call, _ in recorded], tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    forward, reverse = pickle.loads((tmp_path / "results").read_bytes())
    for case, (_, like), (first,), (second,) in zip(cases, recorded, forward, reverse, strict=True):
        assert (first == second).all()
        check(as_tensor(first, like), *case)


# --- the emulation finds mistakes ---------------------------------------------------------------------


def mistake(name: str) -> dict:
    buffers = [np.full(128, 0xFF, np.uint8)]
    return {
        "function": "emulate_mistake",
        "arguments": (name, ("pointer", 0, 0)),
        "buffers": buffers,
        "outputs": [0],
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("divergent_barrier", "some threads have returned"),
        ("different_barriers", "divergent barrier: lines"),
        ("unaligned_vector", "unaligned 16-byte access"),
        ("shared_overflow", "beyond the launch's shared memory"),
        ("too_much_shared_memory", "invalid launch"),
    ],
)
def test_emulation_rejects(library, name, message):
    with pytest.raises(replay.EmulationError, match=message):
        replay.run(library, mistake(name), reverse=False)


def test_emulation_shows_a_missing_barrier(library):
    for reverse in (False, True):
        (y,) = replay.run(library, mistake("missing_barrier"), reverse=reverse)
        assert np.isnan(y.view(np.float32)).any()


@pytest.mark.parametrize("name", ["shared_overflow", "global_overflow"])
def test_sanitizer_stops_an_overflow(sanitized_library, tmp_path, name):
    done = run_sanitized(sanitized_library, [mistake(name)], tmp_path)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr
