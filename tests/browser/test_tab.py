"""The tab in a real TensorBoard: what is seen, and that every control does what it says."""

import re

import pytest
from playwright.sync_api import expect

from tests.browser import runs
from tests.browser.conftest import TensorBoard, faults

SEEN = {
    "shared": "encoder/bn normalizes 2 call sites with one set of running statistics",
    "cold": "Evaluation ran while moving averages still held",
    "stuck": "All 10 units of dense are zero for every example",
    "healthy": "Nothing is wrong",
}


def only(name):
    return f"&p.bnwatch.runs={name}"


def cells_of(column):
    """Return the numbers of a column of the table, as they stand."""
    return [float(text.replace("▲", "").replace("\u2212", "-")) for text in column.all_inner_texts()]


@pytest.mark.parametrize("backend", ["tensorboard", "fast_tensorboard"])
def test_each_kind_of_run_is_seen_on_each_backend(visit, request, backend):
    window = visit()
    server = request.getfixturevalue(backend)
    tab = window.tab(server, only("shared"))
    for name, sentence in SEEN.items():
        tab.locator(".picker summary").click()
        tab.locator(".run", has_text=name).get_by_role("button", name="Only this").click()
        window.window.keyboard.press("Escape")
        expect(tab.locator(".diagnoses")).to_contain_text(sentence)
        expect(tab.locator(".one-run")).to_have_text(name)
        expect(tab.locator("figure[data-figure=accuracy] canvas")).to_be_visible()
        expect(tab.locator("table.layers tbody tr:not(.spacer)").first).to_be_visible()
        expect(tab.locator("figure[data-figure=series] .sentence")).to_contain_text("running standard deviations")


def test_without_a_choice_the_gravest_run_is_shown(visit, tensorboard):
    tab = visit().tab(tensorboard)
    expect(tab.locator(".one-run")).to_have_text("stuck")


def test_a_healthy_run_says_what_was_and_what_could_not_be_looked_at(visit, tensorboard):
    tab = visit().page(tensorboard, only("healthy"))
    expect(tab.locator(".notice.fine")).to_contain_text("Looked at 12 layers, 12 call sites")
    expect(tab.locator(".card.active")).to_have_count(0)
    tab.get_by_text("rules could not look").last.click()
    expect(tab.locator(".blind")).to_contain_text("BN306")
    expect(tab.locator(".blind")).to_contain_text("no look through the network was taken")


def test_a_card_shows_evidence_what_to_do_and_its_consequence(visit, tensorboard):
    window = visit()
    window.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab = window.page(tensorboard, only("shared"))
    card = tab.locator(".card.warning").first
    expect(card.locator(".severity").first).to_have_text("Warning")
    expect(card.locator("table").first).to_contain_text("encoder/bn#1")
    expect(card.locator(".facts").first).to_contain_text("standard deviations between site means")
    expect(card.locator(".helps").first).to_contain_text("give each call site its own BatchNormalization layer")
    inside = card.locator(".below .card")
    expect(inside).to_contain_text("Running statistics cost 16.0 points")
    expect(inside.locator(".inside")).to_be_hidden()
    inside.locator("summary").click()
    expect(inside.locator(".inside")).to_be_visible()
    card.get_by_role("button", name="Copy", exact=True).click()
    expect(card.get_by_role("button", name="Copied")).to_be_visible()
    assert window.window.evaluate("navigator.clipboard.readText()") == "bnwatch.keras.split_shared(model)"
    card.get_by_role("button", name="Copy the allowance").last.click()
    expect(card.get_by_role("button", name="Copied")).to_have_count(2)
    assert window.window.evaluate("navigator.clipboard.readText()") == 'allow={"BN101:encoder/bn": "why"}'
    card.get_by_role("button", name="Show the layer").click()
    expect(tab.locator("#layer-title")).to_be_focused()
    expect(tab.locator("#layer-title")).to_contain_text("encoder/bn")
    expect(tab.locator("#layer-title")).to_be_in_viewport()


def test_a_rule_opens_its_page_and_gives_the_focus_back(visit, tensorboard):
    window = visit()
    tab = window.page(tensorboard, only("shared"))
    button = tab.get_by_role("button", name="About BN101")
    button.click()
    panel = tab.get_by_role("dialog")
    expect(panel.get_by_role("heading", name="BN101 shared-batch-norm")).to_be_visible()
    expect(panel.get_by_role("heading", name="Why it matters")).to_be_visible()
    expect(panel.locator("pre code").first).to_contain_text("bn = BatchNormalization()")
    assert "p.bnwatch.rule=BN101" in window.hash()
    window.window.keyboard.press("Escape")
    expect(panel).to_be_hidden()
    expect(button).to_be_focused()
    assert "rule" not in window.hash()


