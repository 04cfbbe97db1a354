"""How diagnoses read. The golden texts are in messages/; BNWATCH_UPDATE_MESSAGES=1 writes them anew."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnwatch import render
from bnwatch.diagnosis import Diagnosis, Quantity, Report, Severity, Table
from tests import samples

MESSAGES = Path(__file__).parent / "messages"

CYCLE = (
    samples.diagnosis("a", causes=("BN101 b",)),
    samples.diagnosis("b", causes=("BN101 a",)),
    samples.diagnosis("c", causes=("BN101 b",)),
)
CHAIN = (
    samples.diagnosis("model", "BN306", name="dead-bottleneck", message="`dense` gives 0 for every sample"),
    samples.diagnosis("model", "BN302", message="accuracy is that of guessing", causes=("BN306 model",)),
    samples.diagnosis("model", "BN301", message="evaluation is as bad", causes=("BN302 model", "BN306 model")),
)
REPORTS = {
    "full": samples.report(),
    "calm": samples.report(diagnoses=(), skipped=()),
    "calm_but_blind": samples.report(diagnoses=()),
    "cut_off": samples.report(diagnoses=(), skipped=(), complete=False),
    "one_of_each": Report("a", layers=1, sites=1, samples=1, steps=1, evaluations=1),
    "chain": samples.report(diagnoses=CHAIN, skipped=()),
    "hostile": samples.report(
        run=samples.HOSTILE,
        skipped=(),
        diagnoses=(
            samples.diagnosis(
                samples.HOSTILE,
                samples.HOSTILE,
                name=samples.HOSTILE,
                evidence={samples.HOSTILE: Quantity(float("nan"), samples.HOSTILE, (float("-inf"), 1e300))},
                table=Table((samples.HOSTILE,), ((samples.HOSTILE,), (float("inf"),))),
                notes=(samples.HOSTILE,),
                helps=(samples.HOSTILE,),
                built_at=f"{samples.HOSTILE}:12",
            ),
        ),
    ),
    "further_tables": samples.report(
        diagnoses=(
            samples.diagnosis(
                further=(Table(("points at", "won back"), (("bn#0", 1.25), ("bn#1", -0.5))),), built_at="model.py:12"
            ),
            samples.diagnosis(
                "model",
                "BN301",
                message="evaluation is as bad",
                further=(Table(("points at", "won back"), (("bn", 12.5),)),),
                causes=("BN101 encoder/bn_2",),
            ),
        ),
        skipped=(),
    ),
    "long_names": samples.report(
        diagnoses=(samples.diagnosis("x" * 10_000), samples.diagnosis("a b " * 3000)), skipped=()
    ),
}


def golden(name, text):
    path = MESSAGES / name
    if os.environ.get("BNWATCH_UPDATE_MESSAGES"):
        path.write_text(text + "\n", encoding="utf-8")
    assert text + "\n" == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", REPORTS)
def test_text(name):
    golden(f"report_{name}.txt", render.report_text(REPORTS[name], width=100))


@pytest.mark.parametrize("name", ["full", "calm", "chain", "further_tables", "hostile"])
def test_markdown(name):
    golden(f"report_{name}.md.txt", render.report_markdown(REPORTS[name]))


@pytest.mark.parametrize("name", ["full", "hostile"])
def test_json(name):
    golden(f"report_{name}.json.txt", render.dumps(render.report_json(REPORTS[name]), indent=2))


@pytest.mark.parametrize("state", ["active", "cleared", "allowed"])
def test_one_diagnosis(state):
    diagnosis = samples.diagnosis(state=state, reason="same data" if state == "allowed" else None, last_step=620)
    golden(f"diagnosis_{state}.txt", render.diagnosis_text(diagnosis, width=80))
    golden(f"diagnosis_{state}.md.txt", render.diagnosis_markdown(diagnosis))


def test_colour_changes_nothing_but_colour():
    colored = render.report_text(REPORTS["full"], color=True, width=90)
    plain = render.report_text(REPORTS["full"], width=90)
    assert colored != plain
    for code in ("\x1b[1;33m", "\x1b[1;31m", "\x1b[1m", "\x1b[0m"):
        colored = colored.replace(code, "")
    assert colored == plain


def test_epochs_are_counted_from_one_and_steps_span():
    assert "step 400, epoch 2\n" in render.diagnosis_text(samples.diagnosis())
    assert "steps 400 to 1,620, since epoch 2\n" in render.diagnosis_text(samples.diagnosis(last_step=1620))


def test_the_model_as_a_whole_is_allowed_by_rule():
    assert '  allow: {"BN302": "why"}' in render.diagnosis_text(samples.diagnosis("model", "BN302"))


@settings(deadline=None)
@given(st.text(max_size=60))
def test_an_allowance_as_printed_allows_what_it_stands_under(subject):
    from ast import literal_eval
    from fnmatch import fnmatchcase

    line = render.diagnosis_text(samples.diagnosis(subject)).splitlines()[-1]
    printed = line.removeprefix("  allow: ").rpartition("   more:")[0]
    ((key, why),) = literal_eval(printed).items()
    rule, _, pattern = key.partition(":")
    assert (rule, why) == ("BN101", "why")
    assert subject == "model" or fnmatchcase(subject, pattern)


def test_a_consequence_has_no_headline_of_its_own():
    text = render.report_text(REPORTS["chain"])
    assert sum(line.startswith("warning[") for line in text.splitlines()) == 1
    assert text.count("consequence: ") == 2
    assert text.endswith("1 diagnosis: 3 layers at 4 call sites, 40 samples in 620 steps, 2 evaluations")


def test_a_consequence_of_what_has_cleared_stands_for_itself():
    cause = samples.diagnosis("a", state="cleared")
    text = render.report_text(samples.report(diagnoses=(cause, samples.diagnosis("b", causes=("BN101 a",)))))
    assert "consequence" not in text
    assert "\nwarning[BN101]: `b`" in "\n" + text


def test_causes_in_a_circle_hide_nothing():
    text = render.report_text(samples.report(diagnoses=CYCLE))
    assert all(f"`{subject}` normalizes" in text for subject in "abc")


def test_many_causes_in_a_row_are_shown_in_bearable_time():
    row = tuple(samples.diagnosis(str(n), causes=(f"BN101 {n - 1}",)) for n in range(2000))
    assert render.report_text(samples.report(diagnoses=row)).count("normalizes") == 2000


def test_json_tells_consequences():
    data = render.report_json(REPORTS["chain"])
    assert data["diagnoses"][0]["consequences"] == ["BN302 model", "BN301 model"]
    assert data["diagnoses"][2]["causes"] == ["BN302 model", "BN306 model"]


def test_json_has_no_numbers_that_json_lacks():
    text = render.dumps(render.report_json(REPORTS["hostile"]))
    data = json.loads(text, parse_constant=pytest.fail)
    ((measured,),) = [list(entry["evidence"].values()) for entry in data["diagnoses"]]
    assert (measured["value"], measured["interval"]) == ("NaN", ["-Infinity", 1e300])
    assert text.isascii()


@settings(deadline=None)
@given(st.text())
def test_nothing_that_steers_a_terminal_gets_through(text):
    diagnosis = samples.diagnosis(text, text or "x", message=text, notes=(text,), helps=(text,), reason=text)
    for state in ("active", "allowed", "cleared"):
        shown = render.report_text(Report(text, (Diagnosis(**{**fields(diagnosis), "state": state}),)))
        assert all(line.isprintable() for line in shown.split("\n"))
        shown.encode("utf-8")


@settings(deadline=None)
@given(st.text(alphabet="a`<>&*_[]()!|\\#\n\x1b ~"))
def test_markdown_from_outside_stays_text(text):
    for shown in (render.markdown_text(text), render.diagnosis_markdown(samples.diagnosis(text, message=text))):
        assert "<" not in shown
        assert "\x1b" not in shown
    assert "\n" not in render.markdown_text(text)


@settings(deadline=None)
@given(st.text())
def test_cleaning_twice_is_cleaning_once(text):
    assert render.clean(render.clean(text)) == render.clean(text)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"), (400.0, "400"), (10_000, "10,000"), (0.8553, "0.855"), (97.56, "97.6"), (12_345.6, "12,346"),
        (1e-12, "1e-12"), (3.2e9 + 0.5, "3.2e+09"), (float("nan"), "nan"), (float("-inf"), "-inf"), (-2.5, "-2.5"),
        (1e300, "1e+300"), (999.96, "1e+03"),
    ],
)  # fmt: skip
def test_numbers(value, shown):
    assert render.number(value) == shown


def test_tables_of_any_shape_are_shown():
    ragged = Table(("a", "b"), (("x",), ("y", 1.0, 2.0)))
    assert "a" in render.diagnosis_text(samples.diagnosis(table=ragged))
    assert "and 980 more" in render.diagnosis_text(
        samples.diagnosis(table=Table(("n",), tuple((n,) for n in range(1000))))
    )
    assert "call site" in render.diagnosis_text(samples.diagnosis(table=Table(("call site",), ())))


@pytest.mark.parametrize(
    ("cells", "shown"),
    [
        ((-1.03, 1.0), ["-1.03", "1.00"]),
        ((1.0361, 0.928, "none"), ["1.04", "0.93", "none"]),
        ((-0.0638, 0.0459, 0.0), ["-0.0638", "0.0459", "0.0000"]),
        ((400.0, 10_000.0), ["400", "10,000"]),
        ((1e-20, 0.5), ["1e-20", "0.5"]),
        ((float("nan"), 0.25), ["nan", "0.25"]),
        ((float("inf"), 0.25), ["inf", "0.25"]),
        ((), []),
        (("a",), ["a"]),
    ],
)
def test_columns_of_numbers(cells, shown):
    assert render._column(cells) == shown


@settings(deadline=None)
@given(st.lists(st.floats() | st.integers(-(10**12), 10**12)))
def test_any_column_has_a_text_a_cell(cells):
    assert len(render._column(cells)) == len(cells)


def test_severities_have_their_colours():
    for severity in Severity:
        assert "\x1b[1;3" in render.diagnosis_text(samples.diagnosis(severity=severity), color=True)


def fields(diagnosis):
    return {name: getattr(diagnosis, name) for name in Diagnosis.__dataclass_fields__}
