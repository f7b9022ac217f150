"""Time, bandwidth and speed-up of every op on the network's own shapes: each implementation against PyTorch's own ops.

    python benchmarks/kernels.py                               S0, S3 and S6 on this machine
    python benchmarks/kernels.py --quick                       the two heaviest shapes of each op of S0
    python benchmarks/kernels.py --ops 'depthwise*' --scales s3 --dtype bfloat16

The shapes are not chosen by hand: a training step of ``revbifpn.fast`` runs on fake tensors, and every call of an op is
written down with the shapes, strides and dtypes of its arguments and how often it occurs. Before a case is timed, every
implementation and PyTorch's composition are compared with the reference in float64; a case that disagrees gets no time,
and the exit code is 1. Contestants then take turns; times are medians, ratios medians of the ratios within rounds.

Bytes are those of the arguments and results, each once (``couple_`` reads and writes y): GB/s of a composition that
makes several passes counts the same bytes. Raw numbers go to benchmarks/results as CSV, one line per number.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: an installed revbifpn comes first, this checkout after it
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from benchmarks.harness import command

    command.quiet_interrupts()

import torch

from benchmarks.harness import command, results
from benchmarks.harness.agreement import PYTORCH, disagreement, outcome
from benchmarks.harness.cases import BATCHES, Case, cases, tensors
from benchmarks.harness.command import BenchmarkError, entry
from benchmarks.harness.compositions import COMPOSITIONS
from benchmarks.harness.networks import DTYPES
from benchmarks.harness.terminal import Column, print_table, track
from benchmarks.harness.timing import Action, alternate, paired_ratios, quantiles, seconds
from revkernels import dispatch
from revkernels.registry import OPS

ROUNDS, QUICK_ROUNDS = 15, 5
SAMPLE_SECONDS = 2e-4  # calls shorter than this are repeated within one reading


@dataclass
class Row:
    """One contestant in one case."""

    scale: str
    op: str
    case: str
    dtype: str
    implementation: str
    calls: int
    bytes: int
    seconds: float | None = None  # median
    seconds_p20: float | None = None
    seconds_p80: float | None = None
    bytes_per_second: float | None = None
    copy_share: float | None = None
    speedup: float | None = None  # time of PyTorch's composition over this one's, paired
    note: str = ""


ROW_KEYS = ("scale", "op", "case", "dtype", "implementation")
UNITS = {
    "calls": "1",
    "bytes": "B",
    **dict.fromkeys(("seconds", "seconds_p20", "seconds_p80"), "s"),
    "bytes_per_second": "B/s",
    **dict.fromkeys(("copy_share", "speedup"), "1"),
}


def contestants(op: str, device: torch.device) -> dict[str, Callable]:
    """PyTorch's composition and every compiled implementation of ``op`` that runs on ``device``."""
    names = [n for n in dispatch.IMPLEMENTATIONS if n != "reference" and dispatch.can_run(op, n, device)]
    names = [n for n in names if not (n == "triton" and device.type == "cpu")]  # the interpreter is not a speed
    return {PYTORCH: COMPOSITIONS[op], **{n: dispatch.implementation(op, n, device) for n in names}}


def measure(calls: dict[str, Action], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every contestant in every round; they take turns, and what is short is repeated within one."""
    repeats = {}
    for call in calls.values():
        call()
        repeats[call] = min(200, max(1, round(SAMPLE_SECONDS / max(seconds(call, device), 1e-7))))
    times = alternate(list(calls.values()), rounds, lambda call: seconds(call, device, repeats[call]))
    return dict(zip(calls, times, strict=True))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy much larger than the caches."""
    x = torch.empty(1 << (25 if device.type == "cpu" else 28), device=device)
    y = torch.empty_like(x)
    seconds = measure({"copy": lambda: y.copy_(x)}, 7, device)["copy"]
    return 2 * x.numel() * x.element_size() / statistics.median(seconds)


def bench(case: Case, dtype: str, rounds: int, device: torch.device, copy: float) -> list[Row]:
    """The rows of one case; without times where a contestant disagrees with the reference."""
    runs = contestants(case.op, device)
    arguments = case.make(device)
    touched = tensors([arguments, outcome(case.op, runs[PYTORCH], arguments)])
    moved = sum(t.nbytes for t in touched if t.dtype != torch.uint8)  # a workspace is no result
    rows = {n: Row(case.scale, case.op, case.label, dtype, n, case.calls, moved) for n in runs}
    red = disagreement(case, runs, device)
    if red:
        for row in rows.values():
            row.note = red
        return list(rows.values())
    calls = {name: (lambda run=run: run(*arguments)) for name, run in runs.items()}
    times = measure(calls, rounds, device)
    for name, row in rows.items():
        row.seconds, row.seconds_p20, row.seconds_p80 = quantiles(times[name])
        row.bytes_per_second = moved / row.seconds
        row.copy_share = row.bytes_per_second / copy
        row.speedup = paired_ratios(times[PYTORCH], times[name])[0]
    return list(rows.values())


def select(found: Sequence[Case], ops: Sequence[str], quick: bool) -> list[Case]:
    """Those of ``ops``; quick: the two of each op that move most bytes in a step."""
    found = [case for case in found if case.op in ops]
    if not quick:
        return found
    kept: list[Case] = []
    for op in dict.fromkeys(case.op for case in found):
        weight = {c: max(c.calls, 1) * sum(s.bytes for s in tensors(c.arguments)) for c in found if c.op == op}
        kept += sorted(weight, key=weight.get, reverse=True)[:2]
    return kept


COLUMNS = (
    Column("op", number=False),
    Column("arguments", number=False),
    Column("calls"),
    Column("implementation", number=False),
    Column("us"),
    Column("p20-p80"),
    Column("GB/s"),
    Column("of copy"),
    Column("speed-up"),
)


def _cells(row: Row) -> list[str]:
    start = [row.op, row.case, str(row.calls or "-"), row.implementation]
    if row.seconds is None:
        return [*start, "wrong", "", "", "", ""]
    spread = f"{row.seconds_p20 * 1e6:.0f}-{row.seconds_p80 * 1e6:.0f}"
    speedup = "" if row.implementation == PYTORCH else f"{row.speedup:.2f}x"
    rate = [f"{row.bytes_per_second / 1e9:.1f}", f"{row.copy_share:.0%}"]
    return [*start, f"{row.seconds * 1e6:.1f}", spread, *rate, speedup]


def _totals(rows: Sequence[Row]) -> Iterator[list[str]]:
    """Per op and implementation, the time of all its calls in a step."""
    for op in dict.fromkeys(row.op for row in rows):
        timed = [r for r in rows if r.op == op and r.seconds is not None and r.calls > 0]
        total = {n: sum(r.calls * r.seconds for r in timed if r.implementation == n) for n in _names(timed)}
        for name, spent in total.items():
            speedup = "" if name == PYTORCH else f"{total[PYTORCH] / spent:.2f}x"
            calls = sum(r.calls for r in timed if r.implementation == name)
            yield [op, "all calls of a step", str(calls), name, f"{spent * 1e6:.0f}", "", "", "", speedup]


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.implementation for row in rows))


