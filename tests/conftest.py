"""Where the golden numbers and real videos are found, which tests are slow, and in which order they run.

Everything else a test needs, it makes itself.
"""

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

import pytest
from xdist.scheduler import LoadFileScheduling

if TYPE_CHECKING:
    from shared_ray import SharedRay

# Two test processes share the cores, and layers this small gain nothing from more threads, which only wait for each
# other; and the bits of a sum may depend on how it is split. Torch reads both when it is imported, here and in the
# processes that tests start, so nothing above may import torch.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Ray gives its workers the lowest priority (niceness 15), so beside another test they would hardly run.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 -- as Ray spells it

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


@pytest.fixture(scope="session", autouse=True)
def drawing() -> Iterator[dict[str, Callable[..., Any]]]:
    """What draws with matplotlib: ``plot_curves`` of trainings and ``draw_svg`` of reports.

    In this process neither draws, unless a test puts it back: there are hundreds of short trainings and evaluations,
    and their pictures take longer than they do.
    """
    from deltacache.evaluate.report import charts
    from deltacache.train import logs

    drawing = {"plot_curves": logs.plot_curves, "draw_svg": charts.draw_svg}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs, "plot_curves", lambda rows, path, title: path.touch())
        patch.setattr(charts, "draw_svg", lambda draw, **size: "<svg></svg>")
        yield drawing


_SLOW = {
    *("SharedRay", "subprocess", "multiprocessing", "start_command", "start_script"),
    *("run_here", "extract_features", "train_systems", "run_chain"),
}
"""Names that code of tests uses to start Ray or a process, or to call commands and chains in this one."""
_LONGEST_FIRST = (
    "train/test_ray_workers.py",
    "commands/test_cluster_command.py",
    "pipeline/test_cluster_faults.py",
    "commands/test_object_store_command.py",
    "commands/test_chaos.py",
    "train/test_simulated_cuda.py",
    "commands/test_extract_command.py",
    "commands/test_training_cluster.py",
    "commands/test_secrets_command.py",
    "commands/test_chain_commands.py",
    "commands/test_doctor_command.py",
    "chain/test_systems_table.py",
    "evaluate/test_benchmark_engine.py",
    "pipeline/test_cluster_tasks.py",
)
_FOLDERS = ("commands", "train", "chain", "pipeline", "evaluate", "models")
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
    """Mark what is slow; and put files that take minutes first, so that no worker is left alone with one at the end."""
    root = Path(__file__).parent
    for item in items:
        if _is_slow(item):
            item.add_marker("slow")
    places = {file: place for place, file in enumerate((*_LONGEST_FIRST, *_FOLDERS))}

    def place(item: pytest.Item) -> int:
        file = item.path.relative_to(root)
        return places.get(file.as_posix(), places.get(file.parts[0], len(places)))

    items.sort(key=place)


def _is_slow(item: pytest.Item) -> bool:
    """Whether the test, a fixture of it or a function of their files that they use names one of ``_SLOW``."""
    assert isinstance(item, pytest.Function)
    fixtures = item._fixtureinfo.name2fixturedefs.values()
    waiting: list[Any] = [item.function, *(one.func for fixture in fixtures for one in fixture)]
    seen = set[int]()
    while waiting:
        function = waiting.pop()
        if callable(function):
            function = inspect.unwrap(function)  # of a context manager
        if not isinstance(function, FunctionType) or id(function) in seen:
            continue
        seen.add(id(function))
        codes = [function.__code__]
        while codes:
            code = codes.pop()
            if not _SLOW.isdisjoint(code.co_names):
                return True
            codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
            used = [function.__globals__.get(name) for name in code.co_names]
            waiting += [each for each in used if getattr(each, "__module__", None) == function.__module__]
    return False


class _ByFixture(LoadFileScheduling):
    """Files that share a long fixture go to one worker, as the tests of a file do, so that it is made once."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return next((name for name, files in _TOGETHER.items() if any(each in file for each in files)), file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    """See ``_ByFixture``."""
    return _ByFixture(config, log)
