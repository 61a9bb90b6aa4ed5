"""Table D's evaluation against the same numbers computed step by step, and what it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from foresight_runs import GRID, SIZE, WIDTH, lively, save_models, whole_settings
from PIL import Image
from torch import Tensor, nn

from deltacache.descriptions import describe_output
from deltacache.evaluate.comparing import compare_runs
from deltacache.evaluate.examples import load_examples, load_frames
from deltacache.evaluate.foresight.pictures import kept_size, principal_axes
from deltacache.evaluate.foresight.predictions import movable_totals
from deltacache.evaluate.foresight.run import evaluate_foresight
from deltacache.evaluate.report.page import write_page, write_report
from deltacache.evaluate.report.panels import PUBLISHED_MARK
from deltacache.evaluate.report.strips import fit_projection
from deltacache.models.backbone import load_backbone
from deltacache.models.checkpoints import load_tokenizer, load_world, save_model
from deltacache.models.deltatok import DeltaTok
from deltacache.models.heads import SegmentationHead, load_head
from deltacache.models.pca import Pca, save_pca
from deltacache.models.worlds.deltaworld import DeltaWorld
from deltacache.models.worlds.foresight import Foresight
from deltacache.pipeline.benchmarks.frames import read_label
from deltacache.pipeline.benchmarks.layouts import benchmark_sequences
from deltacache.pipeline.benchmarks.windows import FrameCounts
from deltacache.schemas.errors import DatasetError, DeltacacheError, MismatchError
from deltacache.schemas.foresight import FrameFeatureConfig
from deltacache.schemas.progress import SilentReporter
from deltacache.schemas.tables import METRICS_SCHEMA, SEQUENCES_SCHEMA
from reporters import Lines

BARE = {"segmentation_head": None, "depth_head": None, "depth": None, "worlds": (), "tokenizer": None}


@pytest.fixture(scope="module")
def cityscapes(mini_benchmarks: Path) -> Path:
    return mini_benchmarks / "cityscapes"


@pytest.fixture(scope="module")
def made(cityscapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("foresight"), cityscapes)


@pytest.fixture(scope="module")
def run(made: Path, cityscapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    evaluate_foresight(whole_settings(made, cityscapes, out), SilentReporter())
    return out


def values(out: Path) -> dict[tuple[str, str, int], float]:
    rows = pq.read_table(out / "metrics.parquet", schema=METRICS_SCHEMA).to_pylist()
    assert all(
        (row["dataset"], row["aggregation"], row["image_size"]) == ("foresight", "single", 32) for row in rows
    )
    return {(row["method"], row["metric"], row["horizon"]): row["value"] for row in rows}


@torch.no_grad()
def oracle(made: Path, cityscapes: Path, method: str, horizon: int) -> dict[str, float]:
    """One method at one horizon, pixel by pixel over all frames."""
    backbone = load_backbone("tiny")
    tokenizer = load_tokenizer(made / "tokenizer").model
    counts = FrameCounts((7,))
    classes, truth, depths, known, losses = [], [], [], [], []
    for each in benchmark_sequences("cityscapes", cityscapes, counts).sequences:
        pictures = [
            np.asarray(opened(path).resize((SIZE[1], SIZE[0]), Image.Resampling.BILINEAR))
            for path in each.frames
        ]
        black = backbone.patch_tokens(torch.zeros(1, 3, *SIZE, dtype=torch.uint8)).half().float()
        frames = torch.stack(
            [backbone.patch_tokens(torch.tensor(one).permute(2, 0, 1)[None])[0] for one in pictures]
        )
        frames = frames.half().float()
        seen = {1: frames[2:6], 3: frames[:4]}[horizon]
        seconds = torch.arange(4.0 + horizon)[None]
        if method == "copy_last":
            tokens = seen[-1]
        elif method == "present":
            tokens = frames[6]
        elif method == "dino_foresight":
            tokens = load_world(made / "baseline").model.rollout(seen[None], seconds, grid=GRID)[0, 0, -1]
        else:
            before = torch.cat((black, seen[:3]))
            deltas = torch.cat(
                [tokenizer.encode(a[None], b[None], GRID) for a, b in zip(before, seen, strict=True)]
            )
            future = load_world(made / "delta").model.rollout(deltas[None], seconds)[0, 0]
            tokens = seen[-1:]
            for delta in future:
                tokens = tokenizer.decode(delta[None], tokens, GRID)
            tokens = tokens[0]
        label = read_label("cityscapes", each.label, opened(each.frames[-1]).size[::-1])
        losses.append(nn.functional.smooth_l1_loss(tokens, frames[6], beta=0.1).item())
        small = tokens.T.reshape(1, WIDTH, *GRID)
        classes.append(enlarged(head(made, "segmentation"), small, label).argmax(1)[0].numpy().ravel())
        truth.append(label.ravel())
        depths.append(enlarged(head(made, "depth"), small, label)[0, 0].double().numpy().ravel())
        rows = np.linspace(0, 255, label.shape[0]).astype(np.uint8).astype(np.float64) * 80 / 255
        known.append(np.repeat(rows, label.shape[1]))
    predicted, labelled = np.concatenate(classes), np.concatenate(truth)
    predicted, labelled = predicted[labelled != 255], labelled[labelled != 255]
    ious = {
        c: np.mean(
            predicted[(predicted == c) | (labelled == c)] == labelled[(predicted == c) | (labelled == c)]
        )
        for c in {*predicted.tolist(), *labelled.tolist()}
    }
    depth, metres = np.concatenate(depths), np.concatenate(known)
    depth, metres = depth[metres > 0], metres[metres > 0]
    return {
        "smooth_l1": float(np.mean(losses)),
        "miou": float(np.mean(list(ious.values()))),
        "miou_movable": float(np.mean([iou for c, iou in ious.items() if c >= 11])),
        "abs_rel": float(np.mean(np.abs(depth - metres) / metres)),
        "delta1": float(np.mean(np.maximum(depth / metres, metres / depth) < 1.25)),
    }


def opened(path: str) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


def head(made: Path, name: str) -> nn.Module:
    return load_head(made / name, "depth" if name == "depth" else "segmentation").model


def enlarged(model: nn.Module, small: Tensor, label: np.ndarray) -> Tensor:
    return nn.functional.interpolate(model(small), size=label.shape, mode="bilinear", align_corners=False)


@pytest.mark.parametrize("horizon", [1, 3])
@pytest.mark.parametrize("method", ["copy_last", "present", "dino_foresight", "dino_foresight_delta"])
def test_every_number_is_that_of_the_protocol(
    method: str, horizon: int, run: Path, made: Path, cityscapes: Path
) -> None:
    found = values(run)
    for metric, value in oracle(made, cityscapes, method, horizon).items():
        assert found[method, metric, horizon] == pytest.approx(value, rel=1e-5, abs=1e-6), metric


def test_the_bounds_bound_and_methods_differ(run: Path) -> None:
    found = values(run)
    for horizon in (1, 3):
        assert found["present", "smooth_l1", horizon] == 0
        losses = [
            found[name, "smooth_l1", horizon]
            for name in ("copy_last", "dino_foresight", "dino_foresight_delta")
        ]
        assert len(set(losses)) == 3
        assert min(losses) > 0
    assert ("copy_last", "rmse", 1) not in found


def test_people_and_vehicles_move() -> None:
    ids = np.arange(19)
    totals = movable_totals(np.concatenate([ids, 100 + ids, 200 + ids])[None])
    movable = [11, 12, 13, 14, 15, 16, 17, 18]
    assert totals.tolist() == [movable + [100 + each for each in movable] + [200 + each for each in movable]]


def test_single_sequences_have_the_same_columns(run: Path) -> None:
    rows = pq.read_table(run / "sequences.parquet", schema=SEQUENCES_SCHEMA).to_pylist()
    assert {row["metric"] for row in rows} >= {"miou", "miou_movable", "delta1", "abs_rel", "smooth_l1"}
    assert len({row["sequence_id"] for row in rows}) == 2


def test_a_finished_evaluation_is_left_alone(run: Path, made: Path, cityscapes: Path) -> None:
    before = (run / "metrics.parquet").stat().st_mtime_ns
    evaluate_foresight(whole_settings(made, cityscapes, run), SilentReporter())
    assert (run / "metrics.parquet").stat().st_mtime_ns == before
    assert {row["run_id"] for row in pq.read_table(run / "metrics.parquet").to_pylist()}


def test_without_heads_features_alone_are_scored(made: Path, cityscapes: Path, tmp_path: Path) -> None:
    evaluate_foresight(whole_settings(made, cityscapes, tmp_path / "out", **BARE), SilentReporter())
    assert {metric for _, metric, _ in values(tmp_path / "out")} == {"smooth_l1", "mse", "cosine"}


def test_layers_and_a_pca_make_the_features(made: Path, cityscapes: Path, tmp_path: Path) -> None:
    """Whose copy of the last frame is as far from the truth as computed by hand; other models do not fit."""
    joined = load_backbone("tiny", "float32", (0, 1))
    (sequence, *others) = benchmark_sequences("cityscapes", cityscapes, FrameCounts((7,))).sequences
    tokens = {}
    for each in (sequence, *others):
        pictures = [
            np.asarray(opened(path).resize((SIZE[1], SIZE[0]), Image.Resampling.BILINEAR))
            for path in each.frames
        ]
        tokens[each.sequence_id] = joined.patch_tokens(torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2))
    whole = torch.cat(list(tokens.values())).flatten(0, 1)
    components = torch.linalg.qr(torch.randn(2 * WIDTH, 20, generator=torch.Generator().manual_seed(0)))[0].T
    origin = {"backbone": {"weights_sha256": joined.weights_sha256, "layers": [0, 1]}}
    pca = Pca(whole.mean(0), whole.std(0), components, torch.ones(20), origin)
    save_pca(tmp_path / "pca", pca)
    features = FrameFeatureConfig.model_validate(
        {"backbone": "tiny", "image_size": "32x64", "layers": "0,1", "pca": tmp_path / "pca"}
    )
    evaluate_foresight(
        whole_settings(made, cityscapes, tmp_path / "out", **BARE, features=features), SilentReporter()
    )
    reduced = [pca.project(each).half().float() for each in tokens.values()]
    expected = np.mean([nn.functional.mse_loss(each[5], each[6]).item() for each in reduced])
    assert values(tmp_path / "out")["copy_last", "mse", 1] == pytest.approx(expected, rel=1e-4)
    (named,) = {row["backbone"] for row in pq.read_table(tmp_path / "out" / "metrics.parquet").to_pylist()}
    assert named.endswith(f"layers 0,1, PCA {pca.fingerprint}")
    made_from = {"backbone_sha256": joined.weights_sha256, "patch_grid": list(GRID), "layers": [0, 1]}
    save_model(tmp_path / "head", SegmentationHead(20, 19), "head", made_from)
    with pytest.raises(MismatchError, match=f"without PCA, but .* reduced by PCA {pca.fingerprint}"):
        evaluate_foresight(
            whole_settings(
                made,
                cityscapes,
                tmp_path / "no",
                **BARE | {"segmentation_head": tmp_path / "head"},
                features=features,
            ),
            SilentReporter(),
        )


def test_what_does_not_belong_together_is_refused(made: Path, cityscapes: Path, tmp_path: Path) -> None:
    def refused(error: type[DeltacacheError], words: str, **changes: Any) -> None:
        asked = whole_settings(made, cityscapes, tmp_path / "out", **changes)
        with pytest.raises(error, match=words):
            evaluate_foresight(asked, SilentReporter())
        assert not (tmp_path / "out").exists()

    save_model(tmp_path / "noisy", DeltaWorld(WIDTH, 4, 1), "world", {})
    refused(DeltacacheError, "noisy has many futures", worlds=(tmp_path / "noisy",))
    refused(
        DeltacacheError, "delta predicts delta tokens: give their", worlds=(made / "delta",), tokenizer=None
    )
    refused(DeltacacheError, "named twice", worlds=(made / "baseline", made / "baseline"))
    save_model(tmp_path / "other", lively(DeltaTok(WIDTH, 4, 1, 1), 9), "tokenizer", {})
    refused(MismatchError, "was trained on delta tokens of tokenizer", tokenizer=tmp_path / "other")
    save_model(tmp_path / "wide", Foresight(24, 4, 1), "world", {})
    refused(
        MismatchError,
        "has 64-wide tokens, but .*wide expects 24: load the model",
        worlds=(tmp_path / "wide",),
    )
    save_model(tmp_path / "grid", Foresight(WIDTH, 4, 1), "world", {"patch_grid": [2, 2]})
    refused(
        MismatchError,
        "2 x 2 patches per frame, but .* has 2 x 4: use its image size",
        worlds=(tmp_path / "grid",),
    )
    save_model(tmp_path / "head", SegmentationHead(WIDTH, 124), "head", {})
    refused(MismatchError, "knows 124 classes", segmentation_head=tmp_path / "head")
    refused(DatasetError, "has no depth map", depth=tmp_path)
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "thesis.txt").touch()
    with pytest.raises(DatasetError, match="holds something else"):
        evaluate_foresight(whole_settings(made, cityscapes, tmp_path / "strange"), SilentReporter())


def test_another_evaluation_is_not_overwritten(made: Path, cityscapes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluate_foresight(whole_settings(made, cityscapes, out, **BARE), SilentReporter())
    before = (out / "metrics.parquet").read_bytes()
    other = whole_settings(made, cityscapes, out, **BARE | {"horizons": (2,)})
    with pytest.raises(DatasetError, match="its tables are not overwritten; choose another folder"):
        evaluate_foresight(other, SilentReporter())
    assert (out / "metrics.parquet").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("split", ["val", "train"])
def test_heads_are_recorded_and_one_of_the_scored_split_is_told(
    made: Path, cityscapes: Path, tmp_path: Path, split: str
) -> None:
    said = {"benchmark": "cityscapes", "split": split, "frames": 2}
    model = load_head(made / "segmentation", "segmentation").model
    head = tmp_path / "head"
    save_model(head, model, "head", {"trained_on": said})
    fingerprint = load_head(head, "segmentation").fingerprint
    reporter, out = Lines(), tmp_path / "out"
    changes = BARE | {"segmentation_head": head}
    evaluate_foresight(whole_settings(made, cityscapes, out, **changes), reporter)
    record = json.loads((out / "models.json").read_text())
    assert record["heads"] == {"segmentation": fingerprint}
    assert record["heads_trained_on"] == {"segmentation": said}
    assert record["backbone"] == load_backbone("tiny").weights_sha256
    note = f"foresight: the head {fingerprint} was trained on the val split: its numbers are not comparable"
    page, text = write_report(out).read_text(), describe_output(out)
    for found in (json.loads((out / "notes.json").read_text()), page, text):
        assert (note in found) is (split == "val")
    assert (f"evaluate-foresight: {note}" in reporter.said) is (split == "val")
    assert f"{fingerprint}, trained on the {split} split, from {head}" in page
    assert f"{fingerprint} at {head}, unchanged" in text
    shutil.rmtree(head)
    assert f"{head} no longer exists" in describe_output(out)


def test_examples_show_what_the_whole_features_show(run: Path, made: Path, cityscapes: Path) -> None:
    """Colours along 32 axes are those of all 64 channels; every world model has one future of all three steps."""
    examples = load_examples(run / "examples")
    backbone = load_backbone("tiny")
    whole = []
    for each in benchmark_sequences("cityscapes", cityscapes, FrameCounts((7,))).sequences:
        pictures = [
            opened(path).resize((SIZE[1], SIZE[0]), Image.Resampling.BILINEAR) for path in each.frames
        ]
        frames = torch.tensor(np.stack([np.asarray(picture) for picture in pictures]))
        whole.append(backbone.patch_tokens(frames.permute(0, 3, 1, 2)).detach().numpy())
    assert [example.title.split()[0] for example in examples] == ["foresight"] * 2
    kept = fit_projection([example.patch_tokens for example in examples])
    full = fit_projection(whole)
    fingerprint = load_world(made / "baseline").fingerprint
    for example, tokens in zip(examples, whole, strict=True):
        assert (example.grid, example.patch_tokens.shape) == (GRID, (7, 8, 32))
        seen = kept.picture(example.patch_tokens[0], GRID).astype(int)
        wanted = full.picture(tokens[0], GRID).astype(int)
        same = np.minimum(np.abs(seen - wanted), np.abs(seen - (255 - wanted)))  # an axis has no sign
        assert same.max() <= 3
        worlds = {world.method: world for world in example.worlds}
        assert worlds["dino_foresight"].fingerprint == fingerprint
        assert {world.samples.shape for world in worlds.values()} == {(1, 3, 8, 32)}
        label = {maps.kind: maps for maps in example.maps}
        assert set(label) == {"segmentation", "relative_depth"}
        truth = label["segmentation"].label
        assert truth is not None
        height, width = kept_size(*truth.shape)
        for maps in label.values():
            assert maps.truth.shape == (7, height, width)
            assert maps.samples[fingerprint].shape == (1, 3, height, width)
        frames = load_frames(run / "examples", example.clip_ids[0])
        assert frames is not None
        assert frames.shape == (7, *SIZE, 3)


def test_axes_are_those_of_largest_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    frames = [torch.randn(2, 50, 40, generator=generator) * torch.linspace(3, 0.1, 40) for _ in range(3)]
    axes = principal_axes(frames)
    together = torch.cat([each.flatten(0, 1) for each in frames])
    exact = torch.linalg.svd(together - together.mean(0), full_matrices=False)[2][:32].T
    assert axes.shape == (40, 32)
    torch.testing.assert_close((axes * exact).sum(0).abs(), torch.ones(32), atol=1e-3, rtol=0)


def test_maps_are_small_and_of_the_labels_aspect() -> None:
    assert kept_size(1024, 2048) == (128, 256)
    assert kept_size(96, 200) == (96, 200)
    assert kept_size(300, 500) == (150, 250)


@pytest.mark.slow
def test_the_page_of_an_evaluation(run: Path, made: Path, cityscapes: Path, tmp_path: Path) -> None:
    page = write_report(run).read_text()
    assert "Evaluation on Cityscapes as whole frames" in page
    assert "one future a model, whole frames of 32 × 64 px" in page
    for text in (
        "DINO-Foresight on delta tokens",
        "Mean IoU of movable classes",
        "Depth δ &lt; 1.25",
        ">road</th>",
    ):
        assert text in page
    for absent in ('id="calibration"', 'id="samples"', 'id="drift"', "“Best”", "Depth RMSE", PUBLISHED_MARK):
        assert absent not in page
    assert page.count('class="example wide"') == 2
    assert "Relative depth, baseline: 3 pictures of the future" in page
    assert "Segmentation, ground truth: one picture at the last moment" in page
    assert f"{load_tokenizer(made / 'tokenizer').fingerprint}, from {made / 'tokenizer'}" in page
    text = describe_output(run)
    assert "made from: depth head" in text
    assert "made from: world" in text
    other = tmp_path / "other"
    evaluate_foresight(whole_settings(made, cityscapes, other, worlds=(made / "delta",)), SilentReporter())
    both = write_page([run, other], tmp_path / "both.html").read_text()
    assert both.count("one future a model, whole frames of") == 2
    differences = compare_runs(run, other).differences
    assert {each.metric for each in differences} >= {"miou", "miou_movable", "delta1", "smooth_l1"}
    assert "rmse" not in {each.metric for each in differences}


@pytest.mark.slow
def test_published_rows_of_table_d_stand_beside_ones_own(
    made: Path, cityscapes: Path, tmp_path: Path
) -> None:
    features = FrameFeatureConfig(backbone="tiny", image_size=(448, 896))
    changes: dict[str, Any] = {"worlds": (), "tokenizer": None, "features": features, "examples": 1}
    out = tmp_path / "out"
    evaluate_foresight(whole_settings(made, cityscapes, out, **changes), SilentReporter())
    path = write_report(out)
    page = path.read_text()
    assert page.count('class="published">published') == 2 * 2  # columns of both moments, IoU and depth
    assert f"DINO-Foresight, 10,240 tokens, paper {PUBLISHED_MARK}" in page
    assert "over the whole validation sets, at 448 × 896 px" in page
    for value in ("71.8", "59.8", "88.6", "85.4", "72.1", "60.0", "88.5", "85.6"):
        assert f">{value}</td>" in page
    (example,) = load_examples(out / "examples")
    assert example.grid == (28, 56)
    assert example.patch_tokens.shape == (7, 28 * 56, 32)
    sizes = [each.stat().st_size for each in (path, *(out / "examples").iterdir())]
    assert max(sizes) < 15e6
