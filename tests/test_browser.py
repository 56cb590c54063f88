"""The report in a real browser: Debian's chromium, headless and without a network."""

import shutil

import pytest

from reporting.text import single_line

from folders import NASTY, make_run, nasty_runs, report
from helpers import machine_lacks

pytestmark = pytest.mark.thorough

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (CHROMIUM and DRIVER):
        machine_lacks("no chromium with chromedriver in PATH (Debian: chromium, chromium-driver)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    for argument in (
        "--headless=new",
        "--no-sandbox",  # containers run as root
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--proxy-server=127.0.0.1:9",  # nothing listens there, so no host can be reached
        f"--user-data-dir={profile}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of a report on a sweep, its baselines and an excluded run."""
    root = tmp_path_factory.mktemp("runs")
    for seed, (plain, se, aa) in enumerate([(70.10, 70.52, 71.92), (70.24, 71.16, 72.06)]):
        make_run(root / f"plain/seed={seed}", plain, seed, epochs=5)
        make_run(root / f"se/seed={seed}", se, seed, "se", epochs=5, optim__lr=0.1)
        for dk in (0.2, 0.4):
            make_run(root / f"aa{dk}/seed={seed}", aa - dk, seed, "aa", epochs=5, attention__dk=dk)
    make_run(root / f"a-name-without-a-space-{'x' * 90}", 1.0, 5, finished=False)
    report([root], root / "out")
    return root / "out"


@pytest.fixture(params=[1280, 400])
def opened(browser, written, request):
    """The page, opened at a given window width in pixels."""
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd(
        "Network.emulateNetworkConditions",
        {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0},
    )
    size = {"width": request.param, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get((written / "report.html").as_uri())
    assert browser.execute_script("return window.innerWidth") == request.param
    return browser


def test_opens_without_network_and_without_errors(opened):
    assert opened.title == "Does attention help?"
    assert opened.get_log("browser") == []
    asked = [entry["message"] for entry in opened.get_log("performance")]
    asked = [text for text in asked if '"Network.requestWillBeSent"' in text]
    assert any("report.html" in text for text in asked)
    assert not any("http://" in text or "https://" in text for text in asked)


def test_all_pictures_are_there_and_not_blank(opened):
    pictures = opened.execute_async_script(
        """const done = arguments[0];
           Promise.all([...document.images].map(async i => {
             await i.decode();
             const c = new OffscreenCanvas(200, 150), g = c.getContext("2d");
             g.drawImage(i, 0, 0, 200, 150);
             const pixels = new Uint32Array(g.getImageData(0, 0, 200, 150).data.buffer);
             const box = i.getBoundingClientRect();
             return [new Set(pixels).size, i.naturalWidth, i.naturalHeight, box.width, box.height];
           })).then(done, e => done(String(e)))"""
    )
    assert len(pictures) == 10, pictures
    for shades, *sizes in pictures:
        assert shades > 20
        assert all(size > 50 for size in sizes)


def test_nothing_is_wider_than_the_window(opened):
    opened.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    widths = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    content, window = opened.execute_script(widths)
    assert content <= window
    # A table may be wider than the window and scroll, but its caption must not be.
    captions = "return [...document.querySelectorAll('caption')]"
    edges = opened.execute_script(f"{captions}.map(c => c.getBoundingClientRect().right)")
    assert edges
    assert max(edges) <= window


def test_the_answer_is_on_the_first_screen(opened):
    card = "return document.querySelector('.card').getBoundingClientRect().bottom"
    assert opened.execute_script(card) < 900
    text = opened.execute_script("return document.querySelector('.card').innerText")
    # 71.92 - 0.2 - 70.10 and 72.06 - 0.2 - 70.24 are both 1.62
    assert "AA dk=0.2 vs. plain" in text
    assert "+1.62" in text
    assert "n = 2 pairs of seeds" in text


def test_tables_have_the_summaries_numbers(opened):
    rows = opened.execute_script(
        """return [...document.querySelectorAll("table")].map(t =>
             [...t.rows].map(r => [...r.cells].map(c => c.innerText)))"""
    )
    scores = {row[0]: row[2:] for row in rows[0]}
    size = ("2,750,000", "0.776")
    assert scores["plain"] == ["70.17 ± 0.10", "90.17 ± 0.10", *size, "70.10, 70.24"]
    size = ("2,700,000", "1.11")
    assert scores["AA dk=0.4"] == ["71.59 ± 0.10", "91.59 ± 0.10", *size, "71.52, 71.66"]
    differences = {row[0]: row for row in rows[1]}
    se = differences["SE \N{MINUS SIGN} plain"]
    assert se[1] == "optim.lr 0.1 vs. 0.2"
    # 0.42 and 0.92: mean 0.67, deviation 0.5 / sqrt 2; t with one degree of freedom is 12.7062
    assert se[3] == "+0.67"
    assert se[4] == f"\N{MINUS SIGN}{12.7062 * 0.25 - 0.67:.2f} to +{12.7062 * 0.25 + 0.67:.2f}"


def test_names_are_shown_and_not_acted_on(browser, tmp_path):
    nasty_runs(tmp_path / "runs")
    report([tmp_path / "runs"], tmp_path / "out")
    browser.get((tmp_path / "out" / "report.html").as_uri())  # an alert would raise an error
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert (
        browser.execute_script("return document.querySelectorAll('[onerror], main a').length") == 0
    )
    assert browser.get_log("browser") == []
    shown = browser.execute_script("return document.body.innerText")
    for name in NASTY:
        assert single_line(name) in shown
