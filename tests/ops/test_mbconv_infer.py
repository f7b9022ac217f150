"""Couplings of MBConvs with running statistics in one op: against its reference, on chunks; what it refuses."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import revkernels  # noqa: F401  defines the op
from revkernels import reference_mbconv as reference
from revkernels.reference_mbconv import ASSIGN, EXPANDS, SQUEEZES
from revkernels.testing import relative_error

OPS = torch.ops.revkernels
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}


def term_weights(c: int, e: int, out: int, kernel: int, flags: int, hidden: int = 3) -> list[Tensor]:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64) / max(1, torch.Size(shape[1:]).numel()) ** 0.5

    def norm(channels: int) -> list[Tensor]:
        return [1 + 0.3 * randn(channels), 0.3 * randn(channels), 0.1 * randn(channels), 1 + randn(channels).abs()]

    found = [randn(e, c, 1, 1), *norm(e)] if flags & EXPANDS else []
    found += [randn(e, 1, kernel, kernel), *norm(e)]
    if flags & SQUEEZES:
        found += [randn(hidden, e, 1, 1), randn(hidden), randn(e, hidden, 1, 1), randn(e)]
    return [*found, randn(out, e, 1, 1), *norm(out)]


def network(dtype: torch.dtype = torch.float32, n: int = 3, h: int = 16, w: int = 24) -> dict:
    """Arguments: halves of a map, a map that is created from it, and back up, with and without each part."""
    torch.manual_seed(0)
    maps = [torch.randn(n, 12, h, w, dtype=torch.float64), torch.full((n, 7, h // 2, w // 2), float("nan"))]
    maps.append(torch.full((n, 5, h // 8, w // 8), float("nan")))
    steps = [  # target, first, source, first, stride, factor, flags; C, E, C', kernel
        ((0, 6, 0, 0, 1, 1, 0), (6, 6, 6, 3)),
        ((0, 0, 0, 6, 1, 1, EXPANDS + SQUEEZES), (6, 13, 6, 5)),
        ((1, 0, 0, 0, 2, 1, ASSIGN + EXPANDS), (12, 17, 7, 3)),
        ((2, 0, 0, 0, 8, 1, ASSIGN + SQUEEZES), (12, 12, 5, 15)),
        ((2, 0, 1, 0, 4, 1, EXPANDS), (7, 9, 5, 7)),
        ((0, 0, 1, 0, 1, 2, SQUEEZES), (7, 7, 12, 3)),
        ((0, 0, 2, 0, 1, 8, EXPANDS), (5, 20, 12, 5)),
    ]
    weights, terms = [], []
    for numbers, (c, e, out, kernel) in steps:
        terms += numbers
        weights += term_weights(c, e, out, kernel, numbers[-1])
    eps = [1e-3 * (1 + i % 5) for i in range(3 * len(steps))]
    return {
        "maps": [m.to(dtype) for m in maps],
        "weights": [t.to(dtype) for t in weights],
        "terms": terms,
        "eps": eps,
        "interpolation": "bilinear",
        "chunk_bytes": 1 << 20,
    }


def run(op, arguments: dict) -> list[Tensor]:
    maps = [m.clone() for m in arguments["maps"]]
    op(*(arguments | {"maps": maps}).values())
    return maps


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_op_agrees_with_its_reference_in_float64(dtype, mode):
    found = run(OPS.mbconv_infer_, network(dtype) | {"interpolation": mode})
    wanted = run(reference.mbconv_infer_, network(torch.float64) | {"interpolation": mode})
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == dtype and relative_error(a, b) < TOLERANCE[dtype]


@pytest.mark.parametrize("h, w", [(8, 8), (40, 72)])
def test_a_sample_is_the_same_in_any_batch_and_chunk(h, w):
    arguments = network(h=h, w=w)
    found = run(OPS.mbconv_infer_, arguments)
    for chunk_bytes in (1, 1 << 14):
        assert all(map(torch.equal, found, run(OPS.mbconv_infer_, arguments | {"chunk_bytes": chunk_bytes})))
    for i in range(3):
        alone = run(OPS.mbconv_infer_, arguments | {"maps": [m[i : i + 1] for m in arguments["maps"]]})
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(found, alone, strict=True))


def test_strided_maps_are_updated_in_place():
    arguments = network()
    wanted = run(OPS.mbconv_infer_, arguments)
    maps = [torch.empty(*m.shape[2:], *m.shape[:2]).permute(2, 3, 0, 1).copy_(m) for m in arguments["maps"]]
    OPS.mbconv_infer_(*(arguments | {"maps": maps}).values())
    for a, b in zip(maps, wanted, strict=True):
        assert relative_error(a, b) < 1e-6


def test_nothing_is_done_without_samples():
    assert [m.shape[0] for m in run(OPS.mbconv_infer_, network(n=0))] == [0, 0, 0]


def test_pytorchs_checks_of_an_op_pass():
    arguments = network(n=1, h=8, w=8)
    arguments["maps"] = [m.nan_to_num(0) for m in arguments["maps"]]
    torch.library.opcheck(OPS.mbconv_infer_.default, tuple(arguments.values()))


def changed(values: Sequence, k: int, value) -> list:
    return [*values[:k], value, *values[k + 1 :]]


def freed(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


GOOD = network(n=2)
MAPS, WEIGHTS, TERMS = GOOD["maps"], GOOD["weights"], GOOD["terms"]
BAD = {
    "maps: expected at least one": {"maps": []},
    r"maps\[1\]: expected 2 samples": {"maps": changed(MAPS, 1, torch.zeros(3, 7, 8, 12))},
    r"maps\[1\]: .*dtype": {"maps": changed(MAPS, 1, torch.zeros(2, 7, 8, 12, dtype=torch.float64))},
    r"maps\[0\]: expected float32 or float64": {"maps": [m.half() for m in MAPS]},
    r"maps\[1\]: expected 8 x 12 pixels": {"maps": changed(MAPS, 1, torch.zeros(2, 7, 8, 11))},
    r"maps\[0\]: elements overlap": {"maps": changed(MAPS, 0, torch.zeros(1, 12, 16, 24).expand(2, -1, -1, -1))},
    r"maps\[0\]: .*freed": {"maps": changed(MAPS, 0, freed(MAPS[0]))},
    r"maps\[0\]: expected memory of its own": {"weights": changed(WEIGHTS, 1, MAPS[0].view(-1)[:6])},
    r"weights\[0\]: expected \[6, 1, 3, 3\]": {"weights": changed(WEIGHTS, 0, torch.zeros(6, 2, 3, 3))},
    r"weights\[1\]: expected \[6\], got \[5\]": {"weights": changed(WEIGHTS, 1, torch.zeros(5))},
    r"weights\[2\]: .*Double": {"weights": changed(WEIGHTS, 2, torch.zeros(6, dtype=torch.float64))},
    r"weights\[5\]: .*freed": {"weights": changed(WEIGHTS, 5, freed(WEIGHTS[5]))},
    r"weights: expected more than": {"weights": WEIGHTS[:-1]},
    r"weights: expected \d+ tensors": {"weights": [*WEIGHTS, WEIGHTS[0]]},
    r"maps\[0\]: expected channels": {"terms": changed(TERMS, 1, 7)},
    "terms: expected maps 0 to 2": {"terms": changed(TERMS, 0, 3)},
    "terms: expected a source beside its target": {"terms": changed(TERMS, 1, 5)},
    "stride of at least 1, got": {"terms": changed(TERMS, 4, 0)},
    "factor: expected 1, 2, 4 or 8, got 3": {"terms": changed(TERMS, 5, 3)},
    "terms: expected 7 numbers each": {"terms": TERMS[:-1]},
    "eps: expected 21 numbers": {"eps": [1e-3]},
    "mode: expected": {"interpolation": "bicubic"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    with pytest.raises((RuntimeError, ValueError), match=message):
        OPS.mbconv_infer_(*(GOOD | BAD[message]).values())
