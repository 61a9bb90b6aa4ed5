"""Energy score and flow matching against slow, obvious ways to compute them; best-of-many beside them as it was."""

import itertools
import json

import pytest
import torch

from deltacache.models.blocks import smooth_l1
from deltacache.models.checkpoints import load_world, save_model
from deltacache.models.flops import training_step_flops
from deltacache.models.objectives import FlowHead, energy_score
from deltacache.models.worlds.deltaworld import DeltaWorld
from deltacache.models.worlds.dino_world import DinoWorld

HIDDEN, GRID, SAMPLES = 24, (2, 3), 4
# class, its own arguments, tokens of a frame
MODELS = {
    "delta": (DeltaWorld, {}, 1),
    "deltas": (DeltaWorld, {"tokens_per_frame": 3}, 3),
    "patches": (DinoWorld, {}, 6),
}


def _world(kind: str, objective: str):
    """In float64, with weights so large that noise, times and past all matter."""
    made, own, _ = MODELS[kind]
    torch.manual_seed(0)
    world = made(HIDDEN, 2, 2, noise_std=1.0, layer_scale_init=0.5, objective=objective, **own)
    with torch.no_grad():
        for part in world.modules():
            if isinstance(part, torch.nn.Linear):
                part.weight *= 8.0
    return world.double().eval()


def _clips(kind: str):
    generator, count = torch.Generator().manual_seed(1), MODELS[kind][2]
    shape = (2, 4, HIDDEN) if count == 1 else (2, 4, count, HIDDEN)
    tokens = torch.randn(shape, generator=generator, dtype=torch.float64)
    return tokens, torch.rand(2, 4, generator=generator, dtype=torch.float64).cumsum(1)


def _noise(world, draws: int = SAMPLES, **training):
    shape = (2, 3, draws, world.noise_width(GRID, **training))
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_the_energy_score_is_that_of_a_loop_over_pairs_with_its_gradients():
    samples = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    truth = torch.randn(2, 7, dtype=torch.float64)
    for row, score in enumerate(energy_score(samples, truth)):
        near = [(one - truth[row]).square().mean().sqrt() for one in samples[row]]
        apart = [
            (one - other).square().mean().sqrt() for one, other in itertools.permutations(samples[row], 2)
        ]
        slow = sum(near) / 5 - sum(apart) / (2 * 5 * 4)
        torch.testing.assert_close(score, slow)
        expected, found = (torch.autograd.grad(each, samples, retain_graph=True)[0] for each in (slow, score))
        torch.testing.assert_close(found, expected)
        assert (found[row].abs().sum(-1) > 0).all()  # every sample learns


