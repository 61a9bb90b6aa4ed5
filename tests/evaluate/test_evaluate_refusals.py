"""What an evaluation refuses: the message names the values, and nothing is written."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from drawn_features import (
    BACKBONE,
    FRAMES,
    DrawnClip,
    DrawnWorld,
    draw_clips,
    save_tokenizer,
    save_world,
    write_features,
    write_futures,
)

from deltacache.evaluate import predictions
from deltacache.evaluate.benchmarks.labels import SegmentationScorer
from deltacache.evaluate.clips import rollouts
from deltacache.evaluate.clips.run import evaluate_clips
from deltacache.evaluate.metrics import naming
from deltacache.evaluate.output import read_notes
from deltacache.evaluate.report.page import write_report
from deltacache.evaluate.report.tables import plain_text
from deltacache.evaluate.settings import clip_evaluation
from deltacache.models.checkpoints import load_tokenizer
from deltacache.models.heads import SegmentationHead
from deltacache.pipeline.benchmarks.frames import CropSplit, read_depth_map
from deltacache.schemas.errors import (
    CheckpointError,
    DatasetError,
    DeltacacheError,
    MismatchError,
    NotFiniteError,
)
from deltacache.schemas.progress import SilentReporter


def refused(drawn: DrawnWorld, error: type[DeltacacheError], message: str, **changes: object) -> None:
    """Evaluating with ``changes`` fails like this and leaves no output."""
    settings = drawn.settings(**changes)
    with pytest.raises(error, match=message):
        evaluate_clips(settings, SilentReporter())
    assert not (drawn.root / "out").exists()


def test_tokenizer_of_another_width(drawn: DrawnWorld) -> None:
    wide = save_tokenizer(drawn.root / "wide", hidden=64)
    refused(
        drawn,
        MismatchError,
        r"32-wide tokens of drawn at 32 px, .*wide expects 64",
        tokenizer=wide,
        worlds=(),
        futures=None,
    )


def test_tokenizer_of_another_backbone(drawn: DrawnWorld) -> None:
    other = save_tokenizer(drawn.root / "other", backbone_sha256="c" * 64)
    message = f"backbone {'c' * 16}, but .*{BACKBONE[:16]}"
    refused(drawn, MismatchError, message, tokenizer=other, worlds=(), futures=None)


def test_tokenizer_of_another_patch_grid(drawn: DrawnWorld) -> None:
    other = save_tokenizer(drawn.root / "other", patch_grid=[4, 6])
    message = r"4 x 6 patches per frame, but .* has 2 x 3"
    refused(drawn, MismatchError, message, tokenizer=other, worlds=(), futures=None)


def test_models_of_another_image_size_are_named_in_every_row(drawn: DrawnWorld) -> None:
    """A recipe goes from one size to another; that a patch grid is of another size, the tokenizer must say."""
    small = save_tokenizer(drawn.root / "small", patch_grid=[1, 2], image_size=[16, 32])
    evaluate_clips(drawn.settings(tokenizer=small, worlds=(), futures=None), SilentReporter())
    assert (
        "small was trained on features of 16x32 px, but these are of 32 px"
        in read_notes(drawn.root / "out")[0]
    )
    metrics = pq.read_table(drawn.root / "out" / "metrics.parquet")
    sizes = {(row["method"], row["trained_image_size"]) for row in metrics.to_pylist()}
    assert {("deltatok", "16x32"), ("deltatok_swapped", "16x32"), ("copy_last", None)} <= sizes
    assert "DeltaTok, closed loop, trained at 16x32 px" in plain_text(metrics)


def test_a_tokenizer_that_says_nothing_of_its_making_needs_the_width_alone(drawn: DrawnWorld) -> None:
    released = save_tokenizer(drawn.root / "released", backbone_sha256=None, patch_grid=None)  # pyright: ignore
    evaluate_clips(drawn.settings(tokenizer=released, worlds=(), futures=None), SilentReporter())
    assert (drawn.root / "out" / "metrics.parquet").exists()


def test_world_model_of_another_tokenizer(drawn: DrawnWorld) -> None:
    other = save_tokenizer(drawn.root / "other", seed=5)
    fingerprints = [load_tokenizer(path).fingerprint for path in (drawn.tokenizer, other)]
    assert fingerprints[0] != fingerprints[1]
    message = f"tokenizer {fingerprints[0]}, but .* is {fingerprints[1]}"
    refused(drawn, MismatchError, message, tokenizer=other)


def test_world_model_of_another_width(drawn: DrawnWorld) -> None:
    wide = save_world(drawn.root / "wide", "", hidden=64)
    refused(drawn, MismatchError, "has 32-wide tokens, but .* expects 64: load the tokenizer", worlds=(wide,))


def test_the_same_world_model_twice(drawn: DrawnWorld) -> None:
    refused(drawn, DeltacacheError, "the same world model", worlds=(drawn.noise, drawn.noise))


def test_clips_shorter_than_context_and_horizon(drawn: DrawnWorld) -> None:
    message = f"10 clips of at most {FRAMES} frames, but context and longest horizon need 8"
    refused(drawn, MismatchError, message, horizons=(1, 4))


def test_a_tokenizer_or_features_in_the_wrong_place(drawn: DrawnWorld) -> None:
    refused(drawn, CheckpointError, "holds a world, but a tokenizer is needed", tokenizer=drawn.noise)
    refused(drawn, DatasetError, "is not a dataset", features=drawn.tokenizer)
    refused(drawn, CheckpointError, "does not exist", worlds=(drawn.root / "gone",))


def test_damaged_features(drawn: DrawnWorld) -> None:
    (shard,) = (drawn.features / "shards").glob("*.tar")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 255
    shard.write_bytes(content)
    with pytest.raises(DatasetError, match="damaged"):
        evaluate_clips(drawn.settings(futures=None), SilentReporter())
    assert not (drawn.root / "out").exists()


def test_damaged_weights(drawn: DrawnWorld) -> None:
    weights = drawn.noise / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(drawn, CheckpointError, "damaged")


def test_an_output_that_holds_something_else(drawn: DrawnWorld) -> None:
    message = "holds something else .*config.json, model.safetensors"
    with pytest.raises(DatasetError, match=message):
        evaluate_clips(drawn.settings("tokenizer"), SilentReporter())
    with pytest.raises(DatasetError, match="is a file"):
        evaluate_clips(drawn.settings("futures.csv"), SilentReporter())
    assert sorted(path.name for path in drawn.tokenizer.iterdir()) == ["config.json", "model.safetensors"]


def test_scenes_that_do_not_share_their_context(drawn: DrawnWorld) -> None:
    clips = draw_clips()
    crossed = [
        DrawnClip(f"scene0-{side}", clip.tokens)
        for side, clip in zip(("left", "right"), clips[::2], strict=False)
    ]
    features = write_features(drawn.root / "crossed", crossed)
    futures = write_futures(drawn.root / "crossed.csv", crossed)
    refused(
        drawn,
        MismatchError,
        "scene scene0: the contexts of left and right",
        features=features,
        futures=futures,
    )


def test_contexts_that_differ_by_compression_alone_pass(drawn: DrawnWorld) -> None:
    clips = draw_clips()
    clips[1].tokens[:4] += 0.01 * np.random.default_rng(0).normal(size=clips[1].tokens[:4].shape)
    features = write_features(drawn.root / "noisy", clips)
    assert evaluate_clips(drawn.settings(features=features), SilentReporter()).exists()


def test_features_without_clips(drawn: DrawnWorld) -> None:
    features = write_features(drawn.root / "empty", [])
    refused(drawn, DatasetError, "empty holds no clips", features=features)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 0}, r"samples: .*greater than or equal to 1 \(got 0\)"),
        ({"horizons": (0, 1)}, "horizon 0 is not after the context"),
        ({"horizons": ()}, "horizons"),
        ({"context": 0}, "context"),
        ({"worlds": (), "futures": "f.csv"}, "give a world model"),
        ({"sample": 3}, r"sample: is not known: give samples, .*, or leave it out \(got 3\)"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, object], message: str) -> None:
    fields = {"out": "out", "features": "features", "tokenizer": "tokenizer", "worlds": ("world",)}
    with pytest.raises(DeltacacheError, match=message):
        clip_evaluation(**(fields | changes))


def test_horizons_are_sorted_and_counted_once() -> None:
    settings = clip_evaluation(out=Path("out"), features=Path("features"), horizons=(3, 1, 3))
    assert settings.horizons == (1, 3)
    assert settings.frames == 7


def test_features_that_are_not_finite_are_refused_by_sequence_and_frame(drawn: DrawnWorld) -> None:
    clips = draw_clips()
    clips[3].tokens[2, 1, 5] = np.inf
    features = write_features(drawn.root / "broken", clips)
    message = rf"sequence {clips[3].name}-v000: the features of frame 2 are not finite"
    refused(drawn, NotFiniteError, message, features=features, futures=None)


@pytest.mark.parametrize("sampled", [True, False])
def test_predictions_that_are_not_finite_are_refused_by_method_sequence_and_step(
    drawn: DrawnWorld, monkeypatch: pytest.MonkeyPatch, sampled: bool
) -> None:
    """One sample of six at the last step: ``argmin`` would choose it for the best."""
    decoded = rollouts.decode_future if sampled else predictions.decode_future

    def broken(*given: Any) -> torch.Tensor:
        frames = decoded(*given)
        frames[:, -1, -1, 0, 0] = torch.nan
        return frames

    monkeypatch.setattr(rollouts if sampled else predictions, "decode_future", broken)
    method = "deltaworld" if sampled else "deltatok_parallel"
    message = rf"{method} predicts values that are not finite .* for sequence scene0-left-v000, 3 steps ahead"
    with pytest.raises(NotFiniteError, match=message):
        evaluate_clips(drawn.settings(), SilentReporter())
    assert not (drawn.root / "out" / "metrics.parquet").exists()
    assert not (drawn.root / "out" / "sequences.parquet").exists()


def test_tables_of_an_older_version_with_nan_are_refused_in_words(
    evaluated: DrawnWorld, tmp_path: Path
) -> None:
    """They opened, and ``report`` ended in a traceback."""
    out = tmp_path / "old"
    shutil.copytree(evaluated.root / "out", out)
    table = pq.read_table(out / "metrics.parquet")
    rows = [
        row | {"value": float("nan")} if row["method"] == "deltatok" else row for row in table.to_pylist()
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), out / "metrics.parquet")
    with pytest.raises(
        NotFiniteError, match=r"smooth_l1 of deltatok on clips, horizon 1, is nan: an older version"
    ):
        write_report(out)


def test_a_head_that_gives_nan_is_refused() -> None:
    """``argmax`` of NaN is a class."""
    head = SegmentationHead(8, 3)
    with torch.no_grad():
        next(head.parameters()).fill_(torch.nan)
    scorer = SegmentationScorer(head, (2, 2), 3)
    label = torch.zeros(1, 4, 4, dtype=torch.uint8)
    message = "copy_last, sequence x, horizon 3: the head gives values that are not finite"
    with pytest.raises(NotFiniteError, match=message), naming("copy_last", "x", 3):
        scorer.totals(torch.ones(1, 4, 8), CropSplit((4, 4), wide=False), label)


def test_depth_maps_of_nan_are_refused_by_name(tmp_path: Path) -> None:
    depth = np.full((4, 4), 3.0, np.float32)
    depth[1, 1] = np.nan
    np.save(tmp_path / "map.npy", depth)
    with pytest.raises(DatasetError, match=r"map\.npy holds depths that are not finite"):
        read_depth_map(tmp_path / "map.npy", (4, 4))
