"""What an evaluation says of its heads and of the decoder of its pictures."""

import json
import shutil
from pathlib import Path

import pytest
from benchmark_runs import mini_settings, saved_decoder, table

from deltacache.descriptions import describe_output
from deltacache.evaluate.benchmarks.engine import evaluate_benchmarks
from deltacache.evaluate.examples import load_examples
from deltacache.evaluate.report.page import write_report
from deltacache.evaluate.settings import BenchmarkEvaluation
from deltacache.models.checkpoints import save_model
from deltacache.models.heads import load_head
from deltacache.schemas.errors import CheckpointError, DatasetError
from deltacache.schemas.progress import SilentReporter
from reporters import Lines


def saved_head(golden: Path, folder: Path, **metadata: object) -> Path:
    """The golden head of VSPW as an output of train-head."""
    head = load_head(golden / "eval" / "head_vspw.safetensors", "segmentation").model
    save_model(folder, head, "head", metadata)
    return folder


def bounds_of(golden: Path, mini: Path, out: Path, **changes: object) -> BenchmarkEvaluation:
    """VSPW without a tokenizer or a world model."""
    fields = {"data": {"vspw": mini / "vspw"}, "tokenizer": None, "worlds": (), "examples": 1}
    fields["heads"] = {"vspw": golden / "eval" / "head_vspw.safetensors"}
    return mini_settings(golden, mini, out, **(fields | changes))


@pytest.mark.slow
@pytest.mark.parametrize("split", ["val", "train", None])
def test_a_head_that_saw_the_validation_split_is_told(
    golden: Path, mini_benchmarks: Path, tmp_path: Path, split: str | None
) -> None:
    said = {"trained_on": {"benchmark": "vspw", "split": split, "frames": 12}} if split else {}
    head = saved_head(golden, tmp_path / "head", **said)
    reporter = Lines()
    settings = bounds_of(golden, mini_benchmarks, tmp_path / "out", heads={"vspw": head})
    evaluate_benchmarks(settings, reporter)
    fingerprint = load_head(head, "segmentation").fingerprint
    record = json.loads((settings.out / "models.json").read_text())
    assert record["heads"] == {"vspw": fingerprint}
    assert record["heads_trained_on"] == ({"vspw": said["trained_on"]} if split else {})
    note = f"vspw: the head {fingerprint} was trained on the val split: its numbers are not comparable"
    told = split == "val"
    assert (f"evaluate: {note}" in reporter.said) is told
    assert (note in json.loads((settings.out / "notes.json").read_text())) is told
    page, text = write_report(settings.out).read_text(), describe_output(settings.out)
    assert (note in page) is told
    assert (note in text) is told
    assert fingerprint in page
    if split:
        assert f"{fingerprint}, trained on the {split} split, from {head}" in page
    assert f"{fingerprint} at {head}, unchanged" in text


def test_a_head_of_depth_is_no_head_of_vspw(golden: Path, mini_benchmarks: Path, tmp_path: Path) -> None:
    heads = {"vspw": golden / "eval" / "head_kitti.safetensors"}
    settings = bounds_of(golden, mini_benchmarks, tmp_path / "out", heads=heads)
    with pytest.raises(CheckpointError, match=r"head_kitti\.safetensors is a head of depth"):
        evaluate_benchmarks(settings, SilentReporter())


def test_a_head_that_changed_or_left_is_told(golden: Path, mini_benchmarks: Path, tmp_path: Path) -> None:
    head = saved_head(golden, tmp_path / "head")
    settings = bounds_of(golden, mini_benchmarks, tmp_path / "out", heads={"vspw": head})
    evaluate_benchmarks(settings, SilentReporter())
    model = load_head(head, "segmentation").model
    model.head.bias.data += 1
    shutil.rmtree(head)
    save_model(head, model, "head", {})
    assert f"at {head}, not the one that was evaluated" in describe_output(settings.out)
    with pytest.raises(DatasetError, match="holds another evaluation"):
        evaluate_benchmarks(settings, SilentReporter())
    shutil.rmtree(head)
    assert f"{head} no longer exists" in describe_output(settings.out)
    (settings.out / "models.json").write_text("{")
    with pytest.raises(DatasetError, match=r"models\.json is damaged"):
        describe_output(settings.out)


def test_a_label_of_other_content_is_another_evaluation(
    golden: Path, mini_benchmarks: Path, tmp_path: Path
) -> None:
    """Of the same size: one byte of a comment in the file."""
    root = Path(shutil.copytree(mini_benchmarks / "vspw", tmp_path / "vspw"))
    settings = bounds_of(golden, mini_benchmarks, tmp_path / "out", data={"vspw": root})
    evaluate_benchmarks(settings, SilentReporter())
    mask = root / "data" / "100_clip0" / "mask" / "00000019.png"
    content = mask.read_bytes()
    mask.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DatasetError, match="holds another evaluation"):
        evaluate_benchmarks(settings, SilentReporter())


@pytest.mark.slow
def test_a_decoder_given_later_makes_pictures_and_leaves_the_numbers(
    golden: Path, mini_benchmarks: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    plain = bounds_of(golden, mini_benchmarks, out, examples=2)
    evaluate_benchmarks(plain, SilentReporter())
    (out / "examples" / "of-clips.npy").write_bytes(b"kept")
    before = (out / "metrics.parquet").stat().st_mtime_ns

    def pictures() -> list[float]:
        kept = (out / "examples" / "of-clips.npy").rename(tmp_path / "aside")
        examples = load_examples(out / "examples")
        kept.rename(out / "examples" / "of-clips.npy")
        assert len(examples) == 2
        return [float(maps.truth.mean()) for each in examples for maps in each.maps if maps.kind == "rgb"]

    assert pictures() == []
    found, reporter = [], Lines()
    for name, shift in (("one", 0.0), ("other", 0.05)):
        decoder = saved_decoder(golden, tmp_path / name, shift)
        (out / "report.html").write_text("of before")
        evaluate_benchmarks(plain.model_copy(update={"rgb_decoder": decoder}), reporter)
        assert "only pictures are made" in reporter.said[-1]
        assert not (out / "report.html").exists()
        assert (out / "metrics.parquet").stat().st_mtime_ns == before
        found.append(pictures())
    assert len(found[0]) == len(found[1]) == 2
    assert found[0] != found[1]
    for again in (tmp_path / "other", None):  # the same decoder, or none: what is there is right
        evaluate_benchmarks(plain.model_copy(update={"rgb_decoder": again}), reporter)
        assert "holds this evaluation already" in reporter.said[-1]
    assert pictures() == found[1]
    assert table(out, "metrics").num_rows > 0
    assert "Decoder of pictures" in write_report(out).read_text()


def test_a_smaller_cityscapes_than_the_published_one_is_told(
    golden: Path, mini_benchmarks: Path, tmp_path: Path
) -> None:
    reporter = Lines()
    data = {"cityscapes": mini_benchmarks / "cityscapes"}
    evaluate_benchmarks(bounds_of(golden, mini_benchmarks, tmp_path / "out", data=data, heads={}), reporter)
    assert "evaluate: cityscapes: 2 sequences with one labelled target each, of 2 cities" in reporter.said
    assert any("2 sequences, the published validation set has 500" in line for line in reporter.said)
