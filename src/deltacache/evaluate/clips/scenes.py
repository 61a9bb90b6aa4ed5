"""Scenes of a dataset: their true futures, checked, and the mode metrics of a world model on them.

Shapes: S samples, K horizons that are scored, F futures, T frames, N patches, D hidden.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deltacache.evaluate.clips.modes import Scene, balance, coverage, futures_differ, reached_futures
from deltacache.evaluate.clips.sequences import read_features
from deltacache.evaluate.inputs import World
from deltacache.evaluate.metrics import token_distance
from deltacache.evaluate.predictions import Protocol
from deltacache.evaluate.statistics import Series, Statistic
from deltacache.pipeline.datasets.dataset import Dataset
from deltacache.schemas.errors import MismatchError

_SAME_TIME_S = 5e-3


@dataclass(frozen=True)
class CheckedScene:
    """A scene whose sequences share their context.

    Attributes:
        between: (K, F, F) distances between the true futures at each horizon.
        differ: (K,) whether they can be told apart there.
        horizons_s: (K,) seconds from the last context frame.
    """

    scene: Scene
    between: np.ndarray
    differ: np.ndarray
    horizons_s: tuple[float, ...]

    def reached(self, distances: np.ndarray, horizon: int) -> np.ndarray:
        """(S,) which future each sample reaches at the ``horizon``-th scored one; see ``reached_futures``."""
        return reached_futures(distances[:, horizon], self.between[horizon])


def read_futures_of(dataset: Dataset, scene: Scene, protocol: Protocol, device: torch.device) -> Tensor:
    """(F, K, N, D) float32: the true target frames of a scene."""
    frames = [read_features(dataset, row).patch_tokens[protocol.targets] for row in scene.rows]
    return torch.from_numpy(np.stack(frames)).to(device).float()


def check_scenes(
    dataset: Dataset, scenes: Iterable[Scene], protocol: Protocol
) -> tuple[dict[int, CheckedScene], list[str]]:
    """Check every scene before anything is computed.

    Returns:
        The scenes by the row that roll-outs start from, and what will not be counted, in words.

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


def _check_scene(dataset: Dataset, scene: Scene, protocol: Protocol) -> CheckedScene:
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
    world: World, checked: CheckedScene, distances: np.ndarray, dataset: str, protocol: Protocol
) -> Iterator[Statistic]:
    """Coverage and balance of one scene from the samples' distances (S, K, F) to its true futures."""
    futures = len(checked.scene.rows)
    for at, horizon in enumerate(protocol.horizons):
        if not checked.differ[at]:
            continue
        reached = checked.reached(distances, at)
        totals = np.array([1.0, coverage(reached, futures), balance(reached, futures)])
        series = Series(dataset, "modes", world.method, "single", horizon, world.samples)
        name = checked.scene.name
        yield Statistic(series, name, name, checked.horizons_s[at], totals, futures)
