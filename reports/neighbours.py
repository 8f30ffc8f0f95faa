"""Near-duplicates, outliers and unknown images, from distances between features of the images.

Features are scaled to length 1 first, so that similarity is the cosine and distance is Euclidean on the unit sphere.
Products are made in blocks: 100,000 images of 512 features take less than 2 GB.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import scipy.sparse.csgraph
from PIL import Image

BLOCK_ROWS = 1024  # of similarities at a time, [BLOCK_ROWS, N]
MOST_PAIRS = 20_000_000  # pairs of near-duplicates that are listed: more would take GBs and no one would read them
SAMPLE = 4096  # images whose distances set the threshold of near-duplicates
# The neighbour whose distance is taken: not the nearest, which are copies where most images have one or some.
DUPLICATE_NEIGHBOUR = 5
DUPLICATE_DEVIATIONS = 7.0  # so many, since the nearest of distinct images lies some nearer than the fifth
OUTLIER_DEVIATIONS = 4.0
OUTLIER_SHARE = 0.01  # of all images: what a person can look at
OUTLIER_NEIGHBOUR = 10  # up to nine copies of an outlier do not hide it
FEWEST = 10  # images that a distribution is taken from
EXACT = 1 - 1e-5  # cosine of features that differ by rounding only
THUMBNAIL = 12  # side in pixels


@dataclass(frozen=True)
class Duplicates:
    """pairs: int64 [P, 2], rows i < j; similarities: float32 [P]; both in the order of falling similarity.

    threshold: the least similarity of a pair; nearest: float32, the similarity of the nearest other image, for up to
    `SAMPLE` images spread evenly over all: what a picture shows beside the threshold.
    """

    pairs: np.ndarray
    similarities: np.ndarray
    threshold: float
    nearest: np.ndarray


def unit_length(features: np.ndarray) -> np.ndarray:
    """Features float32 [N, D] scaled to length 1 each; a row of zeros stays."""
    features = np.asarray(features, np.float32)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def thumbnail_features(image: np.ndarray) -> np.ndarray:
    """What a picture shares with its copies of other sizes and qualities, float32 [432], from uint8 [H, W, 3].

    The picture averaged to 12 x 12 pixels, less its mean. For near-duplicates this tells more than features of a
    network do: those of a small picture change much with its sharpness, and do not change where another picture shows
    the same kind of thing.
    """
    small = Image.fromarray(image).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    values = np.asarray(small, np.float32).ravel()
    return values - values.mean()


def robust_limits(distances: np.ndarray, deviations: float) -> tuple[float, float]:
    """Limits beyond which a distance does not belong to the bulk: exp(median -+ deviations * 1.4826 * MAD) of logs.

    MAD is the median absolute deviation; 1.4826 makes it the standard deviation of a normal distribution (Hampel 1974).
    Up to half of the distances may be of another kind. Logs, since distances between neighbours are skewed.
    """
    logs = np.log(np.maximum(np.asarray(distances, np.float64), 1e-6))
    middle = np.median(logs)
    reach = deviations * 1.4826 * np.median(np.abs(logs - middle))
    return float(np.exp(middle - reach)), float(np.exp(middle + reach))


def nearest(
    queries: np.ndarray,
    references: np.ndarray,
    k: int,
    *,
    skip_self: bool = False,
    each: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The distance of each query to its k-th nearest reference, float32 [Q], and its k nearest, rows int64 [Q, k].

    Args:
        queries: [Q, D]; references: [N, D]; both are scaled to length 1.
        k: from 1; where there are fewer references, all of them.
        skip_self: the queries are the references, and none is its own neighbour.
        each: called with the number of queries after every block; it may raise to stop.
    """
    most = len(references) - skip_self
    if most < 1 or k < 1:
        raise ValueError(f"no neighbour number {k} among {most} references")
    position = len(references) - min(k, most)
    distances, rows = [np.zeros(0, np.float32)], [np.zeros((0, min(k, most)), np.int64)]
    for start, similarity in _similarities(unit_length(queries), unit_length(references)):
        of_block = np.arange(len(similarity))
        if skip_self:
            similarity[of_block, start + of_block] = -np.inf
        order = np.argpartition(similarity, position, axis=1)[:, position:]  # the k-th nearest is the first
        distances.append(_distance(similarity[of_block, order[:, 0]]))
        rows.append(order)
        if each:
            each(len(similarity))
    return np.concatenate(distances), np.concatenate(rows)


def strangeness(queries: np.ndarray, references: np.ndarray, spreads: np.ndarray, k: int) -> np.ndarray:
    """How unlike the references each query is, float32 [Q]: d / sqrt(mean of the spreads of its k nearest references).

    d is the distance to the k-th nearest reference, the score of Sun et al. 2022, "Out-of-Distribution Detection with
    Deep Nearest Neighbors" (arXiv 2204.06507), equation 2. `spreads` [N] are the references' own such distances among
    each other. d alone overlooks what lies near a class of similar images, where every known image is much nearer.
    d / spread, the ratio of Breunig et al. 2000, "LOF: Identifying Density-Based Local Outliers", overlooks what lies
    near a varied class. The square root takes half of each; measured in docs/results.md.
    """
    distances, rows = nearest(queries, references, k)
    return distances / np.sqrt(np.maximum(spreads[rows].mean(axis=1), 1e-6))


