"""What budgets count, by the kneed package, scipy, or definitions followed slowly, one row at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import scipy.stats
from kneed import KneeLocator


def kneed_count(curve: np.ndarray, sensitivity: float) -> int | None:
    locator = KneeLocator(range(1, len(curve) + 1), curve, S=sensitivity, curve="convex", direction="decreasing")
    return None if locator.knee is None else int(locator.knee)


def by_kneed(curve: np.ndarray, _: np.ndarray) -> int | None:
    count = kneed_count(curve, 1.0)
    return len(curve) if count is None else None if count == 1 else count


def by_distance_to_the_chord(curve: np.ndarray, _: np.ndarray) -> int:
    points = np.stack([np.arange(len(curve)) / (len(curve) - 1), (curve - curve[-1]) / (curve[0] - curve[-1])], 1)
    along = (points[-1] - points[0]) / np.linalg.norm(points[-1] - points[0])
    offset = points - points[0]
    return int(np.abs(offset[:, 0] * along[1] - offset[:, 1] * along[0]).argmax()) + 1


def by_two_polyfits(curve: np.ndarray, _: np.ndarray) -> int:
    x = np.arange(len(curve))

    def rmse(part: slice) -> float:
        fit = np.polyval(np.polyfit(x[part], curve[part], 1), x[part])
        return float(np.sqrt(np.mean((curve[part] - fit) ** 2)))

    total = [c * rmse(slice(0, c)) + (len(x) - c) * rmse(slice(c, None)) for c in range(2, len(x) - 1)]
    return int(np.argmin(total)) + 2


def by_circles(curve: np.ndarray, _: np.ndarray) -> int:
    """1 / radius of the circle through three neighbours, its centre from two perpendicular bisectors."""
    points = np.stack([np.arange(len(curve)) / (len(curve) - 1), (curve - curve[-1]) / (curve[0] - curve[-1])], 1)
    curvature = []
    for a, b, c in zip(points, points[1:], points[2:], strict=False):
        centre = np.linalg.solve(2 * np.stack([b - a, c - a]), [b @ b - a @ a, c @ c - a @ a])
        curvature.append(1 / np.linalg.norm(centre - a))
    return int(np.argmax(curvature)) + 2


def by_diff(curve: np.ndarray, _: np.ndarray) -> int:
    bend = np.diff(curve, 2)
    return int(bend.argmax()) + 2 if bend.max() > 0 else len(curve)


def by_class_variances(curve: np.ndarray, _: np.ndarray) -> int:
    """Otsu's threshold the other way round: the least variance within the classes."""
    within = [c * curve[:c].var() + (len(curve) - c) * curve[c:].var() for c in range(1, len(curve))]
    return int(np.argmin(within)) + 1


def by_quartiles(curve: np.ndarray, _: np.ndarray) -> int:
    low, high = np.quantile(curve, [0.25, 0.75])
    return int((curve > high + 1.5 * (high - low)).sum())


def by_reachability(curve: np.ndarray, _: np.ndarray, neighbors: int = 20) -> int:
    """The local outlier factor from its definition; outlying above 1.5 and 1e-10 added, as scikit-learn does."""
    values = (curve - curve[-1]) / (curve[0] - curve[-1])
    count = min(neighbors, len(values) - 1)
    near = []
    for place, value in enumerate(values):
        others = sorted((abs(value - other), index) for index, other in enumerate(values) if index != place)
        near.append(others[:count])
    reach = [near[place][-1][0] for place in range(len(values))]
    density = [1 / (np.mean([max(gap, reach[index]) for gap, index in row]) + 1e-10) for row in near]
    factor = [np.mean([density[index] for _, index in row]) / density[place] for place, row in enumerate(near)]
    return sum(f > 1.5 for f in factor)


def by_prefixes(curve: np.ndarray, _: np.ndarray) -> int:
    exact = [Fraction(value) for value in curve]
    return next(c for c in range(1, len(exact) + 1) if sum(exact[:c]) >= Fraction(9, 10) * sum(exact))


def by_entropy(curve: np.ndarray, _: np.ndarray) -> int:
    return math.floor(np.exp(scipy.stats.entropy(curve)) + 0.5)


def by_svd(_: np.ndarray, features: np.ndarray) -> int:
    return math.floor(np.exp(scipy.stats.entropy(np.linalg.svd(features, compute_uv=False))) + 0.5)


REFERENCES: dict[str, Callable[[np.ndarray, np.ndarray], int | None]] = {
    "kneedle": by_kneed,
    "max_chord": by_distance_to_the_chord,
    "l_method": by_two_polyfits,
    "menger": by_circles,
    "second_difference": by_diff,
    "otsu": by_class_variances,
    "above_zero": lambda curve, _: int((curve > 0).sum()),
    "iqr": by_quartiles,
    "lof": by_reachability,
    "cumulative_mass": by_prefixes,
    "attention_entropy": by_entropy,
    "effective_rank": by_svd,
    "fixed_ratio": lambda curve, _: math.floor(Fraction(len(curve), 4) + Fraction(1, 2)),
    "fixed_count": lambda curve, _: min(64, len(curve)),
}
