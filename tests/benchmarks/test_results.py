"""What stops a benchmark from outside: one line, an exit code, and the results that were there."""

import errno
import importlib
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import pytest

from benchmarks.harness import command, results

ROOT = Path(__file__).resolve().parents[2]

SCRIPTS = sorted(p.stem for p in (ROOT / "benchmarks").glob("*.py") if '__name__ == "__main__"' in p.read_text())
OLD = {"bench.json": "old json", "bench.csv": "old csv", "bench.png": "old png"}


def start(code, *, limit=None, **options):
    """A command in a process of its own, with results of an earlier run; ``limit``: of the bytes of a file."""
    source = """
        import sys, time
        from pathlib import Path
        from benchmarks.harness import command, results, terminal
        command.quiet_interrupts()
        def save(folder, size=10, plot=lambda path: path.write_text("new png")):
            rows = [{"key": "x", "value": "v" * size}]
            return results.save(Path(folder) / "bench", {}, {}, rows, ["key"], {"value": "1"}, plot)
        @command.entry
        def main(argv):
    """
    source = textwrap.dedent(source) + textwrap.indent(textwrap.dedent(code), "    ") + "\nsys.exit(main())\n"

    def prepare():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what runs in the background
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": ""}
    return subprocess.Popen([sys.executable, "-c", source], preexec_fn=prepare, env=environment, **options)


@pytest.fixture
def folder(tmp_path):
    for name, text in OLD.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def contents(folder):
    """All that is there; nothing half-made is left beside the results."""
    return {path.name: path.read_text() for path in folder.iterdir()}


# Files ----------------------------------------------------------------------------------------------


def test_files_take_their_places_together(folder):
    with results.replacing(folder) as new:
        (new / "bench.json").write_text("new json")
        (new / "more.txt").write_text("more")
        assert {name: (folder / name).read_text() for name in OLD} == OLD
    assert contents(folder) == OLD | {"bench.json": "new json", "more.txt": "more"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")])
def test_earlier_files_stay_where_writing_fails(folder, error):
    with (
        pytest.raises(command.BenchmarkError if isinstance(error, OSError) else error),
        results.replacing(folder) as new,
    ):
        (new / "bench.json").write_text("new json")
        raise error
    assert contents(folder) == OLD


def test_folder_that_is_gone_is_one_sentence(tmp_path):
    with pytest.raises(command.BenchmarkError, match="cannot be written to .No such file.*earlier results are kept"):
        results.write_text(tmp_path / "gone" / "x.txt", "text")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission_keeps_its_files(folder):
    folder.chmod(0o500)
    try:
        with pytest.raises(command.BenchmarkError, match="cannot be written to"):
            results.write_text(folder / "bench.json", "new")
    finally:
        folder.chmod(0o700)
    assert contents(folder) == OLD


@pytest.mark.parametrize("size", [10_000, 100])
def test_full_disk_is_one_line_and_keeps_results(folder, size):
    """The first file does not fit, or the last one."""
    process = start(f"save({str(folder)!r}, {size}, lambda path: path.write_text('p' * 5000))", limit=4096)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert err == f"error: {folder}: cannot be written to (File too large); earlier results are kept\n"
    assert contents(folder) == OLD


# Streams --------------------------------------------------------------------------------------------


def test_closed_pipe_ends_quietly_with_results_written(folder):
    process = start(f"save({str(folder)!r})\nfor i in range(10**6):\n    print('row', i)")
    assert process.stdout.readline() == "row 0\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 128 + signal.SIGPIPE
    assert "vvv" in contents(folder)["bench.json"] and contents(folder)["bench.png"] == "new png"


def test_closed_pipe_under_help_ends_quietly():
    process = start("command.ArgumentParser(description='About it.').parse_args(['--help'])")
    process.stdout.close()
    assert (process.stderr.read(), process.wait(60)) == ("", 128 + signal.SIGPIPE)


def test_full_disk_under_the_output_is_one_line():
    with open("/dev/full", "w") as full:
        process = start("print('the table')", stdout=full)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (1, "error: No space left on device\n")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_nothing_is_needed_to_print_to(closed, tmp_path):
    code = (
        "from benchmarks.harness import command, terminal; import sys\n"
        "@command.entry\ndef main(argv):\n"
        "    for _ in terminal.track([1], str, 'title'): pass\n"
        "    terminal.print_table('title', [terminal.Column('x')], [[['1']]], 'caption')\n"
        "sys.exit(main())"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = f'exec {sys.executable} -c "$1" {closed}'
    done = subprocess.run(["sh", "-c", line, "sh", code], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr


# Interrupts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "print('ready', flush=True); time.sleep(60)",
        "save({folder!r}, plot=lambda path: (path.write_text('x'), print('ready', flush=True), time.sleep(60)))",
    ],
    ids=["measuring", "writing"],
)
def test_interrupt_is_one_line_and_keeps_results(folder, code):
    process = start(code.replace("{folder!r}", repr(str(folder))))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n")
    assert contents(folder) == OLD


def test_interrupt_while_modules_are_imported_is_one_line():
    code = "from benchmarks.harness import command; command.quiet_interrupts(); print('ready', flush=True); input()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    handler = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, text=True, **pipes, **handler)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert (process.wait(60), process.stderr.read()) == (130, "interrupted\n")


def test_interrupt_is_left_ignored_where_it_was(monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
    monkeypatch.setattr(signal, "signal", lambda *_: pytest.fail("the handler is somebody else's"))
    command.quiet_interrupts()
    assert command.entry(lambda argv: None)() == 0


def alive(group):
    """Processes of a group that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, of, *_ = path.read_text().rsplit(")", 1)[1].split()
            found += [path.parent.name] * (state != "Z" and int(of) == group)
    return found


@pytest.mark.slow
def test_interrupt_ends_the_processes_that_measure():
    code = """
    from benchmarks.harness.processes import in_processes
    print('ready', flush=True)
    list(in_processes(time.sleep, [60, 61], 2))
    """
    process = start(code, start_new_session=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(3)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.communicate(timeout=50)
    assert (process.returncode, err) == (130, "interrupted\n")
    deadline = time.monotonic() + 20
    while alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(process.pid)


# Every script ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, code, line",
    [
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ""),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (OSError(errno.ENOSPC, "No space left on device", "x.csv"), 1, "error: x.csv: No space left on device\n"),
        (command.BenchmarkError("why"), 1, "error: why\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_ends_with_a_line_and_a_code(script, error, code, line, monkeypatch, capsys):
    def fail():
        raise error

    module = importlib.import_module(f"benchmarks.{script}")
    monkeypatch.setattr(module, "_parser", fail)
    assert module.main([]) == code
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("script", SCRIPTS)
def test_faults_of_a_script_are_not_hidden(script, monkeypatch):
    module = importlib.import_module(f"benchmarks.{script}")
    monkeypatch.setattr(module, "_parser", lambda: {}["a fault"])
    with pytest.raises(KeyError):
        module.main([])


def test_a_commit_is_dirty_once_code_has_changed_but_not_by_results(tmp_path, monkeypatch):
    def git(*words):
        identity = ["-c", "user.name=tests", "-c", "user.email=tests@localhost"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    files = [tmp_path / name for name in ("benchmarks/results/some.json", "revbifpn/fits.json", "revbifpn/model.py")]
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("before")
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    for path, dirty in zip(files, (False, False, True), strict=True):
        path.write_text("after")
        assert results._commit().endswith("-dirty") == dirty, path
