"""The pictures of one example: what was seen, what happened, and what the models expected, a strip per future.

All strips of an example have a picture for every moment, so that a slider over time can pick one; strips of futures
are empty before the first predicted frame.

Shapes: T frames, F true futures, H longest horizon, N patches, D hidden.
"""

import base64
import colorsys
import functools
import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from matplotlib import colormaps
from PIL import Image

from deltacache.evaluate.examples import Example, ExampleMaps, ExampleWorld, spread
from deltacache.evaluate.report.panels import METHOD_LABELS, class_name
from deltacache.schemas.benchmarks import IGNORE, MAX_DEPTH_M

# ----------------------------------------------------------------------------------------------------
# Class ids and metres as colours, with the key that says which colour means what.
# ----------------------------------------------------------------------------------------------------


_KEY_CLASSES = 12
_GOLDEN_ANGLE = 0.61803398875
_NEAREST_M = 1.0
_DEPTH_TICKS_M = (2, 5, 10, 20, 40, 80)
_NOTHING = (0, 0, 0, 0)


@functools.cache
def page_template(name: str) -> Template:
    """A page of ``templates``; compiled once in a process."""
    environment = Environment(
        loader=PackageLoader("deltacache.evaluate.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["capitalize_first"] = lambda text: text[:1].upper() + text[1:]
    environment.filters["unbroken"] = lambda text: text.replace(" s)", "\N{NO-BREAK SPACE}s)")
    return environment.get_template(name)


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """A colour (``#rrggbb``) and what it means."""

    colour: str
    text: str


def class_palette(classes: int) -> np.ndarray:
    """(256, 4) uint8: a colour a class, far apart for ids that are near; the ignored one is transparent."""
    palette = np.zeros((256, 4), np.uint8)
    for label in range(min(classes, IGNORE)):
        hue = (0.58 + label * _GOLDEN_ANGLE) % 1
        lightness = (0.42, 0.66, 0.54)[label % 3]
        palette[label, :3] = np.round(255 * np.array(colorsys.hls_to_rgb(hue, lightness, 0.62)))
        palette[label, 3] = 255
    return palette


def class_colours(labels: np.ndarray) -> np.ndarray:
    """(..., 4) uint8 of class ids; ids keep their colour in all pictures."""
    return class_palette(IGNORE)[labels]


def class_key(dataset: str, maps: Sequence[np.ndarray]) -> list[KeyEntry]:
    """The classes that cover most pixels of ``maps``."""
    counts = sum(np.bincount(each.ravel(), minlength=256)[:IGNORE] for each in maps)
    order = [int(label) for label in np.argsort(-np.asarray(counts)) if np.asarray(counts)[label]]
    palette = class_palette(IGNORE)
    return [KeyEntry(_hex(palette[label]), class_name(dataset, label)) for label in order[:_KEY_CLASSES]]


def depth_colours(metres: np.ndarray) -> np.ndarray:
    """(..., 4) uint8: bright is near; equal steps are equal ratios. Depth 0 is unknown and transparent."""
    depth = np.asarray(metres, np.float32)
    colours = colormaps["viridis"](1 - _position(depth), bytes=True)
    return np.where((depth > 0)[..., None], colours, np.array(_NOTHING, np.uint8))


def nearness_colours(values: np.ndarray) -> np.ndarray:
    """(..., 4) uint8 of relative inverse depth: bright is near. 0 is unknown and transparent."""
    colours = colormaps["viridis"](np.asarray(values, np.float32) / MAX_DEPTH_M, bytes=True)
    return np.where((np.asarray(values) > 0)[..., None], colours, np.array(_NOTHING, np.uint8))


def nearness_key() -> list[KeyEntry]:
    """Both ends and the middle: such depth has no unit."""
    places = {"near": 1.0, "half as near": 0.5, "far": 0.02}
    return [
        KeyEntry(_hex(nearness_colours(np.array(share * MAX_DEPTH_M))), text)
        for text, share in places.items()
    ]


def depth_key() -> list[KeyEntry]:
    """Some depths and their colours."""
    return [KeyEntry(_hex(depth_colours(np.array(metres))), f"{metres} m") for metres in _DEPTH_TICKS_M]


def _position(metres: np.ndarray) -> np.ndarray:
    limits = np.log([_NEAREST_M, MAX_DEPTH_M])
    return (np.log(np.maximum(metres, _NEAREST_M)) - limits[0]) / (limits[1] - limits[0])


def _hex(colour: np.ndarray) -> str:
    return "#" + "".join(f"{int(each):02x}" for each in colour[:3])


# ----------------------------------------------------------------------------------------------------
# Features and frames as small pictures that lie inside the page.
#
# Shapes: N patches, D hidden.
# ----------------------------------------------------------------------------------------------------


_GAP = 0.04  # between pictures of a film, as a share of their width
_COLOUR_RANGE = (1.0, 99.0)  # percentiles of the true features that become dark and bright


@dataclass(frozen=True)
class Projection:
    """From features to colours, the same for true and predicted ones.

    Attributes:
        mean: (D,).
        axes: (3, D) the first three principal axes: red, green, blue.
        low: (3,) what becomes 0.
        high: (3,) what becomes 255.
    """

    mean: np.ndarray
    axes: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def picture(self, tokens: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        """(rows, columns, 3) uint8 of one frame's tokens (N, D); a pixel a patch."""
        values = (tokens.astype(np.float32) - self.mean) @ self.axes.T
        scaled = (values - self.low) / np.maximum(self.high - self.low, 1e-12)
        return np.round(255 * scaled.clip(0, 1)).astype(np.uint8).reshape(*grid, 3)


def fit_projection(features: Sequence[np.ndarray]) -> Projection:
    """Principal axes of true features, each (..., N, D); predictions take no part."""
    tokens = np.concatenate([each.reshape(-1, each.shape[-1]) for each in features]).astype(np.float32)
    mean = tokens.mean(0)
    covariance = np.cov(tokens - mean, rowvar=False).reshape(tokens.shape[1], tokens.shape[1])
    axes = np.linalg.eigh(covariance)[1][:, ::-1][:, :3].T
    axes = axes * np.where(
        axes.sum(1, keepdims=True) < 0, -1, 1
    )  # a sign that does not depend on the library
    low, high = np.percentile((tokens - mean) @ axes.T, _COLOUR_RANGE, axis=0)
    return Projection(mean, axes.astype(np.float32), low, high)


def change_picture(
    tokens: np.ndarray, before: np.ndarray, grid: tuple[int, int], largest: float
) -> np.ndarray:
    """(rows, columns, 4) uint8: how far each patch (N, D) moved, opaque at ``largest``."""
    distance = np.linalg.norm(tokens.astype(np.float32) - before.astype(np.float32), axis=-1)
    picture = np.empty((*grid, 4), np.uint8)
    picture[..., :3] = (213, 94, 0)
    picture[..., 3] = np.round(255 * (distance / max(largest, 1e-12)).clip(0, 1)).reshape(grid)
    return picture


def largest_change(futures: np.ndarray, before: np.ndarray) -> float:
    """The largest distance of a patch of true futures (..., N, D) from ``before`` (N, D)."""
    distance = np.linalg.norm(futures.astype(np.float32) - before.astype(np.float32), axis=-1)
    return float(distance.max())


def film(cells: Sequence[np.ndarray | None], side: int) -> np.ndarray:
    """Pictures of one size side by side, (h, n (w + gap), 4) uint8; what is missing stays transparent.

    Args:
        cells: (h, w, 3 or 4) uint8 each; those of more than ``side`` pixels are made smaller.
    """
    known = [_fitted(each, side) for each in cells if each is not None]
    height, width = known[0].shape[:2]
    gap = gap_of(width)
    strip = np.zeros((height, len(cells) * (width + gap), 4), np.uint8)
    left = iter(known)
    for at, cell in enumerate(cells):
        if cell is not None:
            start = at * (width + gap)
            strip[:, start : start + width] = next(left)
    return strip


def gap_of(width: int) -> int:
    """Pixels between pictures of a film."""
    return max(1, round(width * _GAP))


def _fitted(picture: np.ndarray, side: int) -> np.ndarray:
    image = Image.fromarray(picture).convert("RGBA")
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(image)


def webp_uri(picture: np.ndarray, *, lossless: bool) -> str:
    """A picture (h, w, 4) uint8 as a ``data:`` address."""
    buffer = io.BytesIO()
    options = {"lossless": True, "exact": False} if lossless else {"quality": 82, "alpha_quality": 100}
    Image.fromarray(picture).save(buffer, format="webp", method=4, **options)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ----------------------------------------------------------------------------------------------------
# What a page shows of an example: strips of pictures over time, in groups.
# ----------------------------------------------------------------------------------------------------


PixelLookup = Callable[[str], np.ndarray | None]
"""From a clip id to its frames (T, H, W, 3) uint8, or ``None`` where they are not known."""


@dataclass(frozen=True, slots=True)
class Detail:
    """How much is shown, so that a page keeps within its size.

    Attributes:
        samples: strips a world model.
        futures: moments after the context.
        side: of the largest pictures, in pixels.
        branching: every sample starts with the past, and what needs no explanation comes first: for one sequence alone.
    """

    samples: int = 8
    futures: int = 8
    side: int = 192
    branching: bool = False


@dataclass(frozen=True, slots=True)
class Strip:
    """Pictures of one line of time inside one image of ``size`` (width, height).

    ``kind`` is its style: true, rebuilt, predicted or mean; ``colour`` (``--s<n>``) that of its world model. What is
    ``folded`` is shown on demand.
    """

    kind: str
    label: str
    mark: str
    uri: str
    alt: str
    size: tuple[int, int]
    pixelated: bool
    colour: int | None = None
    folded: bool = False

    def _width(self, pictures: int) -> int:
        """Of one of the pictures, without the gap behind it."""
        share = self.size[0] // pictures
        return next(width for width in range(share, 0, -1) if width + gap_of(width) <= share)

    def stretch(self, pictures: int) -> float:
        """Width of the strip over that of one picture."""
        return self.size[0] / self._width(pictures)

    def ratio(self, pictures: int) -> float:
        """Width of a picture over its height."""
        return self._width(pictures) / self.size[1]


@dataclass(frozen=True, slots=True)
class StripGroup:
    """Strips of one way of looking, and what its colours mean."""

    title: str
    note: str
    key: tuple[KeyEntry, ...]
    strips: tuple[Strip, ...]


@dataclass(frozen=True, slots=True)
class ExampleView:
    """One sequence, or a scene with several futures.

    Attributes:
        moments: what is said of each picture of a strip: its time from the last seen frame, and seen or future.
        seen: how many of them belong to the context.
        wide: whether pictures are wider than high, and so want more room side by side.
    """

    title: str
    moments: tuple[str, ...]
    seen: int
    wide: bool
    note: str
    groups: tuple[StripGroup, ...]


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

_UNFOLDED = 3  # futures of a world model that are shown at first
_WIDE = 1.5  # columns to rows of patches, from which pictures get more room


Looks = Mapping[str, tuple[str, int | None]]
"""Name and colour (``--s<n>``) of world models, by fingerprint."""


def example_views(
    examples: Sequence[Example], frames: PixelLookup, detail: Detail, looks: Looks = MappingProxyType({})
) -> list[ExampleView]:
    """Pictures of all examples; colours mean the same in all of them."""
    if not examples:
        return []
    projection = _projection(examples)
    return [_ExampleStrips(example, projection, detail, looks).view(frames) for example in examples]


def _projection(examples: Sequence[Example]) -> Projection:
    return fit_projection([array for each in examples for array in (each.patch_tokens, each.futures)])


def opening_view(
    examples: Sequence[Example], frames: PixelLookup, detail: Detail, looks: Looks = MappingProxyType({})
) -> ExampleView:
    """One example in short: its past, and behind it the true and some predicted futures.

    Frames where they are known, and one look at the predictions: the one that needs least explanation, in the
    colours of ``example_views``.
    """
    example = next((each for each in examples if len(each.futures) > 1), examples[0])
    detail = replace(detail, branching=True)
    view = _ExampleStrips(example, _projection(examples), detail, looks).view(frames)
    others = [group for group in view.groups if group.title != "Frames"]
    kept = [group for group in view.groups if group.title == "Frames"] + others[:1]
    return replace(
        view,
        groups=tuple(
            replace(group, strips=tuple(each for each in group.strips if each.kind in ("true", "predicted")))
            for group in kept
        ),
    )


class _ExampleStrips:
    """Draws one example; all its change maps share a scale."""

    def __init__(self, example: Example, projection: Projection, detail: Detail, looks: Looks) -> None:
        self._example, self._detail, self._looks = example, detail, looks
        steps = len(example.seconds) - example.context
        self._steps = spread(range(steps), detail.futures)
        self._last = example.patch_tokens[example.context - 1]
        # A video may end with the last seen frame: then changes are shown on the scale of the predicted ones.
        ends = [example.futures[:, -1]] if example.futures.shape[1] else []
        ends = ends or [world.samples[:, -1] for world in example.worlds]
        largest = max(largest_change(each, self._last) for each in ends)
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
        features = [self._features("features"), self._features("change")]
        maps = [self._maps(each) for each in example.maps]
        groups = [self._frames(frames), *(maps + features if self._detail.branching else features + maps)]
        return ExampleView(
            title=example.title,
            moments=tuple(moments),
            seen=example.context,
            wide=example.grid[1] >= _WIDE * example.grid[0],
            note=" ".join(
                _tally(world, self._named(world), self._names(), len(self._order(world)))
                for world in example.worlds
            ).strip(),
            groups=tuple(group for group in groups if group is not None),
        )

    def _names(self) -> list[str]:
        """``left``, ``right``, …, of a scene; none of a sequence with its one recorded future."""
        return [outcome for outcome in self._example.outcomes if outcome]

    def _true_label(self, future: int) -> str:
        names = self._names()
        if not self._example.futures.shape[1]:
            return "what was seen"
        return f"true future: {names[future]}" if names else "true future"

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
        colour: int | None = None,
        folded: bool = False,
    ) -> Strip:
        """``seen`` (C, ...) and ``futures`` (H, ...) as one image; ``only_last`` at the last moment instead.

        Fewer futures end before the others do.
        """
        paint, context = self._paints[look], self._example.context
        cells: list[np.ndarray | None] = [None] * context
        if seen is not None:
            cells = [paint(each) for each in seen[:context]]
        if futures is not None:
            cells += [paint(futures[step]) if step < len(futures) else None for step in self._steps]
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
            colour=colour,
            folded=folded,
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
            strips += self._samples(world, look, world.samples, seen)
            if len(world.reached) > 1 and not self._detail.branching:
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
                strips += self._samples(
                    world, maps.kind, maps.samples[world.fingerprint], maps.truth[:context]
                )
        key: list[KeyEntry] = []
        if maps.kind == "segmentation":
            key = class_key(example.title.split(" ", 1)[0], shown)
        elif maps.kind == "depth":
            key = depth_key()
        elif maps.kind == "relative_depth":
            key = nearness_key()
        return StripGroup(_KINDS[maps.kind], "", tuple(key), tuple(strips))

    def _order(self, world: ExampleWorld) -> list[int]:
        """Samples to show: the closest first, then evenly over the true futures that they are nearest to.

        Those that are not folded are spread in this way too.
        """
        kept = range(len(world.samples))
        best = [world.best] if world.best in kept else []
        rest = sorted(
            (at for at in kept if at not in best),
            key=lambda at: (world.nearest[at], world.reached[at] < 0, at),
        )
        if not self._names():
            return best + rest[: self._detail.samples - len(best)]
        first = list(spread(rest, min(_UNFOLDED, self._detail.samples) - len(best)))
        others = [at for at in rest if at not in first]
        return best + first + list(spread(others, self._detail.samples - len(best) - len(first)))

    def _named(self, world: ExampleWorld) -> str:
        """Its name, or its method, and its fingerprint where two have the same."""
        if world.fingerprint in self._looks:
            return self._looks[world.fingerprint][0]
        label = METHOD_LABELS.get(world.method, world.method)
        several = sum(each.method == world.method for each in self._example.worlds) > 1
        return f"{label} ({world.fingerprint[:8]})" if several else label

    def _samples(
        self, world: ExampleWorld, look: str, samples: np.ndarray, seen: np.ndarray
    ) -> Iterator[Strip]:
        names, several = self._names(), len(world.reached) > 1
        each_one = all(len(world.reached) == 1 for world in self._example.worlds)
        model = self._named(world) if len(self._example.worlds) > 1 else ""
        for position, at in enumerate(self._order(world)):
            label = f"future {at + 1}" if several else "its one future"
            if model:
                label = model if each_one else f"{model}: {label}"
            if names:
                outcome = names[int(world.nearest[at])]
                label += f", {'reaches' if world.reached[at] >= 0 else 'nearest'} {outcome}"
            mark = "closest" if several and at == world.best else ""
            past = seen if self._detail.branching else None
            colour = self._looks.get(world.fingerprint, ("", None))[1]
            folded = position >= _UNFOLDED and not self._detail.branching
            yield self._strip(
                "predicted", look, label, past, samples[at], mark=mark, colour=colour, folded=folded
            )


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


def _tally(world: ExampleWorld, label: str, names: Sequence[str], shown: int) -> str:
    """What became of all samples of a world model, in words."""
    count = len(world.reached)
    parts = []
    if names:
        nearest, reached = Counter(world.nearest.tolist()), Counter(world.reached.tolist())
        near = [f"{nearest[at]} to {name}" for at, name in enumerate(names)]
        there = [f"{reached[at]} reach {name}" for at, name in enumerate(names)]
        parts.append(f"nearest: {', '.join(near)}; close enough: {', '.join(there)}.")
    if shown < count and world.best < 0:
        parts.append(f"{shown} of {count} futures are shown.")
    elif shown < count:
        closest = (
            "the closest to the true future first"
            if world.best < len(world.samples)
            else "the closest not among them"
        )
        parts.append(f"{shown} of {count} futures are shown, {closest}.")
    return f"{label}: {' '.join(parts)}" if parts else ""
