"""Sphinx: ``make docs`` builds the site into docs/_build, without network; every warning is an error."""

from __future__ import annotations

import re
import sys
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.append(str(ROOT))  # an installed revbifpn comes first, this checkout after it

from sphinx.application import Sphinx  # noqa: E402

import revkernels  # noqa: E402
from benchmarks import fits  # noqa: E402

project = "RevBiFPN-fast"
author = project_copyright = "RevBiFPN-fast authors"
version = release = revkernels.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(argparse|collections|os|pathlib|fractions|PIL|torch)\..*"),  # others'
    ("py:.*", r"(timm|torchvision|torchmetrics|lightning|huggingface_hub|mmengine)\..*"),
    ("py:.*", r"revbifpn\.(engine|fused|mbconv|parts|build|adapters\.levels)\b.*|revkernels\..*"),  # no page
    (
        "py:.*",
        r".*\.(T|M|ByArch|Encoded|Pass)|check_coefficients|ExtraFPNBlock|LastLevelMaxPool|(.*\.)?(DataError|IGNORED|Key|Transform)|Stem|Module|RevBiFPN|StreamFormat|Reversible.stream",
    ),
    ("py:class", r".* .*|[a-z_]+"),  # the first words of what an attribute or a result is
]

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_mock_imports = [  # read, not called
    *("timm", "torchvision", "huggingface_hub", "mmengine", "detectron2", "transformers"),
    *("lightning", "torchmetrics", "torchdata", "tensorboard", "webdataset", "matplotlib", "PIL", "yaml", "numpy"),
]
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"RevBiFPN-fast {version}"
html_static_path = ["_static"]
html_css_files = ["site.css", "fits.css"]
html_copy_source = html_show_sourcelink = False


def front_page(app: Sphinx, name: str, source: list[str]) -> None:
    """The site begins with README, whose links to other files than pages are dropped here."""
    if name != "index":
        return
    readme = (ROOT / "README.md").read_text().replace("](docs/", "](")
    readme = re.sub(r"\[([^\]]+)\]\(([A-Z]+\.\w+)\)", r"`\2`", readme)
    source[0] = f"{readme}\n{source[0]}"


def write_table(app: Sphinx, exception: Exception | None) -> None:
    """The table of "What fits on my card", beside the script that reads it."""
    if exception is None and app.builder.format == "html":
        Path(app.outdir, "_static", "fits_table.js").write_text(fits.script())


def setup(app: Sphinx) -> None:
    app.connect("source-read", front_page)
    app.connect("build-finished", write_table)
