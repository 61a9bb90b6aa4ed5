"""``DatasetWriter``: tokens that somebody has made become a dataset like any other."""

from pathlib import Path

import numpy as np
import pytest
from small_datasets import BLACK, FRAMES, GRID, HIDDEN, make_dataset, small_card
from upath import UPath

import deltacache
from deltacache.pipeline.datasets.receipts import finished_shards
from deltacache.pipeline.datasets.verification import verify_dataset
from deltacache.schemas.errors import DatasetError

TIMES = np.arange(FRAMES, dtype=np.float32) / 5


def clips_of(kind: str, number: int, views: int = 2) -> list[tuple[np.ndarray, np.ndarray]]:
    shape = (FRAMES, HIDDEN) if kind == "deltas" else (FRAMES, GRID[0] * GRID[1], HIDDEN)
    rng = np.random.default_rng(number)
    return [(rng.normal(size=shape).astype(np.float16), TIMES + view) for view in range(views)]


@pytest.mark.parametrize(
    ("kind", "store"), [("features", "webdataset"), ("features", "zarr"), ("deltas", "webdataset")]
)
def test_what_is_written_is_read(kind: str, store: str, tmp_path: Path) -> None:
    card = small_card(kind, store, black_crc32c=0)
    with deltacache.DatasetWriter(tmp_path, card, BLACK, views=2, videos_per_shard=2) as out:
        for number in range(5):
            out.write(f"folder/video{number}.mp4", clips_of(kind, number))
        with pytest.raises(DatasetError):  # until the end nobody takes it for a finished one
            deltacache.open_dataset(tmp_path)
    dataset = deltacache.open_dataset(tmp_path, kind)
    assert len(dataset) == 10
    assert len(finished_shards(UPath(tmp_path))) == 3
    for row, uri in enumerate(dataset.index["video_uri"].to_pylist()):
        tokens, times = clips_of(kind, int(uri[-5]))[dataset.index["view"][row].as_py()]
        clip = dataset.read(row)
        assert np.array_equal(clip.delta_tokens if kind == "deltas" else clip.patch_tokens, tokens)
        assert np.array_equal(clip.timestamps_s, times)
    assert verify_dataset(tmp_path) == []


def test_a_block_that_fails_leaves_no_dataset(tmp_path: Path) -> None:
    def broken() -> None:
        with deltacache.DatasetWriter(tmp_path, small_card("features", "webdataset"), BLACK) as out:
            out.write("a.mp4", clips_of("features", 0, 1))
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        broken()
    with pytest.raises(DatasetError):
        deltacache.open_dataset(tmp_path)


def test_videos_twice_other_views_and_a_folder_in_use_are_refused(tmp_path: Path) -> None:
    card = small_card("features", "webdataset")
    one = clips_of("features", 0, 1)
    for per_shard in (1, 8):  # in another shard, and in the same
        with deltacache.DatasetWriter(
            tmp_path / str(per_shard), card, BLACK, videos_per_shard=per_shard
        ) as out:
            out.write("a.mp4", one)
            with pytest.raises(DatasetError, match="written twice"):
                out.write("a.mp4", one)
        assert len(deltacache.open_dataset(tmp_path / str(per_shard))) == 1
    with (
        pytest.raises(DatasetError, match=r"a.mp4 has 2 clips, but each video has 1"),
        deltacache.DatasetWriter(tmp_path / "views", card, BLACK) as out,
    ):
        out.write("a.mp4", clips_of("features", 0, 2))
    make_dataset(tmp_path / "made", "features", "webdataset", "a.mp4")
    with (
        pytest.raises(DatasetError, match="holds a dataset already: give a new folder"),
        deltacache.DatasetWriter(tmp_path / "made", card, BLACK),
    ):
        pass
