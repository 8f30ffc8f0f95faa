"""The exact head against scikit-learn, and cross-validation against fits of its own."""

import numpy as np
import pytest
import tensorflow as tf
from sklearn.linear_model import LogisticRegression

from reports import metrics
from training import cross_validation, solver


def head_features(classes=5, images=120, features=40, seed=0, noise=1.0):
    """(x float32 [N, D], labels [N]) as the gap head sees them: positive, of length 87, correlated."""
    rng = np.random.default_rng(seed)
    labels = np.arange(images) % classes
    hidden = rng.normal(size=(classes, 8))[labels] + noise * rng.normal(size=(images, 8))
    share = np.maximum(hidden @ rng.normal(size=(8, features)) + rng.normal(size=(images, features)), 0) + 0.05
    return (87 * np.sqrt(share / share.sum(axis=1, keepdims=True))).astype(np.float32), labels


def probabilities(features, head):
    return metrics.softmax(features.astype(np.float64) @ head[0] + head[1])


def scikit_learn(features, labels, strength, weights=None):
    """The same problem by another library; weights are those of rows."""
    weights = np.ones(len(labels)) if weights is None else weights
    model = LogisticRegression(C=1 / (strength * weights.sum()), tol=1e-12, max_iter=100_000)
    scale = 87.0  # of unit length the problem is conditioned well enough for its solver
    model.C *= scale**2
    return model.fit(features.astype(np.float64) / scale, labels, weights).predict_proba(
        features.astype(np.float64) / scale
    )


@pytest.mark.parametrize("strength", [100.0, 1.0, 0.01])
@pytest.mark.parametrize(("classes", "noise"), [(5, 0.5), (3, 2.0), (2, 1.0)])
def test_the_optimum_is_scikit_learns(classes, noise, strength):
    x, labels = head_features(classes, noise=noise)
    head = solver.solve(x, labels, classes, strength)
    assert head[0].dtype == head[1].dtype == np.float32
    expected = scikit_learn(x, labels, strength)
    if classes == 2:  # scikit-learn penalises the difference of two weight vectors as one: |w|^2, not |w/2|^2 + |w/2|^2
        expected = scikit_learn(x, labels, strength / 2)
    np.testing.assert_allclose(probabilities(x, head), expected, atol=1e-4)


def test_weights_of_rows_and_classes_multiply():
    x, labels = head_features(classes=3, noise=2.0)
    rows, classes = np.random.default_rng(1).uniform(0, 2, len(x)), np.array([1.0, 0.3, 2.0])
    head = solver.solve(x, labels, 3, 0.5, class_weights=classes, sample_weights=rows)
    expected = scikit_learn(x, labels, 0.5, rows * classes[labels])
    np.testing.assert_allclose(probabilities(x, head), expected, atol=1e-4)


def test_label_smoothing_is_that_of_training():
    """At the optimum the gradient of training's objective (TensorFlow's) plus that of the penalty is zero."""
    x, labels = head_features(classes=4, noise=2.0)
    smoothing, strength = 0.1, 0.5
    weights, biases = solver.solve(x, labels, 4, strength, label_smoothing=smoothing)
    w, b = tf.Variable(weights.astype(np.float64)), tf.Variable(biases.astype(np.float64))
    with tf.GradientTape() as tape:
        logits = tf.matmul(tf.constant(x, tf.float64), w) + b
        plain = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        uniform = tf.reduce_logsumexp(logits, axis=1) - tf.reduce_mean(logits, axis=1)
        loss = tf.reduce_mean((1 - smoothing) * plain + smoothing * uniform) + strength / 2 * tf.reduce_sum(w * w)
    for gradient in tape.gradient(loss, [w, b]):
        assert np.abs(gradient).max() < 1e-4  # of features that are 87 long


def test_more_features_than_are_turned(monkeypatch):
    x, labels = head_features(classes=3)
    expected = probabilities(x, solver.solve(x, labels, 3, 0.5))
    monkeypatch.setattr(solver, "MOST_TURNED", 10)
    np.testing.assert_allclose(probabilities(x, solver.solve(x, labels, 3, 0.5)), expected, atol=1e-4)


def test_more_features_than_rows_and_constant_ones():
    x, labels = head_features(classes=3, images=12)
    x[:, 5] = 3.0
    head = solver.solve(x, labels, 3, 0.5)
    np.testing.assert_allclose(probabilities(x, head), scikit_learn(x, labels, 0.5), atol=1e-4)
    assert np.abs(head[0][5]).max() < 1e-6  # a feature that never varies says nothing


