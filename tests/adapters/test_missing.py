"""Without a framework: the core imports, and its adapter says in one line what to install."""

import subprocess
import sys

ADAPTERS = {"hub": "huggingface_hub", "timm": "timm", "torchvision": "torchvision", "mmengine": "mmengine"}

CODE = """
import importlib, sys
import revbifpn.fast
for adapter, framework in {adapters}.items():
    assert framework not in sys.modules, framework
    sys.modules[framework] = None
    try:
        importlib.import_module(f"revbifpn.adapters.{{adapter}}")
    except ImportError as error:
        print(error)
"""


def test_a_missing_framework_is_one_line_with_the_command(tmp_path):
    command = [sys.executable, "-c", CODE.format(adapters=ADAPTERS)]  # whose first folder of modules is where it runs
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for (adapter, framework), line in zip(ADAPTERS.items(), result.stdout.splitlines(), strict=True):
        assert line.startswith(f"revbifpn.adapters.{adapter} needs {framework}")
        assert line.endswith(f": pip install 'revbifpn-fast[{adapter}]'")
