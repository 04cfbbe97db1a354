import pytest

from bnwatch import testing
from tests.rules import cases


def stuck(samples, spec=None, **fields):
    spec = spec or testing.layer()
    return [testing.snapshot(n, testing.call(spec, mean=n / 10, **fields)) for n in range(1, samples + 1)]


def trained(**fields):
    return testing.signals(*testing.train(testing.layer(**fields), testing.normal(4, 64), steps=20))


def another_layer_later():
    """From the tenth sample on a second layer is called; two samples say little about it."""
    old, new = testing.layer("old"), testing.layer("new")
    moving = [testing.snapshot(n, testing.call(old, mean=n, running_mean=n / 7)) for n in range(1, 10)]
    both = [
        testing.snapshot(n, testing.call(old, mean=n, running_mean=n / 7), testing.call(new, mean=n)) for n in (10, 11)
    ]
    return testing.signals(*moving, *both)


def half(samples, *, mean=True, var=False, batch=True, spec=None):
    """Running statistics of which the ``mean`` moves, the ``var``, or both; batch statistics that vary or do not."""
    spec = spec or testing.layer()
    return testing.signals(
        *(
            testing.snapshot(
                n,
                testing.call(
                    spec, mean=n / 3 if batch else 0.2, var=1 + n / 7 if batch else 3.0,
                    running_mean=n / 9 if mean else 0.0, running_var=1 + n / 9 if var else 1.0,
                ),
            )
            for n in range(1, samples + 1)
        )
    )  # fmt: skip


FIRES = {
    "the variance alone": lambda: half(3),
    "the mean alone": lambda: half(3, mean=False, var=True),
    "the variance alone, from its second value on": lambda: half(40),
    "above_samples": lambda: testing.signals(*stuck(3)),
    "not the initial values": lambda: testing.signals(*stuck(5, running_mean=0.7, running_var=2.0)),
    "a decay of one": lambda: trained(decay=1.0),
    "one of two layers": lambda: testing.signals(
        *(
            testing.snapshot(
                n,
                testing.call(testing.layer("stuck"), mean=n),
                testing.call(testing.layer("moves"), mean=n, running_mean=n / 9),
            )
            for n in (1, 2, 3)
        )
    ),
}
INFO = {
    "a layer the user froze": lambda: testing.signals(*stuck(5, testing.layer(trainable=False))),
    "half of a layer the user froze": lambda: half(5, spec=testing.layer(trainable=False)),
}
QUIET = {
    "moving": trained,
    "a slow decay": lambda: trained(decay=0.9999),
    "the same batch again and again": lambda: testing.signals(
        *(testing.snapshot(n, testing.call(testing.layer(), mean=0.3)) for n in range(1, 9))
    ),
    "moved once": lambda: testing.signals(
        *stuck(3), testing.snapshot(4, testing.call(testing.layer(), mean=1.0, running_mean=1e-7))
    ),
    "both halves": lambda: half(9, var=True),
    "a batch variance that does not vary": lambda: half(9, batch=False),
    "a batch mean that does not vary": lambda: half(9, mean=False, var=True, batch=False),
    "no layers": lambda: testing.signals(testing.snapshot(1)),
}
SKIPS = {
    "below_samples": (lambda: testing.signals(*stuck(2)), None),
    "below_samples of one half": (lambda: half(2), None),
    "below_samples of a layer that came later": (another_layer_later, None),
}

test_cases = cases.runner("BN203", fires=FIRES, info=INFO, quiet=QUIET, skips=SKIPS)


def test_the_help_fits_the_decay():
    ((finding,), _) = cases.look("BN203", FIRES["a decay of one"]())
    assert "decay of 1" in finding.helps[0]
    ((finding,), _) = cases.look("BN203", FIRES["above_samples"]())
    assert "initial values" in finding.message
    ((finding,), _) = cases.look("BN203", FIRES["not the initial values"]())
    assert "initial values" not in finding.message


@pytest.mark.parametrize(("moves", "named"), [({"mean": True}, "variance"), ({"mean": False, "var": True}, "mean")])
def test_the_half_that_stands_still_is_named(moves, named):
    ((finding,), _) = cases.look("BN203", half(4, **moves))
    assert finding.message == (
        f"the running {named} of `bn` has not moved in 4 sampled steps, while its batch {named} did"
    )
    assert f"its running {named}" in finding.helps[0]


def test_a_shared_layer_is_named_once():
    spec = testing.layer()
    fed = testing.signals(
        *(testing.snapshot(n, testing.call(spec, mean=n), testing.call(spec, site=1, mean=-n)) for n in range(1, 5))
    )
    assert [f.subject for f in cases.look("BN203", fed)[0]] == ["bn"]
