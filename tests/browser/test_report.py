"""The page in a file of its own: answers are embedded, and nothing is asked for."""

import json
from pathlib import Path
from urllib.parse import quote

from playwright.sync_api import expect

from bnwatch.cli import main
from bnwatch.views import RunViews
from tests.browser.conftest import faults

PAGE = Path(__file__).parents[2] / "bnwatch" / "dashboard" / "static" / "index.js"


def report(logdir, path, run, layers):
    """Write a report that holds one run and some of its layers."""
    views = RunViews(logdir)
    views.refresh()
    view = views[run]
    overview = view.overview()
    answers = {
        "runs": {**views.runs(), "runs": [one for one in views.runs()["runs"] if one["run"] == run]},
        f"run?run={run}": overview,
        f"layers?run={run}": view.layers(),
        f"heatmap?run={run}&statistic=mean_shift": view.heatmap("mean_shift"),
        **{f"series?layer={quote(layer, safe='')}&run={run}": view.series(layer) for layer in layers},
    }
    data = json.dumps(answers).replace("<", "\\u003c")
    page = PAGE.read_text(encoding="utf-8")
    assert "</script" not in page
    assert "<!--" not in page
    path.write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Report</title></head><body>'
        f'<main id="bnwatch"></main><script type="application/json" id="bnwatch-answers">{data}</script>'
        f'<script type="module">{page}\nrender();</script></body></html>',
        encoding="utf-8",
    )


def test_a_report_shows_what_it_holds_and_says_what_it_does_not(visit, logdir, tmp_path):
    report(logdir, tmp_path / "report.html", "shared", ["encoder/bn"])
    window = visit()
    page = window.window
    page.goto((tmp_path / "report.html").as_uri())
    expect(page.locator(".card.warning").first).to_contain_text("encoder/bn normalizes 2 call sites")
    expect(page.locator("figure[data-figure=series] canvas")).to_have_count(3)
    expect(page.locator("figure[data-figure=heatmap] canvas")).to_be_visible()
    expect(page.locator(".status")).to_contain_text("A report of 1 run")
    page.locator("table.layers tbody button").first.click()
    expect(page.locator("#layer-title")).to_contain_text("l1")
    expect(page.locator("figure[data-figure=series]")).to_contain_text("This report holds a selection only")
    page.get_by_role("button", name="About BN101").click()
    expect(page.get_by_role("dialog")).to_contain_text("bnwatch explain BN101")
    page.keyboard.press("Escape")
    assert "p.bnwatch.layer=l1" in window.hash()
    page.reload()
    expect(page.locator("#layer-title")).to_contain_text("l1")
    assert faults(page) == []
    assert all(url.startswith("file:") for url in window.requests)


def test_the_report_of_the_command_line_is_the_page(visit, logdir, tmp_path):
    path = tmp_path / "report.html"
    assert main(["report", str(logdir), "--format", "html", "--output", str(path)]) == 1
    window = visit(dark=True)
    page = window.window
    page.goto(f"{path.as_uri()}#p.bnwatch.runs=shared|cold")
    expect(page.locator(".run-cards")).to_have_count(2)
    expect(page.locator(".run-cards").nth(1)).to_contain_text("Evaluation ran while moving averages still held")
    expect(page.locator("figure[data-figure=channels] canvas")).to_have_count(2)
    latest = page.locator("output[for=step]").inner_text()
    page.locator("#step").focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("output[for=step]")).not_to_have_text(latest)
    expect(page.get_by_role("button", name="Latest")).to_be_visible()
    page.get_by_role("button", name="About BN101").click()
    expect(page.get_by_role("dialog")).to_contain_text("Why it matters")
    page.keyboard.press("Escape")
    assert faults(page) == []
    assert all(url.startswith("file:") for url in window.requests)
