"""DINO-world against the released code, a slow oracle and its promise not to look ahead; tokens per frame likewise."""

import functools

import pytest
import torch
from augmented_positions import solve, stretched_backbone

from deltacache.models.blocks import first_tokens, smooth_l1
from deltacache.models.selection import Selection
from deltacache.models.worlds.deltaworld import DeltaWorld
from deltacache.models.worlds.dino_world import DinoWorld
from deltacache.schemas.configs import world_preset

BATCH, FRAMES, CANDIDATES, HIDDEN, BETA, GRID = 2, 4, 5, 24, 0.1, (2, 3)


@pytest.fixture
def golden_dino_world(read, heads) -> DinoWorld:
    weights = read("dinoworld")
    layers = len({name.split(".")[2] for name in weights if ".blocks." in name})
    model = DinoWorld(weights["predictor.norm.weight"].shape[0], heads, layers, query="learned")
    model.load_state_dict(weights)
    return model.eval()


def test_rollouts_are_those_of_the_released_code(golden_dino_world, read, grid, assert_golden):
    expected, inputs = read("dinoworld_io")["rollouts"], read("deltatok_released_io")
    context = read("deltaworld_rollout")["context"].shape[1]
    seconds = inputs["timestamps"][:, : context + expected.shape[2]]
    futures = golden_dino_world.rollout(inputs["patch_tokens"][:, :context], seconds, grid=grid)
    assert_golden(futures, expected)


def test_teacher_forcing_is_that_of_the_released_code(
    golden_dino_world, golden_backbone, read, grid, assert_golden
):
    """The released backbone was in train mode, with one unrecorded factor, which is solved for."""
    expected, inputs = read("dinoworld_io")["y_hat"], read("deltatok_released_io")
    frames = inputs["frames"][:, : expected.shape[1] + 1]
    seconds = inputs["timestamps"][:, : frames.shape[1]]

    @functools.cache
    def features(log2_factor: float):
        tokens = stretched_backbone(golden_backbone, log2_factor).patch_tokens(frames.flatten(0, 1))
        return tokens.unflatten(0, frames.shape[:2])

    @torch.no_grad()
    def difference(factor: float):
        tokens = features(factor)
        return (
            golden_dino_world.training_loss(tokens, seconds, grid=grid, candidates=1, beta=BETA).prediction
            - expected
        )

    (factor,) = solve(difference, [torch.linspace(-1, 1, 9)])
    assert_golden(difference(factor) + expected, expected)


def _dino_world(query="noise", **options) -> DinoWorld:
    """Weights, LayerScale and noise so large that candidates, places, times and past all matter."""
    torch.manual_seed(0)
    return _enlarged(DinoWorld(HIDDEN, 2, 2, query=query, noise_std=1.0, layer_scale_init=0.5, **options))


def _delta_world(tokens: int, **options) -> DeltaWorld:
    torch.manual_seed(0)
    arguments = {"noise_std": 1.0, "layer_scale_init": 0.5, "tokens_per_frame": tokens, **options}
    return _enlarged(DeltaWorld(HIDDEN, 2, 2, **arguments))


def _enlarged(world):
    with torch.no_grad():
        for part in world.modules():
            if isinstance(part, torch.nn.Linear | torch.nn.Embedding):
                part.weight *= 10.0
    return world.double().eval()


def _clip(tokens: int):
    generator = torch.Generator().manual_seed(1)
    frames = torch.randn(BATCH, FRAMES, tokens, HIDDEN, generator=generator, dtype=torch.float64)
    return frames, torch.rand(BATCH, FRAMES, generator=generator, dtype=torch.float64).cumsum(1)


def _noise(width: int = HIDDEN):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(BATCH, FRAMES - 1, CANDIDATES, width, generator=generator, dtype=torch.float64)


WORLDS = {
    "dino": lambda: (_dino_world(), 6),
    "wide dino": lambda: (_dino_world(width=48), 6),
    "three tokens": lambda: (_delta_world(3), 3),
    "three tokens, wide": lambda: (_delta_world(3, width=36), 3),
}


@pytest.mark.parametrize("kind", WORLDS)
def test_winners_and_predictions_equal_a_loop_over_everything(kind):
    """One clip, frame, candidate and token at a time, each with only the keys it may see."""
    world, count = WORLDS[kind]()
    tokens, seconds = _clip(count)
    noise = _noise(world.noise_size)
    result = world.training_loss(tokens, seconds, grid=GRID, candidates=CANDIDATES, beta=BETA, noise=noise)
    best = torch.empty(BATCH, FRAMES - 1, dtype=torch.float64)
    for b in range(BATCH):
        for p in range(FRAMES - 1):
            past = world.remember(tokens[b, None, : p + 1], seconds[b, None, : p + 1], GRID)
            rotation = world.rotation(seconds[b, None, p + 1, None], GRID)
            losses = []
            frames = []
            for query in noise[b, p]:
                queries = query.expand(1, count, -1)
                if world.places is not None:
                    queries = queries + world.places.of_queries
                each = [
                    world.predictor(
                        queries[:, m, None], rotation.map(lambda part, m=m: part[:, :, m, None]), past
                    )
                    for m in range(count)
                ]
                frames.append(torch.cat(each, dim=1)[0])
                losses.append(smooth_l1(frames[-1], tokens[b, p + 1], BETA).mean().item())
            assert result.winners[b, p] == losses.index(min(losses))
            torch.testing.assert_close(result.prediction[b, p], frames[losses.index(min(losses))])
            best[b, p] = min(losses)
    torch.testing.assert_close(result.loss, best.mean())
    assert result.winners.unique().numel() > 1


