"""``flops``: the tables of any preset, counted and measured."""

import re

import pytest

from deltacache.costs import CountedSystem, chosen_systems, costs_text, count_costs, on_meta
from deltacache.models.worlds.dino_world import DinoWorld
from deltacache.schemas.errors import MismatchError
from deltacache.schemas.jobs import CostRequest

TINY = ("--preset", "tiny", "--backbone", "tiny", "--image-size", "32", "--samples", "2", "--frames", "3")
TABLE_2 = ["dino-world", "best-of-many", "frame-tokens", "delta-tokens"]
TABLE_D = """
tokenizers:
  delta: {preset: foresight}
systems:
  foresight:
    world: {preset: foresight}
  with-delta-tokens:
    tokenizer: delta
    world: {preset: foresight-delta}
"""


def systems_of(preset: str, hidden_size: int, candidates: int | None = None) -> list[CountedSystem]:
    return on_meta(chosen_systems(preset, hidden_size).config, preset, hidden_size, candidates)


def _rows(text: str, title: str) -> dict[str, list[str]]:
    """The rows under a title, by their first word."""
    block = next(part for part in text.split("\n\n") if part.startswith(title))
    return {line.split()[0]: line.split()[1:] for line in block.splitlines()[2:]}


def test_tables_with_what_was_measured(deltacache):
    printed = deltacache("flops", *TINY, "--measure", "--device", "cpu").done().stdout
    futures = _rows(printed, "GFLOPs of all futures of one image: 2 crops, context 4, horizon 3, 2 samples")
    assert list(futures) == TABLE_2
    for paper, exact, here in futures.values():
        assert float(paper) >= float(exact) > float(here)
    steps = _rows(printed, "GFLOPs of a training step of one clip of 3 frames")
    assert [row[0] for row in steps.values()] == ["1", "16", "16", "16"]
    measured = _rows(printed, "Measured here")
    assert list(measured) == TABLE_2
    assert measured["dino-world"][-2:] == ["1x", "1x"]
    assert all(float(row[0]) > 0 for row in measured.values())
    assert "backbone, a frame" in printed
    assert "counts the attention of predictors twice" in printed


def test_nothing_is_measured_unless_asked_for(deltacache):
    assert "Measured" not in deltacache("flops", *TINY).done().stdout


def test_refusals(deltacache):
    deltacache("flops", "--image-size", "big").refused("image_size.0", "valid integer")
    deltacache("flops", "--preset", "none").refused("'none' is not a preset of a world")


@pytest.mark.slow
def test_candidates_replace_those_of_recipes_with_noise():
    assert [system.candidates for system in systems_of("released", 768)] == [1, 256, 256, 256]
    assert [system.candidates for system in systems_of("table2", 768, 8)] == [1, 8, 8, 8, 1]
    assert [system.name for system in systems_of("table2", 768)] == [*TABLE_2, "discriminative"]


def test_dino_world_in_its_original_size():
    (system,) = systems_of("dino-world-large", 768)
    assert isinstance(system.world, DinoWorld)
    assert len(system.world.predictor.blocks) == 40
    assert system.world.arguments["num_heads"] == 24
    assert system.world.noise_size == 1536


def test_several_tokens_a_frame_reach_the_world_model():
    systems = systems_of("tiny-tokens", 64)
    assert [system.world.arguments["tokens_per_frame"] for system in systems] == [1, 2, 4, 8, 16]


def test_presets_that_do_not_fit():
    with pytest.raises(MismatchError, match="of preset 'released' does not fit tokens 100 wide"):
        systems_of("released", 100)


@pytest.mark.parametrize(("preset", "width"), [("discriminative", 768), ("foresight-delta", 1152)])
def test_a_world_model_without_a_tokenizer_of_its_own_gets_that_of_its_table(preset, width):
    (system,) = systems_of(preset, width)
    assert (system.name, system.world.stochastic) == (preset, False)
    assert system.tokenizer is not None
    assert system.tokenizer.frame_compression == "off"


def test_a_preset_of_frame_tokens_is_no_delta_compression():
    systems = {system.name: system.tokenizer for system in systems_of("frame-tokens", 768)}
    assert systems["frame-tokens"].frame_compression == "zeros"
    assert systems["delta-tokens"].frame_compression == "off"


