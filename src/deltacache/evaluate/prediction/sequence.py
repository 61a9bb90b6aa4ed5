"""The one sequence that futures are sampled for: of a feature dataset, or of a video as extraction would make it."""

import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deltacache.evaluate.clips.sequences import read_features
from deltacache.evaluate.metrics import check_finite_frames
from deltacache.models.backbone import Backbone, load_backbone
from deltacache.models.outside import is_python_path
from deltacache.pipeline.datasets.dataset import Dataset, open_dataset
from deltacache.pipeline.datasets.writing import is_dataset
from deltacache.pipeline.decoding.child import ChildDecoder
from deltacache.pipeline.decoding.decode import VideoJob
from deltacache.pipeline.decoding.pixels import clip_pixels
from deltacache.pipeline.decoding.sampling import Window
from deltacache.pipeline.inputs.fetching import fetched
from deltacache.pipeline.inputs.sources import VideoSource, find_videos
from deltacache.pipeline.jobs.parts import features_card
from deltacache.pipeline.work.encoders import FeatureEncoder, black_patch_tokens_of, resolve_precision
from deltacache.schemas.clips import PixelClip
from deltacache.schemas.datasets import DatasetCard, SamplingSettings
from deltacache.schemas.errors import (
    DatasetError,
    DeltacacheError,
    MismatchError,
    SettingsError,
    VideoRefusedError,
)
from deltacache.schemas.jobs import ExtractionSettings
from deltacache.schemas.prediction import PredictionSettings
from deltacache.schemas.progress import Reporter
from deltacache.schemas.provenance import Provenance, require_matches


@dataclass(frozen=True)
class SeenSequence:
    """C frames that are seen, and the K of H later ones that the video goes on for.

    Attributes:
        clip_id: what its noise is drawn from, as for a clip of a dataset.
        name: what messages and the page call it.
        card: of its tokens, as a feature dataset would describe them.
        tokens: (C+K, N, D) float32, rounded to float16 as a dataset holds them.
        black: (N, D) float32, of the frame before the first.
        times_s: (C+H,) float64 since the first frame of the video, of all frames seen and predicted.
        pixels: (C+K, h, w, 3) uint8, or ``None`` where a dataset's videos are not there any more.
        backbone: that made the tokens, if it was loaded.
    """

    clip_id: str
    name: str
    card: DatasetCard
    tokens: Tensor
    black: Tensor
    times_s: np.ndarray
    pixels: np.ndarray | None
    backbone: Backbone | None


def open_sequence(settings: PredictionSettings, device: torch.device, reporter: Reporter) -> SeenSequence:
    """Read or make the tokens of what ``settings`` name.

    Raises:
        DeltacacheError: no such video or clip, one that is too short, or tokens that are not finite.
    """
    if is_dataset(settings.video):
        return _of_dataset(settings, device)
    return _of_video(settings, device, reporter)


def _of_dataset(settings: PredictionSettings, device: torch.device) -> SeenSequence:
    dataset = open_dataset(settings.video, "features")
    row = _row(dataset, settings)
    clip = read_features(dataset, row)
    times, last = clip.timestamps_s.astype(np.float64), settings.context - 1
    spacing = settings.spacing_s or float(times[-1] - times[0]) / (len(times) - 1)
    if settings.at_s is not None:
        last = int(np.abs(times - settings.at_s).argmin())
    if last < settings.context - 1 or last >= len(times):
        raise DeltacacheError(
            f"clip {clip.clip_id} of {dataset.root} has frames at {', '.join(f'{each:.2f}' for each in times)} s, and "
            f"not {settings.context} of them up to {'the last' if settings.at_s is None else f'{settings.at_s:g} s'}: "
            "give a later --at, fewer frames of --context, or longer clips"
        )
    if abs(times[last] - (times[last] if settings.at_s is None else settings.at_s)) > max(spacing, 1e-3) / 2:
        raise DeltacacheError(
            f"clip {clip.clip_id} of {dataset.root} goes from {times[0]:.2f} to {times[-1]:.2f} s: give an --at "
            "within it"
        )
    frames = slice(last - settings.context + 1, last + 1 + settings.steps)
    known = times[frames]
    missing = settings.context + settings.steps - len(known)
    if missing and spacing <= 0:
        raise DeltacacheError(
            f"all frames of clip {clip.clip_id} of {dataset.root} are at one time: give --spacing, the seconds between "
            "predicted frames"
        )
    pixels = dict(clip_pixels(dataset, [clip.clip_id])).get(clip.clip_id)
    return SeenSequence(
        clip_id=clip.clip_id,
        name=f"{dataset.index['video_uri'][row].as_py()} (clip {clip.clip_id})",
        card=dataset.card,
        tokens=torch.from_numpy(clip.patch_tokens[frames].astype(np.float32)).to(device),
        black=torch.from_numpy(dataset.black_patch_tokens.astype(np.float32)).to(device),
        times_s=np.append(known, known[-1] + spacing * np.arange(1, missing + 1)),
        pixels=None if pixels is None else pixels[frames],
        backbone=None,
    )


