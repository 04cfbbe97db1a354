"""The formulas of the field's detectors, against numbers worked by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.clinic import peers
from benchmarks.clinic.peers import Activation, Kernel, Network

SCORES = np.array([[0.9, 0.1, 0.0], [0.2, 0.7, 0.1], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4]])
KERNEL = np.array([[0.3, -0.1], [0.1, 0.2]])


def network(**changed: Any) -> Network:
    """A network that learns, and that no tool has a word against."""
    activation = np.array([[0.2, 0.5], [0.4, 0.1], [0.0, 0.6], [0.3, 0.0]])
    sound = Network(
        task="classes",
        inputs=np.linspace(0.0, 1.0, 8).reshape(4, 2),
        targets=np.array([0, 1, 2, 1]),
        scores=SCORES,
        activations=[Activation("relu", "relu", activation, activation), Activation("out", "softmax", SCORES, SCORES)],
        kernels=[
            Kernel("first", KERNEL, 0.01 * KERNEL, KERNEL + 0.02),
            Kernel("last", KERNEL, 0.01 * KERNEL, KERNEL - 0.02),
        ],
        losses=(0.5, 0.45),
        history={
            "loss": [2.0, 1.0, 0.7, 0.6, 0.5, 0.4],
            "accuracy": [0.3, 0.6, 0.8, 0.9, 0.9, 0.92],
            "val_loss": [2.0, 1.1, 0.8, 0.7, 0.6, 0.5],
            "val_accuracy": [0.3, 0.5, 0.7, 0.8, 0.8, 0.85],
            "mean:first": [0.1, 0.11, 0.12, 0.11, 0.13, 0.125],
        },
        loss="sparse_categorical_crossentropy",
        learning_rate=0.001,
    )
    return replace(sound, **changed)


def said(tool: Any, **changed: Any) -> list[str]:
    return list(tool(network(**changed)))


def test_a_sound_network() -> None:
    assert {name: said(tool) for name, tool in peers.TOOLS.items()} == {name: [] for name in peers.TOOLS}


# The alignment


def test_alignment_by_hand() -> None:
    # centered: (-1, 0, 1) and (0, -1, 1): the product is 1, the norms are 2 each: 1 / 4
    assert peers.linear_cka(np.array([[0.0], [1.0], [2.0]]), np.array([[1.0], [0.0], [2.0]])) == pytest.approx(0.25)


def test_alignment_ignores_scale_offset_and_rotation() -> None:
    x = np.random.default_rng(0).normal(size=(9, 2))
    turned = 3.0 * x @ np.array([[0.6, -0.8], [0.8, 0.6]]) + 5.0
    assert peers.linear_cka(x, turned) == pytest.approx(1.0)


def test_alignment_by_features_and_by_examples_agree() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(12, 5)), rng.normal(size=(12, 3, 2))
    a, b = x - x.mean(axis=0), y.reshape(12, 6) - y.reshape(12, 6).mean(axis=0)
    expected = np.linalg.norm(b.T @ a) ** 2 / (np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b))
    assert peers.linear_cka(x, y) == pytest.approx(expected)


def test_alignment_with_a_constant_is_unknown_and_no_finding() -> None:
    flat = Activation("flat", "linear", np.ones((4, 2)), np.ones((4, 2)))
    assert np.isnan(peers.linear_cka(flat.training, flat.evaluation))
    assert said(peers.switch_mode, activations=[flat]) == []


# TheDeepChecker


@pytest.mark.parametrize(("losses", "expected"), [((1.0, 2.1), 1), ((1.0, 1.9), 0), ((2.1, 1.0), 1), ((0.0, 0.0), 0)])
def test_losses_of_the_modes(losses: tuple[float, float], expected: int) -> None:
    assert len(said(peers.switch_mode, losses=losses)) == expected


@pytest.mark.parametrize(("mixed", "expected"), [(0.6, 1), (0.55, 0)])
def test_activations_of_the_modes(mixed: float, expected: int) -> None:
    # x and y are centered, orthogonal and of one norm: the alignment of x and x + m y is 1 / (1 + m^2), .735 and .768
    x, y = np.array([[1.0], [1.0], [-1.0], [-1.0]]), np.array([[1.0], [-1.0], [1.0], [-1.0]])
    found = said(peers.switch_mode, activations=[Activation("h", "linear", x, x + mixed * y)])
    assert len(found) == expected
    assert all("h differs" in sentence for sentence in found)


# AUTOTRAINER


@pytest.mark.parametrize(
    ("first", "last", "symptom"),
    [
        (1e-5, 1.0, "vanishing gradient"),
        (1e-5, 5e-3, None),  # the ratio is .002
        (5e-4, 1.0, None),  # the norm is above 1e-4
        (1.42, 0.02, "exploding gradient"),
        (1.38, 0.02, None),
    ],
)
def test_gradients(first: float, last: float, symptom: str | None) -> None:
    unit = np.full((2, 2), 0.5)
    kernels = [Kernel("a", KERNEL, first * unit), Kernel("b", KERNEL, last * unit)]
    assert said(peers.autotrainer, kernels=kernels) == ([symptom] if symptom else [])


def test_a_loss_that_is_no_number_explodes_only_with_its_gradient() -> None:
    lost = {**network().history, "loss": [1.0, np.nan]}
    broken = [Kernel("a", KERNEL, KERNEL * np.nan)]
    assert "exploding gradient" not in said(peers.autotrainer, history=lost)
    assert "exploding gradient" in said(peers.autotrainer, history=lost, kernels=broken)


@pytest.mark.parametrize(("zeros", "expected"), [(7, True), (6, False)])
def test_zero_gradients(zeros: int, expected: bool) -> None:
    gradient = np.where(np.arange(10) < zeros, 0.0, 0.1).reshape(2, 5)
    assert ("dying ReLU" in said(peers.autotrainer, kernels=[Kernel("a", KERNEL, gradient)])) is expected


@pytest.mark.parametrize(
    ("accuracy", "expected"),
    [
        # of ten epochs the last seven count; maxima and minima lie .1 apart twice
        ([0.1, 0.2, 0.3, 0.5, 0.6, 0.5, 0.6, 0.7, 0.8, 0.9], False),  # one swing
        ([0.1, 0.2, 0.3, 0.5, 0.6, 0.5, 0.6, 0.5, 0.8, 0.9], True),  # two swings: a fifth of ten
        ([0.1, 0.2, 0.3, 0.5, 0.52, 0.5, 0.52, 0.5, 0.52, 0.5], False),  # too small
        ([0.6, 0.1, 0.6, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], False),  # too early
    ],
)
def test_oscillation(accuracy: list[float], expected: bool) -> None:
    assert peers.oscillating(np.array(accuracy)) is expected


@pytest.mark.parametrize(
    ("accuracy", "validation", "expected"),
    [
        ([0.1] * 10, [0.1] * 10, True),
        ([0.1] * 10, [], True),
        ([0.1] * 10, [0.1] * 9 + [0.12], False),  # one rises
        ([0.71] * 10, [0.1] * 10, False),
        ([], [], False),
    ],
)
def test_slowness(accuracy: list[float], validation: list[float], expected: bool) -> None:
    assert peers.slow(np.array(accuracy), np.array(validation)) is expected


def test_activation_and_loss_that_do_not_fit() -> None:
    assert said(peers.autotrainer, scores=2.0 * SCORES) == ["improper activation"]
    assert said(peers.autotrainer, loss="mean_squared_error") == ["improper loss"]
    assert said(peers.autotrainer, loss="binary_crossentropy", scores=SCORES[:, :1]) == []
    assert said(peers.autotrainer, loss="mean_squared_error", scores=2.0 * SCORES, task="numbers") == []


@pytest.mark.parametrize(("size", "expected"), [(10.0, ["abnormal data"]), (9.9, [])])
def test_large_activations(size: float, expected: list[str]) -> None:
    values = size * np.array([[1.0, -1.0], [-1.0, 1.0]])
    activations = [Activation("h", "linear", values, values)]
    assert said(peers.autotrainer, activations=activations) == expected


# DeepDiagnosis


def activated(kind: str, values: list[float]) -> list[Activation]:
    array = np.array(values).reshape(-1, 1)
    return [Activation("h", kind, array, array)]


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("relu", [0.0] * 7 + [1.0] * 3, ["dead node: h"]),
        ("relu", [0.0] * 6 + [1.0] * 4, []),
        ("linear", [-1.0] * 9 + [1.0], []),
        ("tanh", [0.99991] * 6 + [0.5] * 4, ["saturated activation: h"]),  # tanh(5) = .999909
        ("tanh", [0.99990] * 6 + [0.5] * 4, []),
        ("sigmoid", [0.9934] * 3 + [0.0066] * 3 + [0.5] * 4, ["saturated activation: h"]),  # of 5: .99331
        ("sigmoid", [0.9932] * 3 + [0.0068] * 3 + [0.5] * 4, []),
        ("linear", [1.0, -1.0], ["numerical error: output of h"]),
        ("linear", [1.0, np.nan], ["numerical error: output of h"]),
    ],
)
def test_outputs(kind: str, values: list[float], expected: list[str]) -> None:
    assert said(peers.deep_diagnosis, activations=activated(kind, values)) == expected


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        (Kernel("k", KERNEL, np.full((2, 2), 0.9e-7)), "vanishing gradient: k"),
        (Kernel("k", KERNEL, np.full((2, 2), 1.1e-7)), None),
        (Kernel("k", np.array([4.0, -2.5]), KERNEL), "poor weights: variance 10.6 of k"),  # 3.25^2
        (Kernel("k", np.array([4.0, -2.3]), KERNEL), None),  # 3.15^2 = 9.92
        (Kernel("k", np.array([0.01, 0.004]), KERNEL), "poor weights: variance 9e-06 of k"),
        (
            Kernel("k", np.array([3.0, 4.0]), KERNEL, np.array([3.0, 3.96])),
            "learning rate: k moves by 8e-06 of its norm",
        ),
        (Kernel("k", np.array([3.0, 4.0]), KERNEL, np.array([3.0, 3.94])), None),  # .001 * .06 / 5
    ],
)
def test_weights(kernel: Kernel, expected: str | None) -> None:
    assert said(peers.deep_diagnosis, kernels=[kernel]) == ([expected] if expected else [])


@pytest.mark.parametrize(
    ("name", "series", "expected"),
    [
        ("loss", [2.0, 1.0, 1.0, 1.0, 1.0, 1.0], ["loss not decreasing"]),
        ("loss", [2.0, 1.5, 1.0, 1.0, 1.0, 1.0], []),
        ("loss", [2.0, np.inf], ["invalid loss"]),
        ("accuracy", [0.5] * 20, ["accuracy not increasing"]),
        ("accuracy", [0.5] * 19, []),
        ("accuracy", [0.0, 0.5], ["invalid accuracy"]),
        ("mean:first", [0.1] * 5, ["unchanged weights: first"]),
    ],
)
def test_series(name: str, series: list[float], expected: list[str]) -> None:
    assert said(peers.deep_diagnosis, history={name: series}) == expected


@pytest.mark.parametrize(("factor", "expected"), [(23.0, ["output out of range"]), (22.0, [])])
def test_range_of_the_output(factor: float, expected: list[str]) -> None:
    # outputs reach from 0 to .9 times the factor, labels from 0 to 2: ten times that is 20
    assert said(peers.deep_diagnosis, scores=factor * SCORES) == expected


# UMLAUT


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"activations": [*activated("linear", [1.0]), *activated("softmax", [1.0])]}, ["no activation function: h"]),
        ({"activations": activated("linear", [1.0])}, []),
        ({"dropout": 0.6}, ["dropout of more than half"]),
        ({"dropout": 0.5}, []),
        ({"inputs": np.zeros((2, 8, 7, 1))}, ["images are not square"]),
        ({"inputs": np.zeros((2, 1, 8, 8))}, []),
        ({"inputs": np.array([[1.01]])}, ["inputs exceed the range of -1 to 1"]),
        ({"inputs": np.array([[1]])}, ["inputs are integers"]),
        ({"learning_rate": 0.011}, ["learning rate 0.011"]),
        ({"learning_rate": 9e-8}, ["learning rate 9e-08"]),
    ],
)
def test_what_umlaut_sees(changed: dict[str, Any], expected: list[str]) -> None:
    assert said(peers.umlaut, **changed) == expected


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ({"loss": [np.nan]}, ["loss is not a number"]),
        (
            {"loss": [2.0, 1.0], "val_loss": [2.0, 2.1]},
            ["overfitting: validation loss rises while training loss does not"],
        ),
        ({"loss": [2.0, 2.1], "val_loss": [2.0, 2.1]}, []),
        ({"val_accuracy": [0.99, 0.9, 0.9, 0.96]}, ["validation accuracy is suspiciously high"]),
        ({"val_accuracy": [0.99, 0.96, 0.96, 0.95]}, []),
        (
            {"accuracy": [0.1, 0.1, 0.1, 0.5], "val_accuracy": [0.1, 0.1, 0.1, 0.56]},
            ["validation accuracy exceeds training accuracy"],
        ),
        ({"accuracy": [0.1, 0.1, 0.1, 0.5], "val_accuracy": [0.1, 0.1, 0.1, 0.54]}, []),
    ],
)
def test_what_umlaut_sees_of_the_epochs(history: dict[str, Any], expected: list[str]) -> None:
    assert said(peers.umlaut, history=history) == expected
