"""Several systems trained on the drawn world with few steps: what is shown of them is wiring, not quality."""

import pytest
import yaml
from trained_systems import TrainedSystems

from deltacache.demo.demo import demo_config
from deltacache.demo.world import draw_world
from deltacache.pipeline.jobs.offline import extract_features
from deltacache.schemas.progress import SilentReporter
from deltacache.systems.training import SystemsConfig, systems_preset, train_systems
from deltacache.train.workers.trainable import Workers

STEPS = {"steps": 12, "batch_size": 4, "warmup_steps": 2, "learning_rate": 1e-3}


@pytest.fixture(scope="session")
def systems(tmp_path_factory: pytest.TempPathFactory) -> TrainedSystems:
    root = tmp_path_factory.mktemp("systems")
    draw_world(root, seed=1, train_videos=6, test_scenes=2, image_size=64)
    chain = demo_config(root / "videos/train", root / "videos/test", root / "futures.csv", seed=1)
    train, test = root / "features/train", root / "features/test"
    extract_features(chain.train_videos, train, SilentReporter())
    extract_features(chain.test_videos, test, SilentReporter())
    config = _small(systems_preset("tiny-table2"))
    paths = train_systems(config, train, root / "systems", Workers(), "cpu", SilentReporter(), encoders=0)
    return TrainedSystems(train, test, root / "futures.csv", config, paths)


def _small(config: SystemsConfig) -> SystemsConfig:
    """The same systems, with few steps, and one more on two tokens per frame."""
    content = config.model_dump(mode="json")
    content["tokenizers"]["two"] = yaml.safe_load(yaml.safe_dump(content["tokenizers"]["delta"]))
    content["tokenizers"]["two"]["model"]["tokens_per_frame"] = 2
    content["systems"]["two-tokens"] = {
        "tokenizer": "two",
        "world": content["systems"]["delta-tokens"]["world"],
    }
    for each in (*content["tokenizers"].values(), *(one["world"] for one in content["systems"].values())):
        each["training"] |= STEPS
    return SystemsConfig.model_validate(content)
