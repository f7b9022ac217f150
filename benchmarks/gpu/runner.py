"""Running parts in their order, within a budget, each ended with all it started; results and the final table."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import tarfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import Machine, Part
from benchmarks.harness import results
from benchmarks.harness.results import ROOT
from benchmarks.harness.terminal import Column, markdown, print_table

SHORTEST = 20.0  # seconds: with less of the budget left, no part is started
PASSED, FAILED, TIMED_OUT, SKIPPED, NOT_RUN = "passed", "failed", "timed out", "skipped", "not run"


@dataclass
class Result:
    """What became of a part."""

    part: str
    status: str
    seconds: float = 0.0
    returncode: int | None = None
    headline: str = ""
    device: str = ""
    date: str = ""
    commands: list[str] = field(default_factory=list)


def run_part(part: Part, machine: Machine, output: Path, limit: float) -> Result:
    """Run a part's commands, ``limit`` seconds at most, and leave ``log.txt`` and ``result.json`` in its folder."""
    folder = output / part.name
    folder.mkdir(parents=True, exist_ok=True)
    commands = [[word.replace("{folder}", str(folder)) for word in command] for command in part.commands]
    result = Result(part.name, SKIPPED if part.skip else PASSED, headline=part.skip, device=machine.name)
    result.date = results.now()
    start = time.monotonic()
    if not part.skip:
        result.commands = [shlex.join(command) for command in commands]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **part.environment}
        if machine.device == "cuda":  # the checkout is built in place there, and comes before an installed package
            environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        running = folder / "running.txt"
        with running.open("w") as log:
            for command in commands:
                print(f"$ {shlex.join(command)}", file=log, flush=True)
                result.returncode = _run(command, environment, log, limit - (time.monotonic() - start))
                if result.returncode != 0:
                    result.status = TIMED_OUT if result.returncode is None else FAILED
                    break
        os.replace(running, folder / "log.txt")  # an earlier log stays until there is a result for this one
        result.headline = _last_line(folder / "log.txt")
    result.seconds = round(time.monotonic() - start, 1)
    results.write_text(folder / "result.json", results.to_json(asdict(result)))
    return result


def _run(command: Sequence[str], environment: dict[str, str], log: Any, limit: float) -> int | None:
    """The command's exit code; None if it had to be ended, with every process it started."""
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    except OSError as error:
        print(f"cannot be started: {error}", file=log)
        return 127
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        print(f"ended after {limit:.0f} s", file=log)
        return None
    finally:
        for number, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)  # its session is its own: nothing else is in that group
            if process.poll() is not None:
                break
            with suppress(subprocess.TimeoutExpired):
                process.wait(patience)


def _last_line(path: Path) -> str:
    lines = [line.strip(" =") for line in path.read_text(errors="replace").splitlines() if line.strip(" =")]
    return lines[-1][:100] if lines else ""


def earlier(part: Part, output: Path) -> Result | None:
    """The result of a part that has passed before."""
    with suppress(OSError, ValueError, TypeError):
        result = Result(**json.loads((output / part.name / "result.json").read_text()))
        if result.status == PASSED:
            return result
    return None


def run_all(
    chosen: Sequence[Part], machine: Machine, output: Path, *, force: bool, budget: float | None
) -> list[Result]:
    """Run what has not passed yet, print what became of each; what ``budget`` seconds do not allow is not started."""
    start, found = time.monotonic(), []
    for i, part in enumerate(chosen, 1):
        left = float("inf") if budget is None else budget - (time.monotonic() - start)
        before = None if force else earlier(part, output)
        print(f"[{i}/{len(chosen)}] {part.name}", end=" ", flush=True)
        if before is not None:
            found.append(before)
            print("passed before", flush=True)
            continue
        if left < SHORTEST:
            found.append(Result(part.name, NOT_RUN, headline="no time was left"))
        else:
            found.append(run_part(part, machine, output, min(part.timeout, left)))
        result = found[-1]
        print(f"{result.status} ({result.seconds:.0f} s): {result.headline}", flush=True)
        if result.status in (FAILED, TIMED_OUT):
            tail = (output / part.name / "log.txt").read_text(errors="replace").splitlines()[-12:]
            print(*(f"    {line}" for line in tail), sep="\n", flush=True)
    return found


def show(found: Sequence[Result], machine: Machine, output: Path) -> None:
    """The final table, on stdout and as ``summary.md``."""
    columns = (Column("part", number=False), Column("status", number=False), Column("s"), Column("says", number=False))
    groups: dict[str, list[list[str]]] = defaultdict(list)
    for result in found:
        row = [result.part, result.status, f"{result.seconds:.0f}", result.headline]
        groups[result.part.split("-")[0]].append(row)
    counts = {
        status: sum(r.status == status for r in found) for status in (PASSED, FAILED, TIMED_OUT, SKIPPED, NOT_RUN)
    }
    caption = ", ".join(f"{count} {status}" for status, count in counts.items() if count) + f"; results in {output}"
    rows = [row for group in groups.values() for row in group]
    table = markdown([c.header for c in columns], rows)
    results.write_text(output / "summary.md", f"{table}\n{machine.name}: {caption}\n")
    print()
    print_table(f"GPU suite on {machine.name}", columns, groups.values(), caption)


def pack(output: Path, archive: Path) -> None:
    """The results as one ``.tar.gz``, without what a dry run built."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with results.replacing(archive.parent) as new, tarfile.open(new / archive.name, "w:gz") as tar:
        for path in sorted(output.rglob("*")):
            inside = path.relative_to(output)
            if path.is_file() and path.resolve() != archive.resolve() and not _is_left_out(inside):
                tar.add(path, arcname=str(Path(output.name) / inside))


def _is_left_out(inside: Path) -> bool:
    """What a dry run built, and an archive that is being written."""
    return inside.parts[:2] in (("build", "lib"), ("build", "build")) or inside.parts[0].startswith(".new-")
