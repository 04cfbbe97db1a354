from tests.summary import main

PASSED = '<testcase classname="a" name="b"/>'
FAILED = '<testcase name="c"><failure message="no"/></testcase>'
BROKEN = '<testcase name="d"><error message="no"/></testcase>'
SKIPPED = '<testcase name="e"><skipped type="pytest.skip" message="no GPU here"/></testcase>'


def summarize(folder, capsys, **sessions):
    for name, cases in sessions.items():
        (folder / f"{name}.xml").write_text(
            f"<testsuites><testsuite>{cases}</testsuite></testsuites>", encoding="utf-8"
        )
    status = main([str(folder), *sessions])
    return status, capsys.readouterr().out.splitlines()


def test_adds_up_the_sessions_and_says_why_tests_were_skipped(tmp_path, capsys):
    status, lines = summarize(tmp_path, capsys, unit=PASSED * 2 + SKIPPED * 2, keras=PASSED)
    assert status == 0
    assert lines == ["unit: skipped 2: no GPU here", "3 passed, 0 failed, 2 skipped"]


def test_a_failure_or_an_error_fails_the_whole(tmp_path, capsys):
    status, lines = summarize(tmp_path, capsys, unit=PASSED + FAILED, keras=PASSED + BROKEN)
    assert status == 1
    assert lines[-1] == "2 passed, 2 failed, 0 skipped"


def test_a_session_in_which_no_test_ran_fails_the_whole(tmp_path, capsys):
    status, lines = summarize(tmp_path, capsys, unit=PASSED, keras=SKIPPED)
    assert status == 1
    assert "keras: ran no test" in lines


def test_a_session_without_a_result_fails_the_whole(tmp_path, capsys):
    assert main([str(tmp_path), "unit"]) == 1
    assert capsys.readouterr().out.splitlines()[0].startswith("unit: no result")


def test_a_result_cut_off_fails_the_whole(tmp_path, capsys):
    (tmp_path / "unit.xml").write_text("<testsuites><testsu", encoding="utf-8")
    assert main([str(tmp_path), "unit"]) == 1
    assert capsys.readouterr().out.splitlines()[0].startswith("unit: no result")


def test_a_session_that_this_machine_cannot_have_is_one_skip(tmp_path, capsys):
    skipped = '<testcase name="s"><skipped type="session" message="installs up to Python 3.11"/></testcase>'
    status, lines = summarize(tmp_path, capsys, unit=PASSED, keras2=skipped)
    assert status == 0
    assert lines == ["keras2: skipped 1: installs up to Python 3.11", "1 passed, 0 failed, 1 skipped"]


def test_a_session_that_runs_twice_counts_twice(tmp_path, capsys):
    summarize(tmp_path, capsys, **{"keras": PASSED, "keras+jax": PASSED + FAILED})
    assert main([str(tmp_path), "keras"]) == 1
    assert capsys.readouterr().out.splitlines() == ["2 passed, 1 failed, 0 skipped"]
