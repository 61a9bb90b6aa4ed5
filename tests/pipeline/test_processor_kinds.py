"""Receipts say on which kind of processor a shard was made; nothing that reads a dataset depends on it."""

import json
import os
import subprocess
import sys
from pathlib import Path

from small_datasets import all_bytes, make_dataset

from deltacache.models.devices import processor_kind
from deltacache.pipeline.datasets.dataset import finish_dataset, open_dataset
from deltacache.pipeline.datasets.receipts import read_receipt
from deltacache.pipeline.datasets.verification import verify_dataset
from deltacache.pipeline.storage.files import seal_json
from deltacache.schemas.datasets import canonical_json

_ELSEWHERE = """
import sys
from pathlib import Path
from small_datasets import make_dataset
make_dataset(Path(sys.argv[1]), "features", "webdataset", "a", "b", "c")
"""


def test_shards_of_several_kinds_of_processors_make_one_dataset(tmp_path: Path) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    tasks = make_dataset(here, "features", "webdataset", "a", "b", "c")
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run([sys.executable, "-c", _ELSEWHERE, str(elsewhere)], env=environment, check=True)
    kinds = [read_receipt(root, tasks[0].shard_id).made_on for root in (here, elsewhere)]
    assert kinds[0] == processor_kind()
    assert {**kinds[0], "instructions": "DEFAULT"} == kinds[1]
    held, other = all_bytes(here), all_bytes(elsewhere)
    differing = {name for name in held if held[name] != other[name]}
    assert all(name.startswith("receipts/") for name in differing)
    (here / "tables.json").unlink()
    receipt = f"receipts/{tasks[1].shard_id}.json"
    (here / receipt).write_bytes(other[receipt])
    finish_dataset(here)
    assert verify_dataset(here) == []
    assert all_bytes(here) == held | {receipt: other[receipt]}
    for clip in range(len(open_dataset(here))):
        open_dataset(here).read(clip)


def test_receipts_from_before_there_were_kinds_are_read(tmp_path: Path) -> None:
    (task,) = make_dataset(tmp_path, "features", "webdataset", "a")
    path = tmp_path / f"receipts/{task.shard_id}.json"
    body = json.loads(path.read_bytes())
    del body["receipt_crc32c"], body["made_on"]
    path.write_bytes(seal_json(canonical_json(body).encode(), "receipt_crc32c"))
    assert read_receipt(tmp_path, task.shard_id).made_on == {}
    assert verify_dataset(tmp_path) == []


def test_tables_from_before_there_were_parts_are_read_and_written_again(tmp_path: Path) -> None:
    make_dataset(tmp_path, "features", "webdataset", "a", "b")
    held = all_bytes(tmp_path)
    body = json.loads(held["tables.json"])
    old = {
        "files": body["files"],
        "receipts_sha256": "5e" * 32,
        "shard_bytes": body["shard_bytes"],
    }
    (tmp_path / "tables.json").write_bytes(seal_json(canonical_json(old).encode(), "tables_crc32c"))
    assert len(open_dataset(tmp_path)) == 4
    (problem,) = verify_dataset(tmp_path)
    assert "run the command that made the dataset again, which writes it" in str(problem)
    finish_dataset(tmp_path)
    assert all_bytes(tmp_path) == held
