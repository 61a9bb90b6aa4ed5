"""``predict``: futures of one video or clip, the same bits as ``evaluate`` gets, and the page and movie of them."""

import os
import re
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from drawn_features import CONTEXT, FRAMES, DrawnWorld
from PIL import Image
from torch import Tensor

import deltacache
from crops import crop_and_resize
from deltacache import cli
from deltacache.descriptions import describe_output
from deltacache.evaluate.clips import run as clips_run
from deltacache.evaluate.clips.rollouts import Futures
from deltacache.evaluate.examples import load_examples
from deltacache.models.backbone import load_backbone
from deltacache.models.checkpoints import save_model
from deltacache.models.deltatok import DeltaTok
from deltacache.models.heads import DepthHead, SegmentationHead
from deltacache.models.rgb_decoder import RgbDecoder
from deltacache.models.worlds.deltaworld import DeltaWorld
from deltacache.models.worlds.dino_world import DinoWorld
from deltacache.pipeline.decoding.sampling import Window, largest_crop, window_indices
from deltacache.pipeline.storage.files import crc32c_of_npy
from deltacache.schemas.configs import load_config
from deltacache.schemas.datasets import DatasetCard, SamplingSettings
from deltacache.schemas.errors import DeltacacheError, VideoRefusedError
from deltacache.schemas.prediction import PredictionSettings
from deltacache.schemas.progress import SilentReporter
from reporters import Lines
from web_server import Web, web_server

SIZE, HIDDEN, SPACING = 32, 64, 0.2