@pytest.mark.parametrize("kind", WORLDS)
@pytest.mark.parametrize("changed", range(1, FRAMES))
def test_a_change_in_a_frame_leaves_predictions_up_to_it_as_they_were(kind, changed):
    world, count = WORLDS[kind]()
    tokens, seconds = _clip(count)
    noise = _noise(world.noise_size)[:, :, :1]  # one candidate: nothing to choose by the targets

    def predictions(clip):
        loss = world.training_loss(clip, seconds, grid=GRID, candidates=1, beta=BETA, noise=noise)
        return loss.prediction

    other = tokens.clone()
    other[:, changed] += 1.0
    before, after = predictions(tokens), predictions(other)
    assert torch.equal(before[:, :changed], after[:, :changed])  # prediction p is of frame p + 1
    if changed < FRAMES - 1:
        assert (before[:, changed:] - after[:, changed:]).abs().amax(dim=(0, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("kind", WORLDS)
def test_a_rollout_is_teacher_forcing_on_its_own_predictions(kind):
    world, count = WORLDS[kind]()
    tokens, seconds = _clip(count)
    noise = _noise(world.noise_size).transpose(1, 2)[:, :, :2]  # (B, S, H, Z)
    context = FRAMES - 2
    futures = world.rollout(tokens[:, :context], seconds, noise, grid=GRID)
    assert futures.shape == (BATCH, CANDIDATES, 2, count, HIDDEN)
    for sample in range(CANDIDATES):
        clip = torch.cat((tokens[:, :context], futures[:, sample]), dim=1)
        forced = torch.cat((torch.zeros_like(noise[:, sample, :1]), noise[:, sample]), dim=1)[
            :, -(FRAMES - 1) :, None
        ]
        loss = world.training_loss(clip, seconds, grid=GRID, candidates=1, beta=BETA, noise=forced)
        torch.testing.assert_close(loss.prediction[:, -2:], futures[:, sample])


@pytest.mark.parametrize("kind", WORLDS)
def test_the_shortlist_in_16_bits_finds_the_winners(kind):
    world, count = WORLDS[kind]()
    world, (tokens, seconds) = world.float(), _clip(count)
    arguments = {
        "grid": GRID,
        "candidates": CANDIDATES,
        "beta": BETA,
        "noise": _noise(world.noise_size).float(),
    }
    full = world.training_loss(tokens.float(), seconds.float(), **arguments)
    quick = world.training_loss(
        tokens.float(), seconds.float(), **arguments, selection=Selection(torch.bfloat16, shortlist=4)
    )
    assert torch.equal(full.winners, quick.winners)


def test_only_the_past_is_remembered():
    world, (tokens, seconds) = _dino_world(), _clip(6)
    past = world.remember(tokens, seconds, GRID)
    shorter = world.remember(tokens[:, :2], seconds[:, :2], GRID)
    for whole, part in zip(first_tokens(past, 12), shorter, strict=True):
        torch.testing.assert_close(whole.keys, part.keys)


def test_a_grid_is_needed_and_must_fit():
    world, (tokens, seconds) = _dino_world("learned"), _clip(6)
    with pytest.raises(ValueError, match="need the grid"):
        world.rollout(tokens[:, :2], seconds)
    with pytest.raises(ValueError, match="is 8 tokens"):
        world.rollout(tokens[:, :2], seconds, grid=(2, 4))
    with pytest.raises(ValueError, match="is 3 tokens"):
        _delta_world(3).training_loss(tokens, seconds, candidates=1, beta=BETA)


@pytest.mark.parametrize(
    ("preset", "layers", "width", "heads"), [("dino-world", 12, 768, 12), ("dino-world-large", 40, 1536, 24)]
)
def test_presets_have_the_published_sizes(preset, layers, width, heads):
    config = world_preset(preset)
    assert config.model.architecture == "dino_world"
    with torch.device("meta"):
        world = DinoWorld(768, **config.model.arguments)
    assert (len(world.predictor.blocks), world.predictor.head_dim * heads) == (layers, width)
    assert world.predictor.norm.weight.shape == (width,)
    assert (config.candidates, config.model.query) == (1, "learned")
