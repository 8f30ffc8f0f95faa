"""Every score against scikit-learn on random cases, and the cases where a score has no value."""

import json
import math
import warnings

import numpy as np
import pytest
import sklearn.metrics

from reports import metrics


def random_case(seed):
    """(class names, labels [N], probabilities [N, C]): 2 to 12 classes, some absent, some never predicted."""
    rng = np.random.default_rng(seed)
    class_count, example_count = int(rng.integers(2, 13)), int(rng.integers(1, 200))
    labels = rng.choice(rng.permutation(class_count)[: rng.integers(1, class_count + 1)], example_count)
    logits = rng.normal(0, rng.uniform(0.1, 10), (example_count, class_count))
    logits[np.arange(example_count), labels] += rng.uniform(0, 5)
    logits[:, rng.integers(class_count)] -= rng.choice([0, 50])
    return [f"class {i}" for i in range(class_count)], labels, metrics.softmax(logits)


def scores_of(names, labels, probabilities):
    confusion = metrics.confusion_matrix(labels, probabilities.argmax(axis=1), len(names))
    return metrics.scores(confusion, probabilities, labels, names)


@pytest.mark.parametrize("seed", range(60))
def test_scores_agree_with_scikit_learn(seed):
    names, labels, probabilities = random_case(seed)
    classes, predictions = range(len(names)), probabilities.argmax(axis=1)
    confusion = metrics.confusion_matrix(labels, predictions, len(names))
    ours = metrics.scores(confusion, probabilities, labels, names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's remarks on absent classes
        sk = sklearn.metrics
        assert confusion.dtype == np.int64
        assert np.array_equal(confusion, sk.confusion_matrix(labels, predictions, labels=classes))
        expected = {
            "accuracy": sk.accuracy_score(labels, predictions),
            "balanced_accuracy": sk.balanced_accuracy_score(labels, predictions),
            "cohen_kappa": sk.cohen_kappa_score(labels, predictions, labels=classes),
            "log_loss": -np.log(probabilities[np.arange(len(labels)), labels]).mean(),
        }
        if probabilities.min() > 1e-15:  # scikit-learn clips smaller ones
            assert ours["log_loss"] == pytest.approx(sk.log_loss(labels, probabilities, labels=classes))
        if len(names) > 5:
            expected["top_5_accuracy"] = sk.top_k_accuracy_score(labels, probabilities, k=5, labels=classes)
        for name, value in expected.items():
            assert ours[name] == (None if math.isnan(value) else pytest.approx(value, abs=1e-12)), name
        for average in ("macro", "weighted", None):
            theirs = sk.precision_recall_fscore_support(
                labels, predictions, labels=classes, average=average, zero_division=0
            )
            for name, value in zip(("precision", "recall", "f1", "support"), theirs, strict=True):
                if average is None:
                    assert [line[name] for line in ours["per_class"]] == pytest.approx(value), name
                elif name != "support":
                    assert ours[average][name] == pytest.approx(value), (average, name)
    assert ours["examples"] == len(labels)
    assert json.loads(json.dumps(ours, allow_nan=False)) == ours


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("k", [1, 2, 3])
def test_top_k_agrees_with_scikit_learn(seed, k):
    rng = np.random.default_rng(seed)
    probabilities, labels = metrics.softmax(rng.normal(size=(50, 6))), rng.integers(0, 6, 50)
    expected = sklearn.metrics.top_k_accuracy_score(labels, probabilities, k=k, labels=range(6))
    assert metrics.top_k_accuracy(probabilities, labels, k) == pytest.approx(expected)


def test_confusion_matrix_has_true_rows_and_predicted_columns():
    confusion = metrics.confusion_matrix(np.array([0, 0, 1, 2]), np.array([1, 1, 1, 0]), 4)
    assert confusion.tolist() == [[0, 2, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]


def test_precision_counts_the_whole_column():
    """Published code took a triangle of the matrix; with mistakes on both sides of the diagonal that differs."""
    per_class = metrics.per_class_scores(np.array([[5, 1, 2], [3, 4, 1], [2, 2, 6]]))
    assert per_class["precision"] == pytest.approx([5 / 10, 4 / 7, 6 / 9])
    assert per_class["recall"] == pytest.approx([5 / 8, 4 / 8, 6 / 10])
    assert per_class["f1"] == pytest.approx([10 / 18, 8 / 15, 12 / 19])


def test_softmax_is_stable_and_float64():
    probabilities = metrics.softmax(np.array([[1e4, 0.0, -1e4], [-1e30, -1e30, -1e30]], np.float32))
    assert probabilities.dtype == np.float64
    assert probabilities == pytest.approx(np.array([[1, 0, 0], [1 / 3, 1 / 3, 1 / 3]]))


@pytest.mark.filterwarnings("error")
def test_softmax_of_infinities_does_not_warn():
    assert metrics.softmax(np.array([[-np.inf, 0.0]])).tolist() == [[0.0, 1.0]]
    assert np.isnan(metrics.softmax(np.array([[np.inf, 0.0], [np.nan, 1.0]]))).all()


def test_log_loss_is_finite_where_the_probability_underflows():
    logits = np.array([[0.0, 5000.0], [3e38, -3e38]], np.float32)
    assert metrics.log_loss(logits[:1], np.array([0])) == 5000
    assert math.isfinite(metrics.log_loss(logits, np.array([0, 1])))


@pytest.mark.parametrize(("dtype", "most"), [(np.float32, 87.4), (np.float64, 708.4)])
def test_log_loss_of_a_zero_probability_is_finite(dtype, most):
    loss = scores_of(["a", "b"], np.array([1]), np.array([[1, 0]], dtype))["log_loss"]
    assert loss == pytest.approx(most, abs=0.1)


def test_equal_probabilities_rank_by_class_index():
    labels = np.arange(4)
    constant = np.full((4, 4), 0.25)
    assert metrics.accuracy(constant, labels) == 0.25
    assert [metrics.top_k_accuracy(constant, labels, k) for k in (1, 2, 3, 4, 9)] == [0.25, 0.5, 0.75, 1, 1]
    with pytest.raises(ValueError, match="k must be at least 1"):
        metrics.top_k_accuracy(constant, labels, 0)


def test_nan_probabilities_give_nulls_and_argmax_accuracy():
    probabilities = np.full((2, 3), np.nan, np.float32)
    scores = scores_of(["a", "b", "c"], np.array([0, 2]), probabilities)
    assert (scores["accuracy"], scores["log_loss"], scores["expected_calibration_error"]) == (0.5, None, None)
    assert metrics.accuracy(probabilities, np.array([0, 2])) == 0.5


def test_calibration_error_agrees_with_its_definition():
    _, labels, probabilities = random_case(3)
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    expected = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert expected > 0
    assert metrics.expected_calibration_error(probabilities, labels) == pytest.approx(expected)


def test_calibration_error_of_known_cases():
    always_sure = np.tile([1.0, 0.0], (4, 1))
    assert metrics.expected_calibration_error(always_sure, np.array([0, 0, 1, 1])) == 0.5
    three_quarters = np.tile([0.75, 0.25], (4, 1))
    assert metrics.expected_calibration_error(three_quarters, np.array([0, 0, 0, 1])) == pytest.approx(0)


def test_one_right_example():
    scores = scores_of(["a", "b", "c"], np.array([1]), np.array([[0.1, 0.7, 0.2]]))
    assert (scores["accuracy"], scores["balanced_accuracy"], scores["cohen_kappa"]) == (1.0, 1.0, None)
    assert scores["macro"]["f1"] == pytest.approx(1 / 3)  # absent classes count in the macro mean
    assert scores["weighted"] == {"precision": 1.0, "recall": 1.0, "f1": 1.0}
    assert scores["per_class"][0] == {
        "class": "a", "precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0, "predicted": 0,
    }  # fmt: skip


def test_one_wrong_example_has_a_kappa():
    assert scores_of(["a", "b"], np.array([1]), np.array([[0.9, 0.1]]))["cohen_kappa"] == 0.0


@pytest.mark.filterwarnings("error")
def test_no_example():
    scores = scores_of(["a", "b"], np.zeros(0, np.int64), np.zeros((0, 2)))
    nulls = {name for name, value in scores.items() if value is None}
    assert nulls == {"accuracy", "top_5_accuracy", "log_loss", "cohen_kappa", "balanced_accuracy",
                     "expected_calibration_error"}  # fmt: skip
    assert scores["macro"] == scores["weighted"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


def test_mistaken_arguments_are_refused():
    probabilities, labels = np.full((2, 2), 0.5), np.array([0, 1])
    confusion = np.eye(2, dtype=np.int64)
    with pytest.raises(ValueError, match="outside the 2 classes"):
        metrics.confusion_matrix(np.array([0, -1]), labels, 2)
    with pytest.raises(ValueError, match="outside the 2 classes"):
        metrics.log_loss(probabilities, np.array([0, 2]))
    with pytest.raises(ValueError, match="expected 2 integer labels"):
        metrics.accuracy(probabilities, np.array([0.0, 1.0]))
    with pytest.raises(ValueError, match="expected 2 integer labels"):
        metrics.top_k_accuracy(probabilities, np.array([[0], [1]]), 1)  # would broadcast
    with pytest.raises(ValueError, match="were logits passed"):
        metrics.scores(confusion, probabilities * 7, labels, ["a", "b"])
    with pytest.raises(ValueError, match="3 names"):
        metrics.scores(confusion, probabilities, labels, ["a", "b", "c"])
    with pytest.raises(ValueError, match="counts 4 examples"):
        metrics.scores(2 * confusion, probabilities, labels, ["a", "b"])
