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


def test_a_missing_framework_is_one_line_with_the_command():
    result = subprocess.run(
        [sys.executable, "-c", CODE.format(adapters=ADAPTERS)], capture_output=True, text=True, check=True
    )
    for (adapter, framework), line in zip(ADAPTERS.items(), result.stdout.splitlines(), strict=True):
        assert line.startswith(f"revbifpn.adapters.{adapter} needs {framework}")
        assert line.endswith(f": pip install 'revbifpn-fast[{adapter}]'")
