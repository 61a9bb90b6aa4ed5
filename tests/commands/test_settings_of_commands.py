"""Options of all commands against the schemas they come from, and ``show-config`` of each."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner

from deltacache.chain import ChainConfig
from deltacache.cli import app
from deltacache.cli_options import settings_of
from deltacache.demo.demo import demo_config
from deltacache.evaluate.settings import ClipEvaluation
from deltacache.schemas.arguments import plain_type
from deltacache.schemas.configs import (
    HeadConfig,
    RgbConfig,
    TokenizerConfig,
    WorldConfig,
    save_config,
)
from deltacache.schemas.foresight import ForesightEvaluation, ForesightHeadConfig
from deltacache.schemas.jobs import (
    ContextExport,
    CostRequest,
    DemoSettings,
    DoctorSettings,
    ExtractionSettings,
    PcaSettings,
    PushSettings,
    TokenizeVideosSettings,
)
from deltacache.schemas.prediction import PredictionSettings
from deltacache.systems.training import SystemsConfig

PARSER: Any = get_command(app)
NO_SETTINGS = {
    "extract-features": {"dry_run"},
    "tokenize": {"tokenizer"},
    "report": {"out"},
    "compare": {"every_metric"},
    "doctor": {"as_json"},
    "inspect": {"pictures"},
    "verify": {"repair"},
    "run": {"from_stage"},
}
"""Options that say what a command does or where things lie; they are no settings that a value is kept of."""


@pytest.mark.parametrize("name", PARSER.commands)
def test_each_option_is_that_of_its_schema(name: str) -> None:
    """A flag has its help text, bounds and default from the schema, and docs/settings.md lists it."""
    page = (Path(__file__).parents[2] / "docs" / "settings.md").read_text()
    section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    settings = settings_of(app).get(name, {})
    options = {each.name: each for each in PARSER.commands[name].params if each.param_type_name == "option"}
    assert options.keys() - settings.keys() == NO_SETTINGS.get(name, set())
    for argument, shown in settings.items():
        option, field = options[argument], shown.argument
        default = f" [default: {shown.default}]" if shown.default else ""
        assert option.help == f"{field.help}{default}"
        assert field.help.endswith((".", ")")), field.help
        assert option.default is None, argument  # the schema decides
        numbers = plain_type(field.annotation) in (int, float)
        assert [option.min, option.max] == ([field.least, field.most] if numbers else [None, None])
        (row,) = [line for line in section.splitlines() if line.startswith(f"| `{shown.option}` |")]
        assert shown.argument.help in row
        assert f"| {shown.default} |".replace("|  |", "| |") in row


RECIPE = ("--set", "training.learning_rate=3e-4", "--device", "cpu")
COMMANDS: dict[str, tuple[Any, str]] = {
    "extract-features videos out --views 3": (ExtractionSettings, "views: 3"),
    "tokenize videos out --tokenizer tokenizer --views 2": (TokenizeVideosSettings, "views: 2"),
    "fit-pca features out --components 7": (PcaSettings, "components: 7"),
    "demo out --seed 4": (DemoSettings, "seed: 4"),
    "run chain.yaml out": (ChainConfig, "device: cpu"),
    "doctor --videos 12": (DoctorSettings, "videos: 12"),
    "train-tokenizer features out --preset tiny": (TokenizerConfig, "learning_rate: 0.0003"),
    "train-world deltas out --preset tiny": (WorldConfig, "learning_rate: 0.0003"),
    "train-head vspw VSPW out --preset tiny": (HeadConfig, "learning_rate: 0.0003"),
    "train-head rgb pictures out --preset tiny": (RgbConfig, "learning_rate: 0.0003"),
    "train-foresight-head segmentation Cityscapes out": (ForesightHeadConfig, "learning_rate: 0.0003"),
    "train-systems features out --preset tiny-table2 --set systems.dino-world.world.training.steps=5": (
        SystemsConfig,
        "steps: 5",
    ),
    "evaluate out --data clips=features --samples 5": (ClipEvaluation, "samples: 5"),
    "evaluate-foresight Cityscapes out --world world --seed 3": (ForesightEvaluation, "seed: 3"),
    "predict video out --world world --tokenizer tokenizer --steps 3": (PredictionSettings, "steps: 3"),
    "export-contexts out --data vspw=VSPW --format mp4": (ContextExport, "clip_format: mp4"),
    "push world me/world --private": (PushSettings, "private: true"),
    "flops --preset table2 --horizon 2": (CostRequest, "horizon: 2"),
}


@pytest.mark.parametrize("line", COMMANDS)
def test_the_settings_of_each_command_are_shown(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_config(demo_config(Path("train"), Path("test"), Path("futures.csv"), 1), Path("chain.yaml"))
    for name in ("tokenizer", "world"):  # as if they were released files, which record no settings
        Path(name).touch()
    kind, words = COMMANDS[line]
    arguments = line.split()
    if arguments[0].startswith("train-") and "--set" not in arguments:
        arguments += RECIPE
    shown = CliRunner().invoke(app, ["show-config", *arguments], catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    assert words in shown.output
    kind.model_validate(yaml.safe_load(shown.output))
    assert {each.name for each in tmp_path.iterdir()} == {
        "chain.yaml",
        "tokenizer",
        "world",
    }  # nothing was run


def test_every_command_with_settings_is_among_them() -> None:
    """``compare-systems`` needs trained systems: tests/chain/test_systems_table.py."""
    assert {line.split()[0] for line in COMMANDS} == settings_of(app).keys() - {"compare-systems"} | {"run"}


def test_what_has_no_settings_is_refused() -> None:
    refused = CliRunner().invoke(app, ["show-config", "verify", "features"])
    assert refused.exit_code == 2
    assert "verify has no settings to show" in refused.output


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("export-contexts out --data coco=x", "coco is not known"),
        ("export-contexts out --data vspw=x --horizons 0", "horizon 0 is not after the context"),
        ("train-systems features out --set systems.dino-world.world.candidate=1", "candidate: is not known"),
        ("train-world deltas out --init-from a --continue-from b", "--init-from or --continue-from, not both"),
        ("train-head rgb pictures out --kitti-split x", "--kitti-split concerns kitti, not rgb"),
    ],
)  # fmt: skip
def test_settings_that_are_refused_are_wrong_usage(line: str, words: str) -> None:
    refused = CliRunner().invoke(app, line.split())
    assert refused.exit_code == 2, refused.output
    assert words in " ".join(refused.output.replace("│", " ").split())


def test_help_groups_the_commands_and_shows_each_summary_whole() -> None:
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}).output
    assert max(map(len, shown.splitlines())) <= 80
    text = "".join(shown.split())  # lines are broken at hyphens too
    groups = [text.index(f"{name}:") for name in ("Pipeline", "Training", "Evaluation", "Tools")]
    assert groups == sorted(groups)
    for name, command in PARSER.commands.items():
        summary = command.help.partition("\n\n")[0]
        assert f"{name}{summary}".replace(" ", "").replace("\n", "") in text[groups[0] :]


def test_the_shell_completes_commands_flags_and_values() -> None:
    script = """
        eval "$(deltacache --show-completion bash)"
        complete_line() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _deltacache_completion deltacache; }
        complete_line deltacache train-; echo "${COMPREPLY[@]}"
        complete_line deltacache train-world --pre; echo "${COMPREPLY[@]}"
        complete_line deltacache extract-features --store z; echo "${COMPREPLY[@]}"
    """
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True
    )
    commands = " ".join(name for name in PARSER.commands if name.startswith("train-"))
    assert done.stdout.splitlines() == [commands, "--preset --precision", "zarr"], done.stderr