def test_runs_are_compared_side_by_side(visit, tensorboard):
    window = visit()
    tab = window.page(tensorboard, only("shared"))
    tab.locator(".picker summary").click()
    tab.locator(".run", has_text="healthy").get_by_role("checkbox").check()
    expect(tab.locator(".chip")).to_have_count(2)
    expect(tab.locator(".run-cards")).to_have_count(2)
    expect(tab.locator(".run-cards").nth(1)).to_contain_text("Nothing is wrong")
    heads = tab.locator("table.layers thead th")
    expect(heads.filter(has_text="A: Matters")).to_have_count(1)
    expect(heads.filter(has_text="B: Mean shift")).to_have_count(1)
    expect(tab.locator("figure[data-figure=accuracy] .legend")).to_contain_text("B: evaluation")
    assert "p.bnwatch.runs=shared|healthy" in window.hash()
    window.window.keyboard.press("Escape")
    tab.locator(".chip", has_text="healthy").click()
    expect(tab.locator(".chip[aria-pressed=true]")).to_contain_text("healthy")
    expect(tab.locator("#layer-title")).to_contain_text("stage")
    tab.locator(".picker summary").click()
    tab.locator(".run", has_text="healthy").get_by_role("button", name="Only this").click()
    expect(tab.locator(".one-run")).to_have_text("healthy")


def test_the_table_is_sorted_searched_and_walked_by_keyboard(visit, tensorboard):
    window = visit()
    tab = window.page(tensorboard, only("shared"))
    rows = tab.locator("table.layers tbody tr:not(.spacer)")
    expect(rows).to_have_count(4)
    expect(rows.nth(1)).to_contain_text("encoder/bn #0")
    head = tab.locator("th[data-sort=matters]")
    expect(head).to_have_attribute("aria-sort", "none")
    head.get_by_role("button").click()
    expect(head).to_have_attribute("aria-sort", "descending")
    values = cells_of(tab.locator("table.layers tbody tr:not(.spacer) td:nth-child(2)"))
    assert values == sorted(values, reverse=True)
    expect(rows.first).to_contain_text("encoder/bn")
    expect(rows.first).to_contain_text("▲")
    head.get_by_role("button").click()
    expect(head).to_have_attribute("aria-sort", "ascending")
    assert "p.bnwatch.sort=+matters" in window.hash()
    tab.get_by_label("Search layers").fill("HEAD")
    expect(rows).to_have_count(1)
    tab.get_by_label("Search layers").fill("nowhere")
    expect(tab.get_by_text("No layer has that in its name.")).to_be_visible()
    tab.get_by_label("Search layers").fill("")
    rows.first.get_by_role("button").focus()
    window.window.keyboard.press("End")
    window.window.keyboard.press("ArrowUp")
    expect(rows.nth(2).get_by_role("button")).to_be_focused()
    window.window.keyboard.press("Enter")
    expect(rows.nth(2)).to_have_class("chosen")
    tab.get_by_text("Columns", exact=True).click()
    tab.get_by_role("checkbox", name="Constant").check()
    expect(tab.locator("th[data-sort=zero_variance]")).to_be_visible()


def test_a_step_is_chosen_and_the_address_brings_it_back(visit, tensorboard):
    window = visit()
    tab = window.tab(tensorboard, only("shared"))
    slider = tab.locator("#step")
    slider.focus()
    for _ in range(3):
        window.window.keyboard.press("ArrowLeft")
    expect(tab.get_by_role("button", name="Latest")).to_be_visible()
    tab.locator("th[data-sort=mean_shift] button").click()
    tab.locator("table.layers tbody button", has_text="l1").click()
    expect(tab.locator("#layer-title")).to_contain_text("l1")
    window.window.wait_for_timeout(300)
    step = tab.locator("output[for=step]").inner_text()
    kept = window.hash()
    assert re.search(r"^#bnwatch&.*p\.bnwatch\.layer=l1&p\.bnwatch\.step=\d+", kept)
    window.window.get_by_role("tab").first.click()
    window.window.get_by_role("tab", name="BN Watch").click()
    expect(tab.locator("#layer-title")).to_contain_text("l1")
    assert window.hash() == kept
    window.window.reload()
    expect(tab.locator("#layer-title")).to_contain_text("l1")
    expect(tab.locator("output[for=step]")).to_have_text(step)
    expect(tab.locator("th[data-sort=mean_shift]")).to_have_attribute("aria-sort", "descending")
    tab.get_by_role("button", name="Latest").click()
    expect(tab.locator("output[for=step]")).to_contain_text("latest")


