"""What a GPU does with this package, as one Markdown table: `make gpu`, some minutes, without Ray and decoders.

Correct first: numbers of the released code on the device, training that resumes to the same bits there, bfloat16
against float32. Then fast: step times of the recipes with their share of the measured bfloat16 rate and the GPU-hours
that follow, encoders beside the bare forward pass, and peaks of memory. Weights are random, tokens are noise.

    python benchmarks/gpu.py --out gpu.md                    # on a GPU
    python benchmarks/gpu.py --device cpu --small            # tiny sizes: does the script itself work
"""

import argparse
import copy
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import deltacache
from deltacache.models.checkpoints import load_tokenizer, load_world
from deltacache.models.deltatok import DeltaTok
from deltacache.models.devices import allow_tf32, choose_device, forward_precision
from deltacache.models.worlds import world_class
from deltacache.pipeline.work.encoders import DeltaEncoder, FeatureEncoder, black_patch_tokens_of
from deltacache.schemas.configs import tokenizer_preset, world_preset
from deltacache.schemas.errors import DeltacacheError
from deltacache.train.data import ClipBatch, PairBatch, ResidentClips
from deltacache.train.optimizer import FiniteGuard, clip_gradients, make_optimizer, set_rate
from deltacache.train.order import MicroBatch, Split
from deltacache.train.tokenizer import TokenizerTask
from deltacache.train.world import WorldTask
from encoder import backbone_named, clips_of, end_to_end, pure_forward

FRAMES, CLIPS = 8, 256
GOLDEN = Path(os.environ.get("DELTACACHE_GOLDEN", Path(__file__).resolve().parents[2] / "shared" / "golden"))
STEPS = (  # kind, preset, stage, side in pixels, samples of a pass on an H200
    ("tokenizer", "released", "256px", 256, 128),
    ("tokenizer", "released", "512px", 512, 64),
    ("world", "released", None, 256, 1024),
    ("world", "dino-world", None, 256, 64),
)
SMALL_STEPS = (("tokenizer", "tiny", "main", 64, 8), ("world", "tiny", None, 64, 8))


class Row(NamedTuple):
    """A line of the table."""

    what: str
    value: str
    about: str = ""


class Step(NamedTuple):
    """A training task of a recipe with batches that lie on the device.

    Attributes:
        batch: of a pass of the split.
        effective: samples of an optimizer's step.
    """

    task: Any
    config: Any
    split: Split
    batch: Callable[[MicroBatch], Any]
    effective: int


def number(value: Tensor) -> float:
    """What a tensor of one number holds; waits for the device."""
    return float(value)


def same(one: Any, other: Any) -> bool:
    """Whether two tensors are equal, bit by bit."""
    return torch.equal(one, other)


