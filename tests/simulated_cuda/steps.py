"""What the simulated device is asked: ``python steps.py NAME…`` prints a line of JSON for each name.

    world/PRESET[/STAGE]     a training step of a world model, at the whole batch unless :PASS says how many clips
    tokenizer/PRESET/STAGE   one of a tokenizer, pairs at the resolution of its stage
    head/PRESET/RECIPE       one of a head, on 512 px through a ViT-B; frames that are not kept, so each is encoded;
                             segmentation, depth or rgb; whole-segmentation and whole-depth: frames of 448 x 896 px
    extract/PIXELS           64 frames through extraction's encoder, a ViT-B
    tokenize/PIXELS          the same to delta tokens with the released tokenizer; features/PIXELS from patch tokens
    evaluate/RECIPE          a sequence of a benchmark with a head, a tokenizer and two world models, 512 px

    gpu/small                benchmarks/gpu.py from end to end, tiny

``@float32`` behind a name: in float32 instead of bfloat16. ``#2``: with two layers of every model, which are all alike.
A step is the second one, when all that happens once has happened. Tiny presets take 64 wide tokens, and a backbone to
match.
"""

import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from device import CUDA, Watch, simulated  # isort: skip: it comes before torch

import numpy as np
import torch
from torch.utils._pytree import tree_leaves
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from deltacache.evaluate.benchmarks import labels, scoring
from deltacache.evaluate.benchmarks.labels import DepthScorer, SegmentationScorer
from deltacache.evaluate.benchmarks.loading import LoadedSequence
from deltacache.evaluate.benchmarks.sampling import Ensemble, SequenceBatch, Timing
from deltacache.evaluate.benchmarks.scoring import BatchScorer
from deltacache.evaluate.inputs import Models, Tokenizer, World
from deltacache.evaluate.metrics import SampleSums
from deltacache.evaluate.output import Method
from deltacache.evaluate.predictions import RolloutProtocol
from deltacache.models import backbone as backbone_module
from deltacache.models.backbone import IMAGENET, Backbone
from deltacache.models.deltatok import DeltaTok
from deltacache.models.devices import forward_precision
from deltacache.models.heads import DepthHead, SegmentationHead
from deltacache.models.masked_transformer import MaskedTransformer
from deltacache.models.rgb_decoder import RgbDecoder
from deltacache.models.worlds import world_class
from deltacache.pipeline.benchmarks.frames import split_of
from deltacache.pipeline.benchmarks.training_frames import LoadedFrame, TrainingFrame, TrainingFrames
from deltacache.pipeline.work.encoders import DeltaEncoder, FeatureEncoder
from deltacache.pipeline.work.lanes import OverlappedForward
from deltacache.schemas.benchmarks import CLASSES, LabelledSequence
from deltacache.schemas.configs import head_preset, rgb_preset, tokenizer_preset, world_preset
from deltacache.train.data import ClipBatch, PairBatch, ResidentClips, clip_batches
from deltacache.train.heads.data import HeadFrames
from deltacache.train.heads.training import LinearHeadTask, RgbTask
from deltacache.train.optimizer import FiniteGuard, clip_gradients, make_optimizer, set_rate
from deltacache.train.order import MicroBatch, Split
from deltacache.train.tokenizer import TokenizerTask
from deltacache.train.world import WorldTask

FRAMES, CLIPS = 8, 2048
most_layers: int | None = None
"""Of each model, where not all of them are asked for."""


