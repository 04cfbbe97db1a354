"""A report shows itself in a notebook and at a Python prompt."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

import bnwatch
from bnwatch import render
from tests import samples

VOID = {"br", "img", "meta", "link", "input", "hr"}


class Parsed(HTMLParser):
    """The elements and the text; fails where an element is not closed in turn."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], set(), set(), ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_a_notebook_shows_all_that_the_terminal_shows():
    report = samples.report()
    page = Parsed(report._repr_html_())
    shown = "".join(page.text.split())
    for diagnosis in report.diagnoses:
        assert "".join(diagnosis.message.replace("`", "").split()) in shown
    for text in (*report.diagnoses[0].notes, *report.diagnoses[0].helps, "could not look: BN302, BN301", "-0.92"):
        assert "".join(text.split()) in shown
    assert "1diagnosis" in shown


def test_it_brings_no_script_no_style_sheet_and_no_address():
    page = Parsed(samples.report()._repr_html_())
    assert page.tags <= {"div", "span", "b", "code", "table", "tr", "th", "td"}
    assert page.attributes == {"style"}


def test_a_single_diagnosis_shows_itself():
    assert "2.41 std (95% 2.2 to 2.6)" in Parsed(samples.diagnosis()._repr_html_()).text


def test_a_calm_run_is_one_line():
    page = Parsed(samples.report(diagnoses=(), skipped=())._repr_html_())
    assert page.text.startswith("bnwatch: no diagnosis in runs/a: 3 layers at 4 call sites")


@pytest.mark.parametrize("field", ["message", "subject", "rule", "notes", "helps", "reason", "table", "run"])
def test_hostile_text_stays_text(field):
    hostile = samples.HOSTILE + "</div><script>alert(1)</script>"
    if field == "run":
        report = samples.report(run=hostile)
    else:
        value = {
            "notes": (hostile,), "helps": (hostile,), "table": bnwatch.diagnosis.Table((hostile,), ((hostile,),)),
        }.get(field, hostile)  # fmt: skip
        changes = {"state": "allowed"} if field == "reason" else {}
        report = samples.report(diagnoses=(samples.diagnosis(**{field: value, **changes}),))
    page = Parsed(report._repr_html_())
    assert not page.tags & {"script", "img"}
    assert "<img src=x" in page.text or field == "table"
    assert "\x1b" not in page.text
    assert "\u202e" not in page.text


def test_a_python_prompt_prints_what_bnwatch_report_prints(tmp_path):
    with bnwatch.Watch(None) as watch:
        watch.record("bn", batch_mean=[0.0], batch_var=[1.0], count=8, running_mean=[0.0], running_var=[1.0], decay=0.9)
        watch.step()
    report = watch.report()
    assert repr(report) == str(report) == render.report_text(report)
    assert "1 layer at 1 call site" in str(report)
    assert str(samples.diagnosis()) == render.diagnosis_text(samples.diagnosis())


def test_what_ipython_would_take_of_it():
    formatters = pytest.importorskip("IPython.core.formatters", reason="IPython is not installed")
    data, _ = formatters.DisplayFormatter().format(samples.report())
    assert data["text/html"] == render.report_html(samples.report())
    assert "text/markdown" not in data
