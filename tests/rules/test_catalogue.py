import importlib
import re
from pathlib import Path

import pytest

import bnwatch.rules
from bnwatch.diagnosis import Severity
from bnwatch.order import ORDER, rank
from bnwatch.rules import CATALOGUE, Finding
from tests.rules import cases

FOLDER = Path(bnwatch.rules.__file__).parent
DOCS = FOLDER.parents[1] / "docs"
HEADINGS = (
    "What it means",
    "Why it matters",
    "Fires on",
    "Stays quiet on",
    "Threshold",
    "When to allow it",
    "References",
)
every_rule = pytest.mark.parametrize("rule", CATALOGUE, ids=lambda rule: rule.id)


def module_name(rule):
    return f"{rule.id.lower()}_{rule.name.replace('-', '_')}"


def tables(rule):
    module = importlib.import_module(f"tests.rules.test_{module_name(rule)}")
    return {name: getattr(module, name) for name in cases.TABLES if hasattr(module, name)}


def findings(rule):
    for name in ("FIRES", "INFO"):
        for build in tables(rule).get(name, {}).values():
            yield from (o for o in rule.check(build()) if isinstance(o, Finding))


def test_ids_and_names_are_unique_and_in_order():
    ids = [rule.id for rule in CATALOGUE]
    assert ids == sorted(set(ids))
    assert len({rule.name for rule in CATALOGUE}) == len(CATALOGUE)
    assert all(re.fullmatch(r"BN[1-9]\d\d", id_) for id_ in ids)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", rule.name) for rule in CATALOGUE)


def test_no_rule_file_and_no_page_is_left_out():
    assert {path.stem for path in FOLDER.glob("bn*.py")} == {module_name(rule) for rule in CATALOGUE}
    assert {path.stem for path in (FOLDER / "pages").iterdir()} == {rule.id for rule in CATALOGUE}


@every_rule
def test_summary_is_one_sentence_without_its_full_stop(rule):
    assert rule.summary
    assert len(rule.summary) <= 120
    assert not rule.summary.endswith(".")


@every_rule
def test_causes_have_a_place_in_the_order(rule):
    assert set(rule.causes) <= set(ORDER)


def test_the_order_of_decision_has_each_rule_once():
    assert len(set(ORDER)) == len(ORDER)
    assert {rule.id for rule in CATALOGUE} == set(ORDER)
    assert rank("BN801") == len(ORDER)


@every_rule
def test_only_what_is_believed_before_a_rule_explains_it(rule):
    """So no rule is its own cause by a detour either."""
    places = [rank(cause) for cause in rule.causes]
    assert places == sorted(places)
    assert all(place < rank(rule.id) for place in places)


@every_rule
def test_every_threshold_says_where_it_comes_from(rule):
    for threshold in rule.thresholds.values():
        assert threshold.kind in ("derived", "measured", "convention")
        assert threshold.why


@every_rule
def test_there_are_cases_on_both_sides_of_every_threshold(rule):
    found = tables(rule)
    assert found.get("FIRES") or found.get("INFO")
    assert found.get("QUIET")
    names = {name.split(" ")[0] for table in found.values() for name in table}
    wanted = {f"{side}_{threshold}" for side in ("above", "below") for threshold in rule.thresholds}
    assert wanted <= names


@every_rule
def test_the_page_has_the_fixed_headings(rule):
    page = rule.page()
    assert page.startswith(f"# {rule.id} {rule.name}\n")
    assert tuple(re.findall(r"^## (.+)$", page, re.MULTILINE)) == HEADINGS
    assert [line for line in page.splitlines() if len(line) > 120] == []
    assert re.findall(r"^#{3,} ", page, re.MULTILINE) == []


@every_rule
def test_no_section_of_the_page_is_empty(rule):
    sections = re.split(r"^## .+$", rule.page(), flags=re.MULTILINE)[1:]
    assert all(section.strip() for section in sections)


@every_rule
def test_the_page_names_every_threshold(rule):
    section = rule.page().split("## Threshold")[1].split("## When")[0]
    for name in rule.thresholds:
        assert f"`{name}`" in section


@every_rule
def test_the_index_links_the_page(rule):
    assert f"../bnwatch/rules/pages/{rule.id}.md" in (DOCS / "rules.md").read_text(encoding="utf-8")


@every_rule
def test_the_first_line_is_a_fact(rule):
    for finding in findings(rule):
        message = finding.message
        assert "\n" not in message
        assert len(message) <= 200
        assert not message.endswith((".", "!"))
        assert not message[0].isupper()
        assert not re.search(r"\b(should|must|please|bad|try)\b", message.lower())


@every_rule
def test_warnings_say_why_and_what_to_do(rule):
    for finding in findings(rule):
        assert finding.notes
        assert all(not note.endswith(".") for note in (*finding.notes, *finding.helps))
        if (finding.severity or rule.severity) >= Severity.WARNING:
            assert finding.helps


@every_rule
def test_evidence_is_made_of_numbers(rule):
    for finding in findings(rule):
        assert all(float(quantity.value) is not None for quantity in finding.evidence.values())
        assert finding.subject


@every_rule
def test_thresholds_can_be_overridden(rule):
    """What `report --replay` with other limits rests on: every limit is read from what the rule is given."""
    for name in ("FIRES", "INFO", "QUIET"):
        for build in tables(rule).get(name, {}).values():
            limits = {key: threshold.value for key, threshold in rule.thresholds.items()}
            assert [type(o) for o in rule.check(build(), limits)] == [type(o) for o in rule.check(build())]
