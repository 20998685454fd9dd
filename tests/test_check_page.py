"""The page of `check --report`: whole in a browser, on a phone, in print, in light and dark; no request, clean console."""

import json
import math
import re

import pytest
import torch
from browser import Browser, find_browser

from model import cli, equivalence, equivalence_run
from model.chart import Line, bar_chart, frame_of, line_chart, strip_chart
from model.equivalence_faults import FAULTS

BOX = "(() => { const b = document.querySelector(%s).getBoundingClientRect(); return [b.width, b.height]; })()"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The path of a page."""
    path, threads = tmp_path_factory.mktemp("page") / "new" / "report.html", torch.get_num_threads()
    torch.set_num_threads(1)
    words = f"check tiny n_embd=16 batch=4 --steps 4 --band 3 --bisect --report {path}"
    assert cli.main(words.split()) == 0
    torch.set_num_threads(threads)
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium."""
    path = find_browser()
    if path is None:
        pytest.skip("no Chromium on the PATH: apt-get install chromium")
    with Browser(path, tmp_path_factory.mktemp("profile")) as found:
        yield found


def test_the_page_needs_nothing_else(report):
    text = report.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and text.endswith("</html>\n")
    assert not re.search(r"<script|@import|url\(|https?://(?!www\.w3\.org)", text)
    assert re.findall(r'(?:src|href)="([^"]*)"', text) == ["data:,"]
    for word in ("svg", "table", "figure", "div", "details", "tbody", "p", "dl"):
        assert len(re.findall(rf"<{word}[ >]", text)) == text.count(f"</{word}>"), word


@pytest.mark.parametrize("width", [320, 390, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it(report, browser, width, scheme):
    browser.open(report.as_uri(), width, prefers_color_scheme=scheme)
    assert browser.told("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded") == []
    requests = [request["request"]["url"] for request in browser.told("Network.requestWillBeSent")]
    assert [url for url in requests if not url.startswith("data:")] == [report.as_uri()]
    pictures = browser.evaluate(
        "[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().width)"
    )
    assert len(pictures) == 4 and all(width * 0.4 < shown or shown > 250 for shown in pictures)
    assert browser.evaluate("document.querySelectorAll('svg polyline.ours, svg circle.ours').length") > 20
    titles = browser.evaluate("[...document.querySelectorAll('figure h3')].map(h => h.textContent)")
    assert any("drift" in title for title in titles) and any("operator" in title for title in titles)
    # Nothing but the tables' own boxes is wider than the window.
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    back, text = browser.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    dark = [sum(map(int, re.findall(r"\d+", colour)[:3])) < 300 for colour in (back, text)]
    assert dark == ([True, False] if scheme == "dark" else [False, True])


def test_the_table_holds_every_row(report, browser):
    browser.open(report.as_uri(), 1200)
    browser.evaluate("document.querySelector('details').open = true")
    rows = browser.evaluate("[...document.querySelectorAll('details tbody tr td:first-child')].map(c => c.textContent)")
    assert len(rows) == len(set(rows)) > 80 and "logits" in rows and "48 greedy tokens" in rows
    assert "h.1.attn causal_attention_packed: grad of qkv" in rows
    assert browser.evaluate("document.querySelector('.verdict').textContent").startswith("The fast model computes")


def test_it_prints(report, browser):
    browser.open(report.as_uri(), 800, prefers_color_scheme="dark")
    browser.call("Emulation.setEmulatedMedia", media="print", features=[])
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert len(browser.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.7)["data"]) > 20_000


def test_a_failed_comparison_is_a_page_too(tmp_path, capsys, monkeypatch, browser):
    fault = next(fault for fault in FAULTS if fault.name == "scores not scaled by 1/sqrt(D)")
    choose = fault.planted()
    monkeypatch.setattr(equivalence, "compare_all", lambda *a, **k: equivalence_run.compare_all(*a, **k, choose=choose))
    path = tmp_path / "report.html"
    words = f"check tiny n_embd=16 batch=4 --steps 3 --band 2 --report {path}"
    assert cli.main(words.split()) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["passed"] is False
    browser.open(path.as_uri(), 390)
    assert browser.told("Runtime.exceptionThrown", "Log.entryAdded") == []
    assert browser.evaluate("document.querySelector('.verdict.bad').textContent").startswith("FAILED")
    assert browser.evaluate("document.querySelectorAll('td.bad').length") > 10
    assert browser.evaluate("document.querySelectorAll('svg circle.bad').length") > 0


@pytest.mark.parametrize("values", [[], [math.nan], [0.0], [1.0], [1.0, math.inf, -2.0], [1e-9, 1e9]], ids=str)
@pytest.mark.parametrize("log", [False, True])
def test_a_chart_of_anything_is_whole(values, log):
    svg = line_chart("a <chart>", [Line("ours", list(enumerate(values)), dots=True)], "x", "y & z", log=log)
    assert "&lt;chart&gt;" in svg and "y &amp; z" in svg and "nan" not in svg and "inf" not in svg
    assert all(-1 <= float(y) <= 241 for y in re.findall(r'cy="([^"]*)"', svg))
    frame = frame_of(list(enumerate(values)), log)
    assert frame.y_low < frame.y_high and frame.x_low < frame.x_high
    finite = [abs(value) for value in values if math.isfinite(value)]
    assert "nan" not in strip_chart("ratios", [("a", values)], [(1.0, "equal"), (2.0, "limit")], "ratio")
    assert "nan" not in bar_chart("bars", [("a", value + 1, "ms") for value in finite] or [("a", 1.0, "ms")])
