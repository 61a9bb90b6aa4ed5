"""``dataset.json``: what a dataset holds and what it was made from."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from deltacache.schemas.arguments import Flag

# ----------------------------------------------------------------------------------------------------
# Fingerprints: short content hashes that say which things belong together.
# ----------------------------------------------------------------------------------------------------


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint_of(value: Mapping[str, Any]) -> str:
    """First 16 hex digits of the SHA-256 of the canonical JSON of ``value``."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


def fingerprint_of_list(name: str, texts: Iterable[str]) -> str:
    """``fingerprint_of({name: [*texts]})`` of texts that need not fit in memory."""
    digest, separator = hashlib.sha256(f"{{{canonical_json(name)}:[".encode()), ""
    for text in texts:
        digest.update(f"{separator}{canonical_json(text)}".encode())
        separator = ","
    digest.update(b"]}")
    return digest.hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------
# Which blocks of an encoder are taken, as configs and command lines write it.
# ----------------------------------------------------------------------------------------------------


def parse_numbers(value: Any, what: str, advice: str) -> Any:
    """``"2,5,8,11"`` as numbers; anything else as it is.

    Raises:
        ValueError: text that is not a list of numbers; the message begins with ``what`` and ends with ``advice``.
    """
    if not isinstance(value, str):
        return value
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise ValueError(f"{what} {value!r} are not {advice}") from None


def parse_layers(value: Any) -> Any:
    """Blocks from text, see ``parse_numbers``."""
    return parse_numbers(value, "layers", "block numbers: give them from 0 up with commas, such as 2,5,8,11")


Layers = Annotated[tuple[int, ...] | None, BeforeValidator(parse_layers)]
"""Blocks counted from 0 whose outputs are joined, in increasing order; ``None``: the last hidden state alone."""


# ----------------------------------------------------------------------------------------------------
# Sizes of images, one number for squares, height and width for rectangles; and horizons, as text or numbers.
# ----------------------------------------------------------------------------------------------------


Size = int | tuple[int, int]
"""Side of a square, or height and width, in pixels. A square is always one number: equal sizes are equal."""


def parse_size(value: Any) -> Size:
    """``512``, ``"512"``, ``"448x896"`` (height x width), or a pair of numbers.

    Raises:
        ValueError: it has another form, or is not positive.
    """
    parts = value.lower().split("x") if isinstance(value, str) else value
    parts = list(parts) if isinstance(parts, list | tuple) else [parts]
    if not 1 <= len(parts) <= 2 or any(isinstance(part, bool | float) for part in parts):
        raise ValueError(_message(value))
    try:
        numbers = [int(part) for part in parts]
    except (TypeError, ValueError):
        raise ValueError(_message(value)) from None
    if min(numbers) < 1:
        raise ValueError(_message(value))
    height, width = numbers[0], numbers[-1]
    return height if height == width else (height, width)


def _message(value: Any) -> str:
    return f"Invalid image size {value!r}: give the side of a square such as 512, or height x width such as 448x896"


ImageSize = Annotated[Size, BeforeValidator(parse_size)]
"""A field of a config."""


def parse_horizons(value: Any) -> Any:
    """Steps from text, see ``parse_numbers``."""
    return parse_numbers(value, "horizons", "numbers of steps: give them with commas, such as 1,3")


def _in_order(horizons: tuple[int, ...]) -> tuple[int, ...]:
    if min(horizons, default=1) < 1:
        raise ValueError(f"horizon {min(horizons)} is not after the context: give numbers from 1 up")
    return tuple(sorted(set(horizons)))


Horizons = Annotated[tuple[int, ...], BeforeValidator(parse_horizons), AfterValidator(_in_order)]
"""Steps after the context at which futures are scored, in order and each once."""


def sides(size: Size) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else size


def size_text(size: Size | list[int]) -> str:
    """``512`` or ``448x896``, as on the command line."""
    return str(size) if isinstance(size, int) else "x".join(map(str, size))


