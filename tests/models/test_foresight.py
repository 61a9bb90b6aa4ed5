"""DINO-Foresight's masked transformers: what they see, how they roll out, and that they learn motion."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltacache.models.blocks import smooth_l1
from deltacache.models.checkpoints import load_world, save_model
from deltacache.models.masked_transformer import PlainAttention
from deltacache.models.world_model import WorldModel
from deltacache.models.worlds import world_class
from deltacache.models.worlds.foresight import Foresight, SeparableBlock
from deltacache.models.worlds.foresight_delta import ForesightDelta
from deltacache.schemas.errors import MismatchError

GRID, WIDTH, BETA = (2, 3), 12, 0.1
ARGUMENTS: dict[str, Any] = {"hidden_size": WIDTH, "num_heads": 2, "num_layers": 2}


def randomised(model: WorldModel, seed: int = 0) -> WorldModel:
    """Every parameter random: at the start the head is zero and nothing would show."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def clips(frames: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Patch tokens (2, T, N, D) and times (2, T)."""
    tokens = torch.randn(2, frames, GRID[0] * GRID[1], WIDTH, generator=torch.Generator().manual_seed(seed))
    return tokens, torch.arange(float(frames)).expand(2, -1)


def models() -> list[tuple[WorldModel, Tensor, Tensor]]:
    """Both architectures, with tokens of seven frames."""
    tokens, seconds = clips(7)
    return [
        (randomised(Foresight(**ARGUMENTS, position_grid=(2, 3))), tokens, seconds),
        (randomised(ForesightDelta(**ARGUMENTS)), tokens[:, :, 0], seconds),
        (randomised(ForesightDelta(**ARGUMENTS, tokens_per_frame=6)), tokens, seconds),
    ]


@pytest.mark.parametrize("which", range(3))
def test_the_loss_is_that_of_one_window_after_the_other(which: int) -> None:
    model, tokens, seconds = models()[which]
    result = model.training_loss(tokens, seconds, grid=GRID, candidates=1, beta=BETA)
    assert result.prediction.shape == tokens[:, 4:].shape
    losses = []
    for start in range(3):
        one = model.rollout(tokens[:, start : start + 4], seconds[:, :5], grid=GRID)[:, 0, 0]
        torch.testing.assert_close(result.prediction[:, start], one)
        losses.append(smooth_l1(one, tokens[:, start + 4], BETA).mean())
    torch.testing.assert_close(result.loss, torch.stack(losses).mean())


@pytest.mark.parametrize("which", range(3))
def test_the_last_four_frames_decide_and_their_order_counts(which: int) -> None:
    model, tokens, seconds = models()[which]
    future = model.rollout(tokens[:, :5], seconds[:, :6], grid=GRID)
    changed = tokens.clone()
    changed[:, 0] += 1.0
    assert torch.equal(model.rollout(changed[:, :5], seconds[:, :6], grid=GRID), future)
    for frame in range(1, 5):
        changed = tokens.clone()
        changed[:, frame] += 1.0
        assert (model.rollout(changed[:, :5], seconds[:, :6], grid=GRID) - future).abs().max() > 1e-3
    swapped = tokens[:, [0, 2, 1, 3, 4]]
    assert (model.rollout(swapped, seconds[:, :6], grid=GRID) - future).abs().max() > 1e-3


@pytest.mark.parametrize("which", range(3))
def test_predictions_join_the_window_one_by_one(which: int) -> None:
    model, tokens, seconds = models()[which]
    futures = model.rollout(tokens[:, :4], seconds, grid=GRID)
    assert futures.shape == (2, 1, *tokens[0, 4:].shape)
    seen = tokens[:, :4]
    for step in range(3):
        following = model.rollout(seen[:, -4:], seconds[:, :5], grid=GRID)[:, 0]
        torch.testing.assert_close(futures[:, 0, step : step + 1], following)
        seen = torch.cat((seen, following), dim=1)


def test_separable_attention_goes_over_frames_and_then_over_patches() -> None:
    block = SeparableBlock(WIDTH, 2, 20, 0.0)
    hidden = torch.randn(2, 3, 4, WIDTH, generator=torch.Generator().manual_seed(0))

    def attended(part: nn.Module, tokens: Tensor) -> Tensor:
        attention = cast(PlainAttention, part.layer)
        normed = cast(nn.LayerNorm, part.norm)(tokens)
        qkv, out = attention.qkv_proj, attention.out_proj
        mixed, _ = F.multi_head_attention_forward(
            *(normed[:, None],) * 3,
            WIDTH,
            2,
            qkv.weight,
            qkv.bias,
            None,
            None,
            False,
            0.0,
            out.weight,
            out.bias,
        )
        return tokens + mixed[:, 0]

    with torch.no_grad():
        expected = hidden.clone()
        for clip in range(2):
            for patch in range(4):
                expected[clip, :, patch] = attended(block.temporal, expected[clip, :, patch])
            for frame in range(3):
                expected[clip, frame] = attended(block.spatial, expected[clip, frame])
        expected = expected + block.mlp.layer(block.mlp.norm(expected))
        torch.testing.assert_close(block(hidden), expected)


