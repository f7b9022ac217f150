"""Nothing is timed before it was found to compute the same: a network in its variants, an op in its implementations."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import revbifpn
import revbifpn.fast
from benchmarks.harness.cases import LARGEST_INTEGER, Case, map_nested, tensors
from benchmarks.harness.command import BenchmarkError
from benchmarks.harness.networks import CHECKPOINTED, FAST, PUBLISHED, REVBIFPN, REVERSIBLE, Network
from revkernels.registry import OPS
from revkernels.testing import relative_error

GATE = {"resolution": 96, "batch": 4, "seeds": 3, "loss": 1e-4, "gradients": 1e-3}
OWN_CODE = (FAST, REVERSIBLE, CHECKPOINTED, PUBLISHED)  # the others are PyTorch's transformations of the stored model

PYTORCH = "pytorch"
ULP = {torch.float32: 2**-23, torch.float64: 2**-52, torch.float16: 2**-10, torch.bfloat16: 2**-7}
ULP |= {torch.int16: 1 / LARGEST_INTEGER}


class DisagreementError(BenchmarkError):
    """Two variants of one network compute different things; their speeds are not worth printing."""


def check_agreement(chosen: Sequence[Network], device: torch.device) -> list[dict[str, Any]]:
    """Compare loss and gradients of the RevBiFPN variants with the stored plain model's, in float32, same weights.

    ``|l - l'| / |l'|`` and ``||g - g'|| / ||g'||`` over all parameters, each the median over a few random batches: a
    hardswish input that crosses its kink by rounding moves a single batch's gradient by more. With exact streams the
    reference is the stored fast model with the same streams, whose gradients have the same bits.

    Raises:
        DisagreementError: an error is above the limits of ``GATE`` or not a number.
    """
    rows = []
    checked = [c for c in chosen if c.family == REVBIFPN and c.kind in OWN_CODE]
    checked = [c for c in checked if "+" not in c.variant]  # what is added says how a step runs, not what it computes
    for arch, stream in dict.fromkeys((c.name, c.stream) for c in checked):
        torch.manual_seed(0)
        fixed = {"stochastic_depth": 0.0, "head_dropout": 0.0}
        stored = partial(getattr(revbifpn if stream is None else revbifpn.fast, arch), reversible=False)
        model0 = (stored(**fixed) if stream is None else stored(stream=stream, **fixed)).to(device).train()
        batches = [_gate_batch(seed, device) for seed in range(GATE["seeds"])]
        expected = [loss_and_gradients(model0, *batch) for batch in batches]
        for contestant in (c for c in checked if (c.name, c.stream) == (arch, stream)):
            model = contestant.make(**fixed).to(device).train()
            model.load_state_dict(model0.state_dict())
            errors = [
                relative_errors(*loss_and_gradients(model, *b), *e) for b, e in zip(batches, expected, strict=True)
            ]
            loss_error, gradient_error = (statistics.median(e) for e in zip(*errors, strict=True))
            if not (loss_error <= GATE["loss"] and gradient_error <= GATE["gradients"]):
                raise DisagreementError(
                    f"{contestant.key} disagrees with {arch}/stored: relative error {loss_error:.2g} in the loss and "
                    f"{gradient_error:.2g} in the gradients; no speed is reported"
                )
            rows.append({"contestant": contestant.key, "loss_error": loss_error, "gradient_error": gradient_error})
    return rows


def _gate_batch(seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(GATE["batch"], 3, GATE["resolution"], GATE["resolution"], generator=generator)
    return images.to(device), torch.randint(1000, (GATE["batch"],), generator=generator).to(device)


def loss_and_gradients(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    loss = F.cross_entropy(model(images), labels)
    model.zero_grad(set_to_none=True)
    loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    if missing:
        raise DisagreementError(f"{type(model).__name__} leaves {missing[0]} without a gradient; no speed is reported")
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad(set_to_none=True)
    return loss.detach(), gradients


def relative_errors(loss: Tensor, gradients: Tensor, loss0: Tensor, gradients0: Tensor) -> tuple[float, float]:
    errors = (loss - loss0).abs() / loss0.abs(), (gradients - gradients0).norm() / gradients0.norm()
    return tuple(math.inf if e.isnan() else e.item() for e in errors)


SCRATCH = {"mbconv_backward": ("p", "dz")}  # written to, and what is in it afterwards is nobody's


def outcome(op: str, run: Callable, arguments: Sequence[Any]) -> list[Tensor]:
    """What a call computes: its results, and what became of the arguments that it writes to."""
    schema = OPS[op].overload._schema.arguments
    written = [a.alias_info is not None and a.alias_info.is_write for a in schema[: len(arguments)]]
    given = [map_nested(a, Tensor, torch.clone) if w else a for a, w in zip(arguments, written, strict=True)]
    results = run(*given)
    kept = [a for a, w, s in zip(given, written, schema, strict=False) if w and s.name not in SCRATCH.get(op, ())]
    return [t for t in tensors([results, kept]) if t.dtype in ULP]


def disagreement(case: Case, runs: dict[str, Callable], device: torch.device) -> str:
    """Which contestant is further from the reference in float64 than rounding explains; empty when none is."""
    arguments = case.make(device)
    wide = map_nested(arguments, Tensor, lambda t: t.double() if t.is_floating_point() else t)
    want = outcome(case.op, OPS[case.op].reference, wide)
    is_fixed_point = case.op == "couple_" and len(arguments) > 7 and arguments[7] is not None
    step = 2.0 ** -arguments[7] if is_fixed_point else 0.0
    errors = {}
    for name, run in runs.items():
        got = outcome(case.op, run, arguments)
        errors[name] = [(relative_error(a, b), max(ULP[a.dtype], step)) for a, b in zip(got, want, strict=True)]
    coarsest = max(step, *(ULP[t.dtype] for t in tensors(arguments) if t.dtype in ULP))
    for name, pairs in errors.items():
        for k, (error, ulp) in enumerate(pairs):
            # Sums of many terms of either sign lose digits to cancellation, PyTorch's as much as the kernels'.
            allowed = 2 * errors[PYTORCH][k][0] + (16 if name != PYTORCH else 4096) * max(ulp, 2**-23)
            if name == PYTORCH:
                allowed = 4096 * coarsest
            if not error <= allowed:
                return f"{name} is {error:.1e} from the reference, {allowed:.1e} allowed"
    return ""
