"""The page "What fits on my card" in a real browser: choose, read the number, and compare it with the estimator."""

import importlib.util
import re
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import revbifpn.fast
from benchmarks import fits as table_maker
from revbifpn import fits
from revbifpn.estimate import StepEstimator
from tests.marks import mostly_slow

ROOT = Path(__file__).parents[2]
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync""".split()

pytestmark = [
    pytest.mark.skipif(not (ROOT / "docs").exists(), reason="the tests are not in a checkout"),
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="apt install chromium chromium-driver"),
    pytest.mark.skipif(importlib.util.find_spec("selenium") is None, reason="pip install selenium"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The page as docs/fits.md has it, without the generator's frame, and the scripts beside it."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(ROOT / "docs" / "_static", folder / "_static")
    (folder / "_static" / "fits_table.js").write_text(table_maker.script())
    body = re.search(r"```\{raw\} html\n(.*?)```", (ROOT / "docs" / "fits.md").read_text(), re.DOTALL)[1]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    style = '<link rel="stylesheet" href="_static/fits.css">'
    (folder / "fits.html").write_text(
        f"<!doctype html><html lang=en><head>{head}{style}</head><body>{body}</body></html>"
    )
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, folder):
    """The page opened as a file, as it was never seen before."""
    browser.get("about:blank")
    browser.get((folder / "fits.html").as_uri())
    return Reader(browser)


class Reader:
    """What a reader does on the page."""

    def __init__(self, browser):
        self.browser = browser

    def field(self, name):
        return self.browser.find_element("css selector", f"#fits [name={name}]")

    def choose(self, **values):
        from selenium.webdriver.support.select import Select

        for name, value in values.items():
            field = self.field(name)
            if field.tag_name == "select":
                Select(field).select_by_visible_text(value)
            else:
                field.clear()
                field.send_keys(value)

    def offered(self, name):
        return [option.text for option in self.field(name).find_elements("tag name", "option")]

    @property
    def batch(self):
        found = re.match(r"(\d+) image", self.browser.find_element("id", "fits-batch").text)
        return int(found[1]) if found else 0

    def part(self, name):
        return float(self.browser.find_element("css selector", f"[data-part={name}]").text)

    def batches(self):
        cells = self.browser.find_elements("css selector", "[data-batch]")
        return {c.get_attribute("data-batch"): 0 if c.text == "none" else int(c.text) for c in cells}

    def errors(self):
        return [entry for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.mark.parametrize("variant", [pytest.param("fast", marks=pytest.mark.slow), "stored"])
def test_the_number_on_the_page_is_the_estimators(page, variant):
    page.choose(task="classification", network="RevBiFPN-S0", size="224 × 224")  # noqa: RUF001
    page.choose(setting="float32, float32 streams", optimizer="Adam, AdamW", card="12")
    with torch.device("meta"):
        model = revbifpn.fast.revbifpn_s0() if variant == "fast" else revbifpn.revbifpn_s0(reversible=False)
    estimator = StepEstimator(model, 224, optimizer_states=2, device="cuda")
    largest = estimator.largest_batch(12 * 2**30)
    assert page.batches()[f"revbifpn_s0/{variant}"] == largest > 100
    if variant == "fast":
        assert page.batch == largest
        found = estimator.estimate(largest)
        for part in ("activations", "images", "parameters", "gradients", "optimizer", "total"):
            assert page.part(part) == pytest.approx(getattr(found, part) / 2**30, abs=0.006)
    assert page.part("total") <= 12
    assert page.errors() == []


def every_setting():
    _, steps = fits.load()
    for task in dict.fromkeys(step.task for step in steps):
        own = [step for step in steps if step.task == task and not step.is_rival]
        yield from {(s.task, s.size, s.precision, s.stream): s for s in own}.values()


@pytest.mark.parametrize("optimizer", mostly_slow(fits.OPTIMIZERS))
def test_page_and_command_say_the_same_of_every_setting(page, optimizer):
    names = {"sgd": "SGD", "momentum": "SGD with momentum", "adamw": "Adam, AdamW"}
    _, steps = fits.load()
    compared = 0
    for setting in every_setting():
        page.choose(task=setting.task, size=f"{setting.size[0]} × {setting.size[1]}")  # noqa: RUF001
        page.choose(setting=f"{setting.precision}, {setting.stream} streams", optimizer=names[optimizer])
        for card in (6, 24):
            page.choose(card=str(card))
            chosen = fits.choose(steps, setting.task, setting.size, setting.precision, setting.stream, [])
            states = fits.OPTIMIZERS[optimizer]
            expected = {f"{s.network}/{s.variant}": s.largest_batch(card * 2**30, states) for s in chosen}
            assert page.batches() == expected
            compared += len(expected)
    assert compared > 50


def test_where_and_when_the_numbers_were_made_is_shown(page):
    environment, steps = fits.load()
    for task in dict.fromkeys(step.task for step in steps):
        page.choose(task=task)
        text = page.browser.find_element("id", "fits-origin").text
        assert text.startswith("Measured on a CPU" if task in environment["measured"] else "Simulated")
        for value in (environment["date"][:10], environment["version"], environment["torch"], environment["commit"]):
            assert value in text
        assert "Nothing was measured on a GPU" in text


def test_what_the_table_has_not_is_named(page):
    absent = table_maker.absent(fits.load()[1])
    _, steps = fits.load()
    for setting in every_setting():
        page.choose(task=setting.task, size=f"{setting.size[0]} × {setting.size[1]}")  # noqa: RUF001
        page.choose(setting=f"{setting.precision}, {setting.stream} streams")
        at = (setting.task, setting.size, setting.precision)
        here = [row for row in absent if (row["task"], row["size"], row["precision"]) == at]
        here = [row for row in here if row["stream"] in ("", setting.stream)]
        names = [row["label"] if row["variant"] == "fast" else f"{row['label']} {row['variant']}" for row in here]
        text = page.browser.find_element("id", "fits-missing").text
        assert text == (f"Absent, since not in the table yet at these settings: {', '.join(names)}." if names else "")
    listed = page.browser.find_element("id", "fits-absent")
    assert listed.is_displayed() == bool(absent)
    if absent:
        listed.find_element("tag name", "summary").click()
        counts = [line.text.split(": ")[1].count(",") + 1 for line in listed.find_elements("tag name", "li")]
        assert sum(counts) == len(absent)
        assert f"{len(absent)} of {len(absent) + len(steps)} rows" in listed.text


def test_a_card_too_small_for_one_image_is_said_so(page):
    page.choose(card="1", reserve="0.99")
    assert page.batch == 0
    assert page.browser.find_element("id", "fits-batch").text == "does not fit"
    assert "total for one image" in page.browser.find_element("id", "fits-parts").text


def test_what_is_chosen_is_kept_in_the_address(page, folder):
    page.choose(network="RevBiFPN-S0", size=page.offered("size")[-1], card="11", reserve="1", optimizer="SGD")
    address, batch = page.browser.current_url, page.batch
    page.browser.get("about:blank")
    page.browser.get(address)
    assert page.batch == batch
    assert page.field("card").get_attribute("value") == "11"


def test_it_is_used_by_keyboard_alone(page):
    from selenium.webdriver.common.keys import Keys

    before, reached = page.batch, []
    body = page.browser.find_element("tag name", "body")
    body.send_keys(Keys.TAB)
    for _ in range(16):
        active = page.browser.switch_to.active_element
        reached.append(active.get_attribute("name") or active.get_attribute("data-card"))
        if reached[-1] == "24":
            active.send_keys(Keys.ENTER)
            break
        active.send_keys(Keys.TAB)
    assert reached[:7] == ["task", "network", "size", "setting", "optimizer", "card", "reserve"]
    assert page.field("card").get_attribute("value") == "24"
    assert page.batch > before > 0
    network = page.field("network")
    first = network.get_attribute("value")
    network.send_keys(Keys.ARROW_DOWN)
    assert network.get_attribute("value") != first


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_is_cut_off_at_a_phones_width(page, width):
    page.browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    try:
        assert page.browser.execute_script("return document.documentElement.scrollWidth") <= width
        for name in ("task", "network", "size", "setting", "optimizer", "card", "reserve"):
            box = page.field(name).rect
            assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["height"] >= 36
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_it_asks_the_network_for_nothing(folder, browser):
    """Served from this machine, it fetches its own files and no other."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        browser.get(f"http://127.0.0.1:{server.server_port}/fits.html")
        loaded = browser.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)")
        server.shutdown()
        thread.join()
    own = {"fits.css", "fits.js", "fits_table.js"}
    assert own <= {name.rsplit("/", 1)[1] for name in loaded} <= own | {"favicon.ico"}  # which the browser wants
    assert all(f"http://127.0.0.1:{server.server_port}/" in name for name in loaded)
    assert "/fits.html" in asked
