"""``python -m revkernels.env`` tells the truth about what runs."""

import json
import os
import subprocess
import sys

import pytest
import torch

import revkernels
from revkernels import dispatch, env
from revkernels.registry import OPS


def run(tmp_path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """The report of a new process that does not run in the source tree."""
    command = [sys.executable, "-m", "revkernels.env", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("REVKERNELS_")} | variables
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)


def test_report_names_the_running_package():
    package = env.collect()["package"]
    assert os.path.samefile(package["path"], os.path.dirname(revkernels.__file__))
    assert package["version"] == revkernels.__version__


def test_report_agrees_with_the_dispatcher():
    report = env.collect()
    assert report["ops"].keys() == OPS.keys()
    for op, uses in report["ops"].items():
        for device_type, name in uses.items():
            assert name == "reference" or dispatch.STATUS[name].loaded
            assert name == dispatch.in_use(op, device_type)


def test_report_tells_how_each_loaded_module_was_built():
    for name, about in env.collect()["implementations"].items():
        if about["loaded"] and name in ("cpp", "cuda"):
            assert about["build"] == dict(dispatch.STATUS[name].module.build_info())
            assert about["build"]


def test_text_shows_every_op_and_every_implementation():
    text = env.render(env.collect())
    for word in [*OPS, *dispatch.IMPLEMENTATIONS, torch.__version__]:
        assert word in text


@pytest.mark.slow
@pytest.mark.parametrize("disabled", ["cpp", "cpp,triton"])
def test_report_works_without_native_code_and_gives_the_reason(tmp_path, disabled):
    process = run(tmp_path, "--json", REVKERNELS_DISABLE=disabled)
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout)
    for name in disabled.split(","):
        assert not report["implementations"][name]["loaded"]
        assert "REVKERNELS_DISABLE" in report["implementations"][name]["reason"]
    assert {uses["cpu"] for uses in report["ops"].values()} == {"reference"}
    assert report["environment"]["REVKERNELS_DISABLE"] == disabled


def test_report_shows_what_the_installation_left_out(monkeypatch):
    monkeypatch.setattr(dispatch, "left_out", lambda: {"cuda": "no nvcc"})
    assert "no nvcc" in env.render(env.collect())


def test_sources_that_hide_an_installation_say_so(tmp_path, monkeypatch):
    sources, installed = tmp_path / "checkout" / "revkernels", tmp_path / "installed" / "revkernels"
    for folder in (sources, installed):
        folder.mkdir(parents=True)
    (installed / "_C.abi3.so").touch()
    monkeypatch.setattr(dispatch, "__file__", str(sources / "dispatch.py"))
    monkeypatch.setattr(sys, "path", [str(sources.parent), "missing", str(installed.parent)])
    reason = dispatch._why_not_built("cpp", "_C")
    assert (
        reason == f"this source tree hides the package that is installed in {installed}: start Python in another folder"
    )
    monkeypatch.setattr(sys, "path", [str(sources.parent)])
    assert "this is a source tree, which `pip install -e .` builds in" in dispatch._why_not_built("cpp", "_C")
    (sources / "_C.abi3.so").touch()
    monkeypatch.setattr(sys, "path", [str(sources.parent)])
    assert dispatch.hidden_installation() is None