def test_positions_are_stretched_as_one_picture_of_them_would_be() -> None:
    model = Foresight(**ARGUMENTS, position_grid=(2, 3))
    positions = model.positions((4, 6)).unflatten(1, (4, 6))
    third = WIDTH // 3
    for dim, table, lines in (
        (slice(third, 2 * third), model.row_embed, positions[2, :, 5]),
        (slice(2 * third, None), model.column_embed, positions[2, 3, :]),
    ):
        picture = F.interpolate(table[None, None], size=(len(lines), third), mode="bilinear")[0, 0]
        torch.testing.assert_close(lines[:, dim], picture)
    torch.testing.assert_close(model.positions((2, 3))[1, 4, :third], model.time_embed[1])
    assert torch.equal(model.positions((2, 3))[0, 5, third : 2 * third], model.row_embed[1])
    assert torch.equal(model.positions((2, 3))[0, 5, 2 * third :], model.column_embed[2])


def test_the_published_size() -> None:
    with torch.device("meta"):
        model = world_class("foresight")(1152, 8, 12, query="learned", dropout=0.1)
    attention, mlp, norms = 4 * 1152**2 + 4 * 1152, 8 * 1152**2 + 5 * 1152, 3 * 2 * 1152
    ends, tables = 2 * (1152**2 + 1152) + 1152, (5 + 16 + 32) * 384
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == 12 * (2 * attention + mlp + norms) + ends + tables


def test_dropout_follows_the_generator_and_leaves_the_global_one_alone() -> None:
    model = randomised(Foresight(**ARGUMENTS, position_grid=(2, 3), dropout=0.5))
    tokens, seconds = clips(5)

    def loss(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return model.training_loss(
            tokens, seconds, grid=GRID, candidates=1, beta=BETA, generator=generator
        ).loss

    assert torch.equal(loss(0), loss(1))  # eval mode
    model.train()
    state = torch.random.get_rng_state()
    first, again, other = loss(0), loss(0), loss(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with pytest.raises(ValueError, match="dropout needs a generator"):
        model.training_loss(tokens, seconds, grid=GRID, candidates=1, beta=BETA)


def test_what_does_not_fit_is_refused() -> None:
    model, tokens, seconds = models()[0]
    with pytest.raises(MismatchError, match=r"clips have 4 frames, but a window has 5: .*--frames 5"):
        model.training_loss(tokens[:, :4], seconds[:, :4], grid=GRID, candidates=1, beta=BETA)
    with pytest.raises(MismatchError, match=r"3 context frames .* looks at 4: give --context 4"):
        model.rollout(tokens[:, :3], seconds[:, :4], grid=GRID)
    with pytest.raises(ValueError, match="one candidate"):
        model.training_loss(tokens, seconds, grid=GRID, candidates=2, beta=BETA)
    with pytest.raises(ValueError, match="takes no noise"):
        model.rollout(tokens, seconds, torch.zeros(2, 1, 1, WIDTH), grid=GRID)
    with pytest.raises(ValueError, match="need the grid"):
        model.rollout(tokens[:, :4], seconds[:, :5])
    with pytest.raises(ValueError, match="query 'noise'"):
        Foresight(**ARGUMENTS, query="noise")
    with pytest.raises(ValueError, match="12 does not split into 5 heads"):
        ForesightDelta(WIDTH, 5, 1)


@pytest.mark.parametrize("which", range(3))
def test_a_checkpoint_gives_the_same_model(which: int, tmp_path: Path) -> None:
    model, tokens, seconds = models()[which]
    save_model(tmp_path, model, "world", {})
    loaded = load_world(tmp_path).model
    assert type(loaded) is type(model)
    assert not loaded.stochastic
    expected = model.rollout(tokens[:, :4], seconds, grid=GRID)
    assert torch.equal(loaded.rollout(tokens[:, :4], seconds, grid=GRID), expected)


def moving_shapes(count: int, frames: int, generator: torch.Generator) -> Tensor:
    """Blobs that cross a 3 x 6 grid, each at its own speed: (B, T, 18, 4)."""
    rows, columns = torch.meshgrid(torch.arange(3.0), torch.arange(6.0), indexing="ij")
    places = torch.stack((rows, columns), -1).flatten(0, 1)
    start = torch.rand(count, 2, generator=generator) * torch.tensor([2.0, 5.0])
    speed = 1.2 * (torch.rand(count, 2, generator=generator) - 0.5)
    centres = start[:, None] + speed[:, None] * torch.arange(frames)[:, None]
    blobs = (-(places - centres[:, :, None]).square().sum(-1)).exp()
    return 2.0 * blobs[..., None] * torch.tensor([1.0, -1.0, 0.5, 0.8])


@pytest.mark.slow
def test_the_baseline_learns_motion() -> None:
    generator, grid, steps = torch.Generator().manual_seed(0), (3, 6), 150
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Foresight(4, 4, 2, position_grid=grid, width=32)
    optimizer = torch.optim.Adam(model.parameters())
    seconds = torch.arange(5.0).expand(32, -1)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        optimizer.zero_grad()
        tokens = moving_shapes(32, 5, generator)
        model.training_loss(tokens, seconds, grid=grid, candidates=1, beta=BETA).loss.backward()
        optimizer.step()
    tokens = moving_shapes(64, 7, torch.Generator().manual_seed(1))
    futures = model.eval().rollout(tokens[:, :4], torch.arange(7.0).expand(64, -1), grid=grid)[:, 0]
    for step in (0, 2):
        own = smooth_l1(futures[:, step], tokens[:, 4 + step], BETA).mean()
        copied = smooth_l1(tokens[:, 3], tokens[:, 4 + step], BETA).mean()
        assert own < 0.6 * copied
