"""Where the golden numbers and real videos are found; everything else a test needs, it makes itself."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from xdist.scheduler import LoadFileScheduling

if TYPE_CHECKING:
    from shared_ray import SharedRay

# Two test processes share the cores: threads that wait for each other must sleep, not spin. Torch reads it when it is
# imported, so nothing above may import torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_ROOT = Path(__file__).resolve().parent.parent


def _golden_root() -> Path:
    return Path(os.environ.get("DELTACACHE_GOLDEN", _ROOT.parent / "shared" / "golden")).resolve()


def _require(path: Path) -> Path:
    """Return ``path``; without it skip, saying why, except in CI, where that is a failure."""
    if path.exists():
        return path
    reason = f"{path} does not exist: set DELTACACHE_GOLDEN to the folder of golden numbers"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def _beside_golden(name: str) -> Path:
    """The folder beside the golden numbers; beside the default ones when these are another set."""
    beside = _golden_root().parent / name
    return beside if beside.exists() else _ROOT.parent / "shared" / name


@pytest.fixture(scope="session")
def golden() -> Path:
    """Inputs, weights and outputs of the released code."""
    return _require(_golden_root())


@pytest.fixture(scope="session")
def real_videos() -> Path:
    """Real clips: ``fixture/`` ordinary, ``odd/`` broken or unusual."""
    return _require(_beside_golden("videos"))


@pytest.fixture(scope="session")
def faults() -> Path:
    """Small files that were handled wrongly once, with their right values in a README."""
    return _require(_beside_golden("faults"))


@pytest.fixture(scope="session")
def mini_benchmarks() -> Path:
    """Miniature VSPW, Cityscapes and KITTI trees."""
    default = _beside_golden("mini")
    return _require(Path(os.environ.get("DELTACACHE_MINI", default)))


@pytest.fixture(scope="session")
def shared_ray() -> Iterator["SharedRay"]:
    """A Ray that the tests of this process share."""
    from shared_ray import SharedRay

    ray = SharedRay()
    yield ray
    ray.stop()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """The Ray that tests share ends with those of a folder: others fork this process, or start their own."""
    if "ray" in sys.modules and (nextitem is None or nextitem.path.parent != item.path.parent):
        sys.modules["ray"].shutdown()


@pytest.fixture
def no_ray(shared_ray: "SharedRay") -> None:
    """For tests that start or join a Ray of their own in this process."""
    shared_ray.stop()


_SLOW_FIRST = ("commands", "train", "chain", "pipeline", "evaluate", "models")
_TOGETHER = {
    "the real clips encoded": (
        "commands/test_extract",
        "commands/test_bad_input",
        "commands/test_training_cluster",
    ),
    "systems trained": ("chain/test_systems", "chain/test_adding_a_world", "chain/test_retry_tokenize"),
}
"""Files that share a fixture of a minute."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes come first, so that no worker is left alone with one at the end."""
    rooms = {room: place for place, room in enumerate(_SLOW_FIRST)}
    root = Path(__file__).parent
    items.sort(key=lambda item: rooms.get(item.path.relative_to(root).parts[0], len(rooms)))


class _ByFixture(LoadFileScheduling):
    """Files that share a long fixture go to one worker, as the tests of a file do, so that it is made once."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return next((name for name, files in _TOGETHER.items() if any(each in file for each in files)), file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    """See ``_ByFixture``."""
    return _ByFixture(config, log)
