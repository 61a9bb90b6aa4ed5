"""Which checkpoint gave which rows, where a run has several: tables are in another order than the settings."""

import shutil
from pathlib import Path

import pytest
from benchmark_runs import mini_settings
from drawn_features import DrawnWorld, save_tokenizer, save_world
from foresight_runs import save_models, whole_settings

from deltacache.descriptions import describe_output
from deltacache.evaluate.benchmarks.engine import evaluate_benchmarks
from deltacache.evaluate.clips.run import evaluate_clips
from deltacache.evaluate.foresight.run import evaluate_foresight
from deltacache.evaluate.report.runs import facts_of, open_runs
from deltacache.models.checkpoints import load_tokenizer, load_world
from deltacache.schemas.progress import SilentReporter
from golden_sizes import golden_sizes


def told_of(out: Path) -> list[str]:
    """What the report says of models."""
    (run,) = open_runs([out])
    return list(facts_of(run).values())


def check_told(out: Path, worlds: tuple[Path, ...], tokenizers: tuple[Path, ...]) -> None:
    """Every model under its own path in the report; and as it was, for inspect."""
    told, inspected = told_of(out), describe_output(out)
    for load, paths in ((load_world, worlds), (load_tokenizer, tokenizers)):
        for path in paths:
            fingerprint = load(path).fingerprint
            # behind the name of what a world model is
            assert any(
                each.endswith(f", {fingerprint}, from {path}") for each in (f", {text}" for text in told)
            )
            assert f"{fingerprint} at {path}, unchanged" in inspected


@pytest.mark.parametrize("swapped", [False, True])
def test_of_clips(drawn: DrawnWorld, swapped: bool) -> None:
    """Two tokenizers, each with a world model of its own."""
    other = save_tokenizer(drawn.root / "other", seed=1)
    tokenizers = (other, drawn.tokenizer) if swapped else (drawn.tokenizer, other)
    worlds = (save_world(drawn.root / "its", other), drawn.learned)
    worlds = worlds[::-1] if swapped else worlds
    settings = drawn.settings(
        tokenizer=tokenizers[0], more_tokenizers=tokenizers[1:], worlds=worlds, samples=2, examples=0
    )
    evaluate_clips(settings, SilentReporter())
    check_told(settings.out, worlds, tokenizers)


@pytest.mark.parametrize("swapped", [False, True])
def test_of_benchmarks(golden: Path, mini_benchmarks: Path, tmp_path: Path, swapped: bool) -> None:
    tokenizer = golden / "tiny" / "deltatok_released.safetensors"
    fingerprint = load_tokenizer(tokenizer).fingerprint
    worlds = tuple(
        save_world(tmp_path / query, fingerprint, query=query, hidden=golden_sizes(golden)[2])
        for query in ("noise", "learned")
    )
    worlds = worlds[::-1] if swapped else worlds
    settings = mini_settings(
        golden,
        mini_benchmarks,
        tmp_path / "out",
        data={"kitti": mini_benchmarks / "kitti"},
        heads={},
        worlds=worlds,
        samples=2,
    )
    evaluate_benchmarks(settings, SilentReporter())
    check_told(settings.out, worlds, (tokenizer,))


def test_of_whole_frames(mini_benchmarks: Path, tmp_path: Path) -> None:
    """Rows are sorted by method, and here the settings are not."""
    made = save_models(tmp_path, mini_benchmarks / "cityscapes")
    worlds = (made / "delta", made / "baseline")
    settings = whole_settings(
        made, mini_benchmarks / "cityscapes", tmp_path / "out", worlds=worlds, examples=0
    )
    evaluate_foresight(settings, SilentReporter())
    check_told(settings.out, worlds, (made / "tokenizer",))


def test_older_runs_do_not_guess(evaluated: DrawnWorld, tmp_path: Path) -> None:
    out = Path(shutil.copytree(evaluated.root / "out", tmp_path / "out"))
    (out / "models.json").unlink()
    told = told_of(out)
    for world in (evaluated.noise, evaluated.learned):
        assert any(each.endswith(f", {load_world(world).fingerprint}") for each in told)  # and no path
    alone = load_tokenizer(evaluated.tokenizer).fingerprint
    assert f"{alone}, from {evaluated.tokenizer}" in told  # there is but one


def test_models_that_changed_places_are_other_ones(drawn: DrawnWorld) -> None:
    settings = drawn.settings(samples=2, examples=0)
    evaluate_clips(settings, SilentReporter())
    drawn.noise.rename(drawn.root / "aside")
    drawn.learned.rename(drawn.noise)
    (drawn.root / "aside").rename(drawn.learned)
    assert describe_output(settings.out).count("not the one that was evaluated") == 2
