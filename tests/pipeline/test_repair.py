"""Repairing drops exactly what is damaged; the rerun makes just that, and the dataset is what it was."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_datasets import BLACK, all_bytes, make_dataset, small_card
from upath import UPath

from deltacache.pipeline.datasets.dataset import prepare_dataset
from deltacache.pipeline.datasets.plan import ShardTask, extend_plan, read_plan
from deltacache.pipeline.datasets.receipts import read_receipt, receipt_bytes
from deltacache.pipeline.datasets.verification import repair_dataset, verify_dataset
from deltacache.pipeline.datasets.writing import drop_shards
from deltacache.schemas.errors import DatasetError, MismatchError

NAMES = ("a", "b", "broken-c", "d", "e", "f", "g")  # four shards, the last of one video
Damage = Callable[[Path, list[ShardTask]], list[str]]

every_dataset = pytest.mark.parametrize(
    ("kind", "store"),
    [("features", "webdataset"), ("features", "zarr"), ("deltas", "webdataset"), ("deltas", "zarr")],
)


def flip(path: Path | UPath) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(bytes(content))


def files_of(root: Path, task: ShardTask) -> list[str]:
    return [*read_receipt(root, task.shard_id).files, f"receipts/{task.shard_id}.json"]


def damaged_shard(root: Path, tasks: list[ShardTask]) -> list[str]:
    gone = files_of(root, tasks[1])
    flip(root / read_receipt(root, tasks[1].shard_id).token_file)
    return [*gone, "tables.json"]


def missing_shard_file(root: Path, tasks: list[ShardTask]) -> list[str]:
    gone = files_of(root, tasks[2])
    (root / gone[0]).unlink()
    return [*gone, "tables.json"]


def damaged_receipt(root: Path, tasks: list[ShardTask]) -> list[str]:
    gone = files_of(root, tasks[0])
    flip(root / "receipts" / f"{tasks[0].shard_id}.json")
    return [*gone, "tables.json"]


def lost_receipt(root: Path, tasks: list[ShardTask]) -> list[str]:
    gone = files_of(root, tasks[3])
    (root / gone[-1]).unlink()
    return [*gone, "tables.json"]


def foreign_receipt(root: Path, tasks: list[ShardTask]) -> list[str]:
    gone = files_of(root, tasks[0])
    receipt = read_receipt(root, tasks[0].shard_id)
    (root / gone[-1]).write_bytes(receipt_bytes(replace(receipt, fingerprint="f" * 16)))
    return [*gone, "tables.json"]


def swapped_clips(root: Path, tasks: list[ShardTask]) -> list[str]:
    """Whole rows of the receipt: clips, arrays and offsets change places, the shard does not."""
    gone = files_of(root, tasks[0])
    receipt = read_receipt(root, tasks[0].shard_id)
    first, second, *rest = receipt.clips
    clips = ({**second, "row": 0}, {**first, "row": 1}, *rest)
    arrays = {row["clip_id"]: receipt.arrays[row["clip_id"]] for row in clips}
    forged = replace(receipt, clips=clips, arrays=arrays)
    (root / gone[-1]).write_bytes(receipt_bytes(forged))
    return [*gone, "tables.json"]


def stranger(root: Path, tasks: list[ShardTask]) -> list[str]:
    """A receipt and a shard that the plan does not have; nothing that the rerun must make."""
    name = "00009-0123abcd"
    receipt = read_receipt(root, tasks[0].shard_id)
    (root / f"receipts/{name}.json").write_bytes(receipt_bytes(replace(receipt, shard_id=name)))
    if receipt.token_file.endswith(".tar"):
        shutil.copy(root / receipt.token_file, root / f"shards/shard-{name}.tar")
    else:
        shutil.copytree(root / f"shards/shard-{tasks[0].shard_id}", root / f"shards/shard-{name}")
    return ["tables.json"]


def damaged_file(name: str) -> Damage:
    def damage(root: Path, _: list[ShardTask]) -> list[str]:
        flip(root / name)
        tables = name in ("index.parquet", "failures.parquet", "sources.parquet", "plan.parquet")
        return [name, "tables.json"] if tables else [name]

    damage.__name__ = name
    return damage


def missing_plan(root: Path, _: list[ShardTask]) -> list[str]:
    (root / "plan.parquet").unlink()
    return ["plan.parquet", "tables.json"]


def plan_and_shards(root: Path, tasks: list[ShardTask]) -> list[str]:
    """The plan is lost, and with it two shards, of which one receipt cannot be read any more."""
    gone = [*files_of(root, tasks[0]), *files_of(root, tasks[2])]
    flip(root / "plan.parquet")
    flip(root / "receipts" / f"{tasks[0].shard_id}.json")
    flip(root / read_receipt(root, tasks[2].shard_id).token_file)
    return [*gone, "plan.parquet", "tables.json"]


def plan_of_unfinished(root: Path, tasks: list[ShardTask]) -> list[str]:
    """The plan is lost before the dataset was finished: two shards are not there, the last among them."""
    gone = [*files_of(root, tasks[1]), *files_of(root, tasks[3])]
    drop_shards(root, [tasks[1].shard_id, tasks[3].shard_id])
    flip(root / "plan.parquet")
    return [*gone, "plan.parquet", "tables.json"]


def everything(root: Path, tasks: list[ShardTask]) -> list[str]:
    gone = [name for task in tasks[:2] for name in files_of(root, task)]
    for name in all_bytes(root):
        if name.startswith(f"shards/shard-{tasks[0].shard_id}") or name.endswith((".npy", ".parquet")):
            flip(root / name)
    flip(root / "receipts" / f"{tasks[1].shard_id}.json")
    tables = ["index.parquet", "failures.parquet", "sources.parquet", "plan.parquet", "tables.json"]
    return [*gone, *tables, "black_patch_tokens.npy"]


DAMAGES = [
    damaged_shard,
    missing_shard_file,
    damaged_receipt,
    lost_receipt,
    foreign_receipt,
    swapped_clips,
    stranger,
    *map(
        damaged_file, ("plan.parquet", "index.parquet", "failures.parquet", "sources.parquet", "tables.json")
    ),
    *map(damaged_file, ("dataset.json", "black_patch_tokens.npy")),
    missing_plan,
    plan_and_shards,
    plan_of_unfinished,
    everything,
]


def stats(root: Path) -> dict[str, tuple[int, int]]:
    found = {name: (root / name).stat() for name in all_bytes(root)}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}


@every_dataset
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_repair_and_rerun_give_the_same_bytes(tmp_path: Path, kind: str, store: str, damage: Damage) -> None:
    root, outside = tmp_path / "dataset", tmp_path / "outside"
    outside.write_text("mine")
    tasks = make_dataset(root, kind, store, *NAMES)
    whole, before = all_bytes(root), stats(root)
    made_anew = set(damage(root, tasks))
    assert verify_dataset(root) != []
    repair = repair_dataset(root)
    assert repair.left == []
    kept = {name: stat for name, stat in stats(root).items() if name != ".lock"}
    mended = {"plan.parquet", "shards/zarr.json"}  # written again by the repair itself
    assert {name: before[name] for name in before.keys() - made_anew} == {
        name: kept[name] for name in kept.keys() - (made_anew & mended)
    }
    assert make_dataset(root, kind, store, *NAMES) == tasks
    assert without_lock(all_bytes(root)) == whole
    after = stats(root)
    assert all(after[name] == before[name] for name in before.keys() - made_anew - {"tables.json"})
    assert verify_dataset(root) == []
    assert outside.read_text() == "mine"


def without_lock(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name != ".lock"}


@pytest.mark.slow
@pytest.mark.parametrize("store", ["webdataset", "zarr"])
def test_dataset_in_an_object_store_is_repaired(s3_root: UPath, store: str) -> None:
    def contents() -> dict[str, bytes]:
        return {
            path.path: path.read_bytes()
            for path in s3_root.rglob("*")
            if path.is_file() and path.name != ".lock"
        }

    tasks = make_dataset(s3_root, "features", store, *NAMES[:5])  # pyright: ignore[reportArgumentType]
    assert verify_dataset(s3_root) == []
    whole = contents()
    flip(s3_root / read_receipt(s3_root, tasks[1].shard_id).token_file)
    flip(s3_root / f"receipts/{tasks[2].shard_id}.json")
    flip(s3_root / "plan.parquet")
    (s3_root / "index.parquet").unlink()
    dropped = [
        action.target for action in repair_dataset(s3_root).actions if action.target.startswith("shard ")
    ]
    assert dropped == [f"shard {task.shard_id}" for task in tasks[1:3]]
    assert not [name for name in contents() if tasks[1].shard_id in name]
    assert make_dataset(s3_root, "features", store, *NAMES[:5]) == tasks  # pyright: ignore[reportArgumentType]
    assert contents() == whole
    assert verify_dataset(s3_root) == []


def test_group_of_all_zarr_shards_is_written_again(tmp_path: Path) -> None:
    make_dataset(tmp_path, "features", "zarr", *NAMES)
    whole = all_bytes(tmp_path)
    flip(tmp_path / "shards/zarr.json")
    repair_dataset(tmp_path)
    assert without_lock(all_bytes(tmp_path)) == whole


@pytest.mark.parametrize("store", ["webdataset", "zarr"])
def test_nothing_to_repair_and_nothing_done(tmp_path: Path, store: str) -> None:
    make_dataset(tmp_path, "features", store, *NAMES)
    before = stats(tmp_path)
    repair = repair_dataset(tmp_path)
    assert (repair.problems, repair.actions, repair.left, repair.unfinished) == ([], [], [], False)
    assert {name: stat for name, stat in stats(tmp_path).items() if name != ".lock"} == before
    assert str(repair) == f"{tmp_path}: nothing to repair"


@pytest.mark.parametrize("store", ["webdataset", "zarr"])
def test_files_of_the_user_are_listed_and_left(tmp_path: Path, store: str) -> None:
    tasks = make_dataset(tmp_path, "features", store, *NAMES)
    mine = [
        "notes.txt",
        "shards/shard-mine.tar",
        "shards/notes.txt",
        "receipts/notes.txt",
        "my folder/shard.tar",
    ]
    for name in mine:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    damaged_shard(tmp_path, tasks)
    repair = repair_dataset(tmp_path)
    assert all((tmp_path / name).read_text() == "mine" for name in mine)
    assert sorted(repair.left) == sorted(name.split("/")[0] if " " in name else name for name in mine)
    assert "left alone, not made by deltacache: notes.txt" in str(repair)


def test_links_out_of_the_dataset_are_not_followed(tmp_path: Path) -> None:
    root, outside = tmp_path / "dataset", tmp_path / "outside"
    tasks = make_dataset(root, "features", "zarr", *NAMES)
    outside.mkdir()
    (outside / "precious").write_text("mine")
    group = root / f"shards/shard-{tasks[0].shard_id}"
    shutil.rmtree(group)
    group.symlink_to(outside)
    repair_dataset(root)
    assert not group.is_symlink()
    assert (outside / "precious").read_text() == "mine"


def test_repaired_dataset_that_lost_its_card_is_not_taken_by_other_settings(tmp_path: Path) -> None:
    make_dataset(tmp_path, "features", "webdataset", *NAMES)
    flip(tmp_path / "dataset.json")
    with pytest.raises(DatasetError, match=r"dataset\.json.*verify .* --repair"):
        make_dataset(tmp_path, "features", "webdataset", *NAMES)
    repair_dataset(tmp_path)
    before = all_bytes(tmp_path)
    with pytest.raises(MismatchError, match=r"has lost its dataset\.json, and .* fingerprint [0-9a-f]{16}"):
        prepare_dataset(tmp_path, small_card("features", "webdataset", image_size=64), BLACK)
    (tmp_path / "thesis.doc").write_text("mine")
    with pytest.raises(DatasetError, match=r"not a dataset \(it holds 'thesis\.doc'"):
        make_dataset(tmp_path, "features", "webdataset", *NAMES)
    (tmp_path / "thesis.doc").unlink()
    assert all_bytes(tmp_path) == before


def test_what_is_no_dataset_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DatasetError, match="is not a dataset"):
        repair_dataset(tmp_path)
    with pytest.raises(DatasetError, match="is not a dataset"):
        repair_dataset(tmp_path / "nothing")
    assert all_bytes(tmp_path) == {"notes.txt": b"mine"}
    assert not (tmp_path / "nothing").exists()


def test_dropped_shards_are_made_again(tmp_path: Path) -> None:
    for store in ("webdataset", "zarr"):
        root = tmp_path / store
        tasks = make_dataset(root, "features", store, *NAMES)
        whole = all_bytes(root)
        gone = {name for task in tasks[1:3] for name in files_of(root, task)} | {"tables.json"}
        drop_shards(root, [task.shard_id for task in tasks[1:3]])
        assert all_bytes(root) == {name: whole[name] for name in whole.keys() - gone}
        make_dataset(root, "features", store, *NAMES)
        assert all_bytes(root) == whole
        with pytest.raises(DatasetError, match="is not a shard id"):
            drop_shards(root, ["../../outside"])


def test_views_that_only_a_lost_shard_had_are_planned_again(tmp_path: Path) -> None:
    make_dataset(tmp_path, "features", "webdataset", "a", "b", views=1)
    tasks = make_dataset(tmp_path, "features", "webdataset", "a", "b", views=3)
    assert [(video.first_view, video.views) for task in tasks for video in task.videos] == [(0, 1)] * 2 + [
        (1, 2)
    ] * 2
    whole = all_bytes(tmp_path)
    drop_shards(tmp_path, [tasks[0].shard_id])
    flip(tmp_path / "plan.parquet")
    repair_dataset(tmp_path)
    assert read_plan(tmp_path)["first_view"].to_pylist() == [1, 1]
    assert make_dataset(tmp_path, "features", "webdataset", "a", "b", views=3) == tasks
    assert without_lock(all_bytes(tmp_path)) == whole


def test_rebuilt_plan_is_the_old_one(tmp_path: Path) -> None:
    make_dataset(tmp_path, "features", "webdataset", *NAMES)
    plan = read_plan(tmp_path)
    assert extend_plan(plan, [], 1, 2).equals(plan)
    rng = np.random.default_rng(3)
    content = (tmp_path / "plan.parquet").read_bytes()
    for _ in range(20):
        (tmp_path / "plan.parquet").write_bytes(rng.permutation(np.frombuffer(content, np.uint8)).tobytes())
        repair_dataset(tmp_path)
        assert (tmp_path / "plan.parquet").read_bytes() == content
