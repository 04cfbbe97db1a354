"""Which layer costs accuracy, where the signal ends, and the repair: on the small model of `bnwatch.testing`."""

import numpy as np
import pytest

from bnwatch import moments, testing
from bnwatch.evidence import (
    Attribution,
    Budget,
    Difference,
    Examples,
    ExperimentNotPossibleError,
    Seen,
    SiteMoments,
    attribute,
    crosscheck,
    localise,
    recalibrate,
)
from bnwatch.records import CallSite

LAYERS = ("bn1", "bn2", "bn3", "bn4")


@pytest.fixture
def lab():
    return testing.FakeLaboratory.stacked(*LAYERS)


@pytest.fixture
def shared():
    return testing.FakeLaboratory.stacked("bn", "other", "bn")


def damage(lab, number):
    lab.mean[number] += 3.0


def subjects(attribution):
    return [cost.subject for cost in attribution.costs]


# --- attribution ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(4))
def test_the_damaged_layer_comes_first_and_explains_it_all(lab, number):
    damage(lab, number)
    found = attribute(lab, step=7, epoch=2)
    assert (found.step, found.epoch, found.split, found.examples) == (7, 2, "evaluation", 384)
    assert found.costs[0].subject == LAYERS[number]
    assert found.costs[0].recovered == found.cost
    assert found.explained(0.9) is found.costs[0]
    assert sorted(subjects(found)) == sorted(LAYERS)
    assert found.unmeasured == ()
    assert f"batch statistics at `{LAYERS[number]}` alone win back 75.0" in str(found)


def test_numbers_are_those_of_the_outputs(lab):
    damage(lab, 1)
    lab.mean[3] -= 0.4
    found = attribute(lab)

    def right(statistics, *other):
        batches = lab.data["evaluation"]
        sites = [CallSite(name) for name in other]
        return np.concatenate([lab.outputs(b, statistics, sites).argmax(1) == b.labels for b in batches])

    assert found.running == right("running").mean()
    assert found.batch == right("batch").mean()
    for cost in found.costs:
        won = right("running", cost.layer).astype(int) - right("running")
        lost = right("batch").astype(int) - right("batch", cost.layer)
        for difference, per_example in ((cost.recovered, won), (cost.lost, lost)):
            assert difference.gained == pytest.approx(per_example.mean())
            p = moments.mcnemar(int((per_example > 0).sum()), int((per_example < 0).sum()))
            assert difference.p_value == p
            low, high = difference.interval
            assert low <= difference.gained <= high


def test_distance_is_that_of_what_enters_under_batch_statistics(lab):
    damage(lab, 1)
    (cost,) = (cost for cost in attribute(lab).costs if cost.layer == "bn2")
    entered = [next(s for s in lab.inputs(b, "batch") if s.site.layer == "bn2") for b in lab.data["evaluation"][:4]]
    mean = np.mean([seen.moments.mean for seen in entered], axis=0)
    var = np.mean([seen.moments.var + np.square(seen.moments.mean - mean) for seen in entered], axis=0)
    shift = np.square(mean - lab.mean[1]) / (lab.var[1] + lab.epsilon)
    scale = np.square(np.log((var + lab.epsilon) / (lab.var[1] + lab.epsilon)) / 2)
    assert cost.distance == pytest.approx(np.sqrt(np.mean(shift + scale)))


def test_statistics_that_are_no_numbers_are_the_most_suspicious(lab):
    lab.var[2] = np.nan
    found = attribute(lab)
    assert (found.costs[0].subject, found.costs[0].distance) == ("bn3", np.inf)


def test_a_layer_called_twice_is_measured_as_a_whole_and_site_by_site(shared):
    found = attribute(shared)
    assert sorted(subjects(found)) == ["bn", "bn#0", "bn#1", "other"]
    by_subject = {cost.subject: cost for cost in found.costs}
    assert by_subject["bn"].recovered == found.cost
    assert by_subject["bn#1"].recovered.gained > by_subject["bn#0"].recovered.gained
    # as much as the whole layer: the call site says more
    assert found.costs[0].subject == "bn#1"
    assert (by_subject["bn"].index, by_subject["bn#1"].index) == (None, 1)


def test_training_examples_stand_in_for_evaluation_examples(lab):
    del lab.data["evaluation"]
    assert attribute(lab).split == "training"
    with pytest.raises(ExperimentNotPossibleError, match="no evaluation examples"):
        attribute(lab, "evaluation")


