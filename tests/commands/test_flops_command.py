"""``flops``: the tables of any preset, counted and measured."""

import pytest

from deltacache.chain.costs import CostRequest, count_costs, systems_of
from deltacache.chain.costs_shown import costs_text
from deltacache.models.worlds.dino_world import DinoWorld
from deltacache.schemas.errors import MismatchError

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
    deltacache("flops", "--preset", "none").refused("'none' is no preset of a world")


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