def relative(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return number((got.float() - expected.float()).norm() / expected.float().norm())


def finish(device: torch.device) -> None:
    """Wait for what the device has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], Any], device: torch.device, at_least: float) -> float:
    """Of one run: the mean over some, after one whose kernels are chosen."""
    run()
    finish(device)
    started, runs = time.perf_counter(), 0
    while runs < 2 or time.perf_counter() - started < at_least:
        run()
        runs += 1
        if runs % 4 == 0:
            finish(device)
    finish(device)
    return (time.perf_counter() - started) / runs


def product_rates(device: torch.device, side: int, seconds: float) -> dict[str, float]:
    """FLOP/s of square products in bfloat16, TF32 and float32."""
    rates = {}
    for name, dtype in (("bfloat16", torch.bfloat16), ("TF32", torch.float32), ("float32", torch.float32)):
        allow_tf32(device, name == "TF32")
        one, other = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        rates[name] = 2 * side**3 / seconds_of(lambda one=one, other=other: one @ other, device, seconds)
    return rates


def golden(device: torch.device) -> Iterator[Row]:
    """Models of the released code, small and in float32, on this device against what the released code gave."""
    folder = GOLDEN / "tiny"
    if not folder.is_dir():
        yield Row("golden numbers", "not compared", f"{folder} is not there: set DELTACACHE_GOLDEN")
        return
    allow_tf32(device, False)
    heads = json.loads((folder / "meta.json").read_text())["heads"]
    tokenizer = load_tokenizer(folder / "deltatok_released.safetensors", {"num_heads": heads}).model.to(
        device
    )
    io, train = (
        {name: value.to(device) for name, value in load_file(folder / f"{name_of}.safetensors").items()}
        for name_of in ("deltatok_released_io", "deltaworld_train")
    )
    side = int(io["patch_tokens"].shape[2] ** 0.5)
    world = load_world(folder / "deltaworld.safetensors", {"num_heads": heads}).model.to(device)
    with torch.no_grad():
        deltas = tokenizer.encode_clip(io["patch_tokens"], io["black_patch_tokens"][0], (side, side))
        result = world.training_loss(
            train["z"],
            train["timestamps"],
            candidates=train["queries"].shape[2],
            beta=0.1,
            noise=train["queries"],
        )
    for name, got, expected in (
        ("delta tokens", deltas, io["delta_tokens"]),
        ("world model's predictions", result.prediction, train["z_hat"]),
    ):
        yield Row(f"golden {name}", f"{number((got - expected).abs().max()):.1e}", "largest error, float32")


def steps_of(
    device: torch.device, kind: str, preset: str, stage: str | None, side: int, samples: int
) -> Step:
    """A recipe's training at its widths: tokens of a ViT-B, or of 64 channels for tiny ones."""
    hidden, grid = 64 if preset == "tiny" else 768, (side // 16, side // 16)
    patches = grid[0] * grid[1]
    config: Any = tokenizer_preset(preset, stage) if kind == "tokenizer" else world_preset(preset, stage)
    effective = config.training.batch_size * (config.training.accumulation or 1)
    split = Split(samples, max(1, effective // samples))
    torch.manual_seed(0)
    if kind == "tokenizer":
        with torch.device(device):
            model: Any = DeltaTok(hidden, **config.model.model_dump())
        task: Any = TokenizerTask.__new__(TokenizerTask)  # what opens a dataset is not needed
        task.model, task._config, task._grid = model.train(), config, grid
        pairs = torch.randn(2, samples, patches, hidden, device=device)
        return Step(task, config, split, lambda _: PairBatch(*pairs), effective)
    made = world_class(config.model.architecture)
    with torch.device(device):
        model = made(hidden, **config.model.arguments)
    arrays = ResidentClips(np.zeros((CLIPS, FRAMES, 1), np.float16), np.zeros((CLIPS, FRAMES), np.float32))
    task = WorldTask(model, arrays, grid, config, device, split)
    shape = (hidden,) if made.trains_on == "deltas" else (patches, hidden)
    tokens = torch.randn(samples, FRAMES, *shape, device=device)
    seconds = torch.arange(FRAMES, device=device).expand(samples, -1) * 0.2
    return Step(task, config, split, lambda _: ClipBatch(tokens, seconds), effective)


def one_pass(step: Step, device: torch.device, part: MicroBatch) -> Tensor:
    """Forward and backward of one pass, as the trainer does them."""
    with forward_precision(device, step.config.training.precision):
        loss, _ = step.task.training_loss(step.batch(part), part)
    (loss / step.split.accumulation).backward()
    return loss.detach()


class Updates:
    """The rest of a step: clipping, the guard against what is not finite, AdamW."""

    def __init__(self, step: Step, device: torch.device, state: dict[str, Any] | None = None) -> None:
        self._parameters = list(step.task.model.parameters())
        self.optimizer = make_optimizer(step.task.model, step.config.training, state)
        self._guard, self._clip = FiniteGuard(self.optimizer, device), step.config.training.gradient_clip

    def update(self, loss: Tensor) -> None:
        """With the gradients that are there, which it then forgets."""
        self._guard.look_at(loss, clip_gradients(self._parameters, self._clip))
        set_rate(self.optimizer, 1e-4)
        self.optimizer.step()
        self.optimizer.zero_grad()


def resuming(device: torch.device) -> Iterator[Row]:
    """Four steps at once against two, the state put aside and read back, and two more."""
    for kind, preset, stage, side, samples in SMALL_STEPS:

        def trained(step: Step, numbers: range, state: Any = None) -> Updates:
            updates = Updates(step, device, state)
            for at in numbers:
                updates.update(one_pass(step, device, MicroBatch(at, 0, step.split.batch_size)))
            return updates

        unbroken, broken = (steps_of(device, kind, preset, stage, side, samples) for _ in range(2))
        trained(unbroken, range(4))
        optimizer = copy.deepcopy(trained(broken, range(2)).optimizer.state_dict())
        weights = {name: value.detach().cpu() for name, value in broken.task.model.state_dict().items()}
        again = steps_of(device, kind, preset, stage, side, samples)
        again.task.model.load_state_dict(weights)
        trained(again, range(2, 4), optimizer)
        one, other = (each.task.model.state_dict() for each in (unbroken, again))
        equal = all(same(one[name], other[name]) for name in one)
        yield Row(
            f"resume, {kind} `{preset}`",
            "to the bit" if equal else "**other bits**",
            "4 steps against 2 and 2",
        )


def agreement(device: torch.device, small: bool) -> Iterator[Row]:
    """bfloat16 against float32 on the same input: relative error."""
    name, side, preset = ("tiny", 64, "tiny") if small else ("vitb", 256, "released")
    frames = torch.randint(
        0, 256, (2, FRAMES, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    allow_tf32(device, False)
    backbone = backbone_named(name).to(device)
    grid = backbone.grid(side)
    exact = backbone.patch_tokens(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
    black = backbone.black_patch_tokens(side)
    hidden = backbone.hidden_size
    torch.manual_seed(0)
    tokenizer_config = tokenizer_preset(preset, "main" if small else "256px").model.model_dump()
    world_config = world_preset(preset).model
    with torch.device(device):
        tokenizer = DeltaTok(hidden, **tokenizer_config).eval().requires_grad_(False)
        world = (
            world_class(world_config.architecture)(hidden, **world_config.arguments)
            .eval()
            .requires_grad_(False)
        )
        for model in (
            tokenizer,
            world,
        ):  # as after a training: at first LayerScale lets nearly nothing through
            for name_of, weight in model.named_parameters():
                if name_of.endswith("lambda1"):
                    nn.init.constant_(weight, 0.3)
        seconds = torch.arange(FRAMES).expand(2, -1) * 0.2
        noise = torch.randn(2, 4, 3, world.noise_size) * world.noise_std
    deltas = tokenizer.encode_clip(exact, black, grid)
    closed = tokenizer.reconstruct_closed_loop(exact, black, grid, 3)
    futures = world.rollout(deltas[:, :5], seconds, noise, grid=grid)
    for model in (backbone, tokenizer, world):
        model.to_precision("bfloat16_autocast")
    fast = backbone.patch_tokens(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
    for what, got, expected in (
        ("patch tokens", fast, exact),
        ("delta tokens", tokenizer.encode_clip(exact, black, grid), deltas),
        (
            "reconstruction, 3 frames in a closed loop",
            tokenizer.reconstruct_closed_loop(exact, black, grid, 3),
            closed,
        ),
        ("rollout, 3 frames", world.rollout(deltas[:, :5], seconds, noise, grid=grid), futures),
    ):
        yield Row(f"bfloat16, {what}", f"{relative(got, expected):.1e}", "relative error against float32")


def training_times(device: torch.device, small: bool, rate: float, seconds: float) -> Iterator[Row]:
    """Seconds of an optimizer's step, share of the measured product rate, hours of the recipe, peak of memory."""
    allow_tf32(device, True)
    for kind, preset, stage, side, samples in SMALL_STEPS if small else STEPS:
        name = f"step, {kind} `{preset}`{f' {stage}' if stage else ''}, {side} px"
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        try:
            yield _training_row(
                name, steps_of(device, kind, preset, stage, side, samples), device, rate, seconds
            )
        except torch.OutOfMemoryError:
            yield Row(name, "out of memory", f"a pass of {samples:,}; the trainer would take smaller ones")


def _training_row(name: str, step: Step, device: torch.device, rate: float, seconds: float) -> Row:
    updates, part = Updates(step, device), MicroBatch(0, 0, step.split.batch_size)

    def whole() -> None:
        updates.update(one_pass(step, device, part))

    with FlopCounterMode(display=False) as counter:
        whole()
    passing = seconds_of(lambda: one_pass(step, device, part), device, seconds)
    with_update = seconds_of(whole, device, seconds / 2)
    taken = (step.split.accumulation - 1) * passing + with_update
    steps, share = step.config.training.steps, counter.get_total_flops() / passing / rate
    about = (
        f"{step.effective:,} in passes of {part.stop:,}; {share:.0%} of the bfloat16 rate; {taken * steps / 3600:,.1f} "
        f"GPU-hours for {steps:,} steps; peak {_peak(device)}"
    )
    return Row(name, f"{taken:.3f} s", about)


def encoder_rates(device: torch.device, small: bool, seconds: float) -> Iterator[Row]:
    """Pixels in host memory to tokens in host memory, beside the bare forward pass on the device."""
    for side in (64,) if small else (256, 512):
        backbone = backbone_named("tiny" if small else "vitb").to(device)
        black = black_patch_tokens_of(backbone, side)
        backbone.to_precision("bfloat16_autocast" if device.type == "cuda" else "float32")
        config = tokenizer_preset("tiny", "main") if small else tokenizer_preset("released", "256px")
        with torch.device(device):
            tokenizer = DeltaTok(backbone.hidden_size, **config.model.model_dump())
        tokenizer.to_precision("bfloat16_autocast" if device.type == "cuda" else "float32")
        clips = clips_of(2 if small else 8, FRAMES, side)
        features = FeatureEncoder(backbone, device, len(clips))
        deltas = DeltaEncoder(tokenizer, black, backbone.grid(side), device, backbone, len(clips))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            pure = pure_forward(backbone, clips, device)(seconds)
        for what, encoder in (("extract-features", features), ("tokenize from videos", deltas)):
            got = end_to_end(encoder, clips, 2, time.perf_counter)(seconds)  # pyright: ignore[reportArgumentType]
            about = f"{got / pure:.2f} of the bare forward pass of the backbone, {pure:.1f} clips/s"
            yield Row(f"{what}, {side} px", f"{got:.1f} clips/s", f"{about}; peak {_peak(device)}")


def _peak(device: torch.device) -> str:
    if device.type != "cuda":
        return "not measured"
    return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"


def machine(device: torch.device) -> Iterator[Row]:
    """Card and versions."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        yield Row(
            "card", torch.cuda.get_device_name(device), f"{free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
        )
    else:
        yield Row("card", "none", platform.processor() or platform.machine())
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    yield Row(
        "versions",
        f"deltacache {deltacache.__version__}",
        f"{versions}, transformers {transformers.__version__}",
    )


def measured(device: torch.device, small: bool, seconds: float) -> Iterator[Row]:
    """All rows, as they are known."""
    yield from machine(device)
    rates = product_rates(device, 256 if small else 8192, seconds / 2)
    for name, rate in rates.items():
        yield Row(f"products in {name}", f"{rate / 1e12:.3g} TFLOP/s", "square matrices")
    yield from golden(device)
    yield from resuming(device)
    yield from agreement(device, small)
    yield from training_times(device, small, rates["bfloat16"], seconds)
    yield from encoder_rates(device, small, seconds)


def main(arguments: list[str] | None = None) -> None:
    """Print the table row by row, and write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--seconds", type=float, default=5.0, help="of one measurement")
    parser.add_argument("--out", type=Path, help="file for the table")
    asked = parser.parse_args(arguments)
    try:
        device = choose_device(asked.device)
    except DeltacacheError as error:
        raise SystemExit(str(error)) from None
    lines = ["| what | value | about |", "|---|---|---|"]
    print("\n".join(lines), flush=True)
    started = time.perf_counter()
    with closing(measured(device, asked.small, asked.seconds)) as rows:
        for row in rows:
            lines.append(f"| {' | '.join(row)} |")
            print(lines[-1], flush=True)
    lines.append(f"| in all | {time.perf_counter() - started:.0f} s | `benchmarks/gpu.py` |")
    print(lines[-1])
    if asked.out is not None:
        asked.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