def test_a_healthy_model_has_nobody_to_blame(lab):
    found = attribute(lab)
    assert found.cost.gained == 0.0
    assert found.explained(0.0) is None


def test_half_explains_nothing_and_more_than_half_does():
    def made(recovered):
        return testing.attribution(cost=0.1, recovered={"bn": recovered})

    assert made(0.05).explained(0.5) is None
    assert made(0.051).explained(0.5).subject == "bn"
    assert testing.attribution(cost=-0.1, recovered={"bn": -0.01}).explained(0.5) is None


def test_no_layer_to_try(lab, monkeypatch):
    monkeypatch.setattr(lab, "inputs", lambda *_: [])
    with pytest.raises(ExperimentNotPossibleError, match="no batch-normalization layer is called"):
        attribute(lab)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def timed(lab, monkeypatch):
    clock, outputs = Clock(), lab.outputs

    def slow(*args):
        clock.now += 1.0
        return outputs(*args)

    monkeypatch.setattr(lab, "outputs", slow)
    return clock


def test_time_leaves_out_the_least_suspicious(monkeypatch):
    lab = testing.FakeLaboratory.stacked(*(f"bn{n}" for n in range(8)))
    for number in range(8):
        lab.mean[number] += 0.1 * ((5 * number) % 8)
    clock = timed(lab, monkeypatch)
    found = attribute(lab, budget=Budget(enough=64, seconds=17.0, clock=clock))
    # two batches a pass, the first does not count: 3 seconds for the baselines, then 4 a layer, until 17 are over
    assert found.examples == 128
    order = [f"bn{n}" for n in sorted(range(8), key=lambda n: -((5 * n) % 8))]
    assert sorted(subjects(found)) == sorted(order[:4])
    assert list(found.unmeasured) == order[4:]
    assert found.seconds == 19.0


def test_the_worst_three_are_measured_whatever_the_time(lab, monkeypatch):
    damage(lab, 2)
    found = attribute(lab, budget=Budget(enough=0, seconds=0.0, clock=timed(lab, monkeypatch)))
    assert (len(found.costs), len(found.unmeasured), found.examples) == (3, 1, 128)
    assert found.costs[0].subject == "bn3"


def test_time_left_is_spent_on_examples(lab, monkeypatch):
    few = attribute(lab, budget=Budget(enough=0, seconds=20.0, clock=timed(lab, monkeypatch)))
    many = attribute(lab, budget=Budget(enough=0, seconds=60.0, clock=timed(lab, monkeypatch)))
    assert few.examples < many.examples


def test_progress_rises_to_its_total(lab):
    seen = []
    attribute(lab, progress=lambda *entry: seen.append(entry))
    assert [done for _, done, _ in seen] == list(range(1, 61))
    assert {total for _, _, total in seen} == {60}  # 6 batches, 2 baselines, 2 passes for each of 4 layers
    assert seen[12][0] == "batch statistics at bn1 alone"


def test_an_attribution_assigns_nothing(lab):
    damage(lab, 0)
    before = lab.mean.copy(), lab.var.copy()
    attribute(lab)
    assert "assign" not in lab.asked
    np.testing.assert_array_equal((lab.mean, lab.var), before)


def test_difference_of_the_builder():
    assert testing.difference(0.1) == Difference(
        0.1, moments.paired_interval(450, 100, 0, 450), moments.mcnemar(100, 0)
    )
    assert testing.difference(-0.1).interval == pytest.approx([-end for end in testing.difference(0.1).interval[::-1]])
    assert isinstance(testing.attribution(cost=0.1, recovered={"a": 0.01, "bn#1": 0.05}), Attribution)
    assert subjects(testing.attribution(cost=0.1, recovered={"a": 0.01, "bn#1": 0.05})) == ["bn#1", "a"]


# --- localisation --------------------------------------------------------------------------------------------------


def test_where_every_output_varies_nothing_is_found(lab):
    found = localise(lab)
    assert found.first is None
    assert found.look.examples == 384
    assert str(found) == "the output varies across 384 examples"


def test_the_first_layer_that_gives_a_constant_is_named(lab):
    lab.weights = np.zeros_like(lab.weights)
    found = localise(lab, step=3, epoch=1)
    assert (found.first.path, found.look.step, found.look.epoch) == ("dense", 3, 1)
    assert str(found) == (
        "from `dense` (Dense) on, nothing varies across 384 examples: 100% of its units are zero for every one"
    )


