"""``doctor --measure``: rates of this machine, and the hours that the published chains would take on it.

What takes long is measured in small: one pass of each model at 256 px, of random weights. Other sizes and recipes
follow from the number of operations.
"""

import io
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import numpy as np
import torch

from deltacache.models.deltatok import DeltaTok
from deltacache.models.devices import autocast_to
from deltacache.models.flops import (
    META,
    backbone_flops,
    count_flops,
    encoder_flops,
    encoder_on,
    product_rate,
    rebuilt,
    training_step_cost,
    training_step_flops,
)
from deltacache.models.worlds.deltaworld import DeltaWorld
from deltacache.schemas.configs import (
    PRESETS,
    TokenizerConfig,
    TrainingConfig,
    WorldConfig,
    read_yaml,
    tokenizer_preset,
    world_preset,
)
from deltacache.schemas.datasets import SamplingSettings
from deltacache.schemas.errors import VideoRefusedError

KINETICS_VIDEOS = 545_000
"""Of the training split of Kinetics-700-2020, as published."""
CHAINS = ("released", "paper")
_BUDGET_S, _DECODING_S = 35.0, 15.0
"""After which no model is run any more, and no larger frames are decoded; what is left takes a few seconds."""
OPERATIONS = Path(__file__).with_name("operations.json")
"""Operations of the shipped recipes in one and two layers, as a test counts them: that takes 10 processor seconds."""
FORWARD, TOKENIZER, WORLD = "forward pass of a ViT-B", "tokenizer step", "world-model step"
_LAYERS = 2
_FRAMES, _WIDTH, _PATCH, _MEASURED_PX = 8, 768, 16, 256
_HALF_BYTES = 2
_ASSUMED_SHARE = 0.5
"""Of the product rate, where a model is not run because that would take too long."""
Precision = Literal["float32", "bfloat16"]
_TYPES: dict[Precision, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of a chain: hours by what each resource would need alone, in each precision."""

    name: str
    compute_h: dict[Precision, float]
    decode_h: float = 0.0
    disk_h: float = 0.0
    shared: bool = False  # decoders and the model use the same cores

    def hours(self, precision: Precision) -> float:
        """Of the stage."""
        computing = self.compute_h[precision]
        return max(computing + self.decode_h if self.shared else max(computing, self.decode_h), self.disk_h)

    def limit(self, precision: Precision) -> str:
        """What takes most of the time."""
        parts = {"computing": self.compute_h[precision], "decoding": self.decode_h, "the disk": self.disk_h}
        return max(parts, key=lambda name: parts[name])


@dataclass
class Measurement:
    """Rates and, from them, the stages of each chain.

    Attributes:
        model_flop_per_s: operations per second that passes of models reach.
        decode_clips_per_s: of one core, by the size of the frames.
    """

    device: str
    videos: int
    product_flop_per_s: dict[Precision, float]
    model_flop_per_s: dict[Precision, dict[str, float]] = field(default_factory=dict)
    decode_clips_per_s: dict[int, float] = field(default_factory=dict)
    disk: dict[str, Any] = field(default_factory=dict)
    chains: dict[str, list[Stage]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    took_s: float = 0.0

    def total_h(self, chain: str, precision: Precision) -> float:
        """Hours of all stages of a chain, one after the other."""
        return sum(each.hours(precision) for each in self.chains[chain])

    @property
    def precisions(self) -> list[Precision]:
        """Those that are worth showing: bfloat16 where it is fast, both on a CPU."""
        fast = self.product_flop_per_s["bfloat16"] > 1.5 * self.product_flop_per_s["float32"]
        if not fast:
            return ["float32"]
        return ["float32", "bfloat16"] if self.device == "cpu" else ["bfloat16"]

    def as_json(self) -> dict[str, Any]:
        """Plain values, with the hours of each stage."""
        plain = asdict(self)
        plain["chains"] = {
            name: [
                {
                    "stage": each.name,
                    "hours": {p: each.hours(p) for p in self.precisions},
                    "limit": each.limit(self.precisions[-1]),
                }
                for each in stages
            ]
            for name, stages in self.chains.items()
        }
        return plain


def measure(device: torch.device, folder: Path, videos: int, say: Callable[[str], None]) -> Measurement:
    """Measure for at most a minute.

    Args:
        folder: whose disk is written and read; the file is removed.
        videos: of one view each, that the hours are for.
    """
    started = time.perf_counter()
    say(f"measuring on {device}, for at most a minute")
    rates: dict[Precision, float] = {
        name: product_rate(device, dtype or torch.float32, 1.0) for name, dtype in _TYPES.items()
    }
    found = Measurement(device.type, videos, rates)
    flops = Operations.shipped()
    _measure_decoding(found)
    _measure_disk(found, folder)
    _measure_models(found, device, started + _BUDGET_S, flops)
    for name in CHAINS:
        found.chains[name] = stages_of(name, found, flops)
    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    if load > 1.5 * cores:
        found.notes.append(
            f"other processes were busy (load {load:.1f} on {cores} cores): rates are lower bounds"
        )
    found.took_s = time.perf_counter() - started
    return found


def _measure_disk(found: Measurement, folder: Path) -> None:
    block = np.random.default_rng(0).bytes(16 << 20)
    folder = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".deltacache-doctor-") as file:
            begun, written = time.perf_counter(), 0
            while written < 256 << 20 and time.perf_counter() - begun < 2:
                file.write(block)
                file.flush()
                os.fsync(file.fileno())  # of each block, or the last one of a slow disk would take minutes
                written += len(block)
            write_s = time.perf_counter() - begun
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(
                    file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED
                )  # read from the disk, not from memory
            file.seek(0)
            begun, read = time.perf_counter(), 0
            while (part := file.read(16 << 20)) and time.perf_counter() - begun < 2:
                read += len(part)
            read_s = time.perf_counter() - begun
    except OSError as error:
        found.notes.append(f"disk not measured: {folder}: {error.strerror}")
        return
    found.disk = {
        "path": str(folder),
        "write_bytes_per_s": written / write_s,
        "read_bytes_per_s": read / read_s,
    }


def _measure_decoding(found: Measurement) -> None:
    """One clip of 8 frames from a drawn H.264 video of Kinetics' usual size, as an extraction decodes it."""
    try:
        from deltacache.pipeline.decoding.child import ChildDecoder
        from deltacache.pipeline.decoding.decode import VideoJob

        video = _drawn_video()
    except ImportError as error:
        found.notes.append(f"decoding not measured: {error.name or error} is missing")
        return
    with (
        tempfile.TemporaryDirectory(prefix="deltacache-doctor-") as folder,
        ChildDecoder(30.0, 4 << 30) as decoder,
    ):
        path = Path(folder, "drawn.mp4")
        path.write_bytes(video)
        started = time.perf_counter()
        for size in (256, 512):
            if size > 256 and time.perf_counter() - started > _DECODING_S:
                found.decode_clips_per_s[size] = found.decode_clips_per_s[256]
                found.notes.append(
                    "decoding to 512 px not run, for lack of time: assumed to be that to 256 px"
                )
                break
            begun, clips = time.perf_counter(), -1  # the first one starts the decoder
            while clips < 1 or time.perf_counter() - begun < 2:
                job = VideoJob(
                    str(path), "drawn.mp4", "drawn", max(clips, 0), 1, size, SamplingSettings(seed=0)
                )
                try:
                    decoder.decode(job)
                except VideoRefusedError as error:
                    found.notes.append(f"decoding not measured: {error.message}")
                    return
                clips += 1
                if clips == 0:
                    begun = time.perf_counter()
            found.decode_clips_per_s[size] = clips / (time.perf_counter() - begun)


def _drawn_video(frames: int = 250, height: int = 256, width: int = 340) -> bytes:
    """H.264 of ten seconds: a texture that moves, with some noise."""
    import av

    rng, buffer = np.random.default_rng(0), io.BytesIO()
    texture = (
        rng.integers(0, 255, (height // 8, width // 8 + frames // 8 + 1, 3), np.uint8)
        .repeat(8, 0)
        .repeat(8, 1)
    )
    noise = rng.integers(0, 24, (height, width, 3), np.uint8)
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {"preset": "veryfast", "crf": "23"}
        for at in range(frames):
            moved = texture[:height, at : at + width] // 2 + np.roll(noise, 7 * at, 0)
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(moved), format="rgb24"))
            )
        container.mux(stream.encode(None))
    return buffer.getvalue()


