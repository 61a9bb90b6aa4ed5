"""``deltacache run`` and ``demo``: what is refused before anything is computed."""

import re
from pathlib import Path

import pytest
import yaml

from deltacache.chain import ChainConfig, run_chain
from deltacache.demo.demo import demo_config, run_demo
from deltacache.schemas.configs import load_config, save_config
from deltacache.schemas.errors import DatasetError, DeltacacheError, MismatchError
from deltacache.schemas.progress import SilentReporter


@pytest.fixture
def config(tmp_path: Path) -> ChainConfig:
    """The demo's chain on folders that are not there."""
    return demo_config(tmp_path / "train", tmp_path / "test", tmp_path / "futures.csv", seed=3)


def test_a_saved_chain_reads_back_as_it_was(config: ChainConfig, tmp_path: Path) -> None:
    save_config(config, tmp_path / "chain.yaml")
    assert load_config(tmp_path / "chain.yaml", ChainConfig) == config


def test_the_example_in_the_docs_is_a_chain(tmp_path: Path) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "chain.md"
    example = re.search(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)
    assert example is not None
    (tmp_path / "chain.yaml").write_text(example[1])
    assert set(load_config(tmp_path / "chain.yaml", ChainConfig).worlds) == {"deltaworld"}


def test_horizons_are_checked_before_hours_of_training(config: ChainConfig, tmp_path: Path) -> None:
    evaluation = config.evaluation.model_copy(update={"horizons": (0,)})
    with pytest.raises(DeltacacheError, match="horizon 0 is not after the context"):
        run_chain(config.model_copy(update={"evaluation": evaluation}), tmp_path / "out", SilentReporter())
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_chain_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeltacacheError, match="cannot be read"):
        load_config(tmp_path, ChainConfig)
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump({"videos": "here"}))
    with pytest.raises(
        DeltacacheError, match=r"is not a chain: .*videos: is not known: give test_videos, train_videos, "
    ):
        load_config(tmp_path / "chain.yaml", ChainConfig)


def test_the_demo_leaves_other_peoples_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(DatasetError, match="choose another folder"):
        run_demo(tmp_path, 0, SilentReporter())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_demo_of_other_odds_is_not_continued(tmp_path: Path, config: ChainConfig) -> None:
    out = tmp_path / "demo"
    videos = out / "videos"
    out.mkdir()
    save_config(demo_config(videos / "train", videos / "test", out / "futures.csv", 0), out / "chain.yaml")
    (out / "futures.csv").write_text(
        "video_uri,scene,outcome,probability\na.mp4,s,left,0.8\nb.mp4,s,right,0.2\n"
    )
    with pytest.raises(DatasetError, match=r"turn left with probability 0\.8, not 0\.5: .*give --odds 0\.8"):
        run_demo(out, 0, SilentReporter())


def test_the_demo_uses_no_gpu(config: ChainConfig) -> None:
    for videos in (config.train_videos, config.test_videos):
        assert videos.cluster.gpus_per_encoder == 0
    assert config.device == "cpu"


def test_a_training_with_steps_left_that_was_used_already_stops_the_chain_before_it_starts(
    config: ChainConfig, tmp_path: Path
) -> None:
    """A world model that joined after the evaluation; a chain that does not reach --from-stage removes nothing."""
    out = tmp_path / "out"
    for folder, steps in (("tokenizer", 1600), ("worlds/best-of-many", 1000)):
        (out / folder / f"checkpoints/step-{steps:08d}").mkdir(parents=True)
    (out / "evaluation").mkdir()
    with pytest.raises(
        MismatchError,
        match=r"discriminative has 0 of 1,000 steps, but .*evaluation was made.*--from-stage evaluation",
    ):
        run_chain(config, out, SilentReporter())
    assert (out / "evaluation").is_dir()
    with pytest.raises(DeltacacheError, match="train does not exist"):  # the videos: the check let it through
        run_chain(config, out, SilentReporter(), "evaluation")
    assert (out / "evaluation").is_dir()
    assert (out / "tokenizer").is_dir()
    assert (out / "worlds/best-of-many").is_dir()