def test_a_layer_that_varies_in_one_batch_of_many_varies(lab, monkeypatch):
    looks = [
        (testing.layer_look("a", zero=1.0, spread=0.0), testing.layer_look("b", zero=1.0, spread=0.0)),
        (testing.layer_look("a", zero=0.5, spread=0.1), testing.layer_look("b", zero=1.0, spread=0.0)),
    ]
    lab.data["training"] = lab.data["training"][:2]
    monkeypatch.setattr(lab, "look", lambda _batch, gradients: Seen(looks.pop(0)))
    found = localise(lab)
    assert found.first.path == "b"
    assert [(layer.zero_samples, layer.dead_units, layer.spread) for layer in found.look.layers] == [
        (0.75, 0.5, 0.1),
        (1.0, 1.0, 0.0),
    ]


def test_batches_of_one_cannot_be_localised(lab):
    lab.data["training"] = [Examples(b.inputs[:1], b.labels[:1], "training") for b in lab.data["training"]]
    with pytest.raises(ExperimentNotPossibleError, match="one example each"):
        localise(lab)


def test_localisation_shows_how_far_it_is_and_obeys_its_bound(lab):
    seen = []
    found = localise(lab, "evaluation", examples=130, progress=lambda *entry: seen.append(entry))
    assert found.look.examples == 128
    assert seen == [(f"evaluation data, layer by layer", n, 2) for n in (1, 2)]  # noqa: F541


# --- recalibration -------------------------------------------------------------------------------------------------


def population(lab):
    return np.concatenate([np.asarray(batch.inputs) for batch in lab.data["training"]])


@pytest.mark.parametrize("exact", [False, True])
def test_a_cold_start_is_repaired(lab, exact):
    right = lab.mean.copy(), lab.var.copy()
    lab.mean[...], lab.var[...] = 0.0, 1.0
    assert attribute(lab).running < 0.6
    found = recalibrate(lab, lab.data["training"], exact=exact)
    assert attribute(lab).running == 1.0
    assert [change.layer for change in found.layers] == list(LAYERS)
    assert (found.examples, found.batches, found.exact, found.uncalled) == (384, 6, exact, ())
    np.testing.assert_allclose(lab.mean[0], population(lab).mean(axis=0))
    np.testing.assert_allclose(lab.var[0], population(lab).var(axis=0))
    if not exact:
        np.testing.assert_allclose((lab.mean, lab.var), right)


def test_exact_statistics_are_those_behind_layers_that_use_theirs(lab):
    recalibrate(lab, lab.data["training"], exact=True)
    active = population(lab)
    for mean, var in zip(lab.mean, lab.var, strict=True):
        np.testing.assert_allclose(mean, active.mean(axis=0))
        np.testing.assert_allclose(var, active.var(axis=0))
        active = np.maximum((active - mean) / np.sqrt(var + lab.epsilon), 0.0)


def test_a_corrected_variance_is_the_unbiased_one(lab):
    lab.bessel_corrected = True
    recalibrate(lab, lab.data["training"])
    np.testing.assert_allclose(lab.var[0], population(lab).var(axis=0, ddof=1))


def test_an_average_of_corrected_batch_variances_comes_to_the_same():
    """What a framework that corrects would reach by itself, in the limit of many small batches."""
    lab = testing.FakeLaboratory.stacked("bn", batches=2000, size=4)
    lab.bessel_corrected = True
    recalibrate(lab, lab.data["training"])
    average = np.mean([np.var(batch.inputs, axis=0, ddof=1) for batch in lab.data["training"]], axis=0)
    # batches hold one example of each class, the population draws them freely: 3/4 of what lies between classes
    within, between = 0.3**2, 4.0**2
    assert average == pytest.approx(within + between / 4, rel=0.02)
    assert lab.var[0] == pytest.approx(within + between * 3 / 16, rel=0.02)


def test_what_changed_is_told_in_units_of_the_old_statistics(lab):
    old_mean, old_var = lab.mean.copy(), lab.var.copy()
    lab.mean[1] += 3.0
    lab.var[1] *= 4.0
    found = recalibrate(lab, lab.data["training"])
    change = found.layers[1]
    wide = 4.0 * old_var[1] + lab.epsilon
    assert change.mean_shift == pytest.approx(np.sqrt(np.mean(9.0 / wide)))
    assert change.std_ratio == pytest.approx(np.exp(np.mean(np.log((old_var[1] + lab.epsilon) / wide)) / 2))
    assert change.count == 384
    assert found.layers[0].mean_shift == pytest.approx(0.0, abs=1e-12)
    assert str(found).startswith("re-estimated the running statistics of 4 layers over 384 examples; `bn2` changed")
    np.testing.assert_allclose(lab.mean, old_mean)


