"""``deltacache demo``: the whole chain on a drawn world whose futures are known, and a look at them (docs/demo.md)."""

from pathlib import Path

from deltacache.chain import ChainConfig, EvaluationPlan, run_chain
from deltacache.demo.world import CONTEXT_FRAMES, EVEN, FRAMES_PER_SECOND, draw_pictures, draw_world
from deltacache.evaluate.clips.scenes import read_futures
from deltacache.evaluate.prediction.run import PAGE, predict_futures
from deltacache.evaluate.results import show_results
from deltacache.schemas.configs import (
    TrainingConfig,
    load_config,
    rgb_preset,
    save_config,
    tokenizer_preset,
    world_preset,
)
from deltacache.schemas.datasets import SamplingSettings
from deltacache.schemas.errors import DatasetError
from deltacache.schemas.jobs import ClusterSettings, ExtractionSettings
from deltacache.schemas.prediction import PredictionSettings
from deltacache.schemas.progress import Reporter
from deltacache.train.heads.setup import HeadRequest
from deltacache.train.heads.training import train_rgb_decoder

IMAGE_SIZE = 64
TRAIN_VIDEOS = 400
TEST_SCENES = 30
FRAMES = 8
PICTURED_VIDEOS = 150
"""Training videos whose frames teach the decoder of pictures."""
SHOWN_VIDEO = "scene-003-left.mp4"


def run_demo(out: Path, seed: int, reporter: Reporter, odds: float = EVEN) -> Path:
    """Draw the videos, run every stage that is not finished, show table and futures; returns the page of the futures.

    Raises:
        DeltacacheError: ``out`` holds something else, or a demo of another seed or other odds.
    """
    out = out.resolve()
    videos = out / "videos"
    config = demo_config(videos / "train", videos / "test", out / "futures.csv", seed)
    _claim(out, config, odds)
    draw_world(
        out,
        seed=seed,
        train_videos=TRAIN_VIDEOS,
        test_scenes=TEST_SCENES,
        image_size=IMAGE_SIZE,
        odds=odds,
        reporter=reporter,
    )
    paths = run_chain(config, out, reporter)
    show_results(paths.evaluation, reporter)
    draw_pictures(out / "pictures", seed=seed, videos=PICTURED_VIDEOS, image_size=IMAGE_SIZE, odds=odds)
    decoder = HeadRequest(out / "pictures", out / "rgb-decoder", "tiny", resume=True, device="cpu")
    recipe = rgb_preset("tiny")
    frames = recipe.frames.model_copy(update={"image_size": IMAGE_SIZE})
    recipe = recipe.model_copy(update={"frames": frames, "training": _seeded(recipe.training, seed)})
    train_rgb_decoder(decoder, recipe, reporter)
    futures = PredictionSettings(
        video=str(videos / "test" / SHOWN_VIDEO),
        out=out / "futures",
        tokenizer=paths.tokenizer,
        world=paths.world("best-of-many"),
        rgb_decoder=decoder.out,
        context=CONTEXT_FRAMES,
        steps=FRAMES - CONTEXT_FRAMES,
        spacing_s=1 / FRAMES_PER_SECOND,
        seed=seed,
        backbone="tiny",
        image_size=IMAGE_SIZE,
        movie="gif",
        device="cpu",
    )
    page = futures.out / PAGE
    if not page.exists():
        predict_futures(futures, reporter)
    reporter.line(f"demo: one past and {futures.samples} futures, open this first: {page}")
    return page


def _claim(out: Path, config: ChainConfig, odds: float) -> None:
    """Refuse a folder that holds something else; otherwise leave the resolved config there."""
    saved = out / "chain.yaml"
    if saved.is_file():
        if load_config(saved, ChainConfig) != config:
            raise DatasetError(
                f"{out} holds a demo with other settings (see {saved}): choose another folder, or remove it"
            )
        futures = out / "futures.csv"
        rows = read_futures(futures) if futures.is_file() else []
        before = next((float(row.get("probability", EVEN)) for row in rows if row["outcome"] == "left"), odds)
        if abs(before - odds) > 1e-9:
            raise DatasetError(
                f"{out} holds a demo whose shapes turn left with probability {before:g}, not {odds:g}: choose another "
                f"folder, or give --odds {before:g}"
            )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DatasetError(f"{out} is not empty and is not a demo: choose another folder, or empty it")
    out.mkdir(parents=True, exist_ok=True)
    save_config(config, saved)


def demo_config(train: Path, test: Path, futures: Path, seed: int) -> ChainConfig:
    """The demo as a chain: tiny models, every video frame a sampled frame, no augmentation."""
    sampling = SamplingSettings(
        frames=FRAMES,
        spacing_min_s=1 / FRAMES_PER_SECOND,
        spacing_max_s=1 / FRAMES_PER_SECOND,
        augment=False,
        seed=seed,
    )

    def videos(folder: Path) -> ExtractionSettings:
        return ExtractionSettings(
            source=str(folder),
            backbone="tiny",
            image_size=IMAGE_SIZE,
            sampling=sampling,
            max_failed_fraction=0.0,
            cluster=ClusterSettings(encoders=0, gpus_per_encoder=0),
        )

    tokenizer = tokenizer_preset("tiny")
    best_of_many = world_preset("tiny")
    best_of_many = best_of_many.model_copy(update={"training": _seeded(best_of_many.training, seed)})
    # The same predictor with one learned query: a single future.
    learned = best_of_many.model.model_copy(update={"query": "learned"})
    discriminative = best_of_many.model_copy(update={"model": learned, "candidates": 1})
    return ChainConfig(
        train_videos=videos(train),
        test_videos=videos(test),
        tokenizer=tokenizer.model_copy(update={"training": _seeded(tokenizer.training, seed)}),
        worlds={"best-of-many": best_of_many, "discriminative": discriminative},
        evaluation=EvaluationPlan(futures=futures, seed=seed),
        device="cpu",
    )


def _seeded(training: TrainingConfig, seed: int) -> TrainingConfig:
    return training.model_copy(update={"seed": seed})
