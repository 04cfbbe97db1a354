import numpy as np
import pytest
from scipy import stats

from bnwatch import testing
from bnwatch.evidence import (
    Budget,
    Cell,
    Cells,
    Examples,
    ExperimentNotPossibleError,
    LayerLook,
    class_indices,
    crosscheck,
    look,
)


class Clock:
    """Advances by one second each time a batch is measured."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def lab():
    return testing.FakeLaboratory.separable(batches=6, size=20)


def timed(lab, seconds_a_batch, monkeypatch):
    clock, outputs = Clock(), lab.outputs

    def slow(*args):
        clock.now += seconds_a_batch
        return outputs(*args)

    monkeypatch.setattr(lab, "outputs", slow)
    return clock


def test_all_cells_measure_the_same_examples(lab):
    cells = crosscheck(lab, step=7, epoch=2)
    assert (cells.step, cells.epoch, cells.classes, cells.missing) == (7, 2, 4, None)
    assert [split for split, _ in cells.rows()] == ["training", "evaluation"]
    for split, row in cells.rows():
        assert list(row) == ["running", "batch", *(["reshuffled"] if split == "training" else []), "population"]
        expected = np.concatenate([batch.labels for batch in lab.data[split]])
        for cell in row.values():
            np.testing.assert_array_equal(cell.labels, expected)
            assert cell.examples == 120


def test_the_cells_show_what_the_statistics_do(lab):
    cells = crosscheck(lab)
    for _, row in cells.rows():
        assert row["batch"].accuracy == row["population"].accuracy == 1.0
        assert row["running"].accuracy < 0.8
        gained, p = row["batch"].gain_over(row["running"])
        assert gained == pytest.approx(1.0 - row["running"].accuracy)
        assert p < 1e-6


def test_population_statistics_come_from_training_data_for_both_rows(lab):
    used = []
    population = lab.population
    lab.population = lambda batches: (used.extend(batches), population(batches))[1]
    crosscheck(lab)
    assert [batch.origin for batch in used] == ["training"] * 6


def test_whole_batches_within_the_budget_of_examples(lab):
    cells = crosscheck(lab, budget=Budget(examples=50))
    assert {cell.examples for _, row in cells.rows() for cell in row.values()} == {40}


def test_one_batch_at_least(lab):
    cells = crosscheck(lab, budget=Budget(examples=1, seconds=0.0))
    assert {cell.examples for _, row in cells.rows() for cell in row.values()} == {20}


def test_time_bounds_the_first_pass_and_pairs_the_rest(lab, monkeypatch):
    clock = timed(lab, 1.0, monkeypatch)
    cells = crosscheck(lab, budget=Budget(seconds=18.0, enough=0, clock=clock))
    sizes = {split: {cell.examples for cell in row.values()} for split, row in cells.rows()}
    # The first batch does not count; a seventh of 18 seconds is passed three batches later, four sevenths are passed
    # when the evaluation examples have had one batch.
    assert sizes == {"training": {80}, "evaluation": {20}}
    assert cells.seconds == 18.0
    for _, row in cells.rows():
        np.testing.assert_array_equal(row["batch"].labels, row["running"].labels)


def test_enough_examples_are_measured_whatever_the_time(lab, monkeypatch):
    clock = timed(lab, 1000.0, monkeypatch)
    cells = crosscheck(lab, budget=Budget(seconds=1.0, enough=50, clock=clock))
    assert {cell.examples for _, row in cells.rows() for cell in row.values()} == {60}


def test_without_a_limit_time_does_not_matter(lab, monkeypatch):
    clock = timed(lab, 1000.0, monkeypatch)
    cells = crosscheck(lab, budget=Budget(clock=clock))
    assert {cell.examples for _, row in cells.rows() for cell in row.values()} == {120}


def test_budget_counts_from_its_start():
    clock = Clock()
    budget = Budget(seconds=10.0, clock=clock)
    clock.now = 500.0
    budget.start()
    assert not budget.share(0.0)
    clock.now = 505.0
    assert budget.spent == 5.0
    assert budget.share(0.4)
    assert not budget.share(0.5)


@pytest.mark.parametrize("seconds", [None, 3.0])
def test_progress_rises_to_its_total(lab, monkeypatch, seconds):
    clock, seen = timed(lab, 1.0, monkeypatch), []
    crosscheck(lab, budget=Budget(seconds=seconds, clock=clock), progress=lambda *a: seen.append(a))
    done = [entry[1] for entry in seen]
    assert done == list(range(1, len(seen) + 1))
    assert seen[-1][1] == seen[-1][2]
    assert all(n <= total for _, n, total in seen)
    assert [entry[2] for entry in seen] == sorted((entry[2] for entry in seen), reverse=True)
    assert list(dict.fromkeys(entry[0] for entry in seen)) == [
        "training data, running statistics",
        "training data, batch statistics",
        "training data, random batches",
        "evaluation data, running statistics",
        "evaluation data, batch statistics",
        "training data, population statistics",
        "evaluation data, population statistics",
    ]


def test_everything_is_restored_also_when_a_pass_fails(lab, monkeypatch):
    outputs, calls = lab.outputs, []

    def failing(batch, statistics, other):
        calls.append(statistics)
        if lab.mean.any():
            msg = "inside the re-estimate"
            raise RuntimeError(msg)
        return outputs(batch, statistics, other)

    monkeypatch.setattr(lab, "outputs", failing)
    with pytest.raises(RuntimeError, match="re-estimate"):
        crosscheck(lab)
    assert lab.mean.tolist() == [0.0] * 4
    assert lab.var.tolist() == [1.0] * 4
    assert len(calls) == 31


@pytest.mark.parametrize("split", ["training", "evaluation"])
def test_one_split_alone_is_measured_and_the_other_said_to_be_missing(lab, split):
    lab.data = {split: lab.data[split]}
    cells = crosscheck(lab)
    other = {"training": "evaluation", "evaluation": "training"}[split]
    assert [name for name, _ in cells.rows()] == [split]
    assert cells.missing == f"no {other} examples"
    measured = set(cells.training or cells.evaluation)
    beyond = {"population", "reshuffled"} if split == "training" else set()
    assert measured == {"running", "batch"} | beyond


def test_reshuffled_batches_are_random_and_their_predictions_come_in_the_order_of_the_others(lab):
    """Batches of one class: what tells the classes apart is in the batch mean, and so is lost in them alone."""
    labels = np.concatenate([batch.labels for batch in lab.data["training"]])
    inputs = np.concatenate([batch.inputs for batch in lab.data["training"]])
    pure = [Examples(inputs[labels == n], labels[labels == n], "training") for n in range(4)]
    lab.data = {"training": pure}
    row = crosscheck(lab).training
    assert row["reshuffled"].accuracy == 1.0
    assert row["batch"].accuracy < 0.6
    np.testing.assert_array_equal(row["reshuffled"].labels, row["batch"].labels)
    np.testing.assert_array_equal(row["reshuffled"].predicted, np.repeat(np.arange(4), 30))


def test_examples_that_cannot_be_taken_apart_leave_the_other_cells(lab, monkeypatch):
    def refuse(_batches, _order):
        msg = "examples of different shapes"
        raise ExperimentNotPossibleError(msg)

    monkeypatch.setattr(lab, "reshuffled", refuse)
    seen = []
    cells = crosscheck(lab, progress=lambda *a: seen.append(a))
    assert set(cells.training) == {"running", "batch", "population"}
    assert seen[-1][1] == seen[-1][2]


def test_one_batch_has_no_other_composition(lab):
    lab.data = {"training": lab.data["training"][:1]}
    assert "reshuffled" not in crosscheck(lab).training


def test_no_examples_at_all(lab):
    lab.data = {}
    with pytest.raises(ExperimentNotPossibleError, match="no evaluation examples"):
        crosscheck(lab)


def test_numbers_that_are_no_classes_of_the_model_are_no_labels(lab):
    """House prices are whole numbers too."""
    prices = [Examples(batch.inputs, 1000 * batch.labels, "training") for batch in lab.data["training"]]
    lab.data = {"training": prices}
    with pytest.raises(ExperimentNotPossibleError, match="labels go up to 3000, and the model scores 4 classes"):
        crosscheck(lab)


def test_a_look_takes_one_batch_and_asks_for_what_it_is_told(lab):
    plain = look(lab, step=3, epoch=1, gradients=False)
    assert (plain.step, plain.epoch, plain.examples) == (3, 1, 20)
    assert [(layer.path, layer.gradient) for layer in plain.layers] == [("bn", None), ("relu", None), ("dense", None)]
    assert look(lab, step=3, epoch=1, gradients=True).layers[-1].gradient == 1.0


# --- cells ---------------------------------------------------------------------------------------------------------


def cell(predicted, labels):
    return Cell(np.asarray(predicted, np.int64), np.asarray(labels, np.int64))


def test_numbers_of_a_cell():
    one = cell([0, 0, 0, 1, 2], [0, 1, 0, 1, 1])
    assert (one.examples, one.accuracy, one.largest_share, one.majority) == (5, 0.6, 0.6, 0.6)
    assert one.correct.tolist() == [True, False, True, True, False]


def test_interval_and_paired_test_against_scipy():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 400)
    first = np.where(rng.random(400) < 0.7, labels, (labels + 1) % 5)
    second = np.where(rng.random(400) < 0.6, labels, (labels + 1) % 5)
    a, b = cell(first, labels), cell(second, labels)
    wilson = stats.binomtest(int(a.correct.sum()), 400).proportion_ci(0.95, "wilson")
    assert a.interval == pytest.approx((wilson.low, wilson.high), abs=1e-4)
    only_a, only_b = int((a.correct & ~b.correct).sum()), int((b.correct & ~a.correct).sum())
    gained, p = a.gain_over(b)
    assert gained == pytest.approx(a.accuracy - b.accuracy)
    assert p == pytest.approx(stats.binomtest(only_a, only_a + only_b, 0.5, "greater").pvalue)
    assert b.gain_over(a)[1] > 0.5


def test_equal_cells_gain_nothing():
    one = cell([0, 1, 1], [0, 1, 0])
    assert one.gain_over(one) == (0.0, 1.0)


def test_what_statistics_gain_on_the_examples_of_both_splits_together():
    labels = np.zeros(20, np.int64)

    def right(*rows):
        return Cell(np.where(np.isin(np.arange(20), rows), 0, 1), labels)

    training = {"population": right(0, 1, 2, 3, 4, 5), "running": right(0, 1)}
    held = {"population": right(7, 8, 9), "running": right(9, 10)}
    gained, p = Cells(1, 0, 2, training, held).gain("population", "running")
    # six examples only with the first, one only with the second
    assert gained == pytest.approx(5 / 40)
    assert p == pytest.approx((1 + 7) / 2**7)
    assert Cells(1, 0, 2, training, {"running": right(0)}).gain("population", "running") is None
    assert Cells(1, 0, 2, {}, {}).gain("population", "running") is None


def test_cells_of_the_builder_have_the_accuracies_asked_for():
    built = testing.cells(training={"batch": 0.9, "running": 0.25}, examples=200)
    assert built.training["batch"].accuracy == 0.9
    assert built.training["running"].accuracy == 0.25
    assert built.training["batch"].majority == pytest.approx(0.1)


# --- looks ---------------------------------------------------------------------------------------------------------


def test_a_look_at_an_output_by_hand():
    output = np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 0.0]], np.float32)
    found = LayerLook.of("relu", "ReLU", output, 0.5)
    assert (found.path, found.kind, found.units, found.gradient) == ("relu", "ReLU", 3, 0.5)
    assert found.zero_samples == 0.5
    assert found.dead_units == pytest.approx(2 / 3)
    deviations, scale = output.std(axis=0), np.sqrt(np.mean(output**2))
    assert found.spread == pytest.approx(np.sqrt(np.mean(deviations**2)) / scale)


def test_images_are_looked_at_flat():
    output = np.random.default_rng(0).normal(size=(5, 4, 4, 3))
    found = LayerLook.of("conv", "Conv2D", output)
    assert found.units == 48
    assert found == LayerLook.of("conv", "Conv2D", output.reshape(5, -1))


def test_constant_outputs_have_no_spread():
    assert LayerLook.of("a", "Dense", np.zeros((4, 3))).spread == 0.0
    assert LayerLook.of("a", "Dense", np.zeros((4, 3))).zero_samples == 1.0
    same = np.tile(np.random.default_rng(0).normal(size=(1, 7)).astype(np.float32), (32, 1))
    assert LayerLook.of("a", "Dense", same).spread < 1e-15
    assert LayerLook.of("a", "Dense", same).zero_samples == 0.0


def test_rounding_of_float32_counts_as_constant_and_signal_does_not():
    same = np.full((64, 10), 1e3, np.float32)
    noisy = same.copy()
    noisy[::2] = np.nextafter(noisy[::2], np.float32(np.inf))
    assert 0.0 < LayerLook.of("a", "Dense", noisy).spread < 1e-6
    noisy[0] *= 1.001
    assert LayerLook.of("a", "Dense", noisy).spread > 1e-6


def test_spread_does_not_depend_on_the_scale():
    output = np.random.default_rng(0).normal(size=(16, 5))
    found = [LayerLook.of("a", "Dense", scale * output).spread for scale in (1e-20, 1.0, 1e20)]
    assert found == pytest.approx([found[1]] * 3)


def spreads(*values):
    return testing.look(1, *(testing.layer_look(f"l{n}", spread=value) for n, value in enumerate(values)))


@pytest.mark.parametrize(
    ("values", "first"),
    [
        ((0.5, 0.4, 0.3), None),
        ((0.5, 0.0, 0.0), "l1"),
        ((0.0, 0.0, 0.0), "l0"),
        # A constant branch that is added to a living one is not the place where the signal ends.
        ((0.5, 0.0, 0.3, 0.0), "l3"),
        ((0.5, 0.0, 0.3), None),
        ((), None),
    ],
)
def test_first_constant(values, first):
    found = spreads(*values).first_constant(1e-6)
    assert (found.path if found else None) == first


# --- targets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "targets",
    [
        [2, 0, 1],
        np.array([2.0, 0.0, 1.0]),
        np.array([[2], [0], [1]], np.int8),
        np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0]], np.float32),
        np.array([2, 0, 1], np.uint8),
    ],
)
def test_class_indices(targets):
    found = class_indices(targets)
    assert found.tolist() == [2, 0, 1]
    assert found.dtype == np.int64


def test_binary_targets_are_classes():
    assert class_indices(np.array([True, False])).tolist() == [1, 0]
    assert class_indices(np.array([[1.0], [0.0]])).tolist() == [1, 0]


@pytest.mark.parametrize(
    "targets",
    [
        [0.5, 1.0],
        [-1, 1],
        [[0.3, 0.7]],
        [[1, 1, 0]],
        [[0, 0, 0]],
        np.zeros((2, 3, 4)),
        [],
        3,
        np.array([np.nan, 1.0]),
        np.array([np.inf, 1.0]),
        np.array(["cat", "dog"]),
        np.array([None, 1], dtype=object),
    ],
)
def test_what_is_no_class_is_refused_in_a_sentence(targets):
    with pytest.raises(ExperimentNotPossibleError, match="not one class an example; the accuracy experiments need"):
        class_indices(targets)


def test_examples_are_whole_batches():
    batches = [Examples(np.zeros((n, 1)), np.zeros(n, np.int64), "training") for n in (3, 3, 3)]
    lab = testing.FakeLaboratory(np.eye(1), {"training": batches}, np.zeros(1), np.ones(1))
    assert [len(lab.examples("training", limit)) for limit in (1, 3, 5, 6, 100)] == [1, 1, 1, 2, 3]
