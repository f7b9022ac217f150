"""The documentation builds without a warning and without network, and every link in it leads somewhere."""

import importlib.util
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")

pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="the tests are not in a checkout")
needs_sphinx = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("sphinx", "myst_parser", "furo"))),
    reason="the site's generator is not installed: pip install 'revbifpn-fast[docs]'",
)


class Page(HTMLParser):
    """Where a page links to, and what can be linked to on it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids |= {found[name] for name in ("id", "name") if found.get(name)}
        self.targets += [found[name] for name in ("href", "src") if found.get(name)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; no connection can be made while it is built."""
    folder = tmp_path_factory.mktemp("site")
    closed = "import socket; socket.socket.connect = socket.create_connection = None\n"
    command = ["--fail-on-warning", "--keep-going", "-q", "-b", "html", str(DOCS), str(folder)]
    code = f"{closed}from sphinx.cmd.build import main; raise SystemExit(main({command!r}))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert process.returncode == 0, process.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path.read_text()) for path in site.glob("**/*.html")}


@pytest.mark.slow
@needs_sphinx
def test_no_link_of_the_site_is_dead(site, pages):
    dead = []
    for path, page in pages.items():
        for target in page.targets:
            if urlsplit(target).scheme or target.startswith("//"):
                continue
            file, anchor = urldefrag(target)
            other = (path.parent / unquote(urlsplit(file).path)).resolve() if urlsplit(file).path else path
            if not other.exists():
                dead.append(f"{path.name}: {target}")
            elif anchor and other.suffix == ".html" and unquote(anchor) not in pages[other].ids:
                dead.append(f"{path.name}: {target}")
    assert len(pages) > 20 and not dead


@pytest.mark.slow
@needs_sphinx
def test_the_site_loads_nothing_from_elsewhere(pages):
    loads = re.compile(r"""<(?:script|img|link)[^>]+(?:src|href)=["'](?:https?:)?//""")
    assert [path.name for path in pages if loads.search(path.read_text())] == []


@pytest.mark.slow
@needs_sphinx
def test_every_page_is_in_the_navigation(site):
    navigation = set(
        re.findall(
            r'class="toctree-l1[^"]*"><a class="reference internal" href="([\w/]+)\.html"',
            (site / "index.html").read_text(),
        )
    )
    written = {path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.glob("**/*.md")} - {"index"}
    written -= {name for name in written if name.startswith("_build")}
    assert navigation == written


def test_links_of_readme_and_docs_lead_to_files_or_are_well_formed():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS.glob("*.md")]
    for page in pages:
        for target in LINK.findall(page.read_text()):
            address = urlsplit(target)
            if address.scheme:
                assert address.scheme == "https" and re.fullmatch(r"[\w-]+(\.[\w-]+)+", address.netloc), target
            elif not target.startswith("#"):
                assert (page.parent / urldefrag(target)[0]).exists(), f"{page.name}: {target}"


# --- drawings ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def draw():
    spec = importlib.util.spec_from_file_location("draw", DOCS / "draw.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_drawings_are_what_the_script_draws(draw):
    drawn = {f"{make.__name__}.svg": make().svg() for make in draw.DRAWINGS}
    assert drawn == {path.name: path.read_text() for path in (DOCS / "drawings").glob("*.svg")}


def luminance(colour: str) -> float:
    """Relative luminance of sRGB, as WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_drawings_can_be_read_in_either_scheme(draw, scheme):
    def contrast(one, other):
        low, high = sorted(luminance(draw.COLOURS[name][scheme]) for name in (one, other))
        return (high + 0.05) / (low + 0.05)

    for ground in ("ground", "blue-ground", "red-ground", "grey-ground"):
        assert contrast("ink", ground) > 7
    for text in ("quiet", "blue", "red"):
        assert contrast(text, "ground") > 4.5


def test_drawings_are_well_formed_and_say_what_they_show(draw):
    for make in draw.DRAWINGS:
        root = ElementTree.fromstring(make().svg())
        title, description = root[0].text, root[1].text
        assert title and len(description) > 40
        for text in root.iter("{http://www.w3.org/2000/svg}text"):
            assert 0 <= float(text.get("x")) <= float(root.get("width"))