def report(scale: str, rows: Sequence[Row], quick: bool, caption: str) -> None:
    groups = [[_cells(r) for r in rows if r.op == op] for op in dict.fromkeys(r.op for r in rows)]
    if not quick:
        groups.append(list(_totals(rows)))
    print_table(f"{scale.upper()}, batch {BATCHES[scale]}, {rows[0].dtype}", COLUMNS, groups, caption)


def _parser() -> command.ArgumentParser:
    parser = command.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", default="*", help="comma list of ops or wildcards: couple_, 'depthwise*'")
    parser.add_argument("--scales", help=f"comma list of {', '.join(BATCHES)} (default all; with --quick s0)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of the maps; streams stay float32")
    parser.add_argument("--threads", type=int, help="CPU threads (default PyTorch's choice); 1 on a shared machine")
    parser.add_argument("--rounds", type=int, help=f"turns that each takes (default {ROUNDS})")
    parser.add_argument("--quick", action="store_true", help="the two heaviest shapes of each op, few rounds")
    parser.add_argument("--output", default=str(results.RESULTS), help="directory for the CSV")
    return parser


def _checked(argv: Sequence[str] | None) -> Any:
    arguments = _parser().parse_args(argv)
    scales = arguments.scales or ("s0" if arguments.quick else ",".join(BATCHES))
    arguments.scales = command.some_of("--scales", scales.lower(), list(BATCHES))
    command.at_least_one(rounds=arguments.rounds, threads=arguments.threads)
    arguments.rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    arguments.ops = command.select("--ops", arguments.ops, list(OPS), lambda op: (op,))
    arguments.device = command.pick_device(arguments.device)
    arguments.output = command.pick_output(arguments.output)
    if arguments.device.type == "cpu":
        dispatch.can_run("couple_", "cpp", arguments.device, raise_error=True)
    return arguments


@entry
def main(argv: Sequence[str] | None = None) -> None:
    arguments = _checked(argv)
    device, quick = arguments.device, arguments.quick
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    environment = results.environment(device)
    copy = copy_bandwidth(device)
    by_scale: dict[str, list[Row]] = {}
    for scale in arguments.scales:
        found = select(cases(scale, device, DTYPES[arguments.dtype]), arguments.ops, quick)
        timed = (
            bench(case, arguments.dtype, arguments.rounds, device, copy)
            for case in track(found, lambda c: f"{c.op} {c.label}", scale)
        )
        by_scale[scale] = [row for rows in timed for row in rows]
    everything = [row for rows in by_scale.values() for row in rows]

    name = f"kernels_{device.type}_{'-'.join(arguments.scales)}_{arguments.dtype}" + "_quick" * quick + ".csv"
    with results.replacing(arguments.output) as new:
        results.write_long_csv(new / name, environment, [vars(row) for row in everything], ROW_KEYS, UNITS)
    caption = f"{environment['device']}, {environment['threads']} threads, torch {environment['torch']}, "
    for scale, rows in by_scale.items():
        if rows:
            report(scale, rows, quick, f"{caption}copy {copy / 1e9:.1f} GB/s")
    print(f"wrote {arguments.output / name}")
    wrong = {f"{row.op} {row.case}: {row.note}" for row in everything if row.note}
    if wrong:
        raise BenchmarkError("disagreements, not timed: " + "; ".join(sorted(wrong)))


if __name__ == "__main__":
    sys.exit(main())