def test_start_blocks_and_threads_do_not_change_the_answer(monkeypatch):
    x, labels = head_features(classes=3, noise=2.0)
    passes = []
    weak = solver.solve(x, labels, 3, 0.5, each=lambda: passes.append(0))
    cold = len(passes)
    assert all(np.array_equal(a, b) for a, b in zip(weak, solver.solve(x, labels, 3, 0.5), strict=True))
    warm = solver.solve(x, labels, 3, 0.5, start=weak, each=lambda: passes.append(0))
    assert len(passes) - cold < cold / 2
    np.testing.assert_allclose(probabilities(x, warm), probabilities(x, weak), atol=1e-5)
    monkeypatch.setattr(solver, "BLOCK_ROWS", 7)
    blocks = solver.solve(x, labels, 3, 0.5)
    np.testing.assert_allclose(probabilities(x, blocks), probabilities(x, weak), atol=1e-5)
    monkeypatch.setattr(solver, "cores", lambda: 1)
    assert all(np.array_equal(a, b) for a, b in zip(blocks, solver.solve(x, labels, 3, 0.5), strict=True))


def test_what_can_not_be_solved_is_said():
    x, labels = head_features(classes=3, images=12)
    with pytest.raises(ValueError, match="more than 0"):
        solver.solve(x, labels, 3, 0.0)
    with pytest.raises(ValueError, match="outside the 2 classes"):
        solver.solve(x, labels, 2, 1.0)
    with pytest.raises(ValueError, match="expected 12 integer labels"):
        solver.solve(x, labels[:5], 3, 1.0)
    with pytest.raises(ValueError, match="expected 12 sample and 3 class weights"):
        solver.solve(x, labels, 3, 1.0, class_weights=[1.0])
    with pytest.raises(ValueError, match="no row has a weight"):
        solver.solve(x, labels, 3, 1.0, sample_weights=np.zeros(12))
    with pytest.raises(RuntimeError, match="was not reached"):
        solver.solve(x, labels, 3, 1.0, tolerance=1e-300)
    x[3, 4] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        solver.solve(x, labels, 3, 1.0)


def stop():
    raise InterruptedError


def test_a_callback_ends_it():
    x, labels = head_features(classes=3, images=30)
    with pytest.raises(InterruptedError):
        solver.solve(x, labels, 3, 1.0, each=stop)
    with pytest.raises(InterruptedError):
        cross_validation.cross_validate(x, labels, 3, np.arange(30), [1.0], each=stop)


def two_views(x, seed=5):
    return np.concatenate([x, x + np.random.default_rng(seed).normal(0, 0.3, x.shape).astype(np.float32)])


def test_cross_validation_against_fits_of_its_own_folds():
    x, labels = head_features(classes=3, images=90, noise=2.0)
    x, labels, groups = two_views(x), np.tile(labels, 2), np.tile(np.arange(90), 2)
    strengths, reported = [0.3, 30.0, 3.0], list[cross_validation.StrengthRecord]()
    found = cross_validation.cross_validate(
        x, labels, 3, groups, strengths, folds=4, seed=3, tolerance=1e-6, report=reported.append
    )
    assert [record.strength for record in found.records] == [30.0, 3.0, 0.3]
    assert list(found.records) == reported
    folds = cross_validation.stratified_folds(labels, groups, 4, 3)
    for record in found.records:
        expected = np.zeros((180, 3))
        for fold in range(4):
            held_out = folds == fold
            head = solver.solve(x[~held_out], labels[~held_out], 3, record.strength)
            expected[held_out] = np.log(probabilities(x[held_out], head))
        right = (expected.argmax(axis=1) == labels).reshape(2, 90).mean(axis=0)  # of each image
        losses = -expected[np.arange(180), labels].reshape(2, 90).mean(axis=0)
        assert record.log_loss == pytest.approx(losses.mean(), abs=1e-3)
        assert record.log_loss_error == pytest.approx(losses.std() / np.sqrt(90), rel=0.01)
        assert record.accuracy == pytest.approx(right.mean())
        assert record.accuracy_error == pytest.approx(right.std() / np.sqrt(90))
        if record.strength == found.best:
            np.testing.assert_allclose(metrics.log_softmax(found.logits), expected, atol=0.02)
    assert found.best == min(found.records, key=lambda record: record.log_loss).strength
    assert found.scored.all()


