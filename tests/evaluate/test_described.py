"""What inspect says of evaluations, models and datasets, and the commands for reports and comparisons."""

import re
import shutil
from pathlib import Path

import pytest
from drawn_features import DrawnWorld, save_tokenizer

from deltacache.descriptions import describe_output, write_pictures
from deltacache.models.checkpoints import load_tokenizer, load_world
from deltacache.pipeline.datasets.dataset import open_dataset
from deltacache.schemas.errors import DeltacacheError
from warm_process import start_command


def command(folder: Path, *arguments: object) -> tuple[int, str]:
    """The exit code of ``deltacache``, and what it printed; first the output, then the errors."""
    out, err = folder / "stdout", folder / "stderr"
    with start_command(*arguments, stdout=out, stderr=err) as process:
        code = process.wait()
    return code, out.read_text() + err.read_text()


def test_an_evaluation_and_its_chain_of_fingerprints(evaluated: DrawnWorld) -> None:
    text = describe_output(evaluated.root / "out")
    tokenizer = load_tokenizer(evaluated.tokenizer)
    lines = text.splitlines()
    assert "an evaluation" in lines[0]
    assert f"{tokenizer.fingerprint} at {evaluated.tokenizer}, unchanged" in text
    assert f"of backbone sha256 {'b' * 16}" in text
    for world in (evaluated.noise, evaluated.learned):
        assert f"{load_world(world).fingerprint} at {world}, unchanged" in text
    assert f"of tokenizer fingerprint {tokenizer.fingerprint}" in text
    assert f"{open_dataset(evaluated.features).card.fingerprint} at {evaluated.features}" in text


def test_models_that_changed_or_left_are_told(drawn: DrawnWorld, evaluated: DrawnWorld) -> None:
    out = drawn.root / "out"
    shutil.copytree(evaluated.root / "out", out)
    config = out / "config.yaml"
    config.write_text(config.read_text().replace(str(evaluated.root), str(drawn.root)))
    assert "not the one that was evaluated" not in describe_output(out)
    shutil.rmtree(drawn.tokenizer)
    save_tokenizer(drawn.tokenizer, seed=1)
    shutil.rmtree(drawn.learned)
    text = describe_output(out)
    assert f"at {drawn.tokenizer}, not the one that was evaluated" in text
    assert f"{drawn.learned} no longer exists" in text
    next(drawn.noise.rglob("config.json")).write_text("{")
    (drawn.features / "plan.parquet").write_bytes(b"")
    text = describe_output(out)
    assert re.search(rf"world +{drawn.noise}\S* cannot be read as JSON", text), text
    assert "plan.parquet is damaged" in text
    shutil.rmtree(drawn.features)
    assert f"{drawn.features} no longer exists" in describe_output(out)


def test_models(evaluated: DrawnWorld, golden: Path) -> None:
    text = describe_output(evaluated.noise)
    assert "DeltaWorld, " in text
    assert load_tokenizer(evaluated.tokenizer).fingerprint in text
    assert text.count("fingerprint") == 2  # its own and its tokenizer's
    heads = golden / "eval"
    assert "SegmentationHead" in describe_output(heads / "head_vspw.safetensors")
    assert "DepthHead" in describe_output(heads / "head_kitti.safetensors")
    assert "DeltaTok" in describe_output(golden / "tiny" / "deltatok_released.safetensors")


def test_datasets(evaluated: DrawnWorld, tmp_path: Path) -> None:
    assert open_dataset(evaluated.features).card.fingerprint in describe_output(evaluated.features)
    sheet = write_pictures(evaluated.features, tmp_path / "sheet.png")
    assert sheet.read_bytes().startswith(b"\x89PNG")


def test_refusals(evaluated: DrawnWorld, tmp_path: Path) -> None:
    with pytest.raises(DeltacacheError, match="does not exist"):
        describe_output(tmp_path / "nothing")
    looked_for = (
        r"is not an output of deltacache: looked for a dataset .*metrics.*systems\.yaml.*contexts\.json"
    )
    with pytest.raises(DeltacacheError, match=looked_for):
        describe_output(tmp_path)
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(DeltacacheError, match=r"notes\.txt is not an output of deltacache: looked for"):
        describe_output(tmp_path / "notes.txt")
    with pytest.raises(DeltacacheError, match="is not a dataset: --pictures shows"):
        write_pictures(evaluated.tokenizer, tmp_path / "sheet.png")


def test_commands(evaluated: DrawnWorld, tmp_path: Path) -> None:
    out, both = evaluated.root / "out", tmp_path / "pages" / "both.html"
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    code, said = command(tmp_path, "report", out, copy, "--out", both)
    assert code == 0, said
    assert str(both) in said
    assert both.read_text().count("<h1>") == 1
    code, said = command(tmp_path, "compare", out, copy)
    assert code == 0, said
    assert "no difference beyond rounding" in said
    sheet = tmp_path / "sheet.html"
    code, said = command(tmp_path, "inspect", evaluated.features, "--pictures", sheet)
    assert code == 0, said
    assert sheet.exists()
    code, said = command(tmp_path, "report", out, copy, "--out", tmp_path)
    assert code == 1
    assert "is a folder: give the name of the page" in said
    assert "Traceback" not in said