def unknown_threshold(scores: np.ndarray, rate: float) -> float:
    """The score that a known image exceeds with a probability of at most `rate`, from those of held-out known ones.

    The ceil((N + 1) (1 - rate))-th smallest: split conformal prediction (Vovk et al. 2005), which holds for any
    distribution; of the N themselves at most N * rate exceed it.

    Raises ValueError for a rate outside 0..1 and where N is too small to tell: it takes 1 / rate - 1 images.
    """
    if not 0 < rate < 1:
        raise ValueError(f"the rate must lie between 0 and 1, got {rate}")
    rank = math.ceil((len(scores) + 1) * (1 - rate) - 1e-9)
    if rank > len(scores):
        needed = math.ceil(1 / rate - 1 - 1e-9)
        raise ValueError(f"a rate of {rate:g} takes {needed} held-out images or more, got {len(scores)}")
    return float(np.sort(scores)[rank - 1])


def find_outliers(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The images farthest from all others: rows int64, the farthest first; and every image's distance, float32 [N].

    The distance is that to the `OUTLIER_NEIGHBOUR`-th nearest other image, whatever its class. Listed are the farthest
    `OUTLIER_SHARE` of all, and those beyond the upper of `robust_limits` where they are more. A limit alone fails:
    where some classes are more varied than others, it lies beyond every image, while images of something else are still
    among the farthest; limits of each class were measured to find fewer of them. Features are [N, D]; among fewer than
    `FEWEST` images there is no outlier.
    """
    if len(features) < FEWEST:
        return np.zeros(0, np.int64), np.zeros(len(features), np.float32)
    distances = nearest(features, features, OUTLIER_NEIGHBOUR, skip_self=True)[0]
    beyond = int((distances > robust_limits(distances, OUTLIER_DEVIATIONS)[1]).sum())
    count = max(beyond, math.ceil(OUTLIER_SHARE * len(features)))
    return np.argsort(-distances, kind="stable")[:count], distances


def near_duplicates(
    features: np.ndarray, threshold: float | None = None, each: Callable[[int], None] | None = None
) -> Duplicates:
    """Pairs of images whose features point the same way.

    Without a threshold it is taken from the data: a pair counts where it is closer than the lower of `robust_limits` of
    the distances to the fifth nearest other image, of up to `SAMPLE` images. So most images may have up to four copies.
    Of fewer than `FEWEST` images only exact copies count.

    Args:
        features: [N, D].
        threshold: the least cosine similarity of a pair.
        each: called with the number of images after every block; it may raise to stop.

    Raises:
        ValueError: for more than `MOST_PAIRS` pairs.
    """
    unit = unit_length(features)
    sample = np.linspace(0, len(unit) - 1, min(len(unit), SAMPLE)).astype(np.int64)
    most_similar, fifth = _sampled_neighbours(unit, sample)
    if threshold is None:
        limit = robust_limits(_distance(fifth), DUPLICATE_DEVIATIONS)[0] if len(unit) >= FEWEST else 0.0
        threshold = min(1 - limit**2 / 2, EXACT)
    pairs, similarities, count = [np.zeros((0, 2), np.int64)], [np.zeros(0, np.float32)], 0
    for start, similarity in _similarities(unit, unit, upper=True):
        rows, columns = np.nonzero(np.triu(similarity >= threshold, 1))
        count += len(rows)
        if count > MOST_PAIRS:
            raise ValueError(f"more than {MOST_PAIRS:,} pairs have a similarity of {threshold:.4f} or more: raise it")
        pairs.append(np.stack([rows, columns], axis=1) + start)
        similarities.append(similarity[rows, columns])
        if each:
            each(len(similarity))
    found = np.concatenate(similarities)
    order = np.argsort(-found, kind="stable")
    return Duplicates(np.concatenate(pairs)[order], found[order], float(threshold), most_similar)


def duplicate_groups(pairs: np.ndarray, image_count: int) -> list[np.ndarray]:
    """Groups of two images or more that pairs connect, int64 rows in order each, groups by their first row."""
    ones = np.ones(len(pairs), bool)
    graph = scipy.sparse.coo_array((ones, (pairs[:, 0], pairs[:, 1])), shape=(image_count, image_count))
    count, group_of = scipy.sparse.csgraph.connected_components(graph, directed=False)
    rows = np.argsort(group_of, kind="stable")
    groups = np.split(rows, np.cumsum(np.bincount(group_of, minlength=count))[:-1])
    return sorted((group for group in groups if len(group) > 1), key=lambda group: int(group[0]))


def _sampled_neighbours(unit: np.ndarray, sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Similarity of the nearest and of the `DUPLICATE_NEIGHBOUR`-th nearest other row, float32 [sample] each."""
    last = len(unit) - 1
    if last < 1:
        return np.zeros(0, np.float32), np.zeros(0, np.float32)
    positions = [len(unit) - min(DUPLICATE_NEIGHBOUR, last), last]
    found = []
    for start, similarity in _similarities(unit[sample], unit):
        rows = np.arange(len(similarity))
        similarity[rows, sample[start + rows]] = -np.inf
        found.append(np.partition(similarity, positions, axis=1)[:, positions])
    fifth, most_similar = np.concatenate(found).T
    return most_similar, fifth


def _distance(cosine: np.ndarray) -> np.ndarray:
    """Euclidean distance on the unit sphere."""
    return np.sqrt(np.maximum(2 - 2 * cosine, 0))


def _similarities(queries: np.ndarray, references: np.ndarray, upper: bool = False) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, cosines float32 [rows, N]) of blocks of queries; `upper`: against the references from that row on."""
    for start in range(0, len(queries), BLOCK_ROWS):
        against = references[start:] if upper else references
        yield start, queries[start : start + BLOCK_ROWS] @ against.T