def _measure_models(found: Measurement, device: torch.device, deadline: float, flops: "Operations") -> None:
    """Models of few layers, as wide as the recipe's: the share of the product rate hardly depends on the depth."""
    side = _MEASURED_PX // _PATCH
    recipe, world_recipe = tokenizer_preset("released"), world_preset("released")
    pairs, clips = (1, 2) if device.type == "cpu" else (16, 64)
    before, after = torch.randn(2, pairs, side**2, _WIDTH, device=device)
    short = _with_layers(recipe, _LAYERS)
    model = rebuilt(_tokenizer(short), device)

    def forward() -> None:
        with torch.no_grad():
            model.encode(before, after, (side, side))

    def step() -> None:
        model.training_loss(before, after, (side, side), recipe.loss).loss.backward()
        model.zero_grad()

    world = _world(_with_layers(world_recipe, _LAYERS))
    wanted: dict[str, tuple[int, Callable[[], float]]] = {
        FORWARD: (
            pairs * flops.encoder(recipe, _MEASURED_PX, _LAYERS),
            lambda: seconds_of(forward, device, deadline),
        ),
        TOKENIZER: (
            pairs * flops.pair(recipe, _MEASURED_PX, _LAYERS),
            lambda: seconds_of(step, device, deadline),
        ),
        WORLD: (
            clips * flops.clip(world_recipe, _LAYERS),
            lambda: (
                training_step_cost(
                    world, _FRAMES, (side, side), world_recipe.candidates, clips, device
                ).seconds
            ),
        ),
    }
    for precision in reversed(found.precisions):
        rate = found.product_flop_per_s[precision]
        reached = found.model_flop_per_s.setdefault(precision, {})
        for name, (flop, run) in wanted.items():
            if name == WORLD and precision != found.precisions[-1]:
                # The trainer chooses among candidates in bfloat16 by itself, which is nearly all it computes.
                reached[name] = found.model_flop_per_s[found.precisions[-1]][name]
            elif time.perf_counter() + 3 * flop / min([_ASSUMED_SHARE * rate, *reached.values()]) > deadline:
                reached[name] = _ASSUMED_SHARE * rate
                found.notes.append(
                    f"{name} in {precision} not run, for lack of time: assumed to be half of the product rate"
                )
            else:
                with autocast_to(device.type, _TYPES[precision] if name != WORLD else None):
                    reached[name] = flop / run()


