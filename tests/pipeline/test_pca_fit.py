"""A PCA fitted on a dataset shard by shard is that of all its tokens at once, and takes no more memory for more."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from small_datasets import BLACK, FRAMES, GRID, HIDDEN, make_dataset, small_card, sources_of, videos_named

from deltacache.models.pca import Pca, load_pca
from deltacache.pipeline.datasets.dataset import (
    finish_dataset,
    open_dataset,
    prepare_dataset,
    write_plan,
    write_shard,
)
from deltacache.pipeline.datasets.plan import extend_plan, read_plan, shard_tasks
from deltacache.pipeline.datasets.receipts import StoredClip
from deltacache.pipeline.jobs.pca_fit import fit_pca
from deltacache.schemas.clips import CropBox, FeatureClip, clip_id_of
from deltacache.schemas.datasets import BackboneCard
from deltacache.schemas.errors import DatasetError, DeltacacheError
from deltacache.schemas.progress import SilentReporter
from reporters import Lines

NAMES = ("a.mp4", "b.mp4", "c.mp4", "broken.mp4", "d.mp4")


def all_vectors(root: Path) -> np.ndarray:
    """(V, D) float64 of every frame, as readers give them."""
    dataset = open_dataset(root, "features")
    return np.concatenate(
        [dataset.read(clip).patch_tokens.reshape(-1, HIDDEN) for clip in range(len(dataset))]
    ).astype(np.float64)


def assert_is_pca_of(pca: Pca, vectors: np.ndarray) -> None:
    np.testing.assert_allclose(pca.mean, vectors.mean(0), atol=1e-6)
    np.testing.assert_allclose(pca.std, vectors.std(0), rtol=1e-6)
    _, sizes, wanted = np.linalg.svd((vectors - vectors.mean(0)) / vectors.std(0), full_matrices=False)
    components = pca.components.double().numpy()
    signs = np.sign((components * wanted[: pca.size]).sum(1, keepdims=True))
    np.testing.assert_allclose(components * signs, wanted[: pca.size], atol=1e-5)
    np.testing.assert_allclose(pca.explained_variance, (sizes**2 / len(vectors))[: pca.size], rtol=1e-5)


@pytest.mark.parametrize("store", ["webdataset", "zarr"])
@pytest.mark.parametrize("kind", ["features", "int8"])
def test_fitted_on_all_frames(kind: str, store: str, tmp_path: Path) -> None:
    make_dataset(tmp_path / "f", kind, store, *NAMES, views=3)
    heard = Lines()
    pca = fit_pca(tmp_path / "f", tmp_path / "pca", 3, heard)
    vectors = all_vectors(tmp_path / "f")
    assert pca.metadata["vectors"] == len(vectors) == 4 * 3 * FRAMES * GRID[0] * GRID[1]
    assert_is_pca_of(pca, vectors)
    assert load_pca(tmp_path / "pca").fingerprint == pca.fingerprint
    config = json.loads((tmp_path / "pca" / "config.json").read_text())
    card = open_dataset(tmp_path / "f").card
    assert (config["features_fingerprint"], config["frames"], config["clips"]) == (card.fingerprint, 36, 12)
    assert (config["backbone"]["weights_sha256"], config["image_size"]) == ("5e" * 32, 48)
    assert f"3 components of 4 channels explain {pca.explained:.2%}" in heard.said[-1]
    assert f"{len(vectors)} vectors of 36 frames; reading" in heard.said[-1]


@pytest.mark.parametrize("wanted", [1, 2, 5, 12, 17, 24, 35, 36])
def test_fitted_on_frames_spread_evenly(wanted: int, tmp_path: Path) -> None:
    make_dataset(tmp_path / "f", "features", "zarr", *NAMES, views=3)
    pca = fit_pca(tmp_path / "f", tmp_path / "pca", 2, SilentReporter(), frames=wanted)
    frames = all_vectors(tmp_path / "f").reshape(36, -1, HIDDEN)
    places = [int((place + 0.5) * 36 / wanted) for place in range(wanted)]
    assert len(set(places)) == wanted
    assert pca.metadata["vectors"] == wanted * GRID[0] * GRID[1]
    assert_is_pca_of(pca, frames[places].reshape(-1, HIDDEN))


def test_the_same_again_does_nothing_and_another_is_refused(tmp_path: Path) -> None:
    make_dataset(tmp_path / "f", "features", "zarr", *NAMES)
    first = fit_pca(tmp_path / "f", tmp_path / "out" / "pca", 2, SilentReporter())
    before = (tmp_path / "out" / "pca" / "pca.safetensors").stat().st_mtime_ns
    heard = Lines()
    assert fit_pca(tmp_path / "f", tmp_path / "out" / "pca", 2, heard).fingerprint == first.fingerprint
    assert "fitted on this already, nothing to do" in heard.said[-1]
    assert (tmp_path / "out" / "pca" / "pca.safetensors").stat().st_mtime_ns == before
    with pytest.raises(DeltacacheError, match=r"holds another PCA \(components was 2, now 3\)"):
        fit_pca(tmp_path / "f", tmp_path / "out" / "pca", 3, SilentReporter())
    with pytest.raises(DeltacacheError, match=r"holds another PCA \(frames was 24, now 5\)"):
        fit_pca(tmp_path / "f", tmp_path / "out" / "pca", 2, SilentReporter(), frames=5)
    with pytest.raises(DeltacacheError, match="holds something else"):
        fit_pca(tmp_path / "f", tmp_path / "f", 2, SilentReporter())


def test_refusals(tmp_path: Path) -> None:
    out, quiet = tmp_path / "pca", SilentReporter()
    make_dataset(tmp_path / "f", "features", "zarr", *NAMES)
    make_dataset(tmp_path / "d", "deltas", "zarr", *NAMES)
    with pytest.raises(DatasetError, match="holds deltas, but a PCA is of features"):
        fit_pca(tmp_path / "d", out, 2, quiet)
    with pytest.raises(DatasetError, match="is not a dataset"):
        fit_pca(tmp_path / "none", out, 2, quiet)
    with pytest.raises(DeltacacheError, match=r"25 frames of .* which has 24: give 1 to 24"):
        fit_pca(tmp_path / "f", out, 2, quiet, frames=25)
    with pytest.raises(DeltacacheError, match="5 components of 4 channels: give 1 to 4"):
        fit_pca(tmp_path / "f", out, 5, quiet)
    unfinished = make_dataset(tmp_path / "u", "features", "zarr", *NAMES)
    (tmp_path / "u" / "receipts" / f"{unfinished[0].shard_id}.json").unlink()
    with pytest.raises(DatasetError, match="is not finished: run extract-features on it again"):
        fit_pca(tmp_path / "u", out, 2, quiet)
    shard = next(
        path
        for path in (tmp_path / "f" / "shards").rglob("*")
        if path.is_file() and path.stat().st_size > 400
    )
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DatasetError, match=r"damaged|bytes"):
        fit_pca(tmp_path / "f", out, 2, quiet)
    assert not out.exists()


def write_features(root: Path, tokens: np.ndarray, backbone: BackboneCard | None = None) -> None:
    """A dataset of clips (C, T, N, D) float16, each a video and a shard of its own."""
    clips, frames, _, hidden = tokens.shape
    changes = {} if backbone is None else {"backbone": backbone}
    card = small_card("features", "webdataset", hidden_size=HIDDEN, **changes)
    assert (frames, hidden) == (FRAMES, HIDDEN)
    prepare_dataset(root, card, BLACK)
    plan = extend_plan(read_plan(root), videos_named(*(f"v{n}.mp4" for n in range(clips))), 1, 1)
    write_plan(root, plan)
    for values, task in zip(tokens, shard_tasks(plan), strict=True):
        (video,) = task.videos
        clip = FeatureClip(clip_id_of(video.video_id, 0), values, np.arange(FRAMES, dtype=np.float32))
        stored = StoredClip(
            clip, video.video_uri, 0, tuple(range(FRAMES)), CropBox(0, 0, 9, 9), False, "drawn", 0
        )
        write_shard(root, card, task.shard_id, [stored], [], sources_of(task))
    finish_dataset(root)


def test_numbers_that_give_no_pca_are_refused(tmp_path: Path) -> None:
    quiet = SilentReporter()
    tokens = np.random.default_rng(0).normal(size=(4, FRAMES, GRID[0] * GRID[1], HIDDEN)).astype(np.float16)
    odd = tokens.copy()
    odd[2, 1, 3, 1] = np.nan
    write_features(tmp_path / "nan", odd)
    with pytest.raises(DatasetError, match=r"clip v2-\w+-v000: channel 1 holds numbers that are not finite"):
        fit_pca(tmp_path / "nan", tmp_path / "pca", 2, quiet)
    still = tokens.copy()
    still[..., 3] = 0.1
    write_features(tmp_path / "still", still)
    with pytest.raises(DeltacacheError, match=r"1 of 4 channels have one value in all 72 vectors \(3\)"):
        fit_pca(tmp_path / "still", tmp_path / "pca", 2, quiet)
    card = small_card("features", "zarr").backbone
    write_features(
        tmp_path / "reduced", tokens, BackboneCard(**{**card.model_dump(), "pca_fingerprint": "ab" * 8})
    )
    with pytest.raises(DatasetError, match="was reduced by PCA abababababababab already"):
        fit_pca(tmp_path / "reduced", tmp_path / "pca", 2, quiet)


_PEAK = """
    import sys, threading, time
    from pathlib import Path
    import numpy as np
    sys.path.insert(0, sys.argv[4])
    import small_datasets
    small_datasets.FRAMES, small_datasets.GRID, small_datasets.HIDDEN = 8, (16, 32), 96
    small_datasets.BLACK = np.ones((512, 96), np.float16)
    from deltacache.pipeline.jobs.pca_fit import fit_pca
    from deltacache.schemas.datasets import SamplingSettings
    from deltacache.schemas.progress import SilentReporter

    original = small_datasets.small_card
    def card(kind, store, **changes):
        made = original(kind, store, **{"sampling": SamplingSettings(frames=8), "patch_grid": (16, 32),
                                        "hidden_size": 96, **changes})
        return made
    small_datasets.small_card = card
    names = [f"v{n}.mp4" for n in range(int(sys.argv[1]))]
    root, out = Path(sys.argv[2]), Path(sys.argv[3])
    small_datasets.make_dataset(root, "features", "webdataset", *names, views=1, videos_per_shard=1)

    def private():  # what is not of files
        text = Path("/proc/self/status").read_text()
        return int(text.split("RssAnon:")[1].split()[0])

    peak, running = 0, True
    def watch():
        global peak
        while running:
            peak = max(peak, private())
            time.sleep(0.002)

    import gc; gc.collect()
    before = private()
    watcher = threading.Thread(target=watch); watcher.start()
    fit_pca(root, out, 40, SilentReporter())
    running = False; watcher.join()
    print(peak - before)
"""


def _peak_kib(clips: int, folder: Path) -> int:
    arguments = [str(clips), str(folder / "f"), str(folder / "pca"), str(Path(__file__).parent)]
    code = textwrap.dedent(_PEAK)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts memory as Linux does")
def test_memory_does_not_grow_with_the_frames(tmp_path: Path) -> None:
    """60 clips hold 45 MiB, and 180 MiB in float64; four times the clips may cost 12 MiB more at most."""
    for name in ("few", "many"):
        (tmp_path / name).mkdir()
    few, many = _peak_kib(15, tmp_path / "few"), _peak_kib(60, tmp_path / "many")
    assert many < few + 12 * 1024, (few, many)
