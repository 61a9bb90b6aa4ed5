"""Scenes of a dataset: their true futures, checked, and the mode metrics of a world model on them.

Shapes: S samples, K horizons that are scored, F futures, T frames, N patches, D hidden.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import torch
from torch import Tensor

from deltacache.evaluate.clips.sequences import read_features
from deltacache.evaluate.inputs import World
from deltacache.evaluate.metrics import token_distance
from deltacache.evaluate.predictions import RolloutProtocol
from deltacache.evaluate.statistics import Series, Statistic
from deltacache.pipeline.datasets.dataset import Dataset
from deltacache.schemas.errors import DatasetError, DeltacacheError, MismatchError
from deltacache.schemas.texts import counted, decoded

# ----------------------------------------------------------------------------------------------------
# Which of several true futures the samples reach.
#
# A scene is a set of sequences that share their context and differ in what comes after. A sample
# **reaches** a true future at a horizon when that future is the nearest one (Euclidean distance over the
# patch tokens of the target frame) and the sample is closer to it than half the distance between that future
# and the true future nearest to it. With two futures: closer than half the distance between the two.
#
# Shapes: S samples, F futures.
# ----------------------------------------------------------------------------------------------------


NOTHING_REACHED = -1
FUTURE_COLUMNS = ("video_uri", "scene", "outcome")
PROBABILITY = "probability"
"""A further column, which may be left out."""
_ODDS_TOLERANCE = 1e-3
# Features are stored in float16: two frames that differ by rounding alone are less than this far apart,
# as a share of their length.
_ROUNDING = 1e-3


@dataclass(frozen=True, slots=True)
class Scene:
    """Sequences with the same past.

    Attributes:
        rows: a dataset row for each true future; rollouts start from the first one's context.
        outcomes: what happens in each.
        odds: the probability of each; empty where it is not known.
    """

    name: str
    rows: tuple[int, ...]
    outcomes: tuple[str, ...]
    odds: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class SceneList:
    """The scenes to score, and what was left out, in words."""

    scenes: tuple[Scene, ...]
    notes: tuple[str, ...]


def reached_futures(distances: np.ndarray, between: np.ndarray) -> np.ndarray:
    """Which true future each sample reaches.

    Args:
        distances: (S, F) from each sample to each true future.
        between: (F, F) from each true future to each other.

    Returns:
        (S,) index of the future, or ``NOTHING_REACHED``.
    """
    nearest = distances.argmin(1)
    close = distances.min(1) < separations(between)[nearest] / 2
    return np.where(close, nearest, NOTHING_REACHED)


def separations(between: np.ndarray) -> np.ndarray:
    """(F,) distance from each true future to the one nearest to it, from (F, F) distances."""
    return np.where(np.eye(len(between), dtype=bool), np.inf, between).min(1)


def futures_differ(between: np.ndarray, lengths: np.ndarray) -> bool:
    """Whether all futures can be distinguished: by more than float16 rounding of vectors of ``lengths`` (F,)."""
    return bool((separations(between) > _ROUNDING * lengths).all())


def coverage(reached: np.ndarray, futures: int) -> float:
    """1 if the samples reach every one of ``futures`` true futures, else 0."""
    return float(np.isin(np.arange(futures), reached).all())


def balance(reached: np.ndarray, futures: int) -> float:
    """How evenly the futures are reached: ``futures * min(count) / sum(count)``, 0 if none is reached.

    1 when each is reached equally often, 0 when one is never reached.
    """
    counts = np.bincount(reached[reached != NOTHING_REACHED], minlength=futures)
    return float(futures * counts.min() / counts.sum()) if counts.sum() else 0.0


def odds_error(distances: np.ndarray, odds: Sequence[float]) -> float:
    """How far the samples' shares are from the true ``odds`` of F futures, from 0 to 1.

    Half the sum of |share of the samples (S, F) nearest to a future - its probability|: with two futures the difference
    of either. S samples that follow the odds are not at 0: with probabilities p they differ by about
    sqrt(2 p (1 - p) / (pi S)).
    """
    shares = np.bincount(distances.argmin(1), minlength=len(odds)) / len(distances)
    return float(np.abs(shares - np.array(odds)).sum() / 2)


def read_futures(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV or Parquet file with the columns ``video_uri``, ``scene``, ``outcome``.

    A fourth, ``probability`` of the outcome in its scene, may be there.

    Raises:
        DatasetError: there is no such file, it cannot be read, a column or a value is missing, or probabilities of a
            scene are not such.
    """
    if not path.is_file():
        raise DatasetError(f"{path} does not exist: give a CSV or Parquet file with {_columns()}")
    try:
        if path.suffix.lower() in {".parquet", ".pq"}:
            table = pq.read_table(path)
        else:
            texts = dict.fromkeys((*FUTURE_COLUMNS, PROBABILITY), pa.string())
            options = pa_csv.ConvertOptions(column_types=texts)
            content = decoded(path.read_bytes()).encode()
            table = pa_csv.read_csv(pa.BufferReader(content), convert_options=options)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DatasetError(
            f"{path} is not a readable CSV or Parquet file with {_columns()}: {error}"
        ) from error
    missing = [name for name in FUTURE_COLUMNS if name not in table.column_names]
    if missing:
        raise DatasetError(
            f"{path} has the columns {', '.join(table.column_names)}, but {', '.join(missing)} is missing: "
            f"it needs {_columns()}"
        )
    known = [PROBABILITY] if PROBABILITY in table.column_names else []
    rows = table.select([*FUTURE_COLUMNS, *known]).to_pylist()
    if any(value is None or value == "" for row in rows for value in row.values()):
        columns = f"{_columns()}{', and probability since there is one' if known else ''}"
        raise DatasetError(f"{path} has empty cells: every row needs {columns}")
    texts = [{name: str(value) for name, value in row.items()} for row in rows]
    if known:
        _check_odds(texts, path)
    return texts


