"""DeltaWorld against numbers that came out of the released code."""

import functools

import pytest
import torch
from augmented_positions import solve, stretched_backbone, stretched_deltas

from deltacache.models.futures import decode_future

BETA = 0.1  # of the golden smooth-L1 losses


@pytest.fixture
def clips(read):
    """Patch tokens, delta tokens and times of the golden clips."""
    io, train = read("deltatok_released_io"), read("deltaworld_train")
    return io["patch_tokens"], train["z"], train["timestamps"]


def test_best_of_many_loss_winners_and_gradients(golden_world, read, assert_golden):
    world, expected = golden_world("deltaworld"), read("deltaworld_train")
    noise = expected["queries"]
    result = world.training_loss(
        expected["z"], expected["timestamps"], candidates=noise.shape[2], beta=BETA, noise=noise
    )
    assert_golden(result.prediction, expected["z_hat"])
    assert_golden(expected["z"][:, 1:], expected["target"])
    assert_golden(result.loss, expected["loss"][0])
    assert result.winners.unique().numel() > 1
    result.loss.backward()
    parameters = dict(world.named_parameters())
    gradients = {
        name.removeprefix("grad."): grad for name, grad in expected.items() if name.startswith("grad.")
    }
    assert gradients
    for name, gradient in gradients.items():
        assert_golden(parameters[name].grad, gradient)


def test_sampled_rollouts(golden_world, golden_tokenizer, read, clips, grid, assert_golden):
    patch_tokens, deltas, seconds = clips
    expected = read("deltaworld_rollout")
    context, horizon = expected["context"].shape[1], expected["queries"].shape[2]
    assert_golden(patch_tokens[:, :context], expected["context"])
    assert_golden(patch_tokens[:, context : context + horizon], expected["targets"])
    futures = golden_world("deltaworld").rollout(
        deltas[:, :context], seconds[:, : context + horizon], expected["queries"]
    )
    frames = decode_future(golden_tokenizer("released"), patch_tokens[:, context - 1], futures, grid)
    assert_golden(frames, expected["rollouts"])


def test_discriminative_rollouts(golden_world, golden_tokenizer, read, clips, grid, assert_golden):
    patch_tokens, deltas, seconds = clips
    expected = read("deltaworld_discriminative_io")["rollouts"]
    context = read("deltaworld_rollout")["context"].shape[1]
    times = seconds[:, : context + expected.shape[2]]
    futures = golden_world("deltaworld_discriminative").rollout(deltas[:, :context], times)
    frames = decode_future(golden_tokenizer("released"), patch_tokens[:, context - 1], futures, grid)
    assert_golden(frames, expected)


@pytest.mark.slow
def test_discriminative_teacher_forcing(
    golden_world, golden_tokenizer, golden_backbone, read, clips, grid, assert_golden
):
    """The delta tokens behind this file come from a backbone and a tokenizer in train mode.

    Their three factors (frames, black frame, tokenizer) are solved for; ``z_hat`` then has to agree.
    """
    _, _, seconds = clips
    world, tokenizer = golden_world("deltaworld_discriminative"), golden_tokenizer("released")
    expected, frames = read("deltaworld_discriminative_io")["z_hat"], read("deltatok_released_io")["frames"]

    @functools.cache
    def features(log2_factor: float):
        tokens = stretched_backbone(golden_backbone, log2_factor).patch_tokens(frames.flatten(0, 1))
        return tokens.unflatten(0, frames.shape[:2])

    @functools.cache
    def black(log2_factor: float):
        return stretched_backbone(golden_backbone, log2_factor).black_patch_tokens(frames.shape[-1])

    @torch.no_grad()
    def difference(of_frames: float, of_black: float, of_tokenizer: float):
        deltas = stretched_deltas(tokenizer, of_tokenizer, features(of_frames), black(of_black), grid)
        return world.training_loss(deltas, seconds, candidates=1, beta=BETA).prediction - expected

    factors = solve(difference, [torch.linspace(-1, 1, 9), torch.zeros(1), torch.linspace(-1, 1, 21)])
    assert_golden(difference(*factors) + expected, expected)