def _row(dataset: Dataset, settings: PredictionSettings) -> int:
    if not len(dataset):
        raise DatasetError(
            f"{dataset.root} holds no clips: its failures.parquet says what was rejected and why"
        )
    asked = settings.clip or "0"
    if asked in dataset.clip_ids:
        return dataset.clip_ids.index(asked)
    if asked.isdecimal() and int(asked) < len(dataset):
        return int(asked)
    raise SettingsError(
        f"--clip {asked}: {dataset.root} has {len(dataset)} clips; give a number below that, or an id such as "
        f"{dataset.clip_ids[0]}"
    )


def _of_video(settings: PredictionSettings, device: torch.device, reporter: Reporter) -> SeenSequence:
    assert settings.image_size is not None  # filled in from what the models were trained on
    assert settings.spacing_s is not None
    videos = find_videos(
        settings.video, None, tell=reporter.line, frames_per_second=settings.frames_per_second
    )
    if len(videos) > 1:
        raise DeltacacheError(
            f"{settings.video} holds {len(videos)} videos, but one is predicted at a time: give the path of one, such "
            f"as that of {videos[0].video_uri}"
        )
    source = videos[0]
    window = Window(settings.at_s, settings.context, settings.steps, settings.spacing_s)
    sampling = SamplingSettings(
        frames=max(2, settings.context + settings.steps),
        spacing_min_s=settings.spacing_s,
        spacing_max_s=settings.spacing_s,
        augment=False,
        frames_per_second=settings.frames_per_second,
    )
    extraction = ExtractionSettings(
        source=settings.video,
        backbone=settings.backbone or "",
        layers=settings.layers,
        pca=settings.pca,
        image_size=settings.image_size,
        sampling=sampling,
    )
    precision = resolve_precision(device, settings.precision)
    with ThreadPoolExecutor(1) as beside:  # the video is decoded while the backbone is loaded
        decoded = beside.submit(_decoded, source, extraction, window)
        backbone = load_backbone(extraction.backbone, precision, settings.layers, settings.pca).to(device)
        backbone.grid(settings.image_size)  # refuses a size that is no multiple of the patch size
        clip = decoded.result()
    black = black_patch_tokens_of(backbone, settings.image_size)
    (features,) = FeatureEncoder(backbone, device).encode([clip])
    if features is None:
        raise DeltacacheError(
            f"backbone {backbone.id} gives tokens that are not finite for {source.video_uri}: its weights are damaged, "
            "or of another model; give others"
        )
    tokens = torch.from_numpy(features.patch_tokens).to(device).float()
    check_finite_frames(tokens, source.video_uri)
    known = clip.timestamps_s.astype(np.float64)
    missing = settings.context + settings.steps - len(known)
    return SeenSequence(
        clip_id=clip.clip_id,
        name=source.video_uri,
        card=features_card(extraction, backbone, black, precision),
        tokens=tokens,
        black=torch.from_numpy(black).to(device).float(),
        times_s=np.append(known, known[-1] + settings.spacing_s * np.arange(1, missing + 1)),
        pixels=clip.pixels,
        backbone=backbone,
    )


def _decoded(source: VideoSource, extraction: ExtractionSettings, window: Window) -> PixelClip:
    limits = extraction.limits
    with (
        ChildDecoder(limits.timeout_s, limits.memory_bytes) as decoder,
        tempfile.TemporaryDirectory(prefix="deltacache-") as spool,
    ):
        try:
            with fetched(source.path, Path(spool)) as video:
                job = VideoJob(
                    path=video.path,
                    video_uri=source.video_uri,
                    video_id=source.video_id,
                    first_view=0,
                    views=1,
                    image_size=extraction.image_size,
                    sampling=video.sampling_of(extraction.sampling),
                    span=video.span,
                    window=window,
                )
                return decoder.decode(job)[0]
        except VideoRefusedError as error:
            raise DeltacacheError(
                f"{source.video_uri} cannot be predicted from ({error.reason.value}): {error.message}"
            ) from error


def backbone_of(sequence: SeenSequence, settings: PredictionSettings, device: torch.device) -> Backbone:
    """The backbone that made the tokens, loaded if need be.

    Raises:
        MismatchError: what is loaded is another one.
    """
    if sequence.backbone is not None:
        return sequence.backbone
    made = sequence.card.backbone
    if settings.backbone is None and is_python_path(made.id):
        raise MismatchError(
            f"{settings.video} was made by the backbone {made.id}, code outside of deltacache, which is imported "
            f"only when it is named: give --backbone {made.id}"
        )
    backbone = load_backbone(settings.backbone or made.id, "float32", made.layers, settings.pca).to(device)
    require_matches(
        Provenance(
            f"--rgb-decoder with backbone {backbone.id}", backbone.hidden_size, backbone.weights_sha256
        ),
        Provenance.of_dataset(sequence.card, settings.video),
        "give --backbone with the one that made these features",
    )
    return backbone
