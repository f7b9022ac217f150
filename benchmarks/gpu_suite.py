"""Everything there is to run on a machine with a GPU: build, tests, kernel and model benchmarks, profiles.

    python benchmarks/gpu_suite.py                            every part, results in benchmarks/results/gpu-<device>
    python benchmarks/gpu_suite.py --parts build,tests        some groups of parts; names and wildcards do too
    python benchmarks/gpu_suite.py --dry-run                  every part on the CPU with tiny sizes

Needs no network. Each part runs in a process of its own with a time-out, and has a folder for its log, its result and
its files. A part that has passed is not run again unless --force; one that fails stops none of the others. The exit
code is the number of parts that failed or ran out of time, 63 at most. See docs/gpu.md.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: an installed revbifpn comes first, this checkout after it
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from benchmarks.harness import command

    command.quiet_interrupts()

import torch

from benchmarks.gpu.parts import Machine, Part, all_parts
from benchmarks.gpu.runner import FAILED, TIMED_OUT, pack, run_all, show
from benchmarks.gpu.workers import WORKERS
from benchmarks.harness import command, results
from benchmarks.harness.command import UsageError, entry


def find_machine(dry_run: bool) -> Machine:
    """The GPU, asked for in another process: this one must not hold a context while others measure."""
    if dry_run:
        return Machine("cpu", "dry run on the CPU")
    question = (
        "import torch; a = torch.cuda.is_available(); print(torch.cuda.get_device_name() if a else ''); "
        "print('%d.%d' % torch.cuda.get_device_capability() if a else '')"
    )
    done = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True)
    name, capability = (done.stdout.splitlines() + ["", ""])[:2]
    if not name:
        raise UsageError(f"torch {torch.__version__} sees no GPU; --dry-run tries every part on the CPU")
    return Machine("cuda", name, capability)


def select(patterns: str, everything: Sequence[Part]) -> list[Part]:
    """The parts whose name or group matches one of the wildcard patterns, in their order."""
    return command.select("--parts", patterns, everything, lambda part: (part.name, part.group))


def _parser() -> command.ArgumentParser:
    parser = command.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--parts", default="*", help="comma list of parts, groups or wildcards: build,tests,kernels-s0*"
    )
    parser.add_argument("--list", action="store_true", help="print the parts and their commands, run nothing")
    parser.add_argument("--force", action="store_true", help="run again what has passed before")
    parser.add_argument("--dry-run", action="store_true", help="every part on the CPU, with tiny sizes")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="start no part, and end those running, after this"
    )
    parser.add_argument("--output", help="folder of the results (default benchmarks/results/gpu-<device>)")
    parser.add_argument("--archive", metavar="FILE", help="pack the folder into this .tar.gz at the end")
    return parser


def run_suite(arguments: Any) -> int:
    """Run what was asked for; returns how many parts failed or ran out of time."""
    listed = arguments.list and not arguments.dry_run
    machine = Machine("cuda", "a GPU") if listed else find_machine(arguments.dry_run)
    chosen = select(arguments.parts, all_parts(machine))
    if arguments.list:
        for part in chosen:
            print(part.name, *(f"    {shlex.join(command)}" for command in part.commands), sep="\n")
        return 0
    name = "dry-run" if machine.dry else "-".join(machine.name.lower().split()).removeprefix("nvidia-")
    output = command.pick_output(arguments.output or str(results.RESULTS / f"gpu-{name}")).resolve()
    found = run_all(chosen, machine, output, force=arguments.force, budget=arguments.budget)
    show(found, machine, output)
    if arguments.archive:
        pack(output, Path(arguments.archive))
    return sum(result.status in (FAILED, TIMED_OUT) for result in found)


@entry
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the suite, or with ``--worker`` a part of it."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["--worker"]:
        _, name, settings, folder = argv
        WORKERS[name](Path(folder), **json.loads(settings))
        return 0
    try:
        return min(run_suite(_parser().parse_args(argv)), os.EX_USAGE - 1)
    except UsageError as error:
        error.code = os.EX_USAGE  # below are numbers of parts
        raise


if __name__ == "__main__":
    sys.exit(main())
