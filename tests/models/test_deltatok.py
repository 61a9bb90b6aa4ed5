"""DeltaTok's clip-wide calls against single steps, its options, and its randomness."""

import pytest
import torch

from deltacache.models.blocks import log_cosh
from deltacache.models.deltatok import DeltaTok
from deltacache.models.futures import decode_future

GRID = (2, 3)
BATCH, FRAMES, PATCHES, HIDDEN = 2, 4, 6, 16


def _tokenizer(**arguments) -> DeltaTok:
    torch.manual_seed(0)
    return DeltaTok(HIDDEN, 2, 1, 1, **{"layer_scale_init": 0.5, **arguments}).eval()


@pytest.fixture
def clip():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, FRAMES, PATCHES, HIDDEN, generator=generator), torch.randn(
        PATCHES, HIDDEN, generator=generator
    )


def test_a_clip_is_encoded_as_its_pairs(clip):
    tokenizer, (frames, black) = _tokenizer(), clip
    deltas = tokenizer.encode_clip(frames, black, GRID)
    previous = black.expand(BATCH, -1, -1)
    for t in range(FRAMES):
        torch.testing.assert_close(deltas[:, t], tokenizer.encode(previous, frames[:, t], GRID).detach())
        previous = frames[:, t]


@pytest.mark.parametrize("horizon", [1, 2, FRAMES])
def test_reconstructions_step_by_step(clip, horizon):
    tokenizer, (frames, black) = _tokenizer(), clip
    true = torch.cat((black.expand(BATCH, 1, -1, -1), frames), dim=1)
    closed = parallel = true[:, FRAMES - horizon]
    results = {
        "closed": tokenizer.reconstruct_closed_loop(frames, black, GRID, horizon),
        "parallel": tokenizer.reconstruct_parallel(frames, black, GRID, horizon),
    }
    with torch.no_grad():
        for step, t in enumerate(range(FRAMES - horizon, FRAMES)):
            closed = tokenizer.decode(tokenizer.encode(closed, true[:, t + 1], GRID), closed, GRID)
            parallel = tokenizer.decode(tokenizer.encode(true[:, t], true[:, t + 1], GRID), parallel, GRID)
            torch.testing.assert_close(results["closed"][:, step], closed)
            torch.testing.assert_close(results["parallel"][:, step], parallel)
    assert torch.allclose(closed, parallel) == (horizon == 1)


@pytest.mark.parametrize("horizon", [0, FRAMES + 1])
def test_horizons_beyond_the_clip_are_refused(clip, horizon):
    with pytest.raises(ValueError, match=f"horizon {horizon} is not within the clip's 4 frames"):
        _tokenizer().reconstruct_closed_loop(*clip, GRID, horizon)


def test_true_deltas_decode_to_the_parallel_reconstruction(clip):
    tokenizer, (frames, black) = _tokenizer(), clip
    deltas = tokenizer.encode_clip(frames, black, GRID)[:, None, -2:]
    futures = decode_future(tokenizer, frames[:, -3], deltas.expand(-1, 3, -1, -1), GRID)
    expected = tokenizer.reconstruct_parallel(frames, black, GRID, 2)
    assert futures.shape == (BATCH, 3, 2, PATCHES, HIDDEN)
    torch.testing.assert_close(futures, expected[:, None].expand_as(futures))


def test_every_sample_of_a_future_is_its_own(clip):
    tokenizer, (frames, _) = _tokenizer(), clip
    deltas = torch.randn(BATCH, 3, 2, HIDDEN, generator=torch.Generator().manual_seed(2))
    futures = decode_future(tokenizer, frames[:, -1], deltas, GRID)
    for s in range(3):
        alone = decode_future(tokenizer, frames[:, -1], deltas[:, s : s + 1], GRID)
        torch.testing.assert_close(futures[:, s : s + 1], alone)


def test_positions_tell_patches_apart():
    tokenizer = _tokenizer()
    generator = torch.Generator().manual_seed(3)
    previous, current = torch.randn(2, 1, PATCHES, HIDDEN, generator=generator).unbind()
    order = torch.randperm(PATCHES, generator=generator)
    there = tokenizer.encode(previous, current, GRID)
    shuffled = tokenizer.encode(previous[:, order], current[:, order], GRID)
    assert (there - shuffled).abs().max() > 1e-4


def test_fresh_tokenizer_decodes_to_the_previous_frame(clip):
    tokenizer, (frames, _) = _tokenizer(layer_scale_init=1e-5), clip
    decoded = tokenizer.decode(torch.randn(BATCH, HIDDEN), frames[:, 0], GRID)
    torch.testing.assert_close(decoded, frames[:, 0], atol=1e-3, rtol=0)