def test_the_lines_of_a_layer_have_a_line_a_call_site_and_their_numbers(visit, tensorboard):
    tab = visit().page(tensorboard, only("shared"))
    figure = tab.locator("figure[data-figure=series]")
    expect(figure.locator("canvas")).to_have_count(3)
    expect(figure.locator(".legend")).to_contain_text("call 2, running")
    expect(figure.locator(".legend")).to_contain_text("noise")
    expect(figure.locator(".legend")).to_contain_text("evaluation")
    figure.get_by_label("call 2").uncheck()
    expect(figure.locator(".legend")).not_to_contain_text("call 2")
    figure.get_by_text("Show the numbers").click()
    expect(figure.locator("table.data tbody tr").first).to_contain_text("call 1")


def test_the_heatmap_is_read_and_walked_by_keyboard_and_mouse(visit, tensorboard):
    window = visit()
    tab = window.page(tensorboard, only("shared"))
    figure = tab.locator("figure[data-figure=heatmap]")
    figure.scroll_into_view_if_needed()
    canvas = figure.locator("canvas")
    expect(canvas).to_be_visible()
    expect(figure.locator(".sentence")).to_contain_text("Farthest from healthy")
    canvas.focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowDown", "ArrowRight"):
        window.window.keyboard.press(key)
    expect(figure.locator("[role=status]")).to_contain_text("head/bn")
    expect(figure.locator(".tip")).to_be_visible()
    window.window.keyboard.press("Enter")
    expect(tab.locator("#layer-title")).to_contain_text("head/bn")
    assert re.search(r"layer=head/bn&p\.bnwatch\.step=2\b", window.hash())
    box = canvas.bounding_box()
    canvas.click(position={"x": box["width"] - 5, "y": 5})
    expect(tab.locator("#layer-title")).to_contain_text("l1")
    figure.get_by_label("Statistic").select_option("std_ratio")
    expect(canvas).to_have_attribute("aria-label", re.compile("^Std ratio"))
    expect(figure.locator(".ticks")).to_contain_text("1")
    assert "p.bnwatch.statistic=std_ratio" in window.hash()
    figure.get_by_text("Show the numbers").click()
    expect(figure.locator("table.data")).to_contain_text("encoder/bn #1")


def test_the_cells_and_the_attribution_are_tables_and_bars(visit, tensorboard):
    tab = visit().page(tensorboard, only("shared"))
    cells = tab.locator("table.cells")
    expect(cells).to_contain_text("running statistics")
    expect(cells).to_contain_text("re-estimated statistics")
    expect(cells.locator("tbody tr").nth(1)).to_contain_text("79.0")
    bars = tab.locator(".bars li")
    expect(bars).to_have_count(3)
    expect(bars.first).to_contain_text("encoder/bn")
    expect(bars.first).to_contain_text("+15.0")
    bars.nth(1).get_by_role("button").click()
    expect(tab.locator("#layer-title")).to_contain_text("head/bn")


def test_the_channels_of_a_layer_are_seen_at_the_chosen_step(visit, tensorboard):
    window = visit()
    page = window.page(tensorboard, only("shared"))
    figure = page.locator("figure[data-figure=channels]")
    expect(figure.locator(".sentence")).to_contain_text("8 channels at step 300. Farthest off is channel")
    histogram, strip = figure.locator("canvas").all()
    expect(histogram).to_have_attribute("aria-label", re.compile("^Histogram of the shift of 16 channels"))
    strip.focus()
    window.window.keyboard.press("End")
    expect(figure.locator("[role=status]")).to_contain_text("Channel 7: call 1: batch")
    figure.get_by_label("Show").select_option("std_ratio")
    expect(histogram).to_have_attribute("aria-label", re.compile("^Histogram of the ratio"))
    figure.get_by_label("At step").focus()
    window.window.keyboard.press("Home")
    expect(figure.locator(".sentence")).to_contain_text("at step 1.")
    expect(page.locator("output[for=step]")).to_have_text("1")
    figure.get_by_text("Show the numbers").click()
    expect(figure.locator("table.data tbody tr")).to_have_count(16)


@pytest.mark.parametrize(("dark", "width"), [(False, 1280), (True, 800), (False, 800)])
def test_nobody_is_kept_out(visit, tensorboard, dark, width):
    window = visit(dark=dark, width=width)
    page = window.page(tensorboard, "&p.bnwatch.runs=shared|cold")
    page.locator("figure[data-figure=heatmap]").scroll_into_view_if_needed()
    expect(page.locator("figure[data-figure=heatmap] canvas")).to_be_visible()
    for summary in page.locator("summary", has_text="Show the numbers").all():
        summary.click()
    assert page.evaluate("document.documentElement.dataset.theme") == ("dark" if dark else "light")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert faults(page) == []
    page.get_by_role("button", name="About BN101").first.click()
    expect(page.get_by_role("dialog")).to_contain_text("Why it matters")
    assert faults(page) == []


