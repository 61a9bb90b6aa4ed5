"""Wide frames, several layers and a PCA through the whole chain, command by command, against tokens by hand."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from command_runs import Command, Outcome
from PIL import Image

from deltacache.models.pca import Pca, load_pca, save_pca
from deltacache.pipeline.datasets.dataset import load_deltas, open_dataset
from drawn_encoders import FAMILIES, PREFIX, normalised

VIDEOS, FRAMES, SPACING_S, SIZE, GRID = 4, 6, 0.1, (56, 112), (4, 8)
WIDTH, LAYERS, COMPONENTS = 24, (0, 2, 3), 32
TRAIN = ("--preset", "tiny", "--steps", 3, "--batch-size", 4)
Run = Callable[..., Outcome]
CLIPS = (
    "--precision", "float32", "--frames", FRAMES, "--spacing", SPACING_S, SPACING_S, "--no-augment",
    "--image-size", "56x112",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(deltacache: Command) -> Run:
    """Runs a command that ends with ``code``."""

    def command(name: str, *arguments: object, code: int = 0) -> Outcome:
        where = ("--gpus-per-encoder", 0) if name in ("extract-features", "tokenize") else ()
        outcome = deltacache(name, *arguments, *where)
        assert outcome.code == code, outcome
        return outcome

    return command


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A random DINOv2 with registers, videos of 70 x 112 pixels, and by video its joined layers by hand."""
    root = tmp_path_factory.mktemp("drawn")
    family = FAMILIES["dinov2_registers"]
    model = family.save(root / "encoder", WIDTH, 56, num_hidden_layers=4)
    tokens = {}
    for number in range(VIDEOS):
        frames = draw_video(root / "videos" / f"video-{number}", number)
        tokens[f"video-{number}"] = torch.stack([joined(model, frame) for frame in frames[:, :, 7:63]])
    return root / "encoder", root / "videos", tokens


def draw_video(folder: Path, seed: int) -> torch.Tensor:
    """A square that moves over a shaded ground, as PNG files; returns (T, 3, 70, 112) uint8."""
    rng = np.random.default_rng(seed)
    ground, colour = rng.integers(0, 256, (70, 112, 3)), rng.integers(0, 256, 3)
    folder.mkdir(parents=True)
    pictures = []
    for time in range(FRAMES):
        picture = ground.astype(np.uint8)
        picture[20:40, 10 + 9 * time : 30 + 9 * time] = colour
        Image.fromarray(picture).save(folder / f"frame_{time * SPACING_S:.1f}.png")
        pictures.append(torch.from_numpy(picture).permute(2, 0, 1))
    return torch.stack(pictures)


@torch.no_grad()
def joined(model: torch.nn.Module, frame: torch.Tensor) -> torch.Tensor:
    """(N, L * D) of one frame (3, H, W), from the hidden states that transformers itself records."""
    states = model(normalised(frame, "dinov2")[None], output_hidden_states=True).hidden_states
    assert len(states) == 5  # the embeddings, then each block
    parts = [model.layernorm(states[layer + 1]) for layer in LAYERS]
    return torch.cat(parts, dim=-1)[0, PREFIX["dinov2_registers"] :]


