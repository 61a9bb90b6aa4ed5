"""How often do 95 % intervals hold the true value, and how often does ``compare`` see a difference between equals?

    python benchmarks/interval_coverage.py                     all of it, about ten minutes
    python benchmarks/interval_coverage.py --repeats 500 --units 4 6 --cases miou scenes

Sequences are drawn whose true metric is known, 1 or 10 of each of 4 to 40 units (videos), alike within a unit, and go
through the functions that make the tables' intervals and the verdicts of ``compare``. Coverage is that of
the intervals that were given, and ``given`` how often one was. Goals: 92 to 98 %, at most 6 % false verdicts.

- ``loss``: mean feature loss; normal, gamma (some videos are twice as hard) or lognormal (a few are ten times as hard)
  over units, with 0.8 of the variance between them; ``uneven``: 2 to 10 members a unit instead of 10.
- ``rmse``: the root of a pooled squared error.
- ``miou``: confusion counts of eight classes, two of which only one video in four shows; the truth is that of 20,000
  units.

Two hard cases are printed without a goal, so that it is known by how much they miss it:

- ``loss, heavy``: lognormal with a sigma of 1.5: one unit in sixteen is ten times as hard as the median, and among
  few units there may be none of these.
- ``scenes``: a yes or no for each scene, which takes few values, so that coverage jumps.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from deltacache.evaluate.comparing import Difference
from deltacache.evaluate.metrics import group_sums, intervals, metrics_of, paired_intervals

COVERAGE, FALSE = (0.92, 0.98), 0.06
CLASSES = 8
Sums = np.ndarray
"""(n, K) of n sequences."""


@dataclass(frozen=True)
class Case:
    """What is drawn.

    Attributes:
        draw: from random numbers and the unit (n,) of each sequence to sums (n, K) of two alike methods, A and B.
        truth: of the metric.
        uneven: units have 2 to 10 members instead of all 10.
        goal: it is judged.
        single: units have one member each, whatever is asked.
    """

    name: str
    task: str
    metric: str
    draw: Callable[[np.random.Generator, np.ndarray], tuple[Sums, Sums]]
    truth: float
    uneven: bool = False
    goal: bool = True
    single: bool = False


def losses(kind: str) -> Callable[[np.random.Generator, np.ndarray], tuple[Sums, Sums]]:
    """Feature losses of mean 1. A and B share half of what makes a unit hard."""

    def hard(rng: np.random.Generator, count: int) -> np.ndarray:
        if kind == "normal":
            return rng.normal(1, 0.2, count)
        if kind == "gamma":
            return rng.gamma(2, 0.5, count)
        width = {"lognormal": 0.8, "heavy": 1.5}[kind]
        return rng.lognormal(-(width**2) / 2, width, count)

    spread = {"normal": 0.2, "gamma": 0.71, "lognormal": 0.95, "heavy": 0}[kind]

    def draw(rng: np.random.Generator, units: np.ndarray) -> tuple[Sums, Sums]:
        shared, found = hard(rng, units.max() + 1), []
        for _ in range(2):
            own = (shared + hard(rng, units.max() + 1)) / 2
            noise = rng.normal(0, spread / np.sqrt(2) / 2, len(units))  # 0.8 of the variance is the unit's
            drawn = np.maximum(own[units] + noise, 1e-3)
            if kind == "heavy":  # added noise would often be cut off at 0, which moves the mean
                drawn = own[units] * rng.gamma(2, 0.5, len(units))
            found.append(np.stack([np.ones(len(units)), drawn], 1))
        return tuple(np.concatenate([each, each[:, 1:], each[:, 1:]], 1) for each in found)

    return draw


def depths(rng: np.random.Generator, units: np.ndarray) -> tuple[Sums, Sums]:
    """Squared errors of 1,000 pixels, their mean 4 m² in expectation: RMSE 2 m."""
    shared, found = rng.gamma(3, 1 / 3, units.max() + 1), []
    for _ in range(2):
        own = 4 * (shared + rng.gamma(3, 1 / 3, units.max() + 1)) / 2
        squared = own[units] * rng.gamma(16, 1 / 16, len(units))
        found.append(
            np.stack([np.full(len(units), 1000.0), *[1000 * squared] * 2, np.full(len(units), 500.0)], 1)
        )
    return found[0], found[1]


def confusions(rng: np.random.Generator, units: np.ndarray) -> tuple[Sums, Sums]:
    """Pixels of eight classes; each unit has its own share of each, and its own share that is hit."""
    count = units.max() + 1
    shown = rng.random((count, CLASSES)) < np.r_[np.ones(CLASSES - 2), 0.25, 0.25]
    common = np.r_[6, 4, 3, 2, 2, 1, 1, 1]
    pixels = rng.gamma(2, 0.5, (count, CLASSES)) * common * shown
    hard = rng.normal(0, 0.5, (count, CLASSES))
    found = []
    labelled = 1e3 * pixels[units] * rng.gamma(8, 1 / 8, (len(units), CLASSES))
    for _ in range(2):
        odds = 0.8 + hard + rng.normal(0, 0.5, (count, CLASSES))
        hit = labelled / (1 + np.exp(-(odds[units] + rng.normal(0, 0.3, (len(units), CLASSES)))))
        missed = (labelled - hit).sum(1, keepdims=True)
        predicted = hit + missed * labelled / labelled.sum(1, keepdims=True)
        found.append(np.concatenate([hit, predicted, labelled], 1))
    return found[0], found[1]


def scenes(rng: np.random.Generator, units: np.ndarray) -> tuple[Sums, Sums]:
    """Both futures of a scene are reached, or not: four of five times."""
    found = [(rng.random(len(units)) < 0.8).astype(float) for _ in range(2)]
    return tuple(np.stack([np.ones(len(units)), each, each], 1) for each in found)


def verdict(case: Case, a: np.ndarray, b: np.ndarray) -> str:
    """What ``compare`` says of B, from the sums (G, K) of both."""
    values = [float(metrics_of(case.task, each.sum(0))[case.metric]) for each in (a, b)]
    low, high = paired_intervals(case.task, a, b).get(case.metric, (np.nan, np.nan))
    return Difference("clips", case.metric, "", 1, 0.2, *values, low, high, len(a), "video").verdict


def true_miou() -> float:
    """Of very many units."""
    totals, _ = confusions(np.random.default_rng(0), np.arange(20_000))
    return float(metrics_of("segmentation", totals.sum(0))["miou"])


def main() -> None:
    """Print a row a case; exit code 1 where a goal is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--units", type=int, nargs="+", default=[4, 6, 10, 20, 40])
    parser.add_argument("--members", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--cases", nargs="+", help="those whose name contains one of these words")
    asked = parser.parse_args()
    cases = (
        *(
            Case(f"loss, {kind}", "features", "smooth_l1", losses(kind), 1.0)
            for kind in ("normal", "gamma", "lognormal")
        ),
        Case("loss, gamma, uneven", "features", "smooth_l1", losses("gamma"), 1.0, uneven=True),
        Case("rmse", "depth", "rmse", depths, 2.0),
        Case("miou", "segmentation", "miou", confusions, true_miou()),
        Case("loss, heavy", "features", "smooth_l1", losses("heavy"), 1.0, goal=False),
        Case("scenes", "modes", "mode_coverage", scenes, 0.8, goal=False, single=True),
    )
    cases = [each for each in cases if not asked.cases or any(word in each.name for word in asked.cases)]
    missed = False
    print("| | units | members | coverage | given | false verdicts |\n|---|---|---|---|---|---|")
    for case in cases:
        for members in asked.members:
            for units in asked.units:
                if (case.uneven or case.single) and members != asked.members[-1]:
                    continue
                rng = np.random.default_rng((units, members))
                held = given = false = 0
                for _ in range(asked.repeats):
                    sizes = rng.integers(2, 11, units) if case.uneven else np.full(units, members)
                    if case.single:
                        sizes[:] = 1
                    of = np.repeat(np.arange(units), sizes)
                    a, b = (group_sums(each, [str(unit) for unit in of]) for each in case.draw(rng, of))
                    interval = intervals(case.task, a).get(case.metric)
                    if interval is not None:
                        given += 1
                        held += interval[0] <= case.truth <= interval[1]
                    false += verdict(case, a, b) in ("better", "worse", "different")
                coverage, wrong = held / max(1, given), false / asked.repeats
                bad = case.goal and (not COVERAGE[0] <= coverage <= COVERAGE[1] or wrong > FALSE)
                missed |= bad
                shown = "2 to 10" if case.uneven else 1 if case.single else members
                print(
                    f"| {case.name} | {units} | {shown} | {100 * coverage:.1f} % | "
                    f"{100 * given / asked.repeats:.0f} % | {100 * wrong:.1f} % |{' MISSED' if bad else ''}",
                    flush=True,
                )
    sys.exit(missed)


if __name__ == "__main__":
    main()