def test_dark_as_tensorboard_is(visit, tensorboard):
    window = visit()
    window.window.add_init_script("localStorage.setItem('_tb_global_settings', '{\"theme\": \"dark\"}')")
    tab = window.tab(tensorboard, only("shared"))
    expect(tab.locator("html")).to_have_attribute("data-theme", "dark")
    frame = next(frame for frame in window.window.frames if "plugin_entry" in frame.url)
    assert faults(frame) == []
    window.window.evaluate("document.body.classList.remove('dark-mode')")
    expect(tab.locator("html")).to_have_attribute("data-theme", "light")


def test_a_running_training_is_followed_without_losing_the_place(visit, tmp_path):
    training = runs.Training(tmp_path / "runs" / "live", ("a/bn", "b/bn"))
    training.train(40)
    training.evaluate(0.9, 0.92)
    server = TensorBoard(tmp_path / "runs", tmp_path, fast=False)
    try:
        window = visit()
        tab = window.tab(server)
        expect(tab.locator(".status")).to_contain_text("Following")
        tab.get_by_text("rules could not look").last.click()
        tab.get_by_label("Search layers").fill("b/")
        tab.locator("table.layers tbody button").first.click()
        tab.get_by_label("Search layers").focus()
        frame = next(frame for frame in window.window.frames if "plugin_entry" in frame.url)
        frame.evaluate("scrollTo(0, 300)")
        before = tab.locator(".status").inner_text()
        training.train(100, sites={"a/bn": (-1.0, 1.0)})
        training.evaluate(0.5, 0.95)
        expect(tab.locator(".status")).not_to_have_text(before, timeout=20_000)
        expect(tab.locator(".card.warning").first).to_contain_text("a/bn normalizes 2 call sites")
        expect(tab.locator("[aria-live=polite]")).to_contain_text("New:")
        expect(tab.get_by_label("Search layers")).to_be_focused()
        expect(tab.get_by_label("Search layers")).to_have_value("b/")
        expect(tab.locator("#layer-title")).to_contain_text("b/bn")
        expect(tab.locator(".blind")).to_be_visible()
        assert frame.evaluate("scrollY") > 200
        window.window.get_by_role("tab").first.click()
        window.window.wait_for_timeout(500)
        asked = len([url for url in window.requests if url.endswith("bnwatch/runs")])
        window.window.wait_for_timeout(5000)
        assert len([url for url in window.requests if url.endswith("bnwatch/runs")]) == asked
        window.window.get_by_role("tab", name="BN Watch").click()
        window.listening = False  # TensorBoard and the browser say what they cannot reach
        server.stop()
        expect(tab.locator(".notice.error")).to_contain_text("TensorBoard does not answer", timeout=10_000)
        expect(tab.locator(".card.warning").first).to_be_visible()
    finally:
        server.stop()
        training.watch.close()


def test_hostile_names_are_text(visit, tensorboard):
    page = visit().page(tensorboard, only("%253Cb%253Ebold"))
    names = page.locator("table.layers tbody th .name")
    expect(names).to_have_count(7)
    expect(names.first).to_have_text(re.compile("^<script>"))
    expect(names.nth(5)).to_have_text(r"turned\u202eround\x1b[31m")
    expect(page.locator(".one-run")).to_have_text("<b>bold")
    for at in range(7):
        page.locator("table.layers tbody button").nth(at).click()
        expect(page.locator("figure[data-figure=series] .sentence")).to_contain_text("At step")
    found = "[window.hacked, document.querySelectorAll('#bnwatch script, #bnwatch img').length]"
    assert page.evaluate(found) == [None, 0]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert "\u202e" not in page.evaluate("document.body.innerText")
    assert faults(page) == []


def test_a_thousand_layers_are_a_few_rows_and_an_empty_directory_says_what_to_do(visit, tmp_path):
    (tmp_path / "runs").mkdir()
    server = TensorBoard(tmp_path / "runs", tmp_path, fast=False)
    try:
        window = visit()
        window.page(server)
        expect(window.window.get_by_text("There is no record of batch normalization here yet")).to_be_visible()
        expect(window.window.locator("pre")).to_contain_text("BatchNormWatch")
        assert faults(window.window) == []
        runs.deep(tmp_path / "runs" / "deep")
        tab = window.page(server)
        expect(tab.locator(".tools [role=status]")).to_have_text("1,000 call sites")
        rows = tab.locator("table.layers tbody tr:not(.spacer)")
        assert rows.count() < 60
        tab.locator("table.layers tbody button").first.focus()
        window.window.keyboard.press("End")
        expect(tab.locator("table.layers tbody tr[data-at='999']")).to_be_in_viewport()
        assert rows.count() < 60
        tab.get_by_label("Search layers").fill("block_517")
        expect(rows).to_have_count(1)
    finally:
        server.stop()