FORMAT_VERSION = 2
Precision = Literal["float32", "bfloat16_autocast", "bfloat16"]
"""Of a model's forward pass. ``bfloat16_autocast``: products in bfloat16, residual stream and norms in float32.

``bfloat16`` in a record is what older versions computed, all of it in bfloat16: it is read, never computed again.
"""
AskedPrecision = Literal["auto", "float32", "bfloat16", "bfloat16_autocast"]
"""On a command line or in a config: ``bfloat16`` asks for ``bfloat16_autocast``."""
TrainingPrecision = Literal["auto", "float32", "bfloat16"]
"""Of a training's products; ``bfloat16`` is that of autocast, ``auto`` takes it on CUDA."""


class Frozen(BaseModel):
    """A value that checks itself and refuses unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SamplingSettings(Frozen):
    """How frames are chosen. Times are seconds."""

    frames: Annotated[int, Flag()] = Field(default=8, ge=2, le=1024, description="Frames per clip.")
    spacing_min_s: Annotated[float, Flag("spacing")] = Field(
        default=0.04, gt=0, description="Shortest and longest time between frames in seconds."
    )
    spacing_max_s: Annotated[float, Flag("spacing")] = Field(default=0.3333, gt=0)
    allow_duplicates: Annotated[bool, Flag("duplicates", off="--no-duplicates")] = Field(
        default=True, description="Repeat frames of short videos, or reject such videos (too_short)."
    )
    augment: Annotated[bool, Flag(off="--no-augment")] = Field(
        default=True, description="Random start, spacing, crop and flip; otherwise centred."
    )
    crop_scale: tuple[float, float] = (0.6, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_probability: float = Field(default=0.5, ge=0, le=1)
    seed: Annotated[int, Flag()] = Field(default=0, ge=0, description="Seed of all random choices.")
    frames_per_second: Annotated[float | None, Flag()] = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Frames per second of folders of frames whose names only count (img_00001.jpg, 00001.jpg); "
        "1000 for names in milliseconds.",
    )

    shots: Annotated[bool, Flag()] = Field(
        default=False,
        description="Keep each clip within one shot (pip install 'deltacache[shots]'); decodes all frames of a video.",
    )

    windows: Annotated[Literal["all"] | None, Flag()] = Field(
        default=None,
        description="all: every clip of a video on one grid of times, instead of --views; their frames are encoded and "
        "stored once.",
    )
    stride: Annotated[int, Flag()] = Field(
        default=1, ge=1, description="Frames of that grid from the start of one clip to that of the next."
    )

    @model_validator(mode="after")
    def _windows_share_their_frames(self) -> Self:
        if self.windows is None:
            if self.stride != 1:
                raise ValueError(f"stride {self.stride} is that of windows: give --windows all as well")
            return self
        if self.augment:
            raise ValueError(
                "windows all: the clips of a video share their frames, so they share one crop and are not mirrored: "
                "give --no-augment as well"
            )
        if self.spacing_min_s != self.spacing_max_s:
            raise ValueError(
                f"windows all: the clips lie on one grid of times, but spacing {self.spacing_min_s:g} "
                f"{self.spacing_max_s:g} is a range: give one time twice, such as --spacing 0.2 0.2"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_not_used(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What is at its default is left out as before there was anything else, so that fingerprints stay."""
        unused = {
            "frames_per_second": self.frames_per_second is None,
            "shots": not self.shots,
            "windows": self.windows is None,
            "stride": self.windows is None,
        }
        return {name: value for name, value in serialise(self).items() if not unused.get(name)}

    @model_validator(mode="after")
    def _spacing_in_order(self) -> Self:
        if self.spacing_min_s > self.spacing_max_s:
            raise ValueError(
                f"spacing {self.spacing_min_s:g} {self.spacing_max_s:g}: "
                "give the shorter time between frames first"
            )
        return self


