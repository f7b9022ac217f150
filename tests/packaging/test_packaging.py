"""The build finds torch, says what it leaves out, and packs what it should; what is tested is what is installed."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import warnings
import zipfile
import zlib
from pathlib import Path

import pytest
import torch

import revbifpn
import revkernels
from revkernels import dispatch
from tests.marks import mostly_slow

ROOT = Path(__file__).parents[2]
TINY_MODULE = """
#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C"};
PyMODINIT_FUNC PyInit__C() {
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddStringConstant(module, "about", REVKERNELS_FLAGS " " REVKERNELS_TORCH_VERSION);
  PyModule_AddIntConstant(module, "float32", aoti_torch_dtype_float32());
  return module;
}
"""

needs_checkout = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="the tests are not in a checkout")
needs_build_tools = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("setuptools", "ninja", "pybind11"))) or shutil.which("g++") is None,
    reason="setuptools, ninja, pybind11 and g++ are needed to build without isolation",
)
loaded = pytest.mark.parametrize("name", [n for n in ("cpp", "cuda") if dispatch.STATUS[n].loaded])


@pytest.fixture
def backend(monkeypatch):
    """setup.py as a module, with no torch in sight and no variable set."""
    spec = importlib.util.spec_from_file_location("revkernels_build_backend", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    for name in ("PATH", "VIRTUAL_ENV", "CONDA_PREFIX", "CUDA_HOME", "CUDA_PATH", "CXX", "NVCC"):
        monkeypatch.delenv(name, raising=False)
    return module


@pytest.fixture
def tree(tmp_path):
    """A copy of the project whose C++ is one tiny module, so that building takes seconds."""
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    built = shutil.ignore_patterns("*.so", "_skipped.json", "__pycache__")
    for name in ("revkernels", "revbifpn", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=built)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "module.cpp").write_text(TINY_MODULE)
    return tmp_path


def run_hook(tree: Path, hook: str, **variables: str) -> subprocess.CompletedProcess:
    """Call a hook of the build backend as a frontend does, in the environment of the tests."""
    code = f"import setup; setup.{hook}('dist')"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("REVKERNELS_")} | variables
    return subprocess.run([sys.executable, "-c", code], cwd=tree, env=environment, capture_output=True, text=True)


def fake_torch(folder: Path, version: str, cuda: str | None = None) -> Path:
    """A folder like site-packages in which only torch's version can be read."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "version.py").write_text(f"__version__ = {version!r}\ncuda = {cuda!r}\n")
    return folder


def fake_nvcc(home: Path, version: str) -> Path:
    """A CUDA toolkit whose nvcc only tells its version."""
    (home / "bin").mkdir(parents=True)
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.88'\n")
    nvcc.chmod(0o755)
    return nvcc


# --- what is installed ----------------------------------------------------------------------------


def test_tests_run_the_installed_package():
    installed = [d for d in importlib.metadata.distributions(name="revbifpn-fast") if d.read_text("RECORD")]
    if not installed and "REVKERNELS_REQUIRE" not in os.environ:
        pytest.skip("revbifpn-fast is not installed; the source tree is tested")
    (distribution,) = installed
    editable = json.loads(distribution.read_text("direct_url.json") or "{}").get("dir_info", {}).get("editable", False)
    expected = ROOT if editable else distribution.locate_file(".")
    assert os.path.samefile(Path(revkernels.__file__).parents[1], expected)
    assert distribution.version == revkernels.__version__


