"""Calibration, label issues, neighbours and significance against SciPy, scikit-learn and hand computation."""

import io
import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import sklearn.metrics
from PIL import Image
from sklearn.neighbors import NearestNeighbors

from dataset.images import read_image
from reports import calibration, label_issues, metrics, neighbours, significance
from training.cross_validation import cross_validate, strength_grid


def logits_of_temperature(temperature, count=4000, classes=4, seed=0):
    """(logits, labels) whose labels are drawn from softmax(logits / temperature)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (count, classes))
    cumulative = metrics.softmax(logits / temperature).cumsum(axis=1)
    return logits, np.minimum((cumulative < rng.uniform(size=(count, 1))).sum(axis=1), classes - 1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_made_the_labels_is_found(temperature):
    logits, labels = logits_of_temperature(temperature)
    fitted = calibration.fit_temperature(logits, labels)
    assert fitted == pytest.approx(temperature, rel=0.1)
    other = scipy.optimize.minimize_scalar(
        lambda t: metrics.log_loss(logits / t, labels), bounds=(0.1, 10), method="bounded", options={"xatol": 1e-9}
    )
    assert fitted == pytest.approx(other.x, rel=1e-4)
    before, after = metrics.softmax(logits), metrics.softmax(logits / fitted)
    assert np.array_equal(before.argmax(axis=1), after.argmax(axis=1))
    if temperature != 1:
        errors = [metrics.expected_calibration_error(p, labels) for p in (before, after)]
        assert errors[1] < errors[0] / 2


def test_temperatures_without_an_optimum():
    logits = np.array([[2.0, 0.0], [0.0, 3.0], [1.0, 0.5]])
    assert calibration.fit_temperature(logits, np.array([0, 1, 0])) == 1.0  # all right
    assert calibration.fit_temperature(logits, np.array([1, 0, 1])) == calibration.TEMPERATURES[1]  # all wrong
    assert calibration.fit_temperature(np.zeros((0, 2)), np.zeros(0, np.int64)) == 1.0
    faint = np.concatenate([np.full((999, 1), 1e-4), np.full((1, 1), -1e-7)])
    labels = np.zeros(1000, np.int64)
    assert calibration.fit_temperature(np.hstack([faint, -faint]), labels) == calibration.TEMPERATURES[0]
    with pytest.raises(ValueError, match="not finite"):
        calibration.fit_temperature(np.array([[np.nan, 0.0]]), np.array([0]))


def test_reliability_by_hand():
    probabilities = np.array([[0.95, 0.05], [0.3, 0.7], [0.65, 0.35], [0.5, 0.5], [0.0, 1.0]])
    part = calibration.reliability(probabilities, np.array([0, 0, 0, 1, 1]), bins=10)
    assert part.count.tolist() == [0, 0, 0, 0, 1, 0, 2, 0, 0, 2]
    assert part.accuracy[[4, 6, 9]].tolist() == [0.0, 0.5, 1.0]
    assert part.confidence[[4, 6, 9]] == pytest.approx([0.5, 0.675, 0.975])
    assert np.isnan(part.accuracy[part.count == 0]).all()
    assert np.isnan(part.confidence[part.count == 0]).all()


def test_reliability_adds_up_to_the_calibration_error(tmp_path):
    logits, labels = logits_of_temperature(2.0, count=500)
    parts = {f"T = {t}": calibration.reliability(metrics.softmax(logits / t), labels) for t in (1, 2)}
    for t, part in zip((1, 2), parts.values(), strict=True):
        error = np.nansum(part.count * np.abs(part.accuracy - part.confidence)) / len(labels)
        assert error == pytest.approx(metrics.expected_calibration_error(metrics.softmax(logits / t), labels))
    calibration.draw_reliability(tmp_path / "two.png", parts, "val: 500 examples")
    calibration.draw_reliability(tmp_path / "one.png", {"as trained": parts["T = 1"]})
    colours = [
        set(map(tuple, np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")).reshape(-1, 3).tolist()))
        for name in ("one", "two")
    ]
    assert [(0, 114, 178) in c for c in colours] == [True, True]
    assert [(230, 159, 0) in c for c in colours] == [False, True]


def test_confident_joint_by_hand():
    probabilities = np.array(
        [[0.9, 0.1, 0.0], [0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.2, 0.6, 0.2], [0.3, 0.7, 0.0], [0.85, 0.15, 0.0]]
    )
    labels = np.array([0, 0, 0, 1, 1, 1])
    thresholds = label_issues.class_thresholds(probabilities, labels)
    assert thresholds[:2] == pytest.approx([1.7 / 3, 1.45 / 3])  # means of 0.9, 0.7, 0.1 and of 0.6, 0.7, 0.15
    assert thresholds[2] == math.inf
    joint = label_issues.confident_joint(probabilities, labels)
    assert joint.tolist() == [[2, 1, 0], [1, 2, 0], [0, 0, 0]]
    assert label_issues.estimate_joint(joint, labels) == pytest.approx(joint / 6)
    issues = label_issues.find_label_issues(probabilities, labels)
    assert [(i.index, i.given, i.suggested) for i in issues] == [(2, 0, 1), (5, 1, 0)]  # both by 0.7
    assert [i.score for i in issues] == pytest.approx([0.7, 0.7])
    assert label_issues.find_label_issues(probabilities[:0], labels[:0]) == []


def test_who_reaches_no_threshold_counts_for_nothing():
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.45, 0.55], [0.2, 0.8]])
    labels = np.array([0, 0, 1, 0, 1])
    assert label_issues.confident_classes(probabilities, labels).tolist() == [0, 0, 1, -1, -1]
    assert label_issues.find_label_issues(probabilities, labels) == []


def test_a_label_that_is_likelier_than_the_rest_is_no_issue():
    """0.4 is over the threshold of its class and 0.6 under that of the label, but the label is likelier."""
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.7, 0.3]])
    labels = np.array([0, 0, 0, 1, 1])
    assert label_issues.confident_joint(probabilities, labels)[0, 1] == 1
    assert 2 not in [issue.index for issue in label_issues.find_label_issues(probabilities, labels)]


def test_the_joint_counts_every_image_once():
    rng = np.random.default_rng(0)
    probabilities, labels = rng.dirichlet(np.ones(5), 300), rng.integers(0, 5, 300)
    joint = label_issues.estimate_joint(label_issues.confident_joint(probabilities, labels), labels)
    assert joint.sum() == pytest.approx(1)
    assert joint.sum(axis=1) == pytest.approx(np.bincount(labels, minlength=5) / 300)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_flips_are_found(seed):
    """3 % of labels flipped among 8 classes whose means lie about 8.5 standard deviations apart."""
    rng = np.random.default_rng(seed)
    true = np.arange(800) % 8
    x = (6 / np.sqrt(30) * rng.normal(size=(8, 30))[true] + rng.normal(size=(800, 30))).astype(np.float32)
    flipped = rng.choice(800, 24, replace=False)
    labels = true.copy()
    labels[flipped] = (true[flipped] + rng.integers(1, 8, 24)) % 8
    found = cross_validate(x, labels, 8, np.arange(800), strength_grid(x))
    issues = label_issues.find_label_issues(metrics.softmax(found.logits), labels)
    hits = [issue for issue in issues if issue.index in flipped]
    assert len(hits) >= 0.9 * 24
    assert len(issues) - len(hits) <= len(hits) / 3
    assert np.mean([issue.suggested == true[issue.index] for issue in hits]) > 0.9
    scores = [issue.score for issue in issues]
    assert scores == sorted(scores, reverse=True)
    joint = label_issues.estimate_joint(label_issues.confident_joint(metrics.softmax(found.logits), labels), labels)
    assert 1 - np.trace(joint) == pytest.approx(0.03, abs=0.015)


def directions(count, features=24, seed=0):
    return np.random.default_rng(seed).uniform(0, 1, (count, features)).astype(np.float32)


@pytest.mark.parametrize("block", [7, 1024])
def test_kth_distances_are_scikit_learns(block, monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK_ROWS", block)
    references, queries = directions(60), directions(20, seed=1)
    scaled = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (references, queries)]
    theirs = NearestNeighbors(n_neighbors=4, algorithm="brute").fit(scaled[0])
    expected = theirs.kneighbors(scaled[1])[0]
    done: list[int] = []
    assert neighbours.nearest(3 * queries, references, 1)[0] == pytest.approx(expected[:, 0], abs=1e-3)
    fourth, rows = neighbours.nearest(queries, references, 4, each=done.append)
    assert fourth == pytest.approx(expected[:, 3], abs=1e-3)
    assert np.sort(rows).tolist() == np.sort(theirs.kneighbors(scaled[1])[1]).tolist()
    assert sum(done) == 20
    own = neighbours.nearest(references, references, 3, skip_self=True)[0]
    assert own == pytest.approx(theirs.kneighbors(scaled[0])[0][:, 3], abs=1e-3)
    both, two = (neighbours.nearest(queries, references[:2], k)[0] for k in (9, 2))
    assert both == pytest.approx(two)
    with pytest.raises(ValueError, match="among 0 references"):
        neighbours.nearest(references[:1], references[:1], 1, skip_self=True)


def test_a_threshold_that_known_images_exceed_at_the_rate():
    distances = np.random.default_rng(0).permutation(np.arange(1, 100)).astype(np.float64)  # 1 ... 99
    assert neighbours.unknown_threshold(distances, 0.05) == 95  # the ceil(100 * 0.95)-th: 4 of 99 exceed it
    assert neighbours.unknown_threshold(distances, 0.01) == 99
    with pytest.raises(ValueError, match="takes 199 held-out images or more, got 99"):
        neighbours.unknown_threshold(distances, 0.005)
    with pytest.raises(ValueError, match="between 0 and 1"):
        neighbours.unknown_threshold(distances, 1.0)
    rng = np.random.default_rng(1)
    rates = [(rng.normal(size=50) > neighbours.unknown_threshold(rng.normal(size=50), 0.1)).mean() for _ in range(400)]
    assert 0.08 < np.mean(rates) <= 0.105  # of new images; 0.1 at most in expectation


def test_robust_limits_of_a_lognormal_sample():
    sample = np.exp(np.random.default_rng(0).normal(-1, 0.2, 20_000))
    low, high = neighbours.robust_limits(np.concatenate([sample, np.zeros(100)]), 3.0)
    assert [math.log(low), math.log(high)] == pytest.approx([-1.6, -0.4], abs=0.02)


@pytest.mark.parametrize("block", [13, 1024])
def test_planted_copies_are_found(block, monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK_ROWS", block)
    x = directions(200)
    copies = np.concatenate([x[:10] * 1.01 + 0.01 * directions(10, seed=2), x[[3]]])
    x = np.concatenate([x, copies])
    found = neighbours.near_duplicates(x)
    expected = {*((i, 200 + i) for i in range(10)), (3, 210), (203, 210)}
    assert set(map(tuple, found.pairs.tolist())) == expected
    assert found.pairs[0].tolist() == [3, 210]
    cosines = sklearn.metrics.pairwise.cosine_similarity(x)
    assert found.similarities == pytest.approx(cosines[found.pairs[:, 0], found.pairs[:, 1]], abs=1e-5)
    np.fill_diagonal(cosines, -1)
    assert found.nearest == pytest.approx(cosines.max(axis=1), abs=1e-5)
    groups = [group.tolist() for group in neighbours.duplicate_groups(found.pairs, len(x))]
    assert groups == [[i, 200 + i, *([210] if i == 3 else [])] for i in range(10)]
    given = neighbours.near_duplicates(x, threshold=0.9)
    assert len(given.pairs) == (np.triu(cosines, 1) >= 0.9).sum() > len(expected)
    monkeypatch.setattr(neighbours, "MOST_PAIRS", 5)
    with pytest.raises(ValueError, match="more than 5 pairs"):
        neighbours.near_duplicates(x, threshold=0.5)


def copy_of(image, scale, quality):
    """The picture at another size, through JPEG."""
    picture = Image.fromarray(image)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file).convert("RGB"))


def test_re_encoded_copies_of_photographs_are_found(shared):
    paths = sorted(shared.glob("mini_natural_images/val/*/*"))[::12]
    images = [read_image(str(path)) for path in paths]
    chosen = range(0, len(images), 5)
    ways = [(0.7, 60), (0.5, 80), (1.5, 40), (0.9, 95)]
    images += [copy_of(images[i], *ways[n % 4]) for n, i in enumerate(chosen)]
    found = neighbours.near_duplicates(np.stack([neighbours.thumbnail_features(image) for image in images]))
    pairs = set(map(tuple, found.pairs.tolist()))
    planted = {(i, len(paths) + n) for n, i in enumerate(chosen)}
    assert planted <= pairs
    assert len(pairs - planted) <= 3  # the photographs themselves hold a few


def test_copies_are_found_where_every_image_has_some():
    x = directions(150)
    x = np.concatenate([x, x + 0.01 * directions(150, seed=1), x + 0.01 * directions(150, seed=2)])
    groups = neighbours.duplicate_groups(neighbours.near_duplicates(x).pairs, len(x))
    assert [group.tolist() for group in groups] == [[i, 150 + i, 300 + i] for i in range(150)]


def test_exact_copies_among_few_images():
    x = directions(4)[[0, 1, 2, 1]]
    assert neighbours.near_duplicates(x).pairs.tolist() == [[1, 3]]


def test_distinct_images_have_no_duplicates_and_few_images_no_statistics():
    assert len(neighbours.near_duplicates(directions(300)).pairs) == 0
    for count in range(3):
        assert len(neighbours.near_duplicates(directions(count)).pairs) == 0
        assert len(neighbours.find_outliers(directions(count))[0]) == 0
    assert neighbours.duplicate_groups(np.zeros((0, 2), np.int64), 3) == []


def clusters(seed=0):
    """Features of two classes, 150 images each, the first five times as narrow as the second, and their labels."""
    rng, labels = np.random.default_rng(seed), np.repeat([0, 1], 150)
    centres, spreads = rng.uniform(0, 1, (2, 24)), np.array([0.05, 0.25])
    return (centres[labels] + spreads[labels, None] * rng.normal(0, 1, (300, 24))).astype(np.float32), labels


def test_planted_outliers_are_the_first_listed():
    x, _ = clusters()
    x[[7, 200]] = np.eye(24, dtype=np.float32)[[0, 9]]
    rows, distances = neighbours.find_outliers(x)
    assert sorted(rows[:2]) == [7, 200]
    assert len(rows) == 3  # one in a hundred, since no limit for both classes is low enough
    assert distances == pytest.approx(neighbours.nearest(x, x, neighbours.OUTLIER_NEIGHBOUR, skip_self=True)[0])
    assert distances[rows].tolist() == sorted(distances, reverse=True)[:3]


def test_more_than_one_in_a_hundred_are_outliers_where_they_are_beyond_the_limit():
    x = directions(300)
    planted = [7, *range(100, 106)]
    x[planted] = np.eye(24, dtype=np.float32)[[0, *[5] * 6]]  # six of them are copies of each other
    assert sorted(neighbours.find_outliers(x)[0]) == planted


def test_strangeness_sees_what_is_near_a_class_of_similar_images():
    x, labels = clusters()
    rng = np.random.default_rng(1)
    known = x + 0.3 * np.array([0.05, 0.25])[labels, None] * rng.normal(0, 1, x.shape)
    strange = x[:50] + 0.2 * rng.normal(0, 1, (50, 24))  # usual in the second class, far for the first
    spreads = neighbours.nearest(x, x, 10, skip_self=True)[0]

    def found(score):
        limit = neighbours.unknown_threshold(score(known), 0.05)
        return (score(strange) > limit).mean()

    assert found(lambda queries: neighbours.strangeness(queries, x, spreads, 10)) > 0.9
    assert found(lambda queries: neighbours.nearest(queries, x, 10)[0]) == 0.0


def answers(both, first, second, neither):
    return np.array([1] * both + [1] * first + [0] * second + [0] * neither, bool), np.array(
        [1] * both + [0] * first + [1] * second + [0] * neither, bool
    )


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (3, 9), (9, 3), (6, 6), (400, 330), (0, 40)])
def test_mcnemar_is_a_binomial_test(first, second):
    result = significance.mcnemar(*answers(20, first, second, 5))
    assert (result.only_first, result.only_second) == (first, second)
    expected = scipy.stats.binomtest(first, first + second).pvalue if first + second else 1.0
    assert result.p_value == pytest.approx(expected)
    if (first, second) == (3, 9):
        assert result.p_value == pytest.approx(2 * sum(math.comb(12, k) for k in range(4)) / 2**12)


def test_the_bootstrap_interval_agrees_with_drawing_images():
    first, second = answers(150, 10, 25, 15)
    low, high = significance.accuracy_difference_interval(first, second)
    assert (low, high) == significance.accuracy_difference_interval(first, second)
    theirs = scipy.stats.bootstrap(
        (first, second), lambda a, b, axis: b.mean(axis=axis) - a.mean(axis=axis), paired=True, vectorized=True,
        method="percentile", n_resamples=20_000, rng=1,
    ).confidence_interval  # fmt: skip
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.006)
    assert low < 15 / 200 < high
    backwards = significance.accuracy_difference_interval(second, first)
    assert backwards == pytest.approx((-high, -low), abs=0.006)
    assert significance.accuracy_difference_interval(first, first) == (0.0, 0.0)


def test_answers_must_be_paired():
    with pytest.raises(ValueError, match="expected two bool"):
        significance.mcnemar(np.zeros(3, bool), np.zeros(4, bool))
    with pytest.raises(ValueError, match="expected two bool"):
        significance.mcnemar(np.zeros(3), np.zeros(3))
    with pytest.raises(ValueError, match="at least one image"):
        significance.accuracy_difference_interval(np.zeros(0, bool), np.zeros(0, bool))