def test_the_energy_score_is_fair_whatever_the_number_of_samples():
    samples, truth = torch.randn(6, 9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    of_pairs = [energy_score(samples[list(pair)], truth) for pair in itertools.combinations(range(6), 2)]
    torch.testing.assert_close(energy_score(samples, truth), torch.stack(of_pairs).mean())


def test_the_energy_score_of_equal_samples_has_finite_gradients():
    samples = torch.zeros(3, 4, requires_grad=True)
    energy_score(samples, torch.zeros(4)).backward()
    assert torch.isfinite(samples.grad).all()
    with pytest.raises(ValueError, match="needs two or more samples"):
        energy_score(samples[:1], torch.zeros(4))


def test_the_energy_score_of_half_precision_is_computed_in_float32():
    samples, truth = torch.randn(8, 400).bfloat16(), torch.randn(400).bfloat16()
    assert energy_score(samples, truth).dtype == torch.float32
    torch.testing.assert_close(energy_score(samples, truth), energy_score(samples.float(), truth.float()))


@pytest.mark.parametrize("kind", MODELS)
def test_energy_training_scores_the_samples_that_a_rollout_gives(kind):
    world, (tokens, seconds) = _world(kind, "energy"), _clips(kind)
    noise = _noise(world).requires_grad_()
    result = world.training_loss(tokens, seconds, grid=GRID, candidates=SAMPLES, beta=0.1, noise=noise)
    scores = []
    for frame in range(3):
        own = noise.detach()[:, frame, :, None]
        samples = world.rollout(tokens[:, : frame + 1], seconds[:, : frame + 2], own, grid=GRID)[:, :, 0]
        truth = tokens[:, frame + 1]
        scores.append(energy_score(samples.flatten(2), truth.flatten(1)))
        nearest = (samples - truth[:, None]).flatten(2).norm(dim=-1).argmin(1)
        assert torch.equal(result.winners[:, frame], nearest)
        torch.testing.assert_close(result.prediction[:, frame], samples[range(2), nearest])
    torch.testing.assert_close(result.loss, torch.stack(scores).mean())
    result.loss.backward()
    assert (noise.grad.abs().sum(-1) > 0).all()
    assert all(weight.grad is not None for weight in world.parameters())


@pytest.mark.parametrize("kind", MODELS)
def test_flow_matching_is_the_formula_draw_by_draw(kind):
    world, (tokens, seconds) = _world(kind, "flow"), _clips(kind)
    count = MODELS[kind][2]
    noise = _noise(world, training=True)
    assert noise.shape[-1] == count * HIDDEN + 1
    result = world.training_loss(tokens, seconds, grid=GRID, candidates=SAMPLES, beta=0.1, noise=noise)
    errors = []
    for frame in range(3):
        state = _state(world, tokens[:, : frame + 1], seconds[:, : frame + 2])
        for draw in range(SAMPLES):
            begun = noise[:, frame, draw, :-1].view(2, count, HIDDEN)
            at = torch.distributions.Normal(0.0, 1.0).cdf(noise[:, frame, draw, -1])[:, None, None]
            truth = tokens[:, frame + 1].view(2, count, HIDDEN)
            velocity = world.flow((1 - at) * begun + at * truth, state, at.flatten())
            errors.append((velocity - (truth - begun)).square().mean())
    torch.testing.assert_close(result.loss, torch.stack(errors).mean())
    assert result.prediction.shape == tokens[:, 1:].shape
    result.loss.backward()
    assert all(weight.grad is not None for weight in world.parameters())


def _state(world, context, seconds):
    """What the predictor says of the next frame (B, M, D): a rollout whose head carries nothing."""
    carried, states = world.flow.transport, []
    world.flow.transport = lambda begun, state, steps: states.append(state) or begun
    try:
        world.rollout(context, seconds, torch.zeros(2, 1, 1, world.noise_width(GRID)).double(), grid=GRID)
    finally:
        world.flow.transport = carried
    return states[0]


@pytest.mark.parametrize("kind", MODELS)
def test_futures_of_a_flow_follow_its_noise_sample_by_sample(kind):
    world, (tokens, seconds) = _world(kind, "flow"), _clips(kind)
    noise = _noise(world)[:, :2].transpose(1, 2)  # (B, S, H, Z)
    futures = world.rollout(tokens[:, :2], seconds, noise, grid=GRID)
    assert futures.shape == (2, SAMPLES, 2, *tokens.shape[2:])
    for sample in range(SAMPLES):
        alone = world.rollout(tokens[:, :2], seconds, noise[:, sample : sample + 1], grid=GRID)
        torch.testing.assert_close(futures[:, sample], alone[:, 0])
    assert (futures[:, 0] - futures[:, 1]).flatten(2).norm(dim=-1).min() > 0.1
    with pytest.raises(ValueError, match="noise of a flow has"):
        world.rollout(tokens[:, :2], seconds, noise[..., :-1], grid=GRID)


def test_transport_is_exact_on_straight_paths_and_of_second_order_on_others(monkeypatch):
    head = FlowHead(3, 8, 2, 1, several=False).double()
    begun, state = torch.randn(5, 1, 3).double(), torch.randn(5, 1, 3).double()
    monkeypatch.setattr(head, "forward", lambda tokens, state, times: state)
    torch.testing.assert_close(head.transport(begun, state, 1), begun + state)
    monkeypatch.setattr(head, "forward", lambda tokens, state, times: tokens + times[:, None, None])
    exact = begun * torch.e + (torch.e - 2)  # of x' = x + t
    errors = [(head.transport(begun, state, steps) - exact).abs().max().item() for steps in (8, 16)]
    assert 3.5 < errors[0] / errors[1] < 4.5


def test_times_on_the_path_are_uniform():
    world = DeltaWorld(HIDDEN, 2, 2, noise_std=3.0, objective="flow")
    seen = []
    world.flow.register_forward_pre_hook(lambda _, given: seen.append(given[2]))
    generator = torch.Generator().manual_seed(0)
    world.training_loss(
        torch.randn(8, 5, HIDDEN),
        torch.arange(5.0).expand(8, -1),
        candidates=64,
        beta=0.1,
        generator=generator,
    )
    shares = torch.histc(seen[0], bins=4, min=0, max=1) / seen[0].numel()
    torch.testing.assert_close(shares, torch.full((4,), 0.25), atol=0.03, rtol=0)


def test_an_objective_that_samples_needs_noise():
    for objective in ("energy", "flow"):
        with pytest.raises(
            ValueError, match=f"objective {objective} samples futures, and query 'learned' has one"
        ):
            DeltaWorld(HIDDEN, 2, 2, query="learned", objective=objective)


def test_checkpoints_without_an_objective_are_best_of_many_and_others_say_theirs(tmp_path):
    labels = {"best_of_many": "deltaworld", "energy": "deltaworld_energy", "flow": "deltaworld_flow"}
    for objective, label in labels.items():
        world = _world("delta", objective).float()
        save_model(tmp_path / objective, world, "world", {})
        recorded = json.loads((tmp_path / objective / "config.json").read_text())["arguments"]
        assert recorded.get("objective", "best_of_many") == objective
        assert ("objective" in recorded) == (objective != "best_of_many")  # older code opens these as before
        loaded = load_world(tmp_path / objective).model
        assert (loaded.objective, loaded.label) == (objective, label)
        assert loaded.arguments == world.arguments
    assert _world("patches", "energy").label == "dino_world_energy"


def test_an_energy_step_learns_from_every_sample_and_its_products_are_counted():
    def counted(samples: int):
        return training_step_flops(DeltaWorld(48, 4, 3, objective="energy"), 8, (4, 4), samples)

    two, four, eight = (counted(samples).here for samples in (2, 4, 8))
    assert eight - four == 2 * (four - two)
    published = training_step_flops(DeltaWorld(48, 4, 3), 8, (4, 4), 8)
    assert counted(8).selection == 0
    # Three passes a sample, one forward and two backward, where best-of-many has one for all but the winner.
    assert 2.5 < eight / published.selection < 3.5
    flow = training_step_flops(DeltaWorld(48, 4, 3, objective="flow"), 8, (4, 4), 4)
    assert flow.here > published.learning


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("objective", ["best_of_many", "energy"])
def test_rollout_training_follows_the_nearest_samples_step_by_step(kind, objective):
    world, (tokens, seconds) = _world(kind, objective), _clips(kind)
    noise, options = _noise(world), {"grid": GRID, "candidates": SAMPLES, "beta": 0.1}
    result = world.training_loss(tokens, seconds, noise=noise, rollout_steps=3, **options)
    frames, losses = tokens[:, :1], []
    for at in range(3):  # frame at + 1 from the first frame and what was predicted after it
        own = noise[:, at, :, None]
        samples = world.rollout(frames, seconds[:, : at + 2], own, grid=GRID)[:, :, 0]
        truth = tokens[:, at + 1, None]
        if objective == "energy":
            losses.append(energy_score(samples.flatten(2), truth.flatten(1)).mean())
            nearest = (samples - truth).flatten(2).norm(dim=-1).argmin(1)
        else:
            errors = smooth_l1(samples, truth, 0.1).flatten(2).mean(-1)
            losses.append(errors.amin(1).mean())
            nearest = errors.argmin(1)
        assert torch.equal(result.winners[:, at], nearest)
        frames = torch.cat((frames, samples[range(2), nearest][:, None]), dim=1)
    torch.testing.assert_close(result.loss, torch.stack(losses).mean())
    torch.testing.assert_close(result.prediction, frames[:, 1:])


@pytest.mark.parametrize("objective", ["best_of_many", "energy", "flow"])
def test_gradients_pass_through_all_steps_of_a_rollout(objective):
    world, (tokens, seconds) = _world("delta", objective), _clips("delta")
    noise, weight = _noise(world, training=True), world.predictor.blocks[0].attention.kv_proj.weight

    def loss(steps: int = 3):
        options = {"candidates": SAMPLES, "beta": 0.1, "rollout_steps": steps}
        return world.training_loss(tokens, seconds, grid=GRID, noise=noise, **options).loss

    (gradient,) = torch.autograd.grad(loss(), weight)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        weight += 1e-6 * direction
        above = loss()
        weight -= 2e-6 * direction
        slope = (above - loss()) / 2e-6
        weight += 1e-6 * direction
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match="4 rollout steps do not fit in 3 predicted frames"):
        loss(4)