def test_the_whole_chain(run: Run, drawn, tmp_path: Path) -> None:
    encoder, videos, tokens = drawn
    sample, pca, features, tokenizer, deltas, direct, world, results = (
        tmp_path / name for name in "spftdxwr"
    )
    taken = ("--backbone", encoder, *CLIPS, "--layers", "0,2,3")

    run("extract-features", videos, sample, *taken, "--store", "zarr")
    stored = open_dataset(sample)
    assert (stored.card.image_size, stored.card.patch_grid) == (SIZE, GRID)
    assert (stored.card.hidden_size, stored.card.backbone.hidden_size) == (3 * WIDTH, WIDTH)
    assert stored.card.backbone.layers == LAYERS
    by_clip = [next(tokens[name] for name in tokens if name in clip_id) for clip_id in stored.clip_ids]
    for place, wanted in enumerate(by_clip):
        found = torch.from_numpy(stored.read(place).patch_tokens.copy()).float()
        torch.testing.assert_close(found, wanted.half().float(), atol=4e-3, rtol=2e-3)

    said = run("fit-pca", sample, pca, "--components", COMPONENTS).stdout
    fitted = load_pca(pca)
    assert f"{COMPONENTS} components of {3 * WIDTH} channels explain" in said.replace("\n", "")
    vectors = torch.stack(by_clip).flatten(0, 2).double()
    standardised = (vectors - vectors.mean(0)) / vectors.std(0, correction=0)
    exact = torch.linalg.svdvals(standardised)[:COMPONENTS] ** 2 / len(vectors)
    torch.testing.assert_close(fitted.explained_variance.double(), exact, rtol=1e-2, atol=0)

    run("extract-features", videos, features, *taken, "--pca", pca)
    reduced = open_dataset(features)
    assert reduced.card.hidden_size == COMPONENTS
    assert reduced.card.backbone.pca_fingerprint == fitted.fingerprint
    assert len({stored.card.fingerprint, reduced.card.fingerprint}) == 2
    assert reduced.black_patch_tokens.shape == (GRID[0] * GRID[1], COMPONENTS)
    for place, wanted in enumerate(by_clip):
        found = torch.from_numpy(reduced.read(place).patch_tokens.copy()).float()
        assert (found - fitted.project(wanted)).abs().max() < 0.01
    inspected = run("inspect", features, "--pictures", tmp_path / "sheet.png").stdout
    assert f"encoder, layers 0,2,3, PCA {fitted.fingerprint}, 56x112 px, 4 x 8 patches, 32 wide" in inspected
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size[0] > 100

    run("train-tokenizer", features, tokenizer, *TRAIN)
    run("tokenize", features, deltas, "--tokenizer", tokenizer)
    run("tokenize", videos, direct, "--tokenizer", tokenizer, *taken, "--pca", pca)
    np.testing.assert_array_equal(load_deltas(deltas).delta_tokens, load_deltas(direct).delta_tokens)
    assert load_deltas(deltas).delta_tokens.shape == (VIDEOS, FRAMES, COMPONENTS)
    assert open_dataset(deltas).card.fingerprint == open_dataset(direct).card.fingerprint
    run("train-world", deltas, world, *TRAIN)
    models = ("--tokenizer", tokenizer, "--world", world, "--horizons", "1", "--samples", 2)
    run("evaluate", results, "--data", f"clips={features}", *models)
    rows = pq.read_table(results / "metrics.parquet").to_pylist()
    assert {row["image_size"] for row in rows} == {56}
    assert {row["backbone"].partition(", ")[2] for row in rows} == {f"layers 0,2,3, PCA {fitted.fingerprint}"}
    copied = next(row for row in rows if row["method"] == "copy_last" and row["metric"] == "smooth_l1")
    assert copied["value"] > 0
    check_refusals(run, drawn, tmp_path)


def check_refusals(run: Run, drawn, tmp_path: Path) -> None:
    """Tokens of another width, a PCA of other layers, a dataset of other settings."""
    encoder, videos, _ = drawn
    sample, pca, features, tokenizer = (tmp_path / name for name in "spft")
    taken = ("--backbone", encoder, *CLIPS, "--layers", "0,2,3")
    refused = run("tokenize", sample, tmp_path / "y", "--tokenizer", tokenizer, code=1)
    assert "expects 32" in refused.stderr
    refused = run("tokenize", videos, tmp_path / "y", "--tokenizer", tokenizer, *taken, code=1)
    assert "expects 32" in refused.stderr
    refused = run("extract-features", videos, tmp_path / "y", *taken[:-1], "0,1,2", "--pca", pca, code=1)
    assert "was fitted on layers 0,2,3, 72 wide, but these tokens are layers 0,1,2" in refused.stderr
    refused = run("extract-features", videos, sample, *taken[:-1], "0,1,2", "--store", "zarr", code=1)
    assert "backbone.layers is [0,2,3], asked for [0,1,2]" in refused.stderr
    fitted = load_pca(pca)
    other = Pca(fitted.mean + 1, fitted.std, fitted.components, fitted.explained_variance, fitted.metadata)
    save_pca(tmp_path / "other", other)
    refused = run("extract-features", videos, features, *taken, "--pca", tmp_path / "other", code=1)
    said = f'backbone.pca_fingerprint is "{fitted.fingerprint}", asked for "{other.fingerprint}"'
    assert said in refused.stderr
    assert refused.stderr.strip().endswith("Use its settings, or another output folder")
    refused = run("extract-features", videos, features, *taken, code=1)
    assert "backbone.pca_fingerprint is" in refused.stderr
    assert "hidden_size is 32, asked for 72" in refused.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--image-size", "56x"), "give the side of a square"),
        (("--image-size", "8"), "at least 16"),
        (("--layers", "a,b"), "give them from 0 up with commas"),
    ],
)
def test_usage_errors(run: Run, drawn, tmp_path: Path, flags: tuple[str, str], words: str) -> None:
    outcome = run("extract-features", drawn[1], tmp_path / "y", *flags, code=2)
    assert words in " ".join(outcome.stderr.replace("│", " ").split())


def test_refused_by_the_backbone(run: Run, drawn, tmp_path: Path) -> None:
    encoder, videos, _ = drawn
    outcome = run(
        "extract-features", videos, tmp_path / "y", "--backbone", encoder, "--image-size", "56x100", code=1
    )
    assert "image size 56 x 100 is not a multiple of the patch size 14" in outcome.stderr
    outcome = run("extract-features", videos, tmp_path / "y", "--backbone", encoder, "--layers", "4", code=1)
    assert "give block numbers from 0 to 3" in outcome.stderr