def seconds_of(run: Callable[[], Any], device: torch.device, deadline: float) -> float:
    """The faster of two runs after one that does not count; of one where it takes seconds.

    Past the deadline the first one counts.
    """
    taken: list[float] = []
    for _ in range(3):
        begun = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
        taken.append(time.perf_counter() - begun)
        if (len(taken) > 1 and taken[-1] > 1) or time.perf_counter() > deadline:
            break
    return min(taken[1:] or taken)


class Operations:
    """Operations of the parts of a recipe, counted on the meta device in two shallow models: layers are all alike.

    Attributes:
        counted: of one and of two layers, by what they are of.
    """

    def __init__(self, counted: dict[str, tuple[int, int]] | None = None) -> None:
        self.counted = {} if counted is None else counted

    @classmethod
    def shipped(cls) -> Self:
        """With the counts that are kept in the package: other recipes are counted when they are asked for."""
        return cls({name: (one, two) for name, (one, two) in json.loads(OPERATIONS.read_bytes()).items()})

    def _of_layers(self, key: str, layers: int, count: Callable[[int], int]) -> int:
        if key not in self.counted:
            self.counted[key] = count(1), count(2)
        one, two = self.counted[key]
        return one + (layers - 1) * (two - one)

    def backbone(self, size: int) -> int:
        """A frame."""
        return self._of_layers(
            f"frame of a ViT-B, {size} px",
            1,
            lambda _: backbone_flops(encoder_on("meta", "vitb16"), (size, size)).total,
        )

    def encoder(self, config: TokenizerConfig, size: int, layers: int | None = None) -> int:
        """A frame."""
        side = size // _PATCH

        def count(layers: int) -> int:
            return encoder_flops(_tokenizer(_with_layers(config, layers)), (side, side)).total

        return self._of_layers(
            f"frame, {size} px, {config.model.model_dump_json()}",
            layers or config.model.encoder_layers,
            count,
        )

    def pair(self, config: TokenizerConfig, size: int, layers: int | None = None) -> int:
        """Forward and backward pass of a pair of frames."""
        side = size // _PATCH
        frame = torch.empty(1, side**2, _WIDTH, device=META)

        def count(layers: int) -> int:
            model = _tokenizer(_with_layers(config, layers))

            def step() -> None:
                model.training_loss(frame, frame, (side, side), config.loss).loss.backward()

            return count_flops(step).total

        return self._of_layers(
            f"pair, {size} px, {config.loss}, {config.model.model_dump_json()}",
            layers or config.model.encoder_layers,
            count,
        )

    def clip(self, config: WorldConfig, layers: int | None = None) -> int:
        """Forward and backward pass of a clip of delta tokens, the selection included."""
        side = _MEASURED_PX // _PATCH

        def count(layers: int) -> int:
            world = _world(_with_layers(config, layers))
            return training_step_flops(world, _FRAMES, (side, side), config.candidates).here

        key = f"clip, K = {config.candidates}, {config.model.model_dump_json()}"
        return self._of_layers(key, layers or config.model.num_layers, count)


