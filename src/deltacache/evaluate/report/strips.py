"""The pictures of one example: what was seen, what came, and what the models expected, a strip a future.

All strips of an example have a picture for every moment, so that a slider over time can pick one; strips of futures
are empty before the first predicted frame.

Shapes: T frames, F true futures, H longest horizon, N patches, D hidden.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from deltacache.evaluate.examples import Example, ExampleMaps, ExampleWorld, spread
from deltacache.evaluate.report.labels import METHOD_LABELS
from deltacache.evaluate.report.map_colours import (
    KeyEntry,
    class_colours,
    class_key,
    depth_colours,
    depth_key,
    nearness_colours,
    nearness_key,
)
from deltacache.evaluate.report.pictures import (
    Projection,
    change_picture,
    film,
    fit_projection,
    largest_change,
    webp_uri,
)
from deltacache.evaluate.report.views import Detail, ExampleView, PixelLookup, Strip, StripGroup
from deltacache.schemas.benchmarks import IGNORE

Paint = Callable[[np.ndarray], np.ndarray]
"""From what is known of one moment to its picture."""
_KINDS = {
    "features": "Features",
    "change": "Change since the last seen frame",
    "segmentation": "Segmentation",
    "depth": "Depth",
    "relative_depth": "Relative depth",
    "rgb": "Pictures decoded from features",
}

_WIDE = 1.5  # columns to rows of patches, from which pictures get more room


def example_views(examples: Sequence[Example], frames: PixelLookup, detail: Detail) -> list[ExampleView]:
    """Pictures of all examples; colours mean the same in all of them."""
    if not examples:
        return []
    projection = fit_projection([array for each in examples for array in (each.patch_tokens, each.futures)])
    return [_ExampleStrips(example, projection, detail).view(frames) for example in examples]


class _ExampleStrips:
    """Draws one example; all its change maps share a scale."""

    def __init__(self, example: Example, projection: Projection, detail: Detail) -> None:
        self._example, self._detail = example, detail
        steps = len(example.seconds) - example.context
        self._steps = spread(range(steps), detail.futures)
        self._last = example.patch_tokens[example.context - 1]
        largest = largest_change(example.futures[:, -1], self._last)
        self._paints: dict[str, Paint] = {
            "features": lambda tokens: projection.picture(tokens, example.grid),
            "change": lambda tokens: change_picture(tokens, self._last, example.grid, largest),
            "segmentation": class_colours,
            "depth": depth_colours,
            "relative_depth": nearness_colours,
            "rgb": lambda picture: picture,
            "frames": lambda picture: picture,
        }

    def view(self, frames: PixelLookup) -> ExampleView:
        """All groups of strips."""
        example = self._example
        since = example.seconds - example.seconds[example.context - 1]
        shown = [*range(example.context), *(example.context + step for step in self._steps)]
        moments = [
            f"{since[at]:+.2f} s".replace("-", "\N{MINUS SIGN}") if at != example.context - 1 else "last seen"
            for at in shown
        ]
        groups = [self._frames(frames), self._features("features"), self._features("change")]
        groups += [self._maps(each) for each in example.maps]
        return ExampleView(
            title=example.title,
            moments=tuple(moments),
            seen=example.context,
            wide=example.grid[1] >= _WIDE * example.grid[0],
            note=" ".join(
                _tally(world, self._names(), len(self._order(world))) for world in example.worlds
            ).strip(),
            groups=tuple(group for group in groups if group is not None),
        )

    def _names(self) -> list[str]:
        """``left``, ``right``, …, of a scene; none of a sequence with its one recorded future."""
        return [outcome for outcome in self._example.outcomes if outcome]

    def _true_label(self, future: int) -> str:
        names = self._names()
        return f"what came: {names[future]}" if names else "what came"

    def _strip(
        self,
        kind: str,
        look: str,
        label: str,
        seen: np.ndarray | None,
        futures: np.ndarray | None,
        *,
        mark: str = "",
        only_last: np.ndarray | None = None,
    ) -> Strip:
        """``seen`` (C, ...) and ``futures`` (H, ...) as one image; ``only_last`` at the last moment instead."""
        paint, context = self._paints[look], self._example.context
        cells: list[np.ndarray | None] = [None] * context
        if seen is not None:
            cells = [paint(each) for each in seen[:context]]
        if futures is not None:
            cells += [paint(futures[step]) for step in self._steps]
        else:
            cells += [None] * (len(self._steps) - 1) + [None if only_last is None else paint(only_last)]
        small = look in ("features", "change")
        picture = film(cells, self._detail.side)
        return Strip(
            kind=kind,
            label=label,
            mark=mark,
            uri=webp_uri(picture, lossless=small or look == "segmentation"),
            size=(picture.shape[1], picture.shape[0]),
            alt=self._alt(look, label, seen is not None, only_last is not None),
            pixelated=small,
        )

    def _alt(self, look: str, label: str, has_seen: bool, only_last: bool) -> str:
        title = "Frames" if look == "frames" else _KINDS[look]
        count = (
            "one picture at the last moment" if only_last else f"{len(self._steps)} pictures of the future"
        )
        seen = f"{self._example.context} seen pictures and " if has_seen else ""
        return f"{title}, {label}: {seen}{count}"

    def _frames(self, lookup: PixelLookup) -> StripGroup | None:
        found = [lookup(clip_id) for clip_id in self._example.clip_ids]
        context = self._example.context
        strips = [
            self._strip("true", "frames", self._true_label(at), frames[:context], frames[context:])
            for at, frames in enumerate(found)
            if frames is not None
        ]
        return StripGroup("Frames", "", (), tuple(strips)) if strips else None

    def _features(self, look: str) -> StripGroup:
        example = self._example
        seen = example.patch_tokens[: example.context]
        strips = [
            self._strip("true", look, self._true_label(at), seen, future)
            for at, future in enumerate(example.futures)
        ]
        if len(example.reconstruction):
            strips.append(self._strip("rebuilt", look, "through DeltaTok", None, example.reconstruction))
        for world in example.worlds:
            strips += self._samples(world, look, world.samples)
            if len(world.reached) > 1:
                label = f"average of {len(world.reached)}"
                strips.append(self._strip("mean", look, label, None, None, only_last=world.mean))
        note = {
            "features": "Three main directions of the features as red, green and blue; equal colours are equal "
            "features.",
            "change": "Stronger where a patch differs more from the last seen frame; empty where nothing changed.",
        }[look]
        return StripGroup(_KINDS[look], note, (), tuple(strips))

    def _maps(self, maps: ExampleMaps) -> StripGroup:
        example, context = self._example, self._example.context
        strips = [
            self._strip("true", maps.kind, "from true features", maps.truth[:context], maps.truth[context:])
        ]
        shown = [maps.truth, *maps.samples.values()]
        if maps.label is not None:
            label = _fitted_label(maps.label, maps.kind, (maps.truth.shape[1], maps.truth.shape[2]))
            strips.insert(0, self._strip("true", maps.kind, "ground truth", None, None, only_last=label))
            shown.append(label)
        if len(maps.reconstruction):
            strips.append(self._strip("rebuilt", maps.kind, "through DeltaTok", None, maps.reconstruction))
        for world in example.worlds:
            if world.fingerprint in maps.samples:
                strips += self._samples(world, maps.kind, maps.samples[world.fingerprint])
        key: list[KeyEntry] = []
        if maps.kind == "segmentation":
            key = class_key(example.title.split(" ", 1)[0], shown)
        elif maps.kind == "depth":
            key = depth_key()
        elif maps.kind == "relative_depth":
            key = nearness_key()
        return StripGroup(_KINDS[maps.kind], "", tuple(key), tuple(strips))

    def _order(self, world: ExampleWorld) -> list[int]:
        """Samples to show: the closest first, then evenly over the true futures that they are nearest to."""
        kept = range(len(world.samples))
        best = [world.best] if world.best in kept else []
        rest = sorted(
            (at for at in kept if at not in best),
            key=lambda at: (world.nearest[at], world.reached[at] < 0, at),
        )
        if not self._names():
            return best + rest[: self._detail.samples - len(best)]
        return best + list(spread(rest, self._detail.samples - len(best)))

    def _model(self, world: ExampleWorld) -> str:
        """Its method, and its fingerprint where two have the same."""
        label = METHOD_LABELS.get(world.method, world.method)
        several = sum(each.method == world.method for each in self._example.worlds) > 1
        return f"{label} ({world.fingerprint[:8]})" if several else label

    def _samples(self, world: ExampleWorld, look: str, samples: np.ndarray) -> Iterator[Strip]:
        names, several = self._names(), len(world.reached) > 1
        each_one = all(len(world.reached) == 1 for world in self._example.worlds)
        model = self._model(world) if len(self._example.worlds) > 1 else ""
        for at in self._order(world):
            label = f"future {at + 1}" if several else "its one future"
            if model:
                label = model if each_one else f"{model}: {label}"
            if names:
                outcome = names[int(world.nearest[at])]
                label += f", {'reaches' if world.reached[at] >= 0 else 'nearest'} {outcome}"
            mark = "closest" if several and at == world.best else ""
            yield self._strip("predicted", look, label, None, samples[at], mark=mark)


def _fitted_label(label: np.ndarray, kind: str, size: tuple[int, int]) -> np.ndarray:
    """A label inside a map of ``size``, at its own aspect; what is around it is nothing."""
    step = max(1, -(-label.shape[0] // size[0]), -(-label.shape[1] // size[1]))
    is_depth = kind != "segmentation"
    if is_depth:  # sparse: the points of a block must not get lost
        rows, columns = label.shape[0] // step, label.shape[1] // step
        small = label[: rows * step, : columns * step].reshape(rows, step, columns, step).max((1, 3))
    else:
        small = label[::step, ::step]
    fitted = np.full(size, 0 if is_depth else IGNORE, label.dtype)
    top, left = (size[0] - small.shape[0]) // 2, (size[1] - small.shape[1]) // 2
    fitted[top : top + small.shape[0], left : left + small.shape[1]] = small
    return fitted


def _tally(world: ExampleWorld, names: Sequence[str], shown: int) -> str:
    """What became of all samples of a world model, in words."""
    count = len(world.reached)
    parts = []
    if names:
        nearest, reached = Counter(world.nearest.tolist()), Counter(world.reached.tolist())
        near = [f"{nearest[at]} to {name}" for at, name in enumerate(names)]
        there = [f"{reached[at]} reach {name}" for at, name in enumerate(names)]
        parts.append(f"nearest: {', '.join(near)}; close enough: {', '.join(there)}.")
    if shown < count:
        closest = (
            "the closest to what came first"
            if world.best < len(world.samples)
            else "the closest not among them"
        )
        parts.append(f"{shown} of {count} futures are shown, {closest}.")
    label = METHOD_LABELS.get(world.method, world.method)
    return f"{label}: {' '.join(parts)}" if parts else ""
