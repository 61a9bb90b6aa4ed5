"""DeltaTok against numbers that came out of the released code."""

import pytest
import torch
from augmented_positions import solve, stretched_backbone

from deltacache.models.blocks import patch_rotation

VARIANTS = ["released", "paper", "frame_compression"]


@pytest.fixture(params=VARIANTS)
def case(request, golden_tokenizer, read):
    """A tokenizer and its golden inputs and outputs."""
    return golden_tokenizer(request.param), read(f"deltatok_{request.param}_io")


def test_rope_angles(case, grid, assert_golden):
    tokenizer, io = case
    rotation = patch_rotation(grid, tokenizer.head_dim, tokenizer.rope_theta)
    assert_golden(rotation.cos, io["rope_cos"])
    assert_golden(rotation.sin, io["rope_sin"])


def test_delta_tokens_of_whole_clips(case, grid, assert_golden):
    tokenizer, io = case
    deltas = tokenizer.encode_clip(io["patch_tokens"], io["black_patch_tokens"][0], grid)
    assert_golden(deltas, io["delta_tokens"])


def test_decoding(case, grid, assert_golden):
    tokenizer, io = case
    frame = tokenizer.decode(io["delta_tokens"][:, 3], io["patch_tokens"][:, 2], grid)
    assert_golden(frame, io["decode_z3_given_frame2"])


@pytest.mark.parametrize("horizon", ["rollout_h1", "rollout_h3", "rollout_h8"])
def test_closed_loop_rollouts(case, horizon, grid, assert_golden):
    tokenizer, io = case
    frames = tokenizer.reconstruct_closed_loop(
        io["patch_tokens"], io["black_patch_tokens"][0], grid, io[horizon].shape[1]
    )
    assert_golden(frames, io[horizon])


@pytest.mark.slow
def test_training_loss_and_gradients(golden_tokenizer, golden_backbone, read, grid, assert_golden):
    """The features of this file come from a backbone in train mode: its one factor is solved for."""
    tokenizer, expected = golden_tokenizer("released"), read("deltatok_released_train")
    pair = read("deltatok_released_io")["frames"][:, -2:]

    def step(log2_factor: float):
        tokens = stretched_backbone(golden_backbone, log2_factor).patch_tokens(pair.flatten(0, 1))
        previous, current = tokens.unflatten(0, pair.shape[:2]).unbind(dim=1)
        return tokenizer.training_loss(previous, current, grid, "log_cosh")

    (factor,) = solve(lambda f: step(f).reconstruction - expected["y_hat"], [torch.linspace(-1, 1, 41)])
    tokenizer.train()
    result = step(factor)
    assert_golden(result.loss, expected["loss"][0])
    assert_golden(result.mse, expected["mse"][0])
    assert_golden(result.reconstruction, expected["y_hat"])
    result.loss.backward()
    parameters = dict(tokenizer.named_parameters())
    gradients = {
        name.removeprefix("grad."): grad for name, grad in expected.items() if name.startswith("grad.")
    }
    assert gradients
    for name, gradient in gradients.items():
        assert_golden(parameters[name].grad, gradient)