def test_folds_keep_images_whole_and_classes_spread():
    labels = np.repeat([0, 0, 1, 2, 1, 0, 0, 0, 0, 1], 2)
    groups = np.repeat(np.arange(10) * 7, 2)
    folds = cross_validation.stratified_folds(labels, groups, 3, 0)
    assert (folds[::2] == folds[1::2]).all()
    counts = np.array([[((folds == f) & (labels == c)).sum() // 2 for f in range(3)] for c in range(3)])
    assert np.ptp(counts.sum(axis=0)) <= 1
    assert (np.ptp(counts, axis=1) <= 1).all()
    assert not np.array_equal(folds, cross_validation.stratified_folds(labels, groups, 3, 1))
    assert set(cross_validation.stratified_folds(labels, groups, 50, 0)) == set(range(10))
    with pytest.raises(ValueError, match="different labels"):
        cross_validation.stratified_folds(np.array([0, 1]), np.array([4, 4]), 2, 0)
    with pytest.raises(ValueError, match="two images"):
        cross_validation.stratified_folds(np.array([0, 0]), np.array([4, 4]), 2, 0)


def test_classes_with_fewer_images_than_folds():
    x, labels = head_features(classes=3, images=60, noise=0.3)
    labels = np.where(labels == 2, 1, labels)
    labels[4], labels[[10, 20]] = 2, 3  # a class of one image, one of two, and class 4 has none
    found = cross_validation.cross_validate(x, labels, 5, np.arange(60), cross_validation.strength_grid(x))
    assert np.isfinite(found.logits).all()
    assert list(np.flatnonzero(~found.scored)) == [4]
    assert found.logits[4].argmax() in (0, 1, 3)
    assert found.logits[4, 2] == found.logits[4, 4] == found.logits[4].min()
    right = (found.logits.argmax(axis=1) == labels)[found.scored].mean()
    assert {r.strength: r.accuracy for r in found.records}[found.best] == pytest.approx(right)
    passes: list[int] = []
    cold = solver.solve(x, labels, 5, found.best, each=lambda: passes.append(0))
    warm = solver.solve(x, labels, 5, found.best, start=found.start, each=lambda: passes.append(1))
    assert sum(passes) < len(passes) / 2
    np.testing.assert_allclose(probabilities(x, warm), probabilities(x, cold), atol=1e-4)


def test_classes_of_one_image_each():
    x, labels = head_features(classes=3, images=3)
    with pytest.raises(ValueError, match="no class has two images"):
        cross_validation.cross_validate(x, labels, 3, np.arange(3), [1.0])


def test_a_single_class():
    x, _ = head_features(classes=3, images=12)
    found = cross_validation.cross_validate(x, np.zeros(12, np.int64), 1, np.arange(12), [1.0])
    assert (found.records[0].log_loss, found.records[0].accuracy) == (0.0, 1.0)
    assert not solver.solve(x, np.zeros(12, np.int64), 1, 1.0)[0].any()


def test_class_weights_weigh_the_loss_that_chooses():
    x, labels = head_features(classes=3, images=60, noise=2.0)
    found = cross_validation.cross_validate(x, labels, 3, np.arange(60), [1.0], class_weights=[1.0, 5.0, 0.0])
    losses = -metrics.log_softmax(found.logits)[np.arange(60), labels]
    assert found.records[0].log_loss == pytest.approx(np.average(losses, weights=np.array([1.0, 5.0, 0.0])[labels]))


def test_the_grid_follows_the_scale_of_the_features_and_ends_early():
    x, labels = head_features(classes=3, images=90, noise=2.0)
    grid = cross_validation.strength_grid(x)
    np.testing.assert_allclose(cross_validation.strength_grid(10 * x), 100 * grid, rtol=1e-5)
    small = cross_validation.cross_validate(x, labels, 3, np.arange(90), grid)
    large = cross_validation.cross_validate(10 * x, labels, 3, np.arange(90), 100 * grid)
    assert not small.at_edge
    assert large.best == pytest.approx(100 * small.best)
    np.testing.assert_allclose(large.logits, small.logits, atol=0.05)
    losses = [record.log_loss for record in small.records]
    assert len(losses) == int(np.argmin(losses)) + 1 + cross_validation.PATIENCE < len(grid)
    assert cross_validation.cross_validate(x, labels, 3, np.arange(90), grid[:2]).at_edge
