"""The published network's recorded values, and its weights and input in closed form: ``README.md`` beside this file."""

import gzip
import json
import math
import zlib
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

F64 = torch.float64


def read(name: str) -> dict:
    return json.loads(gzip.decompress(Path(__file__).with_name(f"{name}.json.gz").read_bytes()))


def closed_form(name: str, shape: torch.Size) -> Tensor:
    j = torch.arange(1, math.prod(shape) + 1, dtype=F64)
    return torch.sin(0.37 * j + (zlib.crc32(name.encode()) % 1000) / 100).reshape(shape)


def weight(name: str, value: Tensor) -> Tensor:
    s = closed_form(name, value.shape)
    if name.endswith("running_mean") or name.endswith("bias"):
        return 0.1 * s
    if name.endswith("running_var"):
        return 1 + 0.5 * s.square()
    if name.endswith("norm.weight"):
        return 1 + 0.1 * s
    return s * math.sqrt(2 / math.prod(value.shape[1:]))


def golden_model(module: ModuleType, scale: int, dtype: torch.dtype, reversible: bool) -> nn.Module:
    make = getattr(module, f"revbifpn_s{scale}")
    model = make(head_dropout=0.0, stochastic_depth=0.0, reversible=reversible).to(dtype)
    state = model.state_dict()
    model.load_state_dict({k: v if v.dtype == torch.long else weight(k, v) for k, v in state.items()})
    return model


def golden_input(shape: list[int], dtype: torch.dtype) -> Tensor:
    j = torch.arange(1, math.prod(shape) + 1, dtype=F64)
    return torch.sin(0.37 * j + 0.5).reshape(shape).to(dtype)


def relative(norm: float, golden: float) -> float:
    return abs(norm - golden) / golden


def assert_matches(out: Tensor, golden: dict, tolerance: float) -> None:
    """The eight recorded values to ``tolerance`` of the tensor's RMS, the norm to ``tolerance`` of itself."""
    out = out.detach().double()
    assert list(out.shape) == golden["shape"]
    rms = golden["l2"] / math.sqrt(out.numel())
    values = out.flatten()[golden["at"]]
    assert (values - torch.tensor(golden["values"], dtype=F64)).abs().max() <= tolerance * rms
    assert relative(out.norm().item(), golden["l2"]) <= tolerance