@pytest.mark.parametrize("kind", MODELS)
def test_noise_of_the_context_is_not_in_the_targets_and_off_changes_no_bit(kind):
    world, (tokens, seconds) = _world(kind, "best_of_many"), _clips(kind)
    options = {"grid": GRID, "candidates": SAMPLES, "beta": 0.1, "noise": _noise(world)}
    plain = world.training_loss(tokens, seconds, **options)
    assert torch.equal(plain.loss, world.training_loss(tokens, seconds, rollout_steps=1, **options).loss)
    added = torch.randn(tokens[:, 1:].shape, dtype=torch.float64)
    none = world.training_loss(tokens, seconds, context_noise=0 * added, **options)
    assert torch.equal(plain.loss, none.loss)
    for steps in (1, 2):
        noisy = world.training_loss(tokens, seconds, context_noise=added, rollout_steps=steps, **options)
        seen = tokens[:, :1] + added[:, :1]
        winner = options["noise"][range(2), 0, noisy.winners[:, 0], None, None]
        first = world.rollout(seen, seconds[:, :2], winner, grid=GRID)[:, 0]
        torch.testing.assert_close(noisy.prediction[:, :1], first)
        torch.testing.assert_close(noisy.loss, smooth_l1(noisy.prediction, tokens[:, 1:], 0.1).mean())
