"""Every Python block of README and docs runs by itself; commands name files and modules that are there.

Words after ``python`` on a block's first line say what it needs:

===========  ==============================================================================================
``gpu``      a GPU: skipped without one
``network``  published weights: run with random ones in their place
``torchrun`` a process that torchrun started: run as the only one
``slow``     long: left to the full run
===========  ==============================================================================================
"""

import ast
import importlib.util
import re
import shlex
import socket
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import revbifpn
from revbifpn import checkpoints
from revbifpn.configs import CONFIGS
from tests.adapters import frameworks

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NEEDS = {"gpu", "network", "torchrun", "slow"}

pytestmark = pytest.mark.skipif(not (ROOT / "docs").exists(), reason="the tests are not in a checkout")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    needs: frozenset[str]
    code: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(language: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in FENCE.finditer(text):
            if match[1] == language:
                line = text.count("\n", 0, match.start()) + 1
                found.append(Block(page, line, language, frozenset(match[2].split()), match[3]))
    return found


def parameters(found):
    for block in found:
        yield pytest.param(block, id=str(block), marks=[pytest.mark.slow] if "slow" in block.needs else [])


def missing_package(code: str) -> str | None:
    """The first package that the code imports and that is not installed; torchvision needs its compiled ops."""
    for node in ast.walk(ast.parse(code)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module]
        for name in names:
            adapter = re.match(r"revbifpn\.adapters\.(\w+)", name)
            package = adapter[1] if adapter else name.split(".")[0]
            package = {"hub": "huggingface_hub"}.get(package, package)
            if importlib.util.find_spec(package) is None:
                return package
    return None


@pytest.fixture
def surroundings(request, monkeypatch, tmp_path):
    """An empty working directory, and what the block's words ask for."""
    block = request.getfixturevalue("block")
    if "gpu" in block.needs and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if package := missing_package(block.code):
        pytest.skip(f"{package} is not installed")
    if "torchvision.models" in block.code or "revbifpn.detection" in block.code:
        frameworks.torchvision("torchvision.models")
    elif "torchvision" in block.code or "timm" in block.code or "segmentation" in block.code:
        frameworks.on_torchvision("torchvision")
    monkeypatch.chdir(tmp_path)
    if "network" in block.needs:
        monkeypatch.setattr(torch.hub, "_hub_dir", None)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        monkeypatch.setattr(checkpoints, "_verify", lambda *_: None)
        folder = tmp_path / "hub" / "checkpoints"
        folder.mkdir(parents=True)
        for arch in {f"revbifpn_{scale}" for scale in re.findall(r"[\"_](s\d)\b", block.code)}:
            file = folder / CONFIGS[arch].url.rsplit("/", 1)[1]
            revbifpn.save_checkpoint(getattr(revbifpn, arch)(), file)
    if "torchrun" in block.needs:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    torch.manual_seed(0)
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("block", blocks("python") and list(parameters(blocks("python"))))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_block_runs_by_itself(block, surroundings):
    assert block.needs <= NEEDS, f"{block}: unknown word {sorted(block.needs - NEEDS)}, choose from {sorted(NEEDS)}"
    exec(compile("\n" * block.line + block.code, str(block.page), "exec"), {"__name__": "__main__"})


def test_readme_and_docs_have_blocks_and_all_of_python_are_called_so():
    pages = {block.page.name for block in blocks("python")}
    assert {"README.md", "own_networks.md", "streams.md", "recipes.md"} <= pages
    for page in PAGES:
        languages = re.findall(r"^```([\w{}-]*)", page.read_text(), re.MULTILINE)
        unknown = set(languages) - {"", "python", "bash", "{toctree}", "{raw}", "{eval-rst}"}
        assert not unknown, f"{page}: blocks of {sorted(unknown)}"


@pytest.mark.parametrize("block", list(parameters(blocks("bash"))))
def test_commands_name_files_and_modules_that_are_there(block):
    for line in block.code.replace("\\\n", " ").splitlines():
        words = [word.strip("();") for word in shlex.split(line, comments=True)]
        for before, word in zip(words, words[1:], strict=False):
            if before == "python" and word.endswith(".py"):
                assert (ROOT / word).exists(), f"{block}: no {word}"
            module = words[words.index("-m") + 1] if word == "-m" and before == "python" else ""
            if module.split(".")[0] in ("revbifpn", "revkernels", "benchmarks", "tests"):
                path = ROOT.joinpath(*module.split("."))
                assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"{block}: no {module}"