_OPTIONAL = ("layers", "pca_fingerprint")


class BackboneCard(Frozen):
    """Which frozen backbone made the patch tokens."""

    id: str = Field(description="hub id, folder name, or 'tiny'")
    weights_sha256: str
    patch_size: int
    hidden_size: int = Field(description="of the transformer; the tokens' own is that of the dataset")
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    source: str | None = Field(
        default=None,
        description="on the hub, with the commit: hf://org/name@commit; not part of any fingerprint",
    )
    layers: Layers = Field(
        default=None, description="blocks whose outputs are joined; None: the last hidden state"
    )
    pca_fingerprint: str | None = Field(
        default=None, description="of the PCA that reduced the tokens, if any"
    )

    @model_serializer(mode="wrap")
    def _without_what_is_not_used(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Layers and PCA are left out when there are none: fingerprints from before there were any stay."""
        unused = {name for name in ("source", *_OPTIONAL) if getattr(self, name) is None}
        return {name: value for name, value in serialise(self).items() if name not in unused}

    @property
    def choice(self) -> dict[str, Any]:
        """Layers and PCA as plain JSON values, for what is made from the tokens; empty without both."""
        return {name: value for name, value in self.model_dump(mode="json").items() if name in _OPTIONAL}

    @property
    def name(self) -> str:
        """For tables: id, weights, layers, PCA."""
        parts = [f"{self.id}@{self.weights_sha256[:16]}"]
        if self.layers is not None:
            parts.append("layers " + ",".join(map(str, self.layers)))
        if self.pca_fingerprint is not None:
            parts.append(f"PCA {self.pca_fingerprint}")
        return ", ".join(parts)


SideRule = Literal["previous", "nearest", "linear"]
"""Which row of a side array a frame gets: the last one up to its time, the nearest, or what lies between two."""


class SideArray(Frozen):
    """What is stored beside the tokens of each frame, such as an action."""

    kind: Literal["numbers", "text"] = "numbers"
    width: int | None = Field(
        default=None, ge=1, description="numbers of a frame; None: one, without a dimension"
    )
    rule: SideRule = "previous"

    def shape(self, frames: int) -> tuple[int, ...]:
        """Of a clip of so many frames."""
        return (frames,) if self.width is None else (frames, self.width)


class DatasetCard(Frozen):
    """The content of ``dataset.json``."""

    format_version: Literal[2] = FORMAT_VERSION
    kind: Literal["features", "deltas"]
    store: Literal["webdataset", "zarr"]
    dtype: Literal["float16", "int8"] = "float16"
    precision: Precision = Field(default="float32", description="of the backbone's forward pass")
    backbone: BackboneCard
    tokenizer_fingerprint: str | None = None
    tokenizer_precision: Literal["float32", "bfloat16_autocast"] = Field(
        default="float32", description="of deltas: of the tokenizer's forward pass"
    )
    features_dtype: Literal["float16", "int8"] | None = Field(
        default=None, description="of deltas: dtype of the features they were made from, None meaning float16"
    )
    image_size: ImageSize
    patch_grid: tuple[int, int]
    hidden_size: int
    tokens_per_frame: int = Field(default=1, ge=1, description="of deltas")
    tokenizer_image_size: ImageSize | None = Field(
        default=None,
        description="of deltas: of the features that the tokenizer was trained on, if it says so",
    )
    sampling: SamplingSettings
    black_crc32c: int = Field(description="CRC-32C of black_patch_tokens.npy")
    side_arrays: dict[str, SideArray] = Field(default={}, description="by name; see docs/data.md")
    code_version: str
    sources: dict[str, str] = Field(
        default={},
        description="downloaded from the hub, such as tokenizer: hf://org/name@commit; not part of any fingerprint",
    )

    @model_serializer(mode="wrap")
    def _without_what_is_not_used(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What is at its default is left out as before there was anything else: older versions still read it."""
        unused = {
            "tokenizer_precision": self.tokenizer_precision == "float32",
            "side_arrays": not self.side_arrays,
            "sources": not self.sources,
        }
        return {name: value for name, value in serialise(self).items() if not unused.get(name)}

    @model_validator(mode="after")
    def _dtypes_fit_the_kind(self) -> Self:
        if self.kind == "deltas" and self.dtype != "float16":
            raise ValueError(
                f"dtype {self.dtype} is for features only: delta tokens are few and stay float16, whatever "
                "dtype their features have. Leave --dtype out, or give float16"
            )
        if self.kind == "features" and self.features_dtype is not None:
            raise ValueError("features_dtype is for deltas: features say their dtype in dtype")
        if self.kind == "features" and self.tokenizer_precision != "float32":
            raise ValueError("tokenizer_precision is for deltas: features are made without a tokenizer")
        return self

    def deltas(
        self,
        *,
        store: Literal["webdataset", "zarr"],
        tokenizer: str,
        code_version: str,
        tokens_per_frame: int = 1,
        tokenizer_image_size: Any = None,
        precision: Precision = "float32",
        sources: Mapping[str, str] = MappingProxyType({}),
    ) -> Self:
        """The card of the deltas that the tokenizer of this fingerprint makes in ``precision`` from these features."""
        features_dtype = self.dtype if self.dtype != "float16" else None
        changes = {"kind": "deltas", "store": store, "dtype": "float16", "features_dtype": features_dtype}
        return type(self).model_validate(
            self.model_dump()
            | changes
            | {
                "tokenizer_fingerprint": tokenizer,
                "code_version": code_version,
                "tokens_per_frame": tokens_per_frame,
                "tokenizer_image_size": tokenizer_image_size,
                "tokenizer_precision": precision,
                "sources": {**self.sources, **sources},
            }
        )

    def other_size(self, trained_at: Any, what: object) -> str:
        """That ``what`` was trained on features of another image size than these, in words; empty if it was not.

        Sizes may differ (a recipe goes from 256 to 512 px), but never without a word. Released files do not say theirs.
        """
        if trained_at is None or sides(parse_size(trained_at)) == sides(self.image_size):
            return ""
        return (
            f"{what} was trained on features of {size_text(parse_size(trained_at))} px, but these are of "
            f"{size_text(self.image_size)} px"
        )

    @property
    def features_fingerprint(self) -> str:
        """What determines the patch tokens: the same whichever store, and for deltas that of their parent."""
        return fingerprint_of(
            {
                "kind": "features",
                "format_version": self.format_version,
                "backbone": self.backbone.model_dump(mode="json", exclude={"id", "source"}),
                "image_size": self.model_dump(mode="json", include={"image_size"})["image_size"],
                "dtype": (self.dtype if self.kind == "features" else self.features_dtype) or "float16",
                "precision": self.precision,
                "sampling": self.sampling.model_dump(mode="json"),
            }
        )

    @property
    def fingerprint(self) -> str:
        """What determines the numbers of this dataset."""
        beside = {name: array.model_dump(mode="json") for name, array in self.side_arrays.items()}
        if self.kind == "features":
            if not beside:  # fingerprints from before there were any stay
                return self.features_fingerprint
            return fingerprint_of({"features": self.features_fingerprint, "side_arrays": beside})
        made_from = {"features": self.features_fingerprint, "tokenizer": self.tokenizer_fingerprint}
        if self.tokenizer_precision != "float32":  # fingerprints from before there was another stay
            made_from["tokenizer_precision"] = self.tokenizer_precision
        if beside:
            return fingerprint_of({**made_from, "side_arrays": beside})
        return fingerprint_of(made_from)

    @property
    def parents(self) -> dict[str, str]:
        """Fingerprints of what this dataset was made from."""
        if self.kind == "features":
            return {"backbone": self.backbone.weights_sha256[:16]}
        return {"features": self.features_fingerprint, "tokenizer": self.tokenizer_fingerprint or ""}