RecipeT = TypeVar("RecipeT", TokenizerConfig, WorldConfig)


def _with_layers(config: RecipeT, layers: int) -> RecipeT:
    names = ("num_layers",) if isinstance(config, WorldConfig) else ("encoder_layers", "decoder_layers")
    model = config.model.model_copy(update=dict.fromkeys(names, layers))
    return config.model_copy(update={"model": model})


def _tokenizer(config: TokenizerConfig) -> DeltaTok:
    with META:
        return DeltaTok(_WIDTH, **config.model.model_dump())


def _world(config: WorldConfig) -> DeltaWorld:
    with META:
        return DeltaWorld(_WIDTH, **config.model.arguments)


def stages_of(name: str, found: Measurement, flops: "Operations") -> list[Stage]:
    """The stages of ``presets/NAME/chain.yaml``, without the evaluation, whose cost is that of its videos."""
    from deltacache.train.data import RESIDENT_SHARE, memory_bytes

    chain, videos = read_yaml(PRESETS / name / "chain.yaml"), found.videos
    final = chain["train_videos"]["image_size"]
    reading = found.disk.get("read_bytes_per_s", float("inf"))
    writing = found.disk.get("write_bytes_per_s", float("inf"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def computing(part: str, flop: float) -> dict[Precision, float]:
        return {p: flop / found.model_flop_per_s.get(p, {}).get(part, 1.0) / 3600 for p in found.precisions}

    def frame_bytes(size: int) -> int:
        return (size // _PATCH) ** 2 * _WIDTH * _HALF_BYTES

    def new_steps(place: int, training: list[TrainingConfig]) -> int:
        """Steps of a stage: those of the stage that it continues do not count again."""
        config = training[place]
        return config.steps - (training[place - 1].steps if config.start == "everything" else 0)

    def features(size: int) -> Stage:
        rate = found.decode_clips_per_s.get(size)
        return Stage(
            f"features {size} px",
            computing(FORWARD, flops.backbone(size) * _FRAMES * videos),
            decode_h=videos / cores / rate / 3600 if rate else 0.0,
            disk_h=videos * _FRAMES * frame_bytes(size) / writing / 3600,
            shared=found.device == "cpu",
        )

    stages = chain["tokenizer"]["stages"]
    configs = [tokenizer_preset(name, each["config"]["stage"]) for each in stages]
    sizes = [each.get("image_size") or final for each in stages]
    made = [features(size) for size in dict.fromkeys([*sizes, final])]
    for place, (each, config, size) in enumerate(zip(stages, configs, sizes, strict=True)):
        pairs = new_steps(place, [c.training for c in configs]) * config.training.batch_size
        resident = videos * _FRAMES * frame_bytes(size) <= RESIDENT_SHARE * memory_bytes()
        disk = 0.0 if resident else pairs * 2 * frame_bytes(size) / reading / 3600
        made.append(
            Stage(
                f"tokenizer {each['name']}",
                computing(TOKENIZER, flops.pair(config, size) * pairs),
                disk_h=disk,
            )
        )
    made.append(
        Stage(
            "tokenize",
            computing(FORWARD, flops.encoder(configs[-1], final) * _FRAMES * videos),
            disk_h=videos * _FRAMES * frame_bytes(final) / reading / 3600,
        )
    )
    stages = next(iter(chain["worlds"].values()))["stages"]
    worlds = [world_preset(name, each["config"]["stage"]) for each in stages]
    for place, (each, world) in enumerate(zip(stages, worlds, strict=True)):
        clips = new_steps(place, [w.training for w in worlds]) * world.training.batch_size
        made.append(Stage(f"world model {each['name']}", computing(WORLD, flops.clip(world) * clips)))
    return made