@needs_checkout
def test_changelog_and_citation_are_of_this_version():
    version = re.search(r'^__version__ = "(.*)"$', (ROOT / "revkernels" / "__init__.py").read_text(), re.MULTILINE)[1]
    released = dict(re.findall(r"^## (\S+)(?: \((.*)\))?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE))
    citation = dict(re.findall(r"^([\w-]+): (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE))
    assert next(iter(released)) == version
    assert (citation["version"], citation["date-released"]) == (version, released[version])


@pytest.mark.parametrize("package", [revbifpn, revkernels], ids=lambda package: package.__name__)
def test_package_says_that_it_is_typed(package):
    assert Path(package.__file__).with_name("py.typed").exists()


@loaded
def test_module_lies_beside_the_package(name):
    assert os.path.samefile(Path(dispatch.STATUS[name].module.__file__).parent, Path(revkernels.__file__).parent)


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
@loaded
def test_module_uses_no_unstable_symbol_of_libtorch(name):
    command = ["nm", "-D", "--undefined-only", "--demangle", dispatch.STATUS[name].module.__file__]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "torch" in symbols
    assert re.findall(r"\b(?:at|c10|caffe2|torch)::.*", symbols) == []


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")
@loaded
def test_module_brings_no_thread_pool_and_no_cuda_runtime(name):
    command = ["readelf", "-d", dispatch.STATUS[name].module.__file__]
    dynamic = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert "libtorch_cpu.so" in needed
    assert [n for n in needed if n.startswith(("libgomp", "libomp", "libiomp", "libcudart", "libtorch_python"))] == []


@pytest.mark.parametrize("name", mostly_slow(["cpp", "cuda", "triton"]))
def test_requiring_an_implementation_that_is_missing_fails_at_import(name, tmp_path):
    variables = {"REVKERNELS_REQUIRE": name, "REVKERNELS_DISABLE": name}
    command = [sys.executable, "-c", "import revkernels"]
    process = subprocess.run(command, cwd=tmp_path, env=os.environ | variables, capture_output=True, text=True)
    assert process.returncode != 0
    assert f"REVKERNELS_REQUIRE asks for '{name}'" in process.stderr


# --- finding torch, compilers and architectures ------------------------------------------------------


@needs_checkout
@pytest.mark.parametrize(
    ("versions", "found"),
    [
        ([], None),
        (["2.9.1"], None),
        (["1.13.1+cu117"], None),
        (["2.10.0"], "2.10.0"),
        (["2.9.1", "2.13.0+cpu"], "2.13.0+cpu"),
        (["3.0.0.dev20270101", "2.13.0"], "3.0.0.dev20270101"),
    ],
)
def test_torch_of_the_target_is_built_against_and_not_downloaded(backend, monkeypatch, tmp_path, versions, found):
    folders = [fake_torch(tmp_path / version, version) for version in versions]
    monkeypatch.setattr(backend, "_site_folders", lambda: iter([tmp_path / "without", *folders]))
    result = backend.find_torch()
    assert (result and result.version) == found
    for hook in (backend.get_requires_for_build_wheel, backend.get_requires_for_build_editable):
        assert hook() == ([] if found else ["torch>=2.10"])


@needs_checkout
@pytest.mark.parametrize("variable", ["PATH", "VIRTUAL_ENV", "CONDA_PREFIX"])
def test_torch_of_an_activated_environment_is_found(backend, monkeypatch, tmp_path, variable):
    site_packages = fake_torch(tmp_path / "lib" / "python3.11" / "site-packages", "2.13.0")
    assert site_packages not in backend._site_folders()
    (tmp_path / ("conda-meta" if variable == "CONDA_PREFIX" else "pyvenv.cfg")).touch()
    monkeypatch.setenv(variable, str(tmp_path / "bin" if variable == "PATH" else tmp_path))
    assert site_packages in backend._site_folders()


@needs_checkout
def test_cuda_is_left_out_for_a_torch_without_cuda(backend, tmp_path):
    fake_torch(tmp_path, "2.13.0+cpu")
    with pytest.raises(backend.Skip, match=r"torch 2\.13\.0\+cpu is built without CUDA"):
        backend.find_nvcc(backend.Torch(tmp_path / "torch", "2.13.0+cpu", None))


@needs_checkout
def test_cuda_takes_the_nvcc_of_torchs_major_version(backend, monkeypatch, tmp_path):
    torch_13 = backend.Torch(tmp_path / "torch", "2.13.0+cu130", "93.0")
    old, new = fake_nvcc(tmp_path / "cuda-92.8", "92.8"), fake_nvcc(tmp_path / "cuda-93.2", "93.2")
    monkeypatch.setenv("CUDA_HOME", str(old.parents[1]))
    with pytest.raises(backend.Skip, match=rf"needs nvcc 93\.x; found {old} \(92\.8\)"):
        backend.find_nvcc(torch_13)
    monkeypatch.setenv("CUDA_PATH", str(new.parents[1]))
    assert backend.find_nvcc(torch_13).path == str(new)


@needs_checkout
def test_a_compiler_asked_for_by_name_is_not_replaced_by_another(backend, monkeypatch):
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable) + os.pathsep + os.defpath)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(backend.Skip, match="no-such-compiler"):
        backend.find_cxx()


@needs_checkout
def test_architectures_are_those_that_nvcc_knows(backend, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho compute_75\necho compute_80\necho compute_90\necho compute_90a\n")
    nvcc.chmod(0o755)
    assert backend.default_archs(backend.Compiler(str(nvcc))) == "7.5;8.0;9.0+PTX"


def test_architectures_become_flags_of_nvcc(backend):
    sass, ptx = "-gencode=arch=compute_{0},code=sm_{0}", "-gencode=arch=compute_{0},code=compute_{0}"
    assert backend.gencode("8.0;9.0a+PTX") == [sass.format("80"), sass.format("90a"), ptx.format("90a")]
    assert backend.gencode("8.0 10.0, 12.0") == [sass.format("80"), sass.format("100"), sass.format("120")]
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST: 'Hopper'"):
        backend.gencode("Hopper")


@needs_checkout
@pytest.mark.parametrize(
    ("version", "wanted"),
    [("2.10.1+cpu", "torchvision==0.25.*"), ("2.13.0", "torchvision==0.28.*"), ("2.14.0", "torchvision>=0.29")],
)
def test_torchvision_goes_with_the_torch_that_is_there(backend, monkeypatch, version, wanted):
    monkeypatch.setattr(backend, "find_torch", lambda: backend.Torch(Path(), version, None))
    assert backend.torchvision_requirement() == wanted
    assert wanted in backend.extras()["bench"]


@needs_checkout
def test_torchvision_is_the_newest_where_torch_will_be(backend, monkeypatch):
    monkeypatch.setattr(backend, "find_torch", lambda: None)
    assert backend.torchvision_requirement() == "torchvision>=0.29"


# --- what is packed ---------------------------------------------------------------------------------


@needs_checkout
@needs_build_tools
def test_wheel_holds_both_packages_and_the_module_and_nothing_else(tree):
    build_lib = f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    stale = tree / "build" / build_lib / "revkernels" / "_C_stale.so"
    stale.parent.mkdir(parents=True)
    stale.touch()
    process = run_hook(tree, "build_wheel", REVKERNELS_REQUIRE="cpp", REVKERNELS_DISABLE="cuda")
    assert process.returncode == 0, process.stderr
    (wheel,) = (tree / "dist").iterdir()
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"revkernels", "revbifpn"}
    assert len([name for name in names if name.endswith(".so")]) == 1
    for source in [*tree.glob("revkernels/**/*.py"), *tree.glob("revbifpn/**/*.py")]:
        assert source.relative_to(tree).as_posix() in names
    assert {"revkernels/py.typed", "revbifpn/py.typed"} <= set(names)
    assert not list(tree.glob("revkernels/*.so")), "an ordinary build leaves nothing in the source tree"
    zipfile.ZipFile(wheel).extractall(tree / "unpacked")
    (module,) = (tree / "unpacked").glob("revkernels/_C*.so")
    spec = importlib.util.spec_from_file_location("_C", module)
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    assert "TORCH_TARGET_VERSION" in tiny.about
    assert torch.__version__ in tiny.about
    assert tiny.float32 == 6  # answered by libtorch


@needs_checkout
@needs_build_tools
def test_without_a_compiler_the_wheel_is_pure_python_and_says_why(tree):
    process = run_hook(tree, "build_wheel", CXX="no-such-compiler")
    assert process.returncode == 0, process.stderr
    assert "the cpp kernels are NOT built: no C++ compiler was found" in process.stderr
    (wheel,) = (tree / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    record = json.loads(zipfile.ZipFile(wheel).read("revkernels/_skipped.json"))
    assert record.keys() == {"cpp", "cuda"}
    assert "no-such-compiler" in record["cpp"]


@needs_checkout
@needs_build_tools
@pytest.mark.parametrize("part", ["cpp", "cuda"])
def test_requiring_a_part_that_cannot_be_built_fails_the_installation(tree, part):
    process = run_hook(tree, "build_wheel", CXX="no-such-compiler", REVKERNELS_REQUIRE=part)
    assert process.returncode != 0
    assert f"REVKERNELS_REQUIRE asks for {part}" in process.stderr


@needs_checkout
def test_a_part_that_does_not_exist_is_refused(backend, monkeypatch):
    monkeypatch.setenv("REVKERNELS_REQUIRE", "cpp,cudda")
    with pytest.raises(SystemExit, match=r"REVKERNELS_REQUIRE: unknown part \['cudda'\]"):
        backend._listed("REVKERNELS_REQUIRE")


@needs_checkout
@needs_build_tools
def test_sdist_holds_every_source(tree):
    shutil.rmtree(tree / "csrc")
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    process = run_hook(tree, "build_sdist")
    assert process.returncode == 0, process.stderr
    (sdist,) = (tree / "dist").iterdir()
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = {path.relative_to(tree).as_posix() for path in (tree / "csrc").rglob("*") if path.is_file()}
    assert sources | {"setup.py", "pyproject.toml", "revkernels/registry.py", "tests/conftest.py"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", "_skipped.json"))]


# --- tools with arguments, paths with spaces, builds beside one another ---------------------------------


def module_of(wheel: Path) -> bytes:
    """The native module in a wheel."""
    archive = zipfile.ZipFile(wheel)
    return archive.read(next(name for name in archive.namelist() if name.endswith(".so")))


def launcher(folder: Path, name: str, program: str) -> Path:
    """A program that notes its arguments and runs ``program`` with them."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f'#!/bin/sh\necho "$@" >> "$0.log"\nexec {program} "$@"\n')
    path.chmod(0o755)
    return path


@needs_checkout
@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("cc", ["{bin}/cc"]),
        ("ccache cc", ["{bin}/ccache", "{bin}/cc"]),
        ("ccache cc -m64 '-DA=\"b c\"'", ["{bin}/ccache", "{bin}/cc", "-m64", '-DA="b c"']),
        ("cc -m64", ["{bin}/cc", "-m64"]),
        ("{bin}/cc", ["{bin}/cc"]),
        ("ccache", ["{bin}/ccache"]),
        ("ccache no-such-compiler", None),
        ("no-such-compiler -m64", None),
    ],
)
def test_a_compiler_is_a_path_or_words_as_a_shell_reads_them(backend, monkeypatch, tmp_path, text, command):
    folder = tmp_path / "a b"
    for name in ("cc", "ccache"):
        launcher(folder, name, "true")
    monkeypatch.setenv("PATH", str(folder))
    compiler = backend.Compiler.of(text.format(bin=folder))
    assert compiler == command if command is None else compiler.command == [w.format(bin=folder) for w in command]


@needs_checkout
def test_nvcc_may_be_named_with_a_launcher_or_lie_in_a_folder_with_spaces(backend, monkeypatch, tmp_path):
    nvcc = fake_nvcc(tmp_path / "CUDA toolkit", "13.0")
    torch_13 = backend.Torch(tmp_path / "torch", "2.13.0+cu130", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(nvcc.parents[1]))
    assert backend.find_nvcc(torch_13).command == [str(nvcc)]
    monkeypatch.delenv("CUDA_HOME")
    cache = launcher(tmp_path / "bin", "ccache", "true")
    monkeypatch.setenv("NVCC", f"'{cache}' '{nvcc}' --threads=2")
    assert backend.find_nvcc(torch_13).command == [str(cache), str(nvcc), "--threads=2"]
    monkeypatch.setenv("NVCC", "no-such-nvcc")
    with pytest.raises(backend.Skip, match="no no-such-nvcc"):
        backend.find_nvcc(torch_13)


@pytest.mark.slow
@needs_checkout
@needs_build_tools
def test_tools_with_arguments_build_in_folders_with_spaces(tree, tmp_path_factory):
    spaced = tmp_path_factory.mktemp("a b") / "c $d"
    shutil.copytree(tree, spaced)
    cache = launcher(spaced / "bin", "ccache", "")
    process = run_hook(
        spaced,
        "build_wheel",
        CXX=f"'{cache}' g++ -m64 -DSPACED='\"a b\"'",
        TMPDIR=str(cache.parent),
        REVKERNELS_REQUIRE="cpp",
        REVKERNELS_DISABLE="cuda",
    )
    assert process.returncode == 0, process.stderr
    calls = cache.with_name("ccache.log").read_text()
    assert "g++ -m64" in calls and "module.cpp" in calls
    (wheel,) = (spaced / "dist").iterdir()
    assert module_of(wheel)[:4] == b"\x7fELF"


@pytest.mark.slow
@needs_checkout
@needs_build_tools
def test_an_editable_build_with_spaces_in_the_temporary_folder_leaves_the_module_in_the_tree(tree):
    temporary = tree / "a b"
    temporary.mkdir()
    process = run_hook(
        tree, "build_editable", TMPDIR=str(temporary), REVKERNELS_REQUIRE="cpp", REVKERNELS_DISABLE="cuda"
    )
    assert process.returncode == 0, process.stderr
    (module,) = tree.glob("revkernels/_C.*.so")
    record = json.loads((tree / "revkernels" / "_C.json").read_text())
    assert record["file"] == module.name and record["bytes"] == module.stat().st_size


@pytest.mark.slow
@needs_checkout
@needs_build_tools
def test_two_builds_of_one_tree_at_once_make_the_same_wheel(tree):
    code = "import setup, sys; setup.build_wheel(sys.argv[1])"
    environment = os.environ | {"REVKERNELS_REQUIRE": "cpp", "REVKERNELS_DISABLE": "cuda"}
    builds = [
        subprocess.Popen(
            [sys.executable, "-c", code, folder],
            cwd=tree,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for folder in ("first", "second")
    ]
    for process in builds:
        output, _ = process.communicate()
        assert process.returncode == 0, output.decode()
    first, second = (next((tree / folder).iterdir()) for folder in ("first", "second"))
    assert zipfile.ZipFile(first).namelist() == zipfile.ZipFile(second).namelist()
    assert module_of(first) == module_of(second)


@pytest.mark.slow
@needs_checkout
@needs_build_tools
def test_a_read_only_tree_is_built_elsewhere_and_left_as_it_was(tree, tmp_path_factory):
    before = {path: path.stat().st_mtime_ns for path in tree.rglob("*")}
    # For root no folder is read-only: what the hook asks is answered for it.
    code = """
import os, sys
access = os.access
os.access = lambda path, mode, **others: path != "." and access(path, mode, **others)
import setup
print(setup.build_wheel(sys.argv[1]))
"""
    folder = tmp_path_factory.mktemp("dist")
    environment = os.environ | {
        "REVKERNELS_REQUIRE": "cpp",
        "REVKERNELS_DISABLE": "cuda",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-c", code, folder]
    process = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    wheel = folder / process.stdout.splitlines()[-1]
    assert module_of(wheel)[:4] == b"\x7fELF"
    assert {path: path.stat().st_mtime_ns for path in tree.rglob("*")} == before


# --- what was not built, and what was damaged since ---------------------------------------------------------


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A copy of the installed package with its native code, to damage."""
    if not dispatch.STATUS["cpp"].loaded:
        pytest.skip(dispatch.STATUS["cpp"].reason)
    folder = tmp_path_factory.mktemp("installed")
    shutil.copytree(Path(revkernels.__file__).parent, folder / "revkernels", ignore=shutil.ignore_patterns("*.pyc"))
    return folder


def import_from(folder: Path, code="import revkernels", **variables: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("REVKERNELS_")}
    environment |= {"PYTHONPATH": str(folder), "REVKERNELS_DISABLE": "cuda,triton", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *(["-m", "revkernels.env"] if code == "env" else ["-c", code])]
    return subprocess.run(command, cwd=folder, env=environment | variables, capture_output=True, text=True)


DAMAGES = {
    "truncated": (lambda content: content[: len(content) // 2], "is truncated: "),
    "empty": (lambda content: b"", r"is no shared library \(0 bytes\)"),
    "text": (lambda content: b"<html>404</html>" * 10000, "is no shared library"),
    "of another machine": (lambda content: content[:18] + b"\xf3\x00" + content[20:], "is built for riscv64, and this"),
    "longer": (lambda content: content + b"\0", "is not the file that was built: .* bytes instead of"),
    "changed": (lambda content: content[:100_000] + bytes(1000) + content[101_000:], "its checksum is another"),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_module_is_not_loaded_and_a_sentence_says_so(package, damage):
    (module,) = package.glob("revkernels/_C.*.so")
    content, (change, sentence) = module.read_bytes(), DAMAGES[damage]
    record = {"file": module.name, "bytes": len(content), "crc32": zlib.crc32(content)}
    (package / "revkernels" / "_C.json").write_text(json.dumps(record))
    module.unlink()  # the tests' own process has the file mapped
    module.write_bytes(change(content))
    try:
        for process in (import_from(package), import_from(package, "env")):
            assert process.returncode == 0, process.stderr
            assert re.search(rf"UserWarning: revkernels runs without its C\+\+ kernels: .*{sentence}", process.stderr)
        assert re.search(rf"cpp +NOT loaded: .*{sentence}", process.stdout)
        process = import_from(package, REVKERNELS_REQUIRE="cpp")
        assert process.returncode == 1
        assert re.search(rf"ImportError: REVKERNELS_REQUIRE asks for 'cpp': .*{sentence}", process.stderr)
    finally:
        module.write_bytes(content)


@pytest.mark.slow
def test_a_module_of_another_python_is_named(package):
    (module,) = package.glob("revkernels/_C.*.so")
    other = module.rename(module.with_name("_C.cpython-39-x86_64-linux-gnu.so"))
    try:
        process = import_from(package)
        assert process.returncode == 0
        assert f"{other.name} is for another Python than {sys.implementation.cache_tag}" in process.stderr
    finally:
        other.rename(module)


@pytest.mark.slow
def test_what_was_not_built_is_said_with_its_reason_at_every_import(package):
    (module,) = package.glob("revkernels/_C.*.so")
    hidden = module.rename(module.with_name("hidden"))
    record = package / "revkernels" / "_skipped.json"
    record.write_text(json.dumps({"cpp": "no C++ compiler was found"}))
    try:
        process = import_from(package)
        assert process.returncode == 0
        assert "revkernels._C was not built: no C++ compiler was found" in process.stderr
    finally:
        hidden.rename(module)
        record.unlink()


def test_missing_cuda_kernels_are_said_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(dispatch, "_load_native", lambda name, *_: dispatch.Status(name, name == "cpp", "no nvcc"))
    monkeypatch.setattr(dispatch, "_load_triton", lambda *_: dispatch.Status("triton", False, "absent"))
    for gpu in (True, False):
        monkeypatch.setattr(dispatch, "_has_gpu", lambda gpu=gpu: gpu)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            dispatch._load()
        assert ["without its CUDA kernels: no nvcc" in str(w.message) for w in caught] == [True] * gpu