@pytest.mark.slow
def test_whole_frames_of_table_d(tmp_path):
    listed = tmp_path / "table-d.yaml"
    listed.write_text(TABLE_D)
    request = CostRequest(
        preset=str(listed),
        backbone="dinov2-with-registers-small",
        hidden_size=1152,
        image_size="28x56",  # pyright: ignore[reportArgumentType]
        crops=1,
        horizon=1,
        frames=5,
    )
    costs = count_costs(request)
    patches, deltas = costs.rows
    assert patches.flops.step.here > deltas.flops.step.here
    assert patches.flops.samples == deltas.flops.samples == 1
    assert "28 x 56 px" in costs_text(costs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "width", "heads"),
    [
        ("delta-tokens", 1280, {20}),
        ("delta-tokens", 1024, {16}),
        ("delta-tokens", 4096, {64}),
        ("delta-tokens", 384, {6}),  # 12 would divide it
        ("table2", 1024, {16}),
        ("released", 768, {12}),
        ("tiny", 64, {4}),
        ("tiny-table2", 64, {4}),
        ("foresight-delta", 1152, {18, 8}),
        ("dino-world-large", 1280, {24}),  # of its own width
    ],
)
def test_other_widths_have_heads_of_64_dims(preset, width, heads):
    chosen = chosen_systems(preset, width)
    models = [each.model for each in chosen.config.tokenizers.values()]
    models += [each.world.model for each in chosen.config.systems.values()]
    assert {model.num_heads for model in models} == heads
    if heads == {width // 64} and width not in (64, 768):
        assert f"tokens {width} wide have {width // 64} attention heads of 64 dims here" in chosen.notes[0]
    else:
        assert not chosen.notes
    assert systems_of(preset, width)


def test_any_backbone_and_any_heads(deltacache):
    wide = ("--preset", "discriminative", "--image-size", "32", "--samples", "2", "--frames", "3")
    printed = deltacache("flops", *wide, "--backbone", "vits16plus", "--candidates", "2").done().stdout
    assert "tokens 384 wide have 6 attention heads of 64 dims here" in printed
    assert "instead of 12: --heads takes another number" in printed
    assert "counting: starting" in printed
    assert "published" not in printed
    given = deltacache("flops", *TINY, "--heads", "8").done().stdout
    assert "attention heads of" not in given
    deltacache("flops", *TINY, "--heads", "7").refused("does not fit tokens 64 wide", "--heads")


def _published(text):
    """``part or system, context: published, difference`` of all lines that have both."""
    found = re.findall(r"^  (\S.*?)  .*?(\S+) +([+-][\d.]+) %$", text, re.MULTILINE)
    return {(name, number): float(off) for name, number, off in found}


@pytest.mark.slow
def test_published_numbers_stand_beside_those_that_are_counted():
    found = _published(costs_text(count_costs(CostRequest(frames=2, candidates=2))))
    two_digits = {number: found.pop((f"predictor, context {at}", number)) for at, number in
                  zip((4, 5, 6), ("0.26", "0.28", "0.31"), strict=True)}  # fmt: skip
    assert all(abs(off) < 2 for off in two_digits.values())
    assert {number for _, number in found} == {
        *("47.185", "96.930", "46.12", "84.88", "96.96", "109.04"), *("959", "12,013", "6,315", "6,721")
    }  # fmt: skip
    assert all(abs(off) <= 0.1 for off in found.values())
    assert found["delta-tokens", "6,721"] == 0.06


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"image_size": (64, 64)}, {"backbone": "vits16"}, {"hidden_size": 384}])
def test_other_settings_have_no_published_numbers(changes):
    fields = {"preset": "dino-world", "frames": 2, "samples": 2}
    assert not _published(costs_text(count_costs(CostRequest(**(fields | changes)))))


@pytest.mark.slow
def test_totals_are_published_for_their_horizon_and_samples_alone():
    """Parts are the same; a single system is counted fast."""
    request = CostRequest(preset="dino-world", horizon=1, frames=2)
    found = _published(costs_text(count_costs(request)))
    assert {number for _, number in found} == {"47.185", "84.88"}


WORLD_RECIPE = """
model: {num_heads: 4, num_layers: 1}
candidates: 3
training: {steps: 5, batch_size: 2, learning_rate: 0.1, weight_decay: 0}
"""
TOKENIZER_RECIPE = """
model: {num_heads: 4, encoder_layers: 1, decoder_layers: 2}
training: {steps: 5, batch_size: 2, learning_rate: 0.1, weight_decay: 0}
"""


def test_a_recipe_of_one_model_is_counted_with_a_stand_in(deltacache, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(WORLD_RECIPE)
    printed = deltacache("flops", "--preset", recipe, *TINY[2:]).done().stdout
    assert list(_rows(printed, "GFLOPs of all futures of one image")) == ["recipe"]
    assert "the tokenizer is that of preset released" in printed
    assert _rows(printed, "GFLOPs of a training step")["recipe"][0] == "3"
    recipe.write_text(WORLD_RECIPE.replace("{num", "{architecture: dino_world, num"))
    (system,) = systems_of(str(recipe), 64)
    assert isinstance(system.world, DinoWorld)
    assert not chosen_systems(str(recipe), 64).notes
    recipe.write_text(TOKENIZER_RECIPE)
    (system,) = systems_of(str(recipe), 64)
    assert system.tokenizer is not None
    assert len(system.tokenizer.decoder_blocks) == 2
    assert "the world model is that of preset released" in chosen_systems(str(recipe), 64).notes[0]


def test_a_yaml_of_another_kind_is_refused(deltacache, tmp_path):
    chain = tmp_path / "chain.yaml"
    chain.write_text("train_videos: {}\nworlds: {}\n")
    deltacache("flops", "--preset", chain).refused(
        "seems to be a chain, which is for deltacache run FILE.yaml"
    )
    chain.write_text(WORLD_RECIPE.replace("num_heads", "num_head"))
    deltacache("flops", "--preset", chain).refused("model.num_head: is not known: give num_heads, ")