@pytest.mark.parametrize(
    ("layers", "changed"),
    [
        (None, "1234"),
        (["bn2"], "2"),
        ("bn2", "2"),
        (["bn[13]"], "13"),
        (["bn*", "bn1"], "1234"),
        (("bn4", "bn1"), "14"),
    ],
)
def test_layers_are_named_by_path_or_pattern(lab, layers, changed):
    lab.mean += 1.0
    before = lab.mean.copy()
    found = recalibrate(lab, lab.data["training"], layers)
    assert [change.layer for change in found.layers] == [f"bn{n}" for n in changed]
    assert [f"{n + 1}" for n in range(4) if (lab.mean[n] != before[n]).any()] == list(changed)


def test_a_path_that_looks_like_a_pattern_is_a_path():
    lab = testing.FakeLaboratory.stacked("bn[1]", "bn1")
    assert [change.layer for change in recalibrate(lab, lab.data["training"], ["bn[1]"]).layers] == ["bn[1]", "bn1"]
    lab = testing.FakeLaboratory.stacked("bn[2]", "bn1")
    assert [change.layer for change in recalibrate(lab, lab.data["training"], ["bn[2]"]).layers] == ["bn[2]"]


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        (["bn22"], "no batch-normalization layer fits 'bn22'; near misses: 'bn2'"),
        (["conv*"], "no batch-normalization layer fits 'conv*'; near misses: 'bn1', 'bn2', 'bn3'"),
        (["bn1", ""], "no batch-normalization layer fits ''"),
    ],
)
def test_a_name_that_fits_nothing_is_an_error_with_near_misses(lab, layers, sentence):
    before = lab.mean.copy()
    with pytest.raises(ValueError, match="no batch-normalization layer fits") as error:
        recalibrate(lab, lab.data["training"], layers)
    assert str(error.value).startswith(sentence)
    np.testing.assert_array_equal(lab.mean, before)


def test_what_cannot_be_done_is_said(lab):
    with pytest.raises(ValueError, match="recalibrate needs training batches, got none"):
        recalibrate(lab, iter(()))
    with pytest.raises(ValueError, match="names no layer"):
        recalibrate(lab, lab.data["training"], [])
    bare = testing.FakeLaboratory.separable()
    bare.calls = ()
    with pytest.raises(ValueError, match="the model has no batch-normalization layer"):
        recalibrate(bare, bare.data["training"])


def test_a_layer_that_is_not_called_is_left_alone_and_told(lab, monkeypatch):
    inputs = lab.inputs
    monkeypatch.setattr(lab, "inputs", lambda *a: [seen for seen in inputs(*a) if seen.site.layer != "bn3"])
    before = lab.mean.copy()
    found = recalibrate(lab, lab.data["training"])
    assert found.uncalled == ("bn3",)
    np.testing.assert_array_equal(lab.mean[2], before[2])
    with pytest.raises(ValueError, match="none of these layers is called on the batches: bn3"):
        recalibrate(lab, lab.data["training"], ["bn3"])


@pytest.mark.parametrize("exact", [False, True])
def test_inputs_that_are_not_finite_change_nothing(lab, exact):
    lab.data["training"][3].inputs[0, 0] = np.inf
    before = lab.mean.copy(), lab.var.copy()
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match="what enters `bn1` is not finite"):
        recalibrate(lab, lab.data["training"], exact=exact)
    np.testing.assert_array_equal((lab.mean, lab.var), before)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize(("exact", "after"), [(False, 3), (True, 3), (True, 15)])
def test_everything_is_restored_when_it_is_broken_off(lab, monkeypatch, error, exact, after):
    lab.mean += 1.0
    before, inputs, calls = (lab.mean.copy(), lab.var.copy()), lab.inputs, []

    def failing(*args):
        calls.append(args)
        if len(calls) > after:
            raise error
        return inputs(*args)

    monkeypatch.setattr(lab, "inputs", failing)
    with pytest.raises(error):
        recalibrate(lab, lab.data["training"], exact=exact)
    np.testing.assert_array_equal((lab.mean, lab.var), before)
    assert ("assign" in lab.asked) is (after == 15)


