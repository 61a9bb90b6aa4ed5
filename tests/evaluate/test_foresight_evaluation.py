"""Table D's evaluation against the same numbers computed step by step, and what it refuses."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from deltacache.evaluate.foresight.run import evaluate_foresight
from deltacache.evaluate.foresight.scoring import movable_totals
from deltacache.models.backbone import load_backbone
from deltacache.models.checkpoints import load_tokenizer, load_world, save_model
from deltacache.models.deltatok import DeltaTok
from deltacache.models.heads import DepthHead, SegmentationHead, load_head
from deltacache.models.pca import Pca, save_pca
from deltacache.models.worlds.deltaworld import DeltaWorld
from deltacache.models.worlds.foresight import Foresight
from deltacache.models.worlds.foresight_delta import ForesightDelta
from deltacache.pipeline.benchmarks.layouts import benchmark_sequences
from deltacache.pipeline.benchmarks.reading import read_label
from deltacache.pipeline.benchmarks.windows import FrameCounts
from deltacache.schemas.errors import DatasetError, DeltacacheError, MismatchError
from deltacache.schemas.foresight import ForesightEvaluation, FrameFeatureConfig
from deltacache.schemas.progress import SilentReporter
from deltacache.schemas.tables import METRICS_SCHEMA, SEQUENCES_SCHEMA

SIZE, GRID, WIDTH = (32, 64), (2, 4), 64
FEATURES = FrameFeatureConfig(backbone="tiny", image_size=SIZE)


def lively(model: nn.Module, seed: int) -> Any:
    """Random weights large enough that futures differ from copies."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def cityscapes(mini_benchmarks: Path) -> Path:
    return mini_benchmarks / "cityscapes"


@pytest.fixture(scope="module")
def made(cityscapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random models, and depth maps that fall from top to bottom."""
    folder = tmp_path_factory.mktemp("foresight")
    tokenizer = lively(DeltaTok(WIDTH, 4, 1, 1, layer_scale_init=0.5), 0)
    save_model(folder / "tokenizer", tokenizer, "tokenizer", {})
    save_model(folder / "baseline", lively(Foresight(WIDTH, 4, 1, position_grid=GRID), 1), "world", {})
    fingerprint = load_tokenizer(folder / "tokenizer").fingerprint
    save_model(
        folder / "delta",
        lively(ForesightDelta(WIDTH, 4, 1), 2),
        "world",
        {"tokenizer_fingerprint": fingerprint},
    )
    save_model(folder / "segmentation", lively(SegmentationHead(WIDTH, 19), 3), "head", {})
    save_model(folder / "depth", lively(DepthHead(WIDTH), 4), "head", {})
    for label in cityscapes.glob("gtFine/val/*/*.png"):
        place = folder / "maps" / "val" / label.parent.name
        place.mkdir(parents=True, exist_ok=True)
        with Image.open(label) as picture:
            width, height = picture.size
        ramp = np.linspace(0, 255, height).astype(np.uint8)
        name = label.name.replace("_gtFine_labelIds", "_leftImg8bit_depth")
        Image.fromarray(np.tile(ramp[:, None], (1, width))).save(place / name)
    return folder


def settings(made: Path, cityscapes: Path, out: Path, **changes: Any) -> ForesightEvaluation:
    fields: dict[str, Any] = {
        "out": out,
        "root": cityscapes,
        "features": FEATURES,
        "tokenizer": made / "tokenizer",
        "worlds": (made / "baseline", made / "delta"),
        "segmentation_head": made / "segmentation",
        "depth_head": made / "depth",
        "depth": made / "maps",
        "device": "cpu",
    }
    return ForesightEvaluation(**(fields | changes))


@pytest.fixture(scope="module")
def run(made: Path, cityscapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    evaluate_foresight(settings(made, cityscapes, out), SilentReporter())
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
            np.asarray(opened(path).resize(SIZE[::-1], Image.Resampling.BILINEAR)) for path in each.frames
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
    evaluate_foresight(settings(made, cityscapes, run), SilentReporter())
    assert (run / "metrics.parquet").stat().st_mtime_ns == before
    assert {row["run_id"] for row in pq.read_table(run / "metrics.parquet").to_pylist()}


def test_without_heads_features_alone_are_scored(made: Path, cityscapes: Path, tmp_path: Path) -> None:
    bare = {"segmentation_head": None, "depth_head": None, "depth": None, "worlds": (), "tokenizer": None}
    evaluate_foresight(settings(made, cityscapes, tmp_path / "out", **bare), SilentReporter())
    assert {metric for _, metric, _ in values(tmp_path / "out")} == {"smooth_l1", "mse", "cosine"}


def test_layers_and_a_pca_make_the_features(made: Path, cityscapes: Path, tmp_path: Path) -> None:
    """Whose copy of the last frame is as far from the truth as computed by hand; other models do not fit."""
    joined = load_backbone("tiny", "float32", (0, 1))
    (sequence, *others) = benchmark_sequences("cityscapes", cityscapes, FrameCounts((7,))).sequences
    tokens = {}
    for each in (sequence, *others):
        pictures = [
            np.asarray(opened(path).resize(SIZE[::-1], Image.Resampling.BILINEAR)) for path in each.frames
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
    bare = {"segmentation_head": None, "depth_head": None, "depth": None, "worlds": (), "tokenizer": None}
    evaluate_foresight(
        settings(made, cityscapes, tmp_path / "out", **bare, features=features), SilentReporter()
    )
    reduced = [pca.project(each).half().float() for each in tokens.values()]
    expected = np.mean([nn.functional.mse_loss(each[5], each[6]).item() for each in reduced])
    assert values(tmp_path / "out")["copy_last", "mse", 1] == pytest.approx(expected, rel=1e-4)
    (named,) = {row["backbone"] for row in pq.read_table(tmp_path / "out" / "metrics.parquet").to_pylist()}
    assert named.endswith(f"layers 0,1, PCA {pca.fingerprint}")
    made_from = {"backbone_sha256": joined.weights_sha256, "patch_grid": list(GRID), "layers": [0, 1]}
    save_model(tmp_path / "head", SegmentationHead(20, 19), "head", made_from)
    with pytest.raises(MismatchError, match=f"pca_fingerprint None, but here it is {pca.fingerprint}"):
        evaluate_foresight(
            settings(
                made,
                cityscapes,
                tmp_path / "no",
                **bare | {"segmentation_head": tmp_path / "head"},
                features=features,
            ),
            SilentReporter(),
        )


def test_what_does_not_belong_together_is_refused(made: Path, cityscapes: Path, tmp_path: Path) -> None:
    def refused(error: type[DeltacacheError], words: str, **changes: Any) -> None:
        asked = settings(made, cityscapes, tmp_path / "out", **changes)
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
        MismatchError, "wide takes 24-wide tokens, but these features are 64", worlds=(tmp_path / "wide",)
    )
    save_model(tmp_path / "grid", Foresight(WIDTH, 4, 1), "world", {"patch_grid": [2, 2]})
    refused(MismatchError, r"with patch_grid \[2, 2\], but here it is \[2, 4\]", worlds=(tmp_path / "grid",))
    save_model(tmp_path / "head", SegmentationHead(WIDTH, 124), "head", {})
    refused(MismatchError, "knows 124 classes", segmentation_head=tmp_path / "head")
    refused(DatasetError, "has no depth map", depth=tmp_path)
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "thesis.txt").touch()
    with pytest.raises(DatasetError, match="holds something else"):
        evaluate_foresight(settings(made, cityscapes, tmp_path / "strange"), SilentReporter())
