"""``predict``: sample futures of one video and write them as tensors, as a page and as a movie.

The futures are those that ``evaluate`` gets for the same sequence, models, context, steps, samples and seed, bit for
bit: both encode and roll out with the same functions, one sequence at a time.

Shapes: C context, H steps, K of them that the video goes on for, S samples, N patches, D hidden.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from deltacache import __version__
from deltacache.evaluate.benchmarks.benchmark_inputs import load_scorer
from deltacache.evaluate.benchmarks.pictures import pictures
from deltacache.evaluate.clips.rollouts import delta_tokens, roll_out
from deltacache.evaluate.examples import MAP_SIDE, MapMaker
from deltacache.evaluate.inputs import Models, load_models
from deltacache.evaluate.metrics import check_finite
from deltacache.evaluate.output import CONFIG, new_folder
from deltacache.evaluate.prediction.page import PastAndFutures, write_movie, write_page
from deltacache.evaluate.prediction.sequence import SeenSequence, backbone_of, open_sequence
from deltacache.evaluate.predictions import RolloutProtocol
from deltacache.evaluate.settings import ClipEvaluation
from deltacache.models.devices import allow_tf32, choose_device
from deltacache.models.rgb_decoder import load_rgb_decoder
from deltacache.pipeline.work.encoders import resolve_precision
from deltacache.schemas.benchmarks import BENCHMARK_TASK
from deltacache.schemas.configs import save_config
from deltacache.schemas.datasets import sides
from deltacache.schemas.errors import DatasetError, DeltacacheError
from deltacache.schemas.hub import origins_within
from deltacache.schemas.prediction import PredictionSettings
from deltacache.schemas.progress import Reporter
from deltacache.schemas.provenance import Provenance
from deltacache.schemas.texts import bytes_text

TENSORS, PAGE = "futures.safetensors", "index.html"
_MOST_NUMBERS = 2**31  # patch tokens of all futures: 8 GiB in float32


@dataclass(frozen=True)
class SampledFutures:
    """What a world model expects.

    Attributes:
        patch_tokens: (S, H, N, D) float32.
        delta_tokens: (S, H, ...) float32 that they are decoded from; ``None`` of a model of patch tokens.
        context_deltas: (C, ...) float32; ``None`` likewise.
        spread: (H,) root mean square difference of two samples, over patches and hidden; 0 of a single one.
        distance: (S, K) root mean square difference of each sample to the true frame.
        copy_last: (K,) that of the last seen frame.
    """

    patch_tokens: Tensor
    delta_tokens: Tensor | None
    context_deltas: Tensor | None
    spread: np.ndarray
    distance: np.ndarray
    copy_last: np.ndarray


def predict_futures(settings: PredictionSettings, reporter: Reporter) -> Path:
    """Write ``futures.safetensors``, ``index.html``, the movie and ``config.yaml``; returns the page's path.

    Raises:
        DeltacacheError: ``out`` holds something, a video that is too short, models that do not belong together, or
            tokens that are not finite.
    """
    out = settings.out
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise DatasetError(
            f"{out} is there already and holds something: predictions are not overwritten; choose another folder"
        )
    device = choose_device(settings.device)
    precision = resolve_precision(device, settings.precision)
    allow_tf32(device, precision != "float32")
    sequence = open_sequence(settings, device, reporter)
    numbers = settings.samples * settings.steps * sequence.black.numel()
    if numbers > _MOST_NUMBERS:
        raise DeltacacheError(
            f"{settings.samples} futures of {settings.steps} steps are {bytes_text(4 * numbers)} of patch tokens, "
            f"and at most {bytes_text(4 * _MOST_NUMBERS)} are allowed: give fewer --samples or --steps, or a smaller "
            "--image-size"
        )
    models = _models(settings, sequence, device)
    for note in models.notes:
        reporter.line(f"predict: {note}")
    protocol = RolloutProtocol(
        context=settings.context,
        horizons=(settings.steps,),
        seed=settings.seed,
        grid=sequence.card.patch_grid,
        black=sequence.black,
    )
    futures = _sample(models, sequence, protocol)
    world = models.worlds[0]
    prediction = PastAndFutures(
        title=sequence.name,
        method=world.method.name,
        world=world.method.world or "",
        context=settings.context,
        grid=protocol.grid,
        times_s=sequence.times_s,
        tokens=sequence.tokens.cpu().numpy(),
        futures=futures.patch_tokens.numpy(),
        pixels=sequence.pixels,
        spread=futures.spread,
        distance=futures.distance,
        copy_last=futures.copy_last,
    )
    makers = _makers(settings, sequence, device)
    out.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(out) as folder, torch.inference_mode():
        _save_tensors(settings, sequence, models, futures, folder / TENSORS)
        shown = prediction.with_maps(makers, sequence.tokens, futures.patch_tokens.to(device))
        write_page(shown, folder / PAGE)
        write_movie(shown, folder / f"futures.{settings.movie}")
        save_config(settings, folder / CONFIG)
    reporter.line(f"predict: {_summary(prediction)}")
    reporter.line(f"tensors: {out / TENSORS}")
    reporter.line(f"movie: {out / f'futures.{settings.movie}'}")
    reporter.line(f"page: {(out / PAGE).resolve()}")
    return out / PAGE


def _models(settings: PredictionSettings, sequence: SeenSequence, device: torch.device) -> Models:
    """The same models as an evaluation of such a clip would load, checked in the same way."""
    architectures = {str(settings.world): settings.architecture} if settings.architecture else {}
    evaluation = ClipEvaluation(
        out=settings.out,
        features=settings.video,
        tokenizer=settings.tokenizer,
        worlds=(settings.world,),
        architectures=architectures,
        context=settings.context,
        horizons=(settings.steps,),
        samples=settings.samples,
        seed=settings.seed,
        device=settings.device,
        precision=settings.precision,
    )
    return load_models(evaluation, sequence.card, sequence.name, device)


@torch.inference_mode()
def _sample(models: Models, sequence: SeenSequence, protocol: RolloutProtocol) -> SampledFutures:
    world, context = models.worlds[0], sequence.tokens[: protocol.context]
    seconds = torch.from_numpy((sequence.times_s - sequence.times_s[0]).astype(np.float32)).to(context.device)
    deltas = None if world.tokenizer is None else delta_tokens(world.tokenizer, context, protocol)
    sampled = roll_out(world, context, seconds, deltas, sequence.clip_id, protocol)
    parts: list[Tensor] = []
    for part in sampled.chunks():
        for step in range(part.shape[1]):
            check_finite(part[:, step], world.method.name, sequence.name, step + 1)
        parts.append(part.cpu())
    patch_tokens = torch.cat(parts)
    truth, last = sequence.tokens[protocol.context :].cpu(), context[-1].cpu()
    goes_on = [
        (patch_tokens[:, step] - frame).square().mean((-2, -1)).sqrt() for step, frame in enumerate(truth)
    ]
    spread = torch.zeros(patch_tokens.shape[1])
    if len(patch_tokens) > 1:
        spread = torch.stack([(2 * each.var(0).mean()).sqrt() for each in patch_tokens.unbind(1)])
    return SampledFutures(
        patch_tokens=patch_tokens,
        delta_tokens=None if sampled.deltas is None else sampled.deltas.float().cpu(),
        context_deltas=None if deltas is None else deltas.float().cpu(),
        spread=spread.numpy(),
        distance=torch.stack(goes_on, 1).numpy() if goes_on else np.zeros((len(patch_tokens), 0), np.float32),
        copy_last=(truth - last).square().mean((-2, -1)).sqrt().numpy(),
    )


def _makers(settings: PredictionSettings, sequence: SeenSequence, device: torch.device) -> list[MapMaker]:
    """What heads and the decoder of pictures make of tokens."""
    card, grid = sequence.card, sequence.card.patch_grid
    side = min(MAP_SIDE, max(sides(card.image_size)))
    # Maps are square as crops of benchmarks are; of other frames they are cut down to the frames' aspect.
    rows, columns = (
        torch.linspace(0, side - 1, round(side * each / max(grid))).round().long() for each in grid
    )

    def at_aspect(maps: Tensor) -> Tensor:
        return maps[:, rows.to(maps.device)][:, :, columns.to(maps.device)]

    makers = list[MapMaker]()
    for name, path in settings.heads.items():
        scorer, _ = load_scorer(name, path, Provenance.of_dataset(card, settings.video), grid, device)
        makers.append(
            MapMaker(scorer.task, None, lambda tokens, scorer=scorer: at_aspect(scorer.maps(tokens, side)))
        )
    if settings.rgb_decoder is not None:
        decoder = load_rgb_decoder(settings.rgb_decoder, backbone_of(sequence, settings, device)).model
        decoder.to(device).requires_grad_(False)
        makers.append(MapMaker("rgb", None, lambda tokens: at_aspect(pictures(decoder, tokens, grid, side))))
    kinds = [BENCHMARK_TASK[name] for name in settings.heads]
    if len(set(kinds)) < len(kinds):
        raise DeltacacheError(
            f"--head was given for {', '.join(settings.heads)}, two of which have the same task: give one of "
            "segmentation and one of depth"
        )
    return makers


def _save_tensors(
    settings: PredictionSettings, sequence: SeenSequence, models: Models, futures: SampledFutures, path: Path
) -> None:
    context = settings.context
    tensors = {
        "future_patch_tokens": futures.patch_tokens,
        "context_patch_tokens": sequence.tokens[:context].cpu(),
        "true_patch_tokens": sequence.tokens[context:].cpu(),
        "times_s": torch.from_numpy(sequence.times_s.astype(np.float32)),
        "spread": torch.from_numpy(futures.spread),
        "distance_to_truth": torch.from_numpy(futures.distance),
    }
    if futures.delta_tokens is not None and futures.context_deltas is not None:
        tensors |= {
            "future_delta_tokens": futures.delta_tokens,
            "context_delta_tokens": futures.context_deltas,
        }
    about = {
        "video": sequence.name,
        "clip_id": sequence.clip_id,
        "grid": list(sequence.card.patch_grid),
        "image_size": sequence.card.model_dump(mode="json")["image_size"],
        "backbone": sequence.card.backbone.name,
        "tokenizer": models.tokenizer.fingerprint if models.tokenizer else None,
        "world": models.worlds[0].method.world,
        "seed": settings.seed,
        "code_version": __version__,
    }
    if sources := origins_within(settings.model_dump()):
        about["sources"] = sources
    save_file(
        {name: each.contiguous().clone() for name, each in tensors.items()},
        path,
        metadata={name: each if isinstance(each, str) else json.dumps(each) for name, each in about.items()},
    )


def _summary(prediction: PastAndFutures) -> str:
    """One line that a person can repeat."""
    samples, steps = prediction.futures.shape[:2]
    ahead = prediction.times_s[-1] - prediction.times_s[prediction.context - 1]
    line = f"{samples} future{'s' if samples > 1 else ''} of {steps} steps ({ahead:.2f} s) by {prediction.method}"
    if samples > 1:
        first, last = prediction.spread[[0, -1]]
        line += f"; the samples differ by {first:.3g} after one step, {last:.3g} at the end"
    if prediction.distance.shape[1]:
        nearest = prediction.distance[:, -1].min()
        line += (
            f"; after {prediction.distance.shape[1]} steps the nearest one is {nearest:.3g} from the truth, the last "
            f"seen frame {prediction.copy_last[-1]:.3g}"
        )
    return line
