"""Every score against scikit-learn on random cases, and the cases where a score has no value."""

import json
import math
import tracemalloc
import warnings

import numpy as np
import pytest
import scipy.stats
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
    return metrics.scores(metrics.outcomes(probabilities, labels), names)


@pytest.mark.parametrize("seed", range(60))
def test_scores_agree_with_scikit_learn(seed):
    names, labels, probabilities = random_case(seed)
    classes, predictions = range(len(names)), probabilities.argmax(axis=1)
    confusion = metrics.confusion_matrix(labels, predictions, len(names))
    ours = scores_of(names, labels, probabilities)
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
    confusion = np.array([[5, 1, 2], [3, 4, 1], [2, 2, 6]])
    labels, predictions = np.repeat(np.argwhere(confusion), confusion.ravel(), axis=0).T
    per_class = metrics.per_class_scores(labels, predictions, 3)
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
    assert nulls == {"accuracy", "accuracy_95_interval", "top_5_accuracy", "log_loss", "cohen_kappa",
                     "balanced_accuracy", "expected_calibration_error"}  # fmt: skip
    assert scores["macro"] == scores["weighted"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


def test_mistaken_arguments_are_refused():
    probabilities, labels = np.full((2, 2), 0.5), np.array([0, 1])
    with pytest.raises(ValueError, match="outside the 2 classes"):
        metrics.confusion_matrix(np.array([0, -1]), labels, 2)
    with pytest.raises(ValueError, match="outside the 2 classes"):
        metrics.log_loss(probabilities, np.array([0, 2]))
    with pytest.raises(ValueError, match="expected 2 integer labels"):
        metrics.accuracy(probabilities, np.array([0.0, 1.0]))
    with pytest.raises(ValueError, match="expected 2 integer labels"):
        metrics.top_k_accuracy(probabilities, np.array([[0], [1]]), 1)  # would broadcast
    with pytest.raises(ValueError, match="were logits passed"):
        metrics.outcomes(probabilities * 7, labels)
    with pytest.raises(ValueError, match="were logits passed"):
        metrics.outcomes(probabilities - 1, labels)
    with pytest.raises(ValueError, match="3 names for 2 classes"):
        scores_of(["a", "b", "c"], labels, probabilities)
    with pytest.raises(ValueError, match="expected 4 integer labels"):
        metrics.outcomes([probabilities, np.full((4, 2), 0.5)], np.array([0, 1, 1]))
    with pytest.raises(ValueError, match="2 labels, 1 rows"):
        metrics.outcomes([probabilities[:1]], labels)
    with pytest.raises(ValueError, match=r"2 rows of \[2, 3\] classes"):
        metrics.outcomes([probabilities[:1], np.full((1, 3), 0.3)], labels)


@pytest.mark.parametrize("seed", range(5))
def test_blocks_of_rows_score_as_the_whole(seed):
    names, labels, probabilities = random_case(seed)
    for rows in (1, 7, len(labels)):
        blocks = (probabilities[start : start + rows] for start in range(0, len(labels), rows))
        assert scores_of(names, labels, blocks) == scores_of(names, labels, probabilities)


def test_slices_of_large_arrays_score_as_the_whole():
    """More than one slice of rows: 1,000 x 3,000 values are three of them."""
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(1000, 3000)).astype(np.float32), rng.integers(0, 3000, 1000)
    expected = -metrics.log_softmax(logits)[np.arange(1000), labels].mean()
    assert metrics.log_loss(logits, labels) == pytest.approx(expected)
    top = np.argsort(-logits, axis=1, kind="stable")[:, :600]
    assert metrics.top_k_accuracy(logits, labels, 600) == (top == labels[:, None]).any(axis=1).mean()
    scores = scores_of([str(i) for i in range(3000)], labels, metrics.softmax(logits).astype(np.float32))
    assert scores["log_loss"] == pytest.approx(expected, rel=1e-5)


def test_10_000_classes_make_no_dense_matrix():
    """Neither of the probabilities, which come in blocks, nor of the counts."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 10_000, 1000)
    predictions = np.where(rng.random(1000) < 0.5, labels, rng.integers(0, 10_000, 1000))

    def blocks():
        for rows in np.split(predictions, 20):
            block = np.zeros((50, 10_000), np.float32)
            block[np.arange(50), rows] = 1
            yield block

    tracemalloc.start()
    outcomes = metrics.outcomes(blocks(), labels)
    scores = metrics.scores(outcomes, [str(i) for i in range(10_000)])
    pairs = metrics.confused_pairs(outcomes.labels, outcomes.predictions)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6  # bytes; the probabilities are 40 MB, a matrix of counts 800 MB
    assert scores["accuracy"] == np.mean(labels == predictions)
    assert scores["macro"]["f1"] == pytest.approx(
        sklearn.metrics.f1_score(labels, predictions, labels=range(10_000), average="macro", zero_division=0)
    )
    assert scores["cohen_kappa"] == pytest.approx(sklearn.metrics.cohen_kappa_score(labels, predictions))
    assert pairs[:, 2].sum() == 1000


@pytest.mark.parametrize("seed", range(5))
def test_confused_pairs_are_the_matrix(seed):
    names, labels, probabilities = random_case(seed)
    predictions = probabilities.argmax(axis=1)
    matrix = sklearn.metrics.confusion_matrix(labels, predictions, labels=range(len(names)))
    true, predicted = np.nonzero(matrix)
    expected = np.column_stack([true, predicted, matrix[true, predicted]])
    assert metrics.confused_pairs(labels, predictions).tolist() == expected.tolist()


@pytest.mark.parametrize(("correct", "total"), [(0, 1), (1, 1), (0, 10), (3, 10), (50, 100), (999, 1000), (7, 50_000)])
def test_wilson_interval_agrees_with_scipy(correct, total):
    expected = scipy.stats.binomtest(correct, total).proportion_ci(0.95, method="wilson")
    z = scipy.stats.norm.ppf(0.975)
    assert metrics.wilson_interval(correct, total, z) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert metrics.wilson_interval(correct, total) == pytest.approx((expected.low, expected.high), abs=1e-4)


def test_wilson_interval_without_examples_and_in_the_scores():
    assert np.isnan(metrics.wilson_interval(0, 0)).all()
    scores = scores_of(["a", "b"], np.array([0, 1]), np.array([[0.9, 0.1], [0.8, 0.2]]))
    # (1/2 + z²/4 ± z sqrt(1/8 + z²/16)) / (1 + z²/2) with z = 1.96, by hand
    assert scores["accuracy_95_interval"] == pytest.approx([0.09453, 0.90547], abs=1e-5)
