"""An evaluation's inputs, opened and checked before anything is computed or written."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import torch

from deltacache import __version__
from deltacache.evaluate import sample_sums
from deltacache.evaluate.clips.modes import find_scenes, read_futures
from deltacache.evaluate.clips.scenes import CheckedScene, check_scenes
from deltacache.evaluate.clips.sequences import SequenceList, choose_sequences
from deltacache.evaluate.examples import spread
from deltacache.evaluate.inputs import Models, load_models
from deltacache.evaluate.model_record import ModelRecord
from deltacache.evaluate.predictions import Protocol
from deltacache.evaluate.rows import TABLES_VERSION, RunStamp
from deltacache.evaluate.settings import ClipEvaluation
from deltacache.models.devices import allow_tf32, choose_device
from deltacache.pipeline.datasets.dataset import Dataset, open_dataset
from deltacache.pipeline.work.encoders import resolve_precision
from deltacache.schemas.fingerprints import fingerprint_of
from deltacache.schemas.images import sides

_NOT_NUMBERS = {
    "out",
    "features",
    "tokenizer",
    "more_tokenizers",
    "worlds",
    "architectures",
    "futures",
    "device",
    "precision",  # see models_precision
}


@dataclass(frozen=True)
class Run:
    """An evaluation whose inputs have been opened and checked.

    ``example_rows``: sequences to keep for the report; scenes, if there are any.
    """

    settings: ClipEvaluation
    dataset: Dataset
    models: Models
    protocol: Protocol
    sequences: SequenceList
    scenes: dict[int, CheckedScene]
    notes: tuple[str, ...]
    stamp: RunStamp
    example_rows: frozenset[int]
    device: torch.device

    @property
    def world_fingerprints(self) -> list[str | None]:
        """In the order of the settings."""
        return [world.method.world for world in self.models.worlds]

    def samples_of(self, method: str) -> int:
        """How many futures of each sequence a method that samples has."""
        return self.settings.samples

    @property
    def record(self) -> ModelRecord:
        """What ``models.json`` says."""
        backbone = self.dataset.card.backbone
        return ModelRecord(
            backbone=backbone.weights_sha256, pca=backbone.pca_fingerprint, **self.models.fingerprints
        )


def open_run(settings: ClipEvaluation) -> Run:
    """Open what ``settings`` names; see ``evaluate_clips`` for what is refused."""
    dataset = open_dataset(settings.features, "features")
    device = choose_device(settings.device)
    settings = settings.model_copy(update={"precision": resolve_precision(device, settings.precision)})
    allow_tf32(device, settings.precision != "float32")
    models = load_models(settings, dataset.card, settings.features, device)
    protocol = Protocol(
        context=settings.context,
        horizons=settings.horizons,
        seed=settings.seed,
        grid=dataset.card.patch_grid,
        black=torch.from_numpy(dataset.black_patch_tokens.astype(np.float32)).to(device),
    )
    sequences = choose_sequences(dataset.index, settings.frames, settings.features)
    scenes, notes = _open_scenes(settings, dataset, sequences, protocol)
    return Run(
        settings=settings,
        dataset=dataset,
        models=models,
        protocol=protocol,
        sequences=sequences,
        scenes=scenes,
        notes=(*sequences.notes, *models.notes, *notes, *_without_energy(models, protocol)),
        stamp=_stamp(settings, dataset, models),
        example_rows=frozenset(spread(tuple(scenes) or sequences.rows, settings.examples)),
        device=device,
    )


def _without_energy(models: Models, protocol: Protocol) -> Iterator[str]:
    """World models whose samples of a sequence are too many to be held together."""
    frame, count = protocol.black.numel(), len(protocol.horizons)
    for world in models.worlds:
        numbers = world.samples * count * frame
        if numbers > sample_sums.ENERGY_NUMBERS:
            yield (
                f"{world.method.name} ({world.method.world}) has no energy score: {world.samples} samples of {count} "
                f"frames of {frame} numbers are {numbers * 4 / 2**20:.0f} MiB a sequence, and at most "
                f"{sample_sums.ENERGY_NUMBERS * 4 / 2**20:.0f} are held; give fewer samples or horizons"
            )


def _open_scenes(
    settings: ClipEvaluation, dataset: Dataset, sequences: SequenceList, protocol: Protocol
) -> tuple[dict[int, CheckedScene], tuple[str, ...]]:
    if settings.futures is None:
        return {}, ()
    found = find_scenes(read_futures(settings.futures), sequences.first_of_video, settings.futures)
    checked, notes = check_scenes(dataset, found.scenes, protocol)
    return checked, (*found.notes, *notes)


def _stamp(settings: ClipEvaluation, dataset: Dataset, models: Models) -> RunStamp:
    """``run_id`` follows from the numbers that went in: not from paths, the device or the clock."""
    card = dataset.card
    numbers = settings.model_dump(mode="json", exclude=_NOT_NUMBERS)
    made_from = {
        "settings": numbers,
        "features": card.fingerprint,
        "clips": dataset.index.select(["clip_id", "crc32c"]).to_pylist(),
        "tokenizer": models.tokenizer.fingerprint if models.tokenizer else None,
        **models.further,
        "worlds": models.world_ids,
        **settings.models_precision,
        "futures": read_futures(settings.futures) if settings.futures else None,
        "code_version": __version__,
        "tables": TABLES_VERSION,
    }
    return RunStamp(
        run_id=fingerprint_of(made_from),
        dataset=settings.dataset,
        context=settings.context,
        image_size=sides(card.image_size),
        seed=settings.seed,
        backbone=card.backbone.name,
        code_version=__version__,
        created_at=datetime.now(UTC),
        trained_sizes=models.trained_sizes,
    )
