"""Without a framework: the core imports, and its adapter says in one line what to install."""

import subprocess
import sys

ADAPTERS = {
    "revbifpn.adapters.hub": ("huggingface_hub", "revbifpn-fast[hub]"),
    "revbifpn.adapters.timm": ("timm", "revbifpn-fast[timm]"),
    "revbifpn.adapters.torchvision": ("torchvision", "revbifpn-fast[torchvision]"),
    "revbifpn.detection": ("torchvision", "revbifpn-fast[torchvision]"),
    "revbifpn.adapters.mmengine": ("mmengine", "revbifpn-fast[mmengine]"),
    "revbifpn.adapters.lightning": ("lightning", "lightning"),
    "revbifpn.adapters.transformers": ("transformers", "transformers[torch]"),
    "revbifpn.adapters.detectron2": ("detectron2", "git+https://github.com/facebookresearch/detectron2.git"),
}

CODE = """
import importlib, sys
import revbifpn.fast
for adapter, (framework, _) in {adapters}.items():
    assert sys.modules.get(framework) is None, framework
    sys.modules[framework] = None
    try:
        importlib.import_module(adapter)
    except ImportError as error:
        print(error)
"""


def test_a_missing_framework_is_one_line_with_the_command(tmp_path):
    command = [sys.executable, "-c", CODE.format(adapters=ADAPTERS)]  # whose first folder of modules is where it runs
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for (adapter, (framework, package)), line in zip(ADAPTERS.items(), result.stdout.splitlines(), strict=True):
        assert line.startswith(f"{adapter} needs {framework}") and line.endswith(f": pip install '{package}'")
