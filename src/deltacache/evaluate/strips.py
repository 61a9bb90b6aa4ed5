"""The pictures of one example: what was seen, what came, and what the models expected.

Shapes: T frames, F true futures, H longest horizon, N patches, D hidden.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from deltacache.evaluate.examples import Example, ExampleWorld
from deltacache.evaluate.pictures import (
    Projection,
    change_picture,
    fit_projection,
    frame_uri,
    largest_change,
    png_uri,
)
from deltacache.evaluate.tables import METHOD_LABELS

PixelLookup = Callable[[str], np.ndarray | None]
"""From a clip id to its frames (T, H, W, 3) uint8, or ``None`` where they are not known."""


@dataclass(frozen=True, slots=True)
class Picture:
    """An image inside the page and what it shows, for those who do not see it."""

    uri: str
    alt: str


@dataclass(frozen=True, slots=True)
class Tile:
    """Pictures of one moment above each other. ``kind`` is its style: seen, true or predicted."""

    kind: str
    caption: str
    pictures: tuple[Picture, ...]
    mark: str = ""


@dataclass(frozen=True, slots=True)
class Strip:
    """Tiles side by side."""

    title: str
    note: str
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True)
class ExampleView:
    """One sequence, or a scene with several futures."""

    title: str
    strips: tuple[Strip, ...]


class _Painter:
    """Draws features of one example; all its change maps share a scale."""

    def __init__(self, example: Example, projection: Projection) -> None:
        self._grid = example.grid
        self._projection = projection
        self._last = example.patch_tokens[example.context - 1]
        self._largest = largest_change(example.futures[:, -1], self._last)

    def features(self, tokens: np.ndarray, what: str) -> Picture:
        """Colours of the tokens (N, D)."""
        picture = self._projection.picture(tokens, self._grid)
        return Picture(png_uri(picture), f"features of {what} as colours")

    def change(self, tokens: np.ndarray, what: str) -> Picture:
        """Where the tokens (N, D) differ from the last seen frame."""
        picture = change_picture(tokens, self._last, self._grid, self._largest)
        return Picture(png_uri(picture), f"where {what} differs from the last seen frame")

    def both(self, tokens: np.ndarray, what: str) -> tuple[Picture, ...]:
        """Colours above, change below."""
        return self.features(tokens, what), self.change(tokens, what)


def example_views(examples: Sequence[Example], frames: PixelLookup) -> list[ExampleView]:
    """Pictures of all examples; colours mean the same in all of them."""
    if not examples:
        return []
    true_features = [array for each in examples for array in (each.patch_tokens, each.futures)]
    projection = fit_projection(true_features)
    return [_view(example, _Painter(example, projection), frames) for example in examples]


def _view(example: Example, painter: _Painter, frames: PixelLookup) -> ExampleView:
    strips = [*_frame_strips(example, frames), _feature_strip(example, painter)]
    strips += [_world_strip(example, world, painter) for world in example.worlds]
    return ExampleView(example.title, tuple(strips))


def _times(example: Example) -> list[str]:
    """Seconds of every frame from the last seen one."""
    since = example.seconds - example.seconds[example.context - 1]
    times = [f"{each:+.2f} s".replace("-", "\N{MINUS SIGN}") for each in since]
    times[example.context - 1] = "last seen"
    return times


def _future_names(example: Example) -> list[str]:
    """``left``, ``right``, …, or what the one recorded future is called."""
    return [outcome or "what came" for outcome in example.outcomes]


def _frame_strips(example: Example, frames: PixelLookup) -> list[Strip]:
    found = [frames(clip_id) for clip_id in example.clip_ids]
    own = found[0]
    if own is None:
        return []
    times, last = _times(example), len(example.seconds) - 1
    tiles = [
        Tile("seen", times[at], (Picture(frame_uri(own[at]), f"seen frame at {times[at]}"),))
        for at in range(example.context)
    ]
    for name, each in zip(_future_names(example), found, strict=True):
        if each is not None:
            picture = Picture(frame_uri(each[last]), f"true frame at {times[last]}: {name}")
            tiles.append(Tile("true", f"{times[last]}: {name}", (picture,)))
    return [Strip("Frames", "", tuple(tiles))]


def _feature_strip(example: Example, painter: _Painter) -> Strip:
    times = _times(example)
    tiles = [
        Tile("seen", times[at], painter.both(example.patch_tokens[at], f"the seen frame at {times[at]}"))
        for at in range(example.context)
    ]
    for name, future in zip(_future_names(example), example.futures, strict=True):
        what = f"the true frame at {times[-1]} ({name})"
        tiles.append(Tile("true", f"{times[-1]}: {name}", painter.both(future[-1], what)))
    if len(example.reconstruction):
        tokens = example.reconstruction[-1]
        tiles.append(Tile("predicted", "through DeltaTok", painter.both(tokens, "DeltaTok's reconstruction")))
    note = "Below each: where it differs from the last seen frame, stronger where it differs more."
    return Strip("Features", note, tuple(tiles))


def _world_strip(example: Example, world: ExampleWorld, painter: _Painter) -> Strip:
    names = [outcome for outcome in example.outcomes if outcome]
    shown = sorted(range(len(world.samples)), key=lambda at: (world.nearest[at], world.reached[at] < 0, at))
    tiles = [_sample_tile(world, at, names, painter) for at in shown]
    if len(world.reached) > 1:
        pictures = painter.both(world.mean, f"the average of {len(world.reached)} futures")
        tiles.append(Tile("mean", f"average of {len(world.reached)}", pictures))
    label = METHOD_LABELS.get(world.method, world.method)
    count = len(world.reached)
    title = f"{label}: {count} futures" if count > 1 else f"{label}: its one future"
    return Strip(f"{title} at {_times(example)[-1]}", _tally(world, names, len(shown)), tuple(tiles))


def _sample_tile(world: ExampleWorld, at: int, names: Sequence[str], painter: _Painter) -> Tile:
    number = f"future {at + 1}" if len(world.reached) > 1 else "the future"
    caption = number
    if names:
        outcome = names[int(world.nearest[at])]
        caption = f"reaches {outcome}" if world.reached[at] >= 0 else f"nearest {outcome}"
    mark = "closest" if at == world.best and len(world.reached) > 1 else ""
    return Tile("predicted", caption, painter.both(world.samples[at][-1], f"{number} ({caption})"), mark)


def _tally(world: ExampleWorld, names: Sequence[str], shown: int) -> str:
    parts = []
    if names:
        nearest, reached = Counter(world.nearest.tolist()), Counter(world.reached.tolist())
        near = [f"{nearest[at]} to {name}" for at, name in enumerate(names)]
        there = [f"{reached[at]} reach {name}" for at, name in enumerate(names)]
        parts.append(f"Nearest: {', '.join(near)}. Close enough: {', '.join(there)}.")
    if len(world.reached) > 1:
        parts.append(f"Closest: the lowest loss to {names[0] if names else 'what came'}.")
    if shown < len(world.reached):
        parts.append(f"The first {shown} are shown.")
    return " ".join(parts)