def _check_odds(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    scenes: dict[str, dict[str, float]] = {}
    for row in rows:
        try:
            probability = float(row[PROBABILITY])
        except ValueError:
            probability = -1.0
        if not 0 <= probability <= 1:
            raise DatasetError(
                f"{path}: probability {row[PROBABILITY]!r} of {row['outcome']} in scene {row['scene']} is not a number "
                "from 0 to 1: correct it, or leave the column out"
            )
        scenes.setdefault(row["scene"], {}).setdefault(row["outcome"], probability)
    for scene, outcomes in scenes.items():
        if abs(sum(outcomes.values()) - 1) > _ODDS_TOLERANCE:
            raise DatasetError(
                f"{path}: the probabilities of scene {scene} add up to {sum(outcomes.values()):g}, not to 1: give one "
                "row for each outcome that the scene can have, or leave the column out"
            )


def _columns() -> str:
    return "the columns video_uri, scene, outcome"


def find_scenes(futures: Sequence[dict[str, str]], row_of_video: dict[str, int], path: Path) -> SceneList:
    """Match the futures with sequences. Only scenes with two or more different outcomes count.

    Args:
        futures: rows of ``read_futures``.
        row_of_video: the sequence to use of each video, by its address.
        path: where ``futures`` came from, for messages.

    Raises:
        DeltacacheError: no scene has two outcomes in this dataset.
    """
    found: dict[str, dict[str, int]] = {}
    odds: dict[tuple[str, str], float] = {}
    absent = repeated = 0
    for row in futures:
        if row["video_uri"] not in row_of_video:
            absent += 1
            continue
        outcomes = found.setdefault(row["scene"], {})
        repeated += row["outcome"] in outcomes
        outcomes.setdefault(row["outcome"], row_of_video[row["video_uri"]])
        if PROBABILITY in row:
            odds.setdefault((row["scene"], row["outcome"]), float(row[PROBABILITY]))

    def of_all(name: str, outcomes: Iterable[str]) -> tuple[float, ...]:
        known = tuple(odds[name, each] for each in outcomes if (name, each) in odds)
        return known if abs(sum(known) - 1) <= _ODDS_TOLERANCE else ()

    scenes = tuple(
        Scene(name, tuple(outcomes.values()), tuple(outcomes), of_all(name, outcomes))
        for name, outcomes in found.items()
        if len(outcomes) > 1
    )
    if not scenes:
        raise DeltacacheError(
            f"{path} names {counted(len(futures), 'video')}, of which {len(futures) - absent} are in this dataset, "
            "and no scene has two different outcomes among them: give the futures of this dataset's videos"
        )
    left_out = [
        (absent, "videos of the futures file are not among the sequences"),
        (repeated, "sequences repeat an outcome of their scene: the first is used"),
        (len(found) - len(scenes), "scenes have a single outcome: not counted in mode coverage"),
        (
            sum(not each.odds for each in scenes) if odds else 0,
            "scenes lack an outcome that has a probability: not counted in the odds error",
        ),
        (
            sum(bool(each.odds) and max(each.odds) - min(each.odds) > _ODDS_TOLERANCE for each in scenes),
            "scenes have futures of unequal probability, whose sequences count alike in all metrics but the odds error",
        ),
    ]
    return SceneList(scenes, tuple(f"{count} {text}" for count, text in left_out if count))


_SAME_TIME_S = 5e-3


@dataclass(frozen=True)
class CheckedScene:
    """A scene whose sequences share their context.

    Attributes:
        between: (K, F, F) distances between the true futures at each horizon.
        differ: (K,) whether they can be distinguished there.
        horizons_s: (K,) seconds from the last context frame.
    """

    scene: Scene
    between: np.ndarray
    differ: np.ndarray
    horizons_s: tuple[float, ...]

    def reached(self, distances: np.ndarray, horizon: int) -> np.ndarray:
        """(S,) which future each sample reaches at the ``horizon``-th scored one; see ``reached_futures``."""
        return reached_futures(distances[:, horizon], self.between[horizon])


def read_futures_of(
    dataset: Dataset, scene: Scene, protocol: RolloutProtocol, device: torch.device
) -> Tensor:
    """(F, K, N, D) float32: the true target frames of a scene."""
    frames = [read_features(dataset, row).patch_tokens[protocol.targets] for row in scene.rows]
    return torch.from_numpy(np.stack(frames)).to(device).float()


def check_scenes(
    dataset: Dataset, scenes: Iterable[Scene], protocol: RolloutProtocol
) -> tuple[dict[int, CheckedScene], list[str]]:
    """Check every scene before anything is computed.

    Returns:
        The scenes by the row that rollouts start from, and what will not be counted, in words.

    Raises:
        MismatchError: the sequences of a scene do not share their context.
    """
    checked = {scene.rows[0]: _check_scene(dataset, scene, protocol) for scene in scenes}
    notes = []
    for at, horizon in enumerate(protocol.horizons):
        alike = sum(not each.differ[at] for each in checked.values())
        if alike:
            notes.append(
                f"{alike} scenes have futures that do not differ yet at horizon {horizon}: not counted "
                "in mode coverage there"
            )
    return checked, notes


def _check_scene(dataset: Dataset, scene: Scene, protocol: RolloutProtocol) -> CheckedScene:
    clips = [read_features(dataset, row) for row in scene.rows]
    tokens = [torch.from_numpy(clip.patch_tokens[: protocol.frames].astype(np.float32)) for clip in clips]
    seconds = np.stack([clip.timestamps_s[: protocol.frames] for clip in clips]).astype(np.float64)
    seconds -= seconds[:, :1]
    futures = torch.stack([each[protocol.targets] for each in tokens])
    between = token_distance(futures[:, None], futures[None]).permute(2, 0, 1).numpy()
    lengths = token_distance(futures, torch.zeros_like(futures)).T.numpy()
    differ = np.array([futures_differ(*pair) for pair in zip(between, lengths, strict=True)])
    if differ[-1]:
        _check_context(scene, torch.stack([each[: protocol.context] for each in tokens]), between[-1])
    if np.abs(seconds - seconds[:1]).max() > _SAME_TIME_S:
        raise MismatchError(
            f"scene {scene.name}: its sequences have frames at different times "
            f"({seconds.round(3).tolist()}), so their futures cannot be compared: extract them without "
            "augmentation"
        )
    since_context = seconds[0, protocol.targets] - seconds[0, protocol.context - 1]
    return CheckedScene(scene, between, differ, tuple(since_context.tolist()))


def _check_context(scene: Scene, contexts: Tensor, between: np.ndarray) -> None:
    """Contexts (F, C, N, D) must lie closer together than half the distance of the futures (F, F)."""
    apart = token_distance(contexts, contexts[:1]).amax(1).numpy()
    for future in range(1, len(apart)):
        if apart[future] >= between[0, future] / 2:
            raise MismatchError(
                f"scene {scene.name}: the contexts of {scene.outcomes[0]} and {scene.outcomes[future]} are "
                f"{apart[future]:.3g} apart, their futures {between[0, future]:.3g}: sequences of a scene "
                "must share the context and differ in the future; correct the futures file, or extract "
                "without augmentation"
            )


def score_modes(
    world: World, checked: CheckedScene, distances: np.ndarray, dataset: str, protocol: RolloutProtocol
) -> Iterator[Statistic]:
    """Coverage and balance of one scene from the samples' distances (S, K, F) to its true futures.

    Also its odds error, where the probabilities of its futures are known and the model samples.
    """
    futures = len(checked.scene.rows)
    for at, horizon in enumerate(protocol.horizons):
        if not checked.differ[at]:
            continue
        reached = checked.reached(distances, at)
        totals = np.array([1.0, coverage(reached, futures), balance(reached, futures)])
        series = Series(dataset, "modes", world.method, "single", horizon, world.samples)
        name = checked.scene.name
        yield Statistic(series, name, name, checked.horizons_s[at], totals, futures)
        if checked.scene.odds and not world.single:
            totals = np.array([1.0, odds_error(distances[:, at], checked.scene.odds)])
            series = replace(series, task="odds")
            yield Statistic(series, name, name, checked.horizons_s[at], totals, futures)