def shallow(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a model with no more layers than were asked for."""
    depths = {"num_layers", "encoder_layers", "decoder_layers", "layers"} & arguments.keys()
    return arguments | {name: min(arguments[name], most_layers or arguments[name]) for name in depths}


class RandomPatches:
    """Stands for the patch tokens of a dataset, which would not fit here: batches on the device."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape

    def batch(self, part: MicroBatch) -> ClipBatch:
        tokens = torch.empty(part.stop - part.start, *self._shape, device=CUDA)
        return ClipBatch(tokens, torch.empty(part.stop - part.start, FRAMES, device=CUDA))


def world_step(samples: int | None, precision: Any, preset: str, stage: str | None = None) -> dict[str, Any]:
    config = world_preset(preset, stage)
    config = config.model_copy(
        update={"training": config.training.model_copy(update={"precision": precision})}
    )
    made = world_class(config.model.architecture)
    hidden, grid = (
        (1152, (32, 64) if stage == "448px" else (16, 32)) if "foresight" in preset else (768, (16, 16))
    )
    if "tiny" in preset:
        hidden, grid = 64, (4, 4)
    arguments = shallow(dict(config.model.arguments))
    tokens: tuple[int, ...] = (hidden,) if made.trains_on == "deltas" else (grid[0] * grid[1], hidden)
    training = config.training
    effective = training.batch_size * (training.accumulation or 1)
    split = Split(samples or effective, effective // (samples or effective))
    with torch.device("cuda"):
        model = made(hidden, **arguments)
    arrays = ResidentClips(np.zeros((CLIPS, FRAMES, 1), np.float16), np.zeros((CLIPS, FRAMES), np.float32))
    if made.trains_on == "deltas":
        arrays = ResidentClips(np.zeros((CLIPS, FRAMES, hidden), np.float16), arrays.timestamps_s)
    task = WorldTask(model, arrays, grid, config, CUDA, split)
    source = RandomPatches((FRAMES, *tokens))
    batches = clip_batches(arrays, effective, training.seed, split.parts_of(range(2)), CUDA)
    patches = made.trains_on != "deltas"
    with closing(batches):
        return measured(task, split, training, lambda part: source.batch(part) if patches else next(batches))


def tokenizer_step(samples: int | None, precision: Any, preset: str, stage: str) -> dict[str, Any]:
    config = tokenizer_preset(preset, stage)
    config = config.model_copy(
        update={"training": config.training.model_copy(update={"precision": precision})}
    )
    if "foresight" in preset:  # frames of 448 x 896 px in patches of 14
        hidden, grid = 1152, (32, 64)
    else:
        side = (512 if "512" in stage or "cooldown" in stage else 256) // 16
        hidden, grid = 64 if preset == "tiny" else 768, (side, side)
    with torch.device("cuda"):
        model = DeltaTok(hidden, **shallow(config.model.model_dump()))
    task = TokenizerTask.__new__(TokenizerTask)  # what opens a dataset is not needed
    task.model, task._config, task._grid = model.train(), config, grid
    effective = config.training.batch_size * (config.training.accumulation or 1)
    split = Split(samples or effective, effective // (samples or effective))

    def batch(part: MicroBatch) -> PairBatch:
        pinned = torch.empty(
            2, part.stop - part.start, grid[0] * grid[1], hidden, dtype=torch.float16, pin_memory=True
        )
        return PairBatch(*pinned.to(CUDA, non_blocking=True).float())

    return measured(task, split, config.training, batch)


def backbone(hidden: int, precision: Any) -> Backbone:
    """A DINOv3 of the width of the tokens: a ViT-B, or one of two blocks."""
    sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": 4 * hidden}
    layers = min(12 if hidden == 768 else 2, most_layers or 12)
    sizes |= {"num_hidden_layers": layers, "num_attention_heads": hidden // 64 or 1}
    with torch.device("cuda"):
        model = DINOv3ViTModel(DINOv3ViTConfig(**sizes, patch_size=16, num_register_tokens=4, image_size=224))
        made = Backbone(model, "random", IMAGENET)
    return made.to_precision("float32" if precision == "float32" else "bfloat16_autocast")


def head_step(samples: int | None, precision: Any, preset: Any, recipe: str) -> dict[str, Any]:
    """Frames of 720 x 1280 in two crops each, through the data of the trainer: nothing but the files is drawn."""
    recipe, whole = recipe.removeprefix("whole-"), recipe.startswith("whole-")
    benchmark: Any = {"segmentation": "vspw", "depth": "kitti", "rgb": None}[recipe]
    config: Any = head_preset(benchmark, preset) if benchmark else rgb_preset(preset)
    training = config.training.model_copy(update={"precision": precision})
    side, hidden = (64, 64) if preset == "tiny" else (512, 768)
    labels: dict[Any, Any] = {"vspw": np.uint8, "kitti": np.float32}
    size = ((side, 2 * side) if preset == "tiny" else (448, 896)) if whole else side
    label = None if benchmark is None else np.ones((2, 720, 640), labels[benchmark])
    if whole:
        crops, label = np.zeros((1, *size, 3), np.uint8), np.ones((1, 1024, 2048), labels[benchmark])
    else:
        crops = np.zeros((2, side, side, 3), np.uint8)
    loaded = LoadedFrame(None if whole else split_of(720, 1280, side), crops, label)
    seen = HeadFrames(
        TrainingFrames(benchmark, (TrainingFrame("frame", None),) * 2048, {}),
        lambda *_: loaded,
        size,
        config.frames.flip,
        backbone(hidden, precision),
        CUDA,
        pictures=not benchmark,
    )
    seen._room = 0
    effective, task = training.batch_size, None
    with torch.device("cuda"):
        if recipe == "rgb":
            sizes = {"patch_size": 16, "image_size": side}
            decoder = RgbDecoder(hidden, **shallow(config.model.model_dump()), **sizes)
            for name, buffer in decoder.named_buffers():
                setattr(decoder, name, buffer.to(CUDA))
            task = RgbTask(decoder, seen, config, effective)
        else:
            head = DepthHead(hidden) if recipe == "depth" else SegmentationHead(hidden, CLASSES["vspw"])
            weights = config.gradient_loss, config.rmse_loss
            task = LinearHeadTask(head, seen, training.seed, effective, weights)
    split = Split(samples or effective, effective // (samples or effective))
    with closing(task.batches(split.parts_of(range(2)))) as batches:
        return measured(task, split, training, lambda _: next(batches))


def encoding(samples: int | None, precision: Any, kind: str, pixels: str) -> dict[str, Any]:
    """What an encoder does on a GPU between two copies: 64 frames."""
    side, clips = int(pixels), samples or 8
    exact: Any = "float32" if precision == "float32" else "bfloat16_autocast"
    grid = (side // 16, side // 16)
    with torch.device("cuda"):
        sizes = shallow(tokenizer_preset("released", "256px").model.model_dump())
        tokenizer = DeltaTok(768, **sizes).to_precision(exact)
    encoder = backbone(768, precision)
    frames = torch.empty(clips, FRAMES, side, side, 3, dtype=torch.uint8, device=CUDA)
    tokens = torch.empty(clips, FRAMES, grid[0] * grid[1], 768, dtype=torch.float16, device=CUDA)
    black = np.zeros((grid[0] * grid[1], 768), np.float16)
    deltas = DeltaEncoder(tokenizer, black, grid, CUDA, encoder, clips)
    runs: dict[str, Callable[[], Any]] = {
        "extract": lambda: FeatureEncoder(encoder, CUDA, clips)._forward(frames),
        "tokenize": lambda: deltas._deltas_of_pixels(frames),
        "features": lambda: deltas._deltas_of_features(tokens),
    }
    held = [*encoder.parameters(), *(tokenizer.parameters() if kind != "extract" else ())]
    return watched(runs[kind], [*held, frames if kind != "features" else tokens], clips)


def evaluation(samples: int | None, precision: Any, recipe: str) -> dict[str, Any]:
    """A batch of a benchmark as its scorer does it, all but what needs numbers."""
    exact: Any = "float32" if precision == "float32" else "bfloat16_autocast"
    count, side, grid = samples or 1, 512, (32, 32)
    benchmark: Any = {"segmentation": "vspw", "depth": "kitti"}[recipe]
    layers = {
        "encoder_layers": 2,
        "decoder_layers": 2,
    }  # all are alike, and a batch takes thousands of operations
    with torch.device("cuda"):
        made_like = tokenizer_preset("released", "256px").model.model_dump() | layers
        tokenizer = Tokenizer(DeltaTok(768, **made_like).to_precision(exact), "tokenizer")
        worlds = []
        for preset in ("released", "dino-world"):
            config = world_preset(preset)
            made = world_class(config.model.architecture)
            model = made(768, **config.model.arguments | {"num_layers": 2}).to_precision(exact)
            own = tokenizer if made.trains_on == "deltas" else None
            worlds.append(World(model, Method(model.label), 4 if model.stochastic else 1, own))
        head = DepthHead(768) if recipe == "depth" else SegmentationHead(768, CLASSES["vspw"])
    scorer: Any = (
        DepthScorer(head.eval(), grid)
        if recipe == "depth"
        else SegmentationScorer(head.eval(), grid, CLASSES["vspw"])
    )
    models = Models((tokenizer,), tuple(worlds))
    modules = [tokenizer.model, head, *(each.model for each in worlds)]
    for module in modules:
        module.eval().requires_grad_(False)
    frames = torch.zeros(grid[0] * grid[1], 768, device=CUDA)
    protocol = RolloutProtocol(context=4, horizons=(1,), seed=0, grid=grid, black=frames)
    label = np.ones((2, 720, 640), np.uint8 if recipe == "segmentation" else np.float32)
    sequences = tuple(
        LoadedSequence(
            LabelledSequence(f"s{at}", "g", ("f",) * 7, "l", 0.2), split_of(720, 1280, side), None, label, 0.0
        )
        for at in range(count)
    )
    tokens = torch.empty(2 * count, 7, grid[0] * grid[1], 768, device=CUDA)
    batch = SequenceBatch(benchmark, sequences, tokens, tuple(range(0, 2 * count + 1, 2)), ({},) * count)
    sums: list[torch.Tensor] = []

    def kept(
        batch: Any, at: int, totals: dict[str, torch.Tensor], summary: Any, horizon: int
    ) -> Iterator[Any]:
        sums.extend(totals.values())
        return iter(())

    def counted(predicted: torch.Tensor, label: torch.Tensor, classes: int = 0) -> torch.Tensor:
        assert predicted.device == label.device
        assert predicted.shape == label.shape
        return torch.zeros(3 * classes or 4, dtype=torch.float64, device=label.device)

    # What an evaluation waits for, and a device without numbers cannot answer: whether values are finite, which
    # sample is best, how many pixels are labelled, and the sums on their way into the tables.
    labels.segmentation_totals = labels.depth_totals = counted
    SampleSums.totals = lambda sums: torch.zeros(1, 9, dtype=torch.float64, device=CUDA)
    scoring._statistics = kept
    scoring.check_finite = scoring.check_finite_frames = lambda *_: None
    labels.finite_of_head = lambda values: values
    Ensemble.best = property(lambda ensemble: 0)
    run = BatchScorer(models, protocol, scorer, CUDA, Timing()).score
    result = watched(
        lambda: run(batch), [tokens, *(w for each in modules for w in each.parameters())], count, runs=1
    )
    found = {(each.device.type, each.dtype) for each in sums}
    assert found == {("cuda", torch.float64)}, found
    return result


def watched(run: Callable[[], Any], held: list[torch.Tensor], samples: int, runs: int = 2) -> dict[str, Any]:
    """The last run of something without gradients."""
    watch = Watch()
    with watch, torch.no_grad():
        for each in held:
            watch.follow(each)
        for _ in range(runs):
            watch.launches.clear()
            watch.waits.clear()
            watch.dtypes.clear()
            out = run()
        assert {each.device.type for each in tree_leaves(out) if isinstance(each, torch.Tensor)} <= {"cuda"}
    return {
        "samples": samples,
        "launches": sum(watch.launches.values()),
        "waits": watch.waits,
        "products": dict(watch.dtypes),
        "peak_gib": round(watch.peak / 2**30, 2),
    }


def measured(task: Any, split: Split, training: Any, batch_of: Any) -> dict[str, Any]:
    """Two steps as ``train/loop.py`` does them; the second is counted, for one pass of it and the update."""
    watch = Watch()
    with watch:
        parameters = list(task.model.parameters())
        for each in (*parameters, *task.model.buffers()):
            watch.follow(each)
        assert {each.device.type for each in parameters} == {"cuda"}
        optimizer = make_optimizer(task.model, training)
        guard = FiniteGuard(optimizer, CUDA)
        for step in range(2):
            watch.launches.clear()
            watch.waits.clear()
            watch.dtypes.clear()
            optimizer.zero_grad()
            part = next(split.parts(step))
            with forward_precision(CUDA, training.precision):
                loss, _ = task.training_loss(batch_of(part), part)
            assert loss.dtype == torch.float32
            (loss / split.accumulation).backward()
            norm = clip_gradients(parameters, training.gradient_clip)
            guard.look_at(loss.detach(), norm)
            set_rate(optimizer, 1e-4)
            optimizer.step()
    return {
        "samples": split.batch_size,
        "passes": split.accumulation,
        "launches": sum(watch.launches.values()),
        "draws": watch.launches["aten.normal_.default"],
        "waits": watch.waits,
        "products": dict(watch.dtypes),
        "peak_gib": round(watch.peak / 2**30, 2),
        "parameters": sum(each.numel() for each in parameters),
        "state_dtypes": sorted({str(each.dtype) for each in parameters}),
    }


def whole_table(samples: int | None, precision: Any, size: str) -> dict[str, Any]:
    """``make gpu`` as it stands, but for what needs numbers, streams or threads."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
    import gpu

    def run(lanes: Any, arrays: Any, count: int, forward: Any) -> list[tuple[np.ndarray, ...]]:
        stacks = [torch.from_numpy(np.stack(given)).pin_memory() for given in arrays]
        results = forward(*(each.to(CUDA, non_blocking=True) for each in stacks))
        assert {each.device.type for each in results} == {"cuda"}
        return [tuple(np.zeros(each.shape[1:], np.float16) for each in results)] * len(arrays[0])

    def once(encoder: Any, clips: Any, *_: Any) -> Callable[[float], float]:
        return lambda seconds: len(encoder.encode(clips)) / (1 + seconds)

    OverlappedForward.run = run
    gpu.number, gpu.same = (
        lambda tensor: 0.0 * (tensor.device.type == "cuda"),
        lambda one, other: one.shape == other.shape,
    )
    gpu.backbone_named, gpu.end_to_end = lambda _: backbone(64, "float32"), once
    gpu.black_patch_tokens_of = lambda made, side: np.zeros(((side // 16) ** 2, made.hidden_size), np.float16)
    gpu.GOLDEN = Path("no golden numbers without numbers")
    for name, value in (
        ("get_device_name", "simulated"),
        ("empty_cache", None),
        ("reset_peak_memory_stats", None),
    ):
        setattr(torch.cuda, name, lambda *_, value=value: value)
    said = io.StringIO()
    with redirect_stdout(said):
        gpu.main(["--small", "--seconds", "0"])
    return {"rows": said.getvalue().splitlines()}


KINDS: dict[str, Callable[..., dict[str, Any]]] = {
    "world": world_step,
    "tokenizer": tokenizer_step,
    "head": head_step,
    "evaluate": evaluation,
    "gpu": whole_table,
    **{
        name: (lambda *asked, name=name: encoding(asked[0], asked[1], name, *asked[2:]))
        for name in ("extract", "tokenize", "features")
    },
}


def main() -> None:
    """See above."""
    backbone_module.tensors_sha256 = lambda _: "random"
    # A seed drawn on the host, from a generator there: nothing that a GPU would be waited for.
    MaskedTransformer._dropout_from = lambda *_: nullcontext()
    global most_layers  # noqa: PLW0603
    for name in sys.argv[1:]:
        place, _, layers = name.partition("#")
        most_layers = int(layers) if layers else None
        place, _, precision = place.partition("@")
        kind, *rest = place.partition(":")[0].split("/")
        samples = int(place.partition(":")[2] or 0) or None
        with simulated():
            result = KINDS[kind](samples, precision or "auto", *rest)
        print(json.dumps({"name": name, **result}), flush=True)


if __name__ == "__main__":
    main()
