"""YAML files that are refused: the key, the names that there are, and what the file seems to be."""

from pathlib import Path

import pytest

from deltacache.chain import ChainConfig
from deltacache.schemas.configs import PRESETS, TokenizerConfig, WorldConfig, kind_of, load_config, read_yaml
from deltacache.schemas.datasets import Frozen
from deltacache.schemas.errors import DeltacacheError
from deltacache.systems.training import SystemsConfig

WORLD = "training: {steps: 5, batch_size: 2, learning_rate: 0.1, weight_decay: 0}"
SYSTEMS = """
tokenizers:
  delta: {preset: tiny}
systems:
  one:
    tokenizer: delta
    world: {preset: tiny, training: {learning_rat: 3}}
"""
CHAIN = """
train_videos: {source: a, views: many}
test_videos: {source: b}
tokenizer: {preset: tiny}
worlds:
  one: {preset: tiny}
evaluation: {horizon: [1]}
"""


def refused(tmp_path: Path, text: str, kind: type[Frozen]) -> str:
    path = tmp_path / "given.yaml"
    path.write_text(text)
    with pytest.raises(DeltacacheError) as caught:
        load_config(path, kind)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "errors.pydantic.dev" not in message
    assert "\n" not in message
    return message.removeprefix(f"{path} ")


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        (
            f"model: {{num_head: 4}}\n{WORLD}",
            WorldConfig,
            ["is not a recipe of a world model", "model.num_head: is not known: give num_heads, ", "(got 4)"],
        ),
        (f"modle: {{}}\n{WORLD}", WorldConfig, ["model is missing", "modle: is not known: give model, "]),
        (f"model: {{}}\ncandidates: 0\n{WORLD}", WorldConfig, ["candidates: ", "equal to 1 (got 0)"]),
        (SYSTEMS, SystemsConfig, ["systems.one.world.training.learning_rat", "give learning_rate, "]),
        (CHAIN, ChainConfig, ["evaluation.horizon: is not known: give horizons, ", "train_videos.views: "]),
        ("", WorldConfig, ["is empty, and a recipe of a world model holds settings by name: give model, "]),
        ("[1, 2]", SystemsConfig, ["holds a list, and a list of systems holds", "give tokenizers, systems"]),
        ("a: 1\nb: c: 2", WorldConfig, ["is not valid YAML: line 2, column 5", "correct that line"]),
    ],
)
def test_problems_are_named_with_a_way_out(
    tmp_path: Path, text: str, kind: type[Frozen], words: list[str]
) -> None:
    message = refused(tmp_path, text, kind)
    for each in words:
        assert each in message, message


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ("tiny/world-main", TokenizerConfig, "seems to be a recipe of a world model, which is for deltacache train-wo"),
        ("tiny/tokenizer-main", WorldConfig, "seems to be a recipe of a tokenizer, which is for deltacache train-tok"),
        ("table2/systems", WorldConfig, "seems to be a list of systems, which is for deltacache train-systems"),
        ("paper/chain", SystemsConfig, "seems to be a chain, which is for deltacache run FILE.yaml"),
        ("tiny-tokens/systems", ChainConfig, "is not a chain but seems to be a list of systems"),
    ],
)  # fmt: skip
def test_a_file_of_another_kind_is_told(tmp_path: Path, given: str, kind: type[Frozen], words: str) -> None:
    assert words in refused(tmp_path, (PRESETS / f"{given}.yaml").read_text(), kind)


def test_every_preset_is_told_by_its_keys() -> None:
    told = {path: kind_of(read_yaml(path)) for path in PRESETS.glob("*/*.yaml") if "head" not in path.name}
    words = {"tokenizer": "a tokenizer", "world": "a world model", "systems": "a list of", "chain": "a chain"}
    for path, kind in told.items():
        assert words[path.stem.split("-")[0]] in (kind or ""), path


def test_a_recipe_that_tells_nothing_is_none_of_them() -> None:
    assert kind_of({"model": {"num_heads": 3}}) is None
    assert kind_of(["systems"]) is None


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks_of_yaml(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "chain.yaml"
    path.write_text("train_videos: {source: a, column: name}\n", encoding=encoding)
    assert read_yaml(path) == {"train_videos": {"source": "a", "column": "name"}}