def test_a_layer_whose_sites_differ_is_refused_with_both_named(shared):
    before = shared.mean.copy()
    with pytest.raises(ValueError, match="see different data") as error:
        recalibrate(shared, shared.data["training"])
    assert "`bn` is called at 2 sites that see different data: bn#0 and bn#1 are " in str(error.value)
    assert "standard deviations apart in their means" in str(error.value)
    np.testing.assert_array_equal(shared.mean, before)
    assert "assign" not in shared.asked
    found = recalibrate(shared, shared.data["training"], ["other"])
    assert [change.layer for change in found.layers] == ["other"]


def test_too_few_batches_cannot_tell_sites_apart(shared):
    with pytest.raises(ValueError, match=r"at 2 sites \(bn#0, bn#1\), and 3 batches cannot tell .*: give 4 or more"):
        recalibrate(shared, shared.data["training"][:3])


def entering(lab, monkeypatch, draw, sites=2):
    """Let the sites of ``bn`` see what ``draw(site, generator)`` gives."""
    rng = np.random.default_rng(0)

    def inputs(_batch, _statistics):
        values = [draw(site, rng) for site in range(sites)]
        return [
            SiteMoments(CallSite("bn", site), moments.Moments(v.mean(axis=0), v.var(axis=0), len(v)))
            for site, v in enumerate(values)
        ]

    monkeypatch.setattr(lab, "inputs", inputs)


@pytest.mark.parametrize("exact", [False, True])
def test_sites_that_see_the_same_are_pooled(shared, monkeypatch, exact):
    entering(shared, monkeypatch, lambda _site, rng: rng.normal(3.0, 2.0, (5000, 4)))
    found = recalibrate(shared, shared.data["training"], ["bn"], exact=exact)
    assert found.layers[0].count == 2 * 6 * 5000
    assert shared.mean[0] == pytest.approx(3.0, abs=0.05)
    assert shared.var[0] == pytest.approx(4.0, rel=0.05)


@pytest.mark.parametrize(("apart", "refused"), [(0.10, False), (0.25, True)])
def test_sites_may_differ_as_much_as_bn101_allows(shared, monkeypatch, apart, refused):
    """Two sites that are d apart have a standard deviation of d / sqrt(2) between them: the limit .1 is at .14."""
    entering(shared, monkeypatch, lambda site, rng: rng.normal(apart * site, 1.0, (20_000, 4)))
    if refused:
        with pytest.raises(ValueError, match="see different data"):
            recalibrate(shared, shared.data["training"], ["bn"])
    else:
        recalibrate(shared, shared.data["training"], ["bn"])


def test_the_two_sites_that_are_farthest_apart_are_named_with_their_difference(shared, monkeypatch):
    entering(shared, monkeypatch, lambda site, rng: rng.normal((0.0, 0.5, 2.0)[site], 1.0, (20_000, 4)), sites=3)
    with pytest.raises(ValueError, match="at 3 sites") as error:
        recalibrate(shared, shared.data["training"], "bn")
    assert "bn#0 and bn#2 are 2.00 standard deviations apart in their means, and their spreads differ" in str(
        error.value
    )
    entering(shared, monkeypatch, lambda site, rng: rng.normal(0.0, 1.0 + site, (20_000, 4)))
    with pytest.raises(ValueError, match=r"apart in their means, and their spreads differ by a factor of 2\.0"):
        recalibrate(shared, shared.data["training"], "bn")


@pytest.mark.parametrize(("exact", "passes"), [(False, [6]), (True, [6, 24])])
def test_a_recalibration_shows_how_far_it_is(lab, exact, passes):
    seen = []
    recalibrate(lab, lab.data["training"], exact=exact, progress=lambda *entry: seen.append(entry))
    assert [(done, total) for _, done, total in seen] == [(n, total) for total in passes for n in range(1, total + 1)]
    assert list(dict.fromkeys(what for what, _, _ in seen)) == [
        "re-estimating every layer", "re-estimating layer by layer",
    ][: len(passes)]  # fmt: skip


def test_recalibration_mends_what_the_cells_show(lab):
    damage(lab, 3)
    assert crosscheck(lab).evaluation["running"].accuracy < 0.5
    recalibrate(lab, lab.data["training"])
    assert crosscheck(lab).evaluation["running"].accuracy == 1.0