def lively(model: Any) -> Any:
    """Random weights large enough for every input to matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models of the built-in backbone at 32 px, which say so in their checkpoints."""
    root = tmp_path_factory.mktemp("models")
    backbone = load_backbone("tiny")
    made_from = {
        "backbone": "tiny",
        "backbone_sha256": backbone.weights_sha256,
        "patch_grid": list(backbone.grid(SIZE)),
        "image_size": SIZE,
        "spacing_s": [0.15, 0.25],
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = lively(DeltaTok(HIDDEN, 2, 1, 1, layer_scale_init=0.2))
        save_model(root / "tokenizer", tokenizer, "tokenizer", made_from)
        fingerprint = deltacache.load_tokenizer(root / "tokenizer").card.fingerprint  # type: ignore[union-attr]
        world = lively(DeltaWorld(HIDDEN, 2, 1, noise_std=1.0, layer_scale_init=0.2))
        save_model(root / "world", world, "world", {**made_from, "tokenizer_fingerprint": fingerprint})
        save_model(
            root / "patches", lively(DinoWorld(HIDDEN, 2, 1, layer_scale_init=0.2)), "world", made_from
        )
        trained_on = {"backbone_sha256": backbone.weights_sha256}
        save_model(root / "cityscapes", SegmentationHead(HIDDEN, 19), "head", trained_on)
        save_model(root / "kitti", DepthHead(HIDDEN), "head", trained_on)
        save_model(root / "narrow", DepthHead(HIDDEN // 2), "head", {})
        decoder = RgbDecoder(HIDDEN, 48, 1, 2, 64, image_size=SIZE)
        save_model(root / "rgb", decoder, "rgb_decoder", trained_on)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirteen frames, ten a second, 48 x 64 pixels, every one of another colour."""
    path = tmp_path_factory.mktemp("video") / "drive.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for number in range(13):
            picture = np.full((48, 64, 3), 40 + 12 * number, np.uint8)
            picture[:24, : 4 * number + 8, 1] = 255 - 15 * number
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def by_hand(video: Path, indices: list[int]) -> np.ndarray:
    """(T, N, D) float16 of frames that are decoded in sequence."""
    with av.open(str(video)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    crop = largest_crop(*frames[0].shape[:2], (SIZE, SIZE))
    pixels = np.stack([crop_and_resize(frames[at], crop, SIZE, flip=False) for at in indices])
    tokens = load_backbone("tiny").patch_tokens(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    return tokens.half().numpy()


def evaluated_futures(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], Tensor]:
    """Filled by the evaluations that follow: all futures by the world model's name and the clip's id."""
    taken: dict[tuple[str, str], Tensor] = {}
    original = clips_run.roll_out

    def recording(
        world: Any, context: Tensor, seconds: Tensor, deltas: Any, clip_id: str, protocol: Any
    ) -> Futures:
        futures = original(world, context, seconds, deltas, clip_id, protocol)
        taken[world.method.name, clip_id] = torch.cat(list(futures.chunks()))
        return futures

    monkeypatch.setattr(clips_run, "roll_out", recording)
    return taken


@pytest.mark.slow
@pytest.mark.parametrize("samples", [5, 1])
def test_clips_have_the_futures_that_an_evaluation_gets(
    drawn: DrawnWorld, monkeypatch: pytest.MonkeyPatch, samples: int
) -> None:
    taken = evaluated_futures(monkeypatch)
    settings = drawn.settings(samples=samples, futures=None, horizons=(1, 3), examples=1)
    clips_run.evaluate_clips(settings, SilentReporter())
    for world, method in ((drawn.noise, "deltaworld"), (drawn.learned, "deltaworld_discriminative")):
        for clip in (0, 9):
            out = drawn.root / f"{method}-{clip}"
            predicted = deltacache.predict(
                drawn.features, out, tokenizer=drawn.tokenizer, world=world, clip=str(clip), steps=3,
                samples=samples, seed=settings.seed, device="cpu", movie="gif",
            )  # fmt: skip
            clip_id = deltacache.open_dataset(drawn.features).clip_ids[clip]
            tensors = predicted.tensors()
            assert torch.equal(tensors["future_patch_tokens"], taken[method, clip_id])
    (example,) = load_examples(settings.out / "examples")
    assert example.clip_ids[0] == clip_id or len(example.worlds) == 2


@pytest.mark.slow
def test_a_batch_does_not_change_the_futures_of_its_clips(
    drawn: DrawnWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = evaluated_futures(monkeypatch)
    clips_run.evaluate_clips(drawn.settings("together", futures=None, samples=5), SilentReporter())
    monkeypatch.undo()
    alone = evaluated_futures(monkeypatch)
    monkeypatch.setattr("deltacache.evaluate.clips.sequences.BATCH_CLIPS", 1)
    clips_run.evaluate_clips(drawn.settings("alone", futures=None, samples=5), SilentReporter())
    assert together.keys() == alone.keys()
    assert all(torch.equal(together[key], alone[key]) for key in together)


@pytest.mark.slow
def test_a_video_gives_what_its_features_give(
    video: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reporter = Lines()
    predicted = deltacache.predict(
        video, tmp_path / "out", tokenizer=models["tokenizer"], world=models["world"], at=0.6, steps=3, samples=5,
        seed=7, device="cpu", reporter=reporter,
    )  # fmt: skip
    tensors = predicted.tensors()
    config = load_config(predicted.folder / "config.yaml", PredictionSettings)
    assert (config.image_size, config.spacing_s, config.backbone) == (SIZE, SPACING, "tiny")
    indices = [0, 2, 4, 6, 8, 10, 12]  # four seen up to 0.6 s, three that come
    tokens = by_hand(video, indices)
    assert tensors["times_s"].tolist() == pytest.approx([0.1 * index for index in indices], abs=1e-3)
    assert np.array_equal(tensors["context_patch_tokens"].numpy(), tokens[:4].astype(np.float32))
    assert np.array_equal(tensors["true_patch_tokens"].numpy(), tokens[4:].astype(np.float32))
    assert tensors["future_patch_tokens"].shape == (5, 3, 4, HIDDEN)
    assert tensors["future_delta_tokens"].shape == (5, 3, HIDDEN)
    assert tensors["context_delta_tokens"].shape == (4, HIDDEN)

    backbone = load_backbone("tiny")
    black = backbone.black_patch_tokens(SIZE).half().numpy()
    card = DatasetCard(
        kind="features",
        store="webdataset",
        backbone=backbone.card,
        image_size=SIZE,
        patch_grid=backbone.grid(SIZE),
        hidden_size=HIDDEN,
        sampling=SamplingSettings(frames=7),
        black_crc32c=crc32c_of_npy(black),
        code_version="0",
    )
    with deltacache.DatasetWriter(tmp_path / "features", card, black) as out:
        out.write("another.mp4", [(tokens[::-1].copy(), tensors["times_s"].numpy())])
        out.write(video.name, [(tokens, tensors["times_s"].numpy())])
    taken = evaluated_futures(monkeypatch)
    deltacache.evaluate(
        tmp_path / "results", {"clips": tmp_path / "features"}, tokenizer=models["tokenizer"],
        world=models["world"], horizons=(3,), samples=5, seed=7, device="cpu",
    )  # fmt: skip
    ids = deltacache.open_dataset(tmp_path / "features").clip_ids
    same = [torch.equal(taken["deltaworld", each], tensors["future_patch_tokens"]) for each in ids]
    assert sorted(same) == [False, True]

    spread = (
        (tensors["future_patch_tokens"][:, None] - tensors["future_patch_tokens"][None])
        .square()
        .mean((-2, -1))
    )
    pairs = ~torch.eye(5, dtype=torch.bool)
    assert tensors["spread"] == pytest.approx(spread[pairs].mean(0).sqrt(), rel=1e-4)
    nearest = (tensors["future_patch_tokens"] - tensors["true_patch_tokens"]).square().mean((-2, -1)).sqrt()
    assert tensors["distance_to_truth"] == pytest.approx(nearest, rel=1e-4)
    described = describe_output(predicted.folder)
    assert "future_patch_tokens    5 x 3 x 4 x 64" in described
    assert (
        f"tokenizer              {deltacache.load_tokenizer(models['tokenizer']).card.fingerprint}"
        in described
    )  # type: ignore[union-attr]
    assert re.search(
        r"5 futures of 3 steps \(0\.60 s\) by deltaworld; the samples differ by", reporter.said[0]
    )


@pytest.mark.slow
def test_a_url_and_a_folder_of_frames_give_what_the_file_gives(
    video: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    """The url carries credentials, which are written nowhere."""
    asked: dict[str, Any] = {
        **{"tokenizer": models["tokenizer"], "world": models["world"], "at": 0.6, "steps": 3, "samples": 2},
        "device": "cpu",
    }
    expected = deltacache.predict(video, tmp_path / "file", **asked).tensors()
    with web_server(Web(files={"/drive.mp4": video.read_bytes()}, signature="planted-secret")) as web:
        place = f"{web.url}/drive.mp4?Signature=planted-secret"
        fetched = deltacache.predict(place, tmp_path / "url", **asked)
    assert all(torch.equal(value, expected[name]) for name, value in fetched.tensors().items())
    assert all(
        b"planted-secret" not in path.read_bytes() for path in fetched.folder.rglob("*") if path.is_file()
    )

    frames = tmp_path / "drive"
    frames.mkdir()
    with av.open(str(video)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            Image.fromarray(frame.to_ndarray(format="rgb24")).save(frames / f"frame_{number / 10:.1f}.png")
    of_frames = deltacache.predict(frames, tmp_path / "frames", **asked).tensors()
    same = ("times_s", "context_patch_tokens", "context_delta_tokens", "true_patch_tokens")
    assert all(
        torch.equal(of_frames[name], expected[name]) for name in same
    )  # noise goes by the name of the video


def test_the_page_needs_nothing_but_itself(video: Path, models: dict[str, Path], tmp_path: Path) -> None:
    heads = {name: models[name] for name in ("cityscapes", "kitti")}
    predicted = deltacache.predict(
        video, tmp_path / "out", tokenizer=models["tokenizer"], world=models["world"], at=0.6, steps=5, samples=3,
        head=heads, rgb_decoder=models["rgb"], device="cpu", movie="gif",
    )  # fmt: skip
    page = predicted.page.read_text()
    assert page.startswith("<!doctype html>")
    assert not re.search(r"(src|href)=[\"'](?!data:|#)", page)
    assert "url(" not in re.sub(r"url\(#[^)]*\)", "", page)
    for title in ("Frames", "Features", "Change since", "Segmentation", "Depth", "Pictures decoded"):
        assert f"<h4>{title}" in page, title
    assert page.count(">true future<") == 3  # frames, features, change: maps say "from true features"
    assert all(page.count(f">future {number}<") == 5 for number in (1, 2, 3))
    assert page.count(">closest<") == 5
    with Image.open(predicted.movie) as movie:
        assert (movie.format, movie.n_frames) == ("GIF", 9)  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_video_that_ends_with_the_last_seen_frame(
    video: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    predicted = deltacache.predict(
        video, tmp_path / "out", world=models["patches"], at=1.2, steps=2, samples=2, device="cpu"
    )
    tensors = predicted.tensors()
    assert tensors["true_patch_tokens"].shape == (0, 4, HIDDEN)
    assert "future_delta_tokens" not in tensors
    assert tensors["times_s"][-2:].tolist() == pytest.approx([1.4, 1.6])
    page = predicted.page.read_text()
    assert "what was seen" in page
    assert "true future<" not in page
    with av.open(str(predicted.movie)) as movie:
        assert sum(1 for _ in movie.decode(video=0)) > 6 * 4


def test_a_clip_that_is_shorter_than_the_steps_goes_on_at_its_own_pace(
    drawn: DrawnWorld, tmp_path: Path
) -> None:
    predicted = deltacache.predict(
        drawn.features, tmp_path / "out", tokenizer=drawn.tokenizer, world=drawn.noise, steps=5, samples=2,
        device="cpu",
    )  # fmt: skip
    times = predicted.tensors()["times_s"]
    assert predicted.tensors()["true_patch_tokens"].shape[0] == FRAMES - CONTEXT
    pace = (times[FRAMES - 1] - times[0]) / (FRAMES - 1)
    assert torch.diff(times)[FRAMES - 1 :].tolist() == pytest.approx([pace.item()] * 2, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"at": 0.5},
            r"4 frames 0.2 s apart up to 0.5 s do not lie within its 1.200 s: give --at between 0.6",
        ),
        ({"at": 3.0}, r"up to 3 s do not lie within its 1.200 s"),
        ({"context": 12}, "give a shorter --spacing, fewer frames of --context, or a longer video"),
        ({"spacing": 0.03, "at": 0.9}, "lie further apart than 0.03 s, so one would be taken twice"),
        ({"video": "models.txt.zip2"}, "does not exist"),
        ({"video": "drive.odd"}, "drive.odd is neither a video, an archive nor a list"),
        ({"clip": "3"}, "--clip names a clip of a feature dataset"),
        ({"image_size": 40}, "40"),
        ({"tokenizer": None}, "predicts delta tokens: give the tokenizer"),
        ({"head": {"kitti": "narrow"}}, "expects 32: give the head"),
        ({"head": {"tokyo": "kitti"}}, "tokyo"),
        ({"steps": 0}, "steps: Input should be greater than or equal to 1"),
        ({"step": 3}, "Unknown setting 'step'. Did you mean steps"),
        ({"samples": 10**9}, "TiB of patch tokens, and at most 8 GiB are allowed"),
    ],
)
def test_refusals(
    video: Path, models: dict[str, Path], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    asked: dict[str, Any] = {"video": video, "tokenizer": models["tokenizer"], "device": "cpu", **changes}
    (tmp_path / "drive.odd").write_bytes(video.read_bytes())
    if "video" in changes:
        asked["video"] = tmp_path / changes["video"]
    if "head" in asked:
        asked["head"] = {name: models[path] for name, path in asked["head"].items()}
    with pytest.raises(DeltacacheError, match=words):
        deltacache.predict(out=tmp_path / "out", world=models["world"], **asked)
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_overwritten(video: Path, models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DeltacacheError, match="is there already and holds something"):
        deltacache.predict(video, tmp_path, tokenizer=models["tokenizer"], world=models["world"])
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_models_that_give_nan_are_named(drawn: DrawnWorld, tmp_path: Path) -> None:
    tokenizer = deltacache.load_tokenizer(drawn.tokenizer)
    with torch.no_grad():
        tokenizer.decoder_blocks[0].norm1.weight.fill_(torch.nan)  # type: ignore[union-attr, operator]
    save_model(tmp_path / "tokenizer", tokenizer, "tokenizer", {})
    world = deltacache.load_world(drawn.noise)
    save_model(tmp_path / "world", world, "world", {})
    with pytest.raises(DeltacacheError, match="deltaworld predicts values that are not finite"):
        deltacache.predict(
            drawn.features,
            tmp_path / "out",
            tokenizer=tmp_path / "tokenizer",
            world=tmp_path / "world",
            device="cpu",
        )
    assert not (tmp_path / "out").exists()


def test_windows_of_frames() -> None:
    times = np.arange(13, dtype=np.float32) / 10
    assert window_indices(times, Window(0.6, 4, 3, 0.2)) == [0, 2, 4, 6, 8, 10, 12]
    assert window_indices(times, Window(None, 4, 3, 0.2)) == [0, 2, 4, 6, 8, 10, 12]
    assert window_indices(times, Window(None, 2, 2, 0.2)) == [6, 8, 10, 12]  # as late as both steps fit
    assert window_indices(times, Window(None, 4, 9, 0.2)) == [0, 2, 4, 6, 8, 10, 12]  # the video ends before
    assert window_indices(times + 5, Window(1.2, 1, 1, 0.2)) == [12]
    with pytest.raises(VideoRefusedError, match="too_short"):
        window_indices(times[:3], Window(None, 4, 3, 0.2))


@pytest.mark.slow
def test_a_real_video(real_videos: Path, models: dict[str, Path], tmp_path: Path) -> None:
    predicted = deltacache.predict(
        real_videos / "fixture" / "dog_720p.mp4", tmp_path / "out", tokenizer=models["tokenizer"],
        world=models["world"], at=1.0, samples=2, steps=2, device="cpu",
    )  # fmt: skip
    assert predicted.tensors()["times_s"].tolist() == pytest.approx([0.4, 0.6, 0.8, 1.0, 1.2, 1.4], abs=0.02)
    assert predicted.page.stat().st_size < 1_000_000


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Exit code of ``deltacache``, called in this process."""
    monkeypatch.setattr(sys, "argv", ["deltacache", *map(str, arguments)])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.slow
def test_the_command(
    video: Path,
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = (video, tmp_path / "out", "--world", models["world"], "--device", "cpu", "--at", "0.6")
    asked = (*given, "--tokenizer", models["tokenizer"], "--steps", "2", "--samples", "3")
    assert command(monkeypatch, "show-config", "predict", *asked) == 0
    shown = capsys.readouterr().out
    assert "image_size: 32" in shown
    assert "spacing_s: 0.2" in shown
    assert not (tmp_path / "out").exists()
    assert command(monkeypatch, "predict", *asked, "--head", f"kitti={models['kitti']}") == 0
    said = capsys.readouterr().out
    assert "3 futures of 2 steps (0.40 s) by deltaworld" in said
    assert f"page: {tmp_path / 'out' / 'index.html'}" in said
    assert command(monkeypatch, "predict", *asked) == 1
    assert "is there already and holds something" in capsys.readouterr().err
    assert command(monkeypatch, "predict", *given, "--steps", "0") == 2
    assert command(monkeypatch, "predict", video, "s3://bucket/out", "--world", models["world"]) == 2
    assert "is a URL: give a folder on this machine" in capsys.readouterr().err.replace("\n", " ").replace(
        "  ", " "
    )
