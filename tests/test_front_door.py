"""``import deltacache``: what a researcher's own program uses, and the programs in ``examples/``."""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import deltacache
import settings_page
from deltacache.schemas.arguments import arguments_of
from deltacache.schemas.configs import TokenizerConfig, WorldConfig
from deltacache.schemas.errors import SettingsError
from deltacache.schemas.jobs import ExtractionSettings
from reporters import Lines
from warm_process import start_script

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Features of drawn frames, a tokenizer, delta tokens and a world model, all made through the front door."""
    root = tmp_path_factory.mktemp("front-door")
    rng = np.random.default_rng(0)
    for video in range(3):
        folder = root / "videos" / f"clip{video}"
        folder.mkdir(parents=True)
        for frame in range(8):
            pixels = rng.integers(0, 255, (48, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"frame_{frame * 0.1:.1f}.png")
    paths = {name: root / name for name in ("videos", "features", "tokenizer", "deltas", "world")}
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    features = deltacache.extract_features(
        paths["videos"],
        paths["features"],
        backbone="tiny",
        image_size=32,
        spacing=(0.1, 0.1),
        augment=False,
        encoders=0,
    )
    assert torch.get_num_threads() == 2, "encoding in this process leaves its threads as they were"
    torch.set_num_threads(threads)
    assert len(features) == 3
    tokenizer = deltacache.train_tokenizer(
        paths["features"], paths["tokenizer"], preset="tiny", steps=2, assignments=["training.batch_size=2"]
    )
    deltas = deltacache.tokenize(paths["features"], paths["deltas"], tokenizer, encoders=0)
    assert deltas.card.kind == "deltas"
    deltacache.train_world(
        paths["deltas"], paths["world"], preset="tiny", steps=2, batch_size=2, candidates=3
    )
    return paths


def test_the_import_is_light() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import deltacache; took = time.perf_counter() - start;"
        "assert not {'torch', 'ray', 'pyarrow', 'pydantic'} & set(sys.modules), sorted(sys.modules);"
        "assert set(deltacache.__all__) <= set(dir(deltacache)); print(took)"
    )
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(times) < 0.1


@pytest.mark.parametrize("name", deltacache.__all__)
def test_every_name_is_there_and_says_what_it_is(name: str) -> None:
    found: Any = getattr(deltacache, name)
    assert isinstance(found, str) or found.__doc__
    if inspect.isfunction(found) and found.__module__ == "deltacache.api":
        assert "Example:" in found.__doc__
        assert found.__annotations__["return"]


def test_the_package_of_evaluations_is_called_like_the_function() -> None:
    import deltacache.evaluate.settings

    with pytest.raises(SettingsError, match="samples"):
        deltacache.evaluate("out", {"clips": "features"}, samples=0)
    with pytest.raises(SettingsError, match="Did you mean samples"):
        deltacache.evaluate("out", {"clips": "features"}, sample=3)


def test_models_come_ready_with_their_cards(chain: dict[str, Path]) -> None:
    backbone = deltacache.load_backbone("tiny", device="cpu")
    tokenizer = deltacache.load_tokenizer(chain["tokenizer"], device="cpu")
    world = deltacache.load_world(chain["world"], device="cpu")
    frames = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)
    previous, current = backbone.patch_tokens(frames).split(1)
    delta = tokenizer.encode(previous, current)
    assert torch.equal(delta, tokenizer.encode(previous, current, backbone.grid(32)))
    assert tokenizer.decode(delta, previous).shape == previous.shape
    assert not delta.requires_grad
    assert tokenizer.card is not None
    assert world.card is not None
    assert tokenizer.card.metadata["backbone_sha256"] == backbone.card.weights_sha256
    assert world.card.metadata["tokenizer_fingerprint"] == tokenizer.card.fingerprint
    noise = world.draw_noise((1, 5, 2, world.noise_size), torch.Generator().manual_seed(0))
    futures = world.rollout(delta[:, None], torch.tensor([[0.0, 0.1, 0.2]]), noise)
    assert futures.shape == (1, 5, 2, delta.shape[-1])


def test_patches_that_form_no_square_need_a_grid(chain: dict[str, Path]) -> None:
    tokenizer = deltacache.load_tokenizer(chain["tokenizer"], device="cpu")
    tokens = torch.randn(1, 6, tokenizer.hidden_size)
    with pytest.raises(ValueError, match="6 patch tokens do not form a square: give grid"):
        tokenizer.encode(tokens, tokens)
    assert tokenizer.encode(tokens, tokens, (2, 3)).shape == (1, tokenizer.hidden_size)


def test_an_evaluation_gives_its_tables_and_its_page(chain: dict[str, Path], tmp_path: Path) -> None:
    reporter = Lines()
    results = deltacache.evaluate(
        tmp_path / "results",
        {"clips": chain["features"]},
        tokenizer=chain["tokenizer"],
        world=chain["world"],
        horizons=(1, 2),
        samples=3,
        reporter=reporter,
    )
    assert {"deltatok", "deltaworld", "copy_last"} <= set(results.metrics["method"].to_pylist())
    assert set(results.sequences["horizon"].to_pylist()) == {1, 2}
    assert reporter.said
    assert deltacache.write_report(results.folder).read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"view": 2}, "Unknown setting 'view'. Did you mean views?"),
        ({"views": 0}, "views: Input should be greater than or equal to 1"),
        ({"spacing": (0.5, 0.1)}, "spacing 0.5 0.1: give the shorter time"),
        ({"retry_for": -1}, "retry_for: Input should be greater than or equal to 0"),
        ({"image_size": "none"}, "image size 'none'"),
    ],
)
def test_settings_that_are_refused_are_named(given: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=words.replace("?", r"\?").replace("'", ".")):
        deltacache.extract_features("videos", tmp_path / "out", backbone="tiny", **given)
    assert not (tmp_path / "out").exists()


def test_a_dataset_takes_no_settings_about_videos(chain: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--views, --seed concern videos"):
        deltacache.tokenize(chain["features"], tmp_path / "out", chain["tokenizer"], views=2, seed=1)


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (["training.learning_rat=1"], "learning_rat"),
        (["training"], "give KEY=VALUE"),
        (["training.learning_rate=-1"], "greater than 0"),
        (["model.num_heads=two"], "valid integer"),
    ],
)
def test_assignments_that_are_refused_are_named(
    assignments: list[str], words: str, chain: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=words):
        deltacache.train_tokenizer(
            chain["features"], tmp_path / "out", preset="tiny", assignments=assignments
        )


@pytest.mark.parametrize("kind", [ExtractionSettings, TokenizerConfig, WorldConfig])
def test_every_argument_says_what_it_is(kind: Any) -> None:
    arguments = arguments_of(kind)
    assert len(arguments) >= 12
    assert not [
        name
        for name, each in arguments.items()
        if not each.help.endswith(".") and not each.help.endswith(")")
    ]


def test_functions_have_signatures_with_the_settings() -> None:
    parameters = inspect.signature(deltacache.extract_features).parameters
    assert parameters["views"].default == 1
    assert parameters["spacing"].default == (0.04, 0.3333)
    assert inspect.signature(deltacache.train_world).parameters["candidates"].default is None


def run_example(folder: Path, name: str, *arguments: object) -> str:
    """What the program prints; warnings are errors."""
    strict = "import warnings; warnings.simplefilter('error')\n"
    with start_script(
        strict + (EXAMPLES / f"{name}.py").read_text(), *arguments, stdout=folder / "printed"
    ) as process:
        code = process.wait()
    printed = (folder / "printed").read_text()
    assert code == 0, printed
    return printed


def test_example_of_a_training_loop(chain: dict[str, Path], tmp_path: Path) -> None:
    printed = run_example(
        tmp_path, "features_in_your_loop", chain["videos"], chain["features"].with_name("own-features"),
        "--backbone", "tiny", "--image-size", 32, "--steps", 3, "--encoders", 0,
    )  # fmt: skip
    assert "3 clips of (2, 2) patches" in printed
    assert "step 2: loss" in printed


def test_example_of_a_tokenizer(chain: dict[str, Path], tmp_path: Path) -> None:
    pictures = sorted((chain["videos"] / "clip0").iterdir())[:2]
    printed = run_example(
        tmp_path,
        "tokenizer_on_two_frames",
        chain["tokenizer"],
        *pictures,
        "--backbone",
        "tiny",
        "--image-size",
        32,
    )
    assert "4 patch tokens per frame" in printed


def test_example_of_futures(chain: dict[str, Path], tmp_path: Path) -> None:
    printed = run_example(
        tmp_path, "futures_of_a_clip", chain["features"], chain["tokenizer"], chain["world"], "--samples", 5
    )
    assert "5 futures of clip0" in printed
    assert len(printed.splitlines()) == 2 + 4


def test_the_page_of_settings_is_that_of_the_schemas() -> None:
    """``python tests/settings_page.py > docs/settings.md`` writes it again."""
    assert (EXAMPLES.parent / "docs" / "settings.md").read_text() == settings_page.page()


def test_the_settings_of_a_command_are_shown_without_running_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deltacache", "show-config"]
    flags = [
        "train-world",
        "deltas/",
        str(tmp_path / "out"),
        "--preset",
        "tiny",
        "--set",
        "training.learning_rate=3e-4",
    ]
    shown = subprocess.run(
        [*command, *flags, "--candidates", "7"], capture_output=True, text=True, check=True
    )
    config = WorldConfig.model_validate(yaml.safe_load(shown.stdout))
    assert (config.candidates, config.training.learning_rate) == (7, 3e-4)
    assert not (tmp_path / "out").exists()
    refused = subprocess.run(
        [*command, *flags, "--candidates", "0"], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2
    assert "--candidates" in refused.stderr