@pytest.mark.parametrize("start", ["learned", "zeros"])
def test_frame_compression_never_sees_the_previous_frame(clip, start):
    tokenizer, (frames, black) = _tokenizer(frame_compression=start), clip
    delta = tokenizer.encode(frames[:, 0], frames[:, 1], GRID)
    assert torch.equal(delta, tokenizer.encode(black.expand_as(frames[:, 0]), frames[:, 1], GRID))
    decoded = tokenizer.decode(delta, frames[:, 0], GRID)
    assert torch.equal(decoded, tokenizer.decode(delta, frames[:, 2], GRID))
    with torch.no_grad():
        tokenizer.xy_embed.weight[0] += 1.0
    assert torch.equal(decoded, tokenizer.decode(delta, frames[:, 2], GRID)) == (start == "zeros")


@pytest.mark.parametrize("kind", ["mse", "log_cosh"])
def test_training_loss_trains_what_it_names(clip, kind):
    tokenizer, (frames, _) = _tokenizer(), clip
    result = tokenizer.training_loss(frames[:, 0], frames[:, 1], GRID, kind)
    decoded = tokenizer.decode(tokenizer.encode(frames[:, 0], frames[:, 1], GRID), frames[:, 0], GRID)
    mse = (decoded - frames[:, 1]).square().mean()
    torch.testing.assert_close(result.mse, mse.detach())
    torch.testing.assert_close(result.loss, mse if kind == "mse" else log_cosh(decoded, frames[:, 1]).mean())
    result.loss.backward()
    assert all(parameter.grad is not None for parameter in tokenizer.parameters())


def _reconstruction(tokenizer: DeltaTok, frames, generator):
    return tokenizer.training_loss(frames[:, 0], frames[:, 1], GRID, "mse", generator).reconstruction


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_rope_is_rescaled_in_train_mode_by_the_generator(clip):
    tokenizer, (frames, _) = _tokenizer().train(), clip
    plain = _reconstruction(tokenizer, frames, None)
    first = _reconstruction(tokenizer, frames, _seeded(1))
    assert not torch.allclose(first, plain, atol=1e-5)
    assert not torch.allclose(first, _reconstruction(tokenizer, frames, _seeded(2)), atol=1e-5)
    assert torch.equal(first, _reconstruction(tokenizer, frames, _seeded(1)))


def test_rope_stays_in_eval_mode_and_without_the_option(clip):
    frames, _ = clip
    for tokenizer in (_tokenizer(), _tokenizer(rope_rescale=None).train()):
        generator = _seeded(1)
        assert torch.equal(
            _reconstruction(tokenizer, frames, generator), _reconstruction(tokenizer, frames, None)
        )
        assert torch.equal(generator.get_state(), _seeded(1).get_state())


def test_rescale_factors_fill_their_range(monkeypatch, clip):
    tokenizer, (frames, _) = _tokenizer(rope_rescale=4.0).train(), clip
    factors: list[float] = []
    monkeypatch.setattr(
        "deltacache.models.deltatok.patch_rotation",
        lambda grid, head_dim, theta, scale: factors.append(scale.log2().item()),
    )
    generator = _seeded(3)
    for _ in range(400):
        tokenizer._rotation(frames, GRID, generator)
    assert -2.0 <= min(factors) < -1.9
    assert 1.9 < max(factors) <= 2.0
    assert abs(sum(factors) / len(factors)) < 0.2  # log-uniform: as often smaller as larger


def test_tokens_that_are_no_such_grid_are_refused(clip):
    frames, _ = clip
    with pytest.raises(ValueError, match="6 patch tokens do not form a grid of 2 x 2"):
        _tokenizer().encode(frames[:, 0], frames[:, 1], (2, 2))


@pytest.mark.parametrize("heads", [0, 3, 8])
def test_heads_that_the_rotation_cannot_turn_are_refused(heads):
    with pytest.raises(ValueError, match=f"16 does not split into {heads} heads of a multiple of 4"):
        DeltaTok(HIDDEN, heads, 1, 1)


def test_sixteen_bit_autocast_runs(clip):
    tokenizer, (frames, _) = _tokenizer().train(), clip
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = tokenizer.training_loss(frames[:, 0], frames[:, 1], GRID, "log_cosh", _seeded(1))
    result.loss.backward()
    assert result.loss.isfinite()
