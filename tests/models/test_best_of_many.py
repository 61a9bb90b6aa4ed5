"""DeltaWorld's fast paths against slow, obvious ones, and what each frame may see."""

import pytest
import torch

from deltacache.models import selection
from deltacache.models.blocks import smooth_l1, time_rotation
from deltacache.models.selection import FoldedPredictor, Selection, selection_for
from deltacache.models.worlds.deltaworld import DeltaWorld

BATCH, FRAMES, CANDIDATES, HIDDEN, BETA = 3, 5, 6, 24, 0.1


def _world(query="noise") -> DeltaWorld:
    """Weights, LayerScale and noise so large that candidates, times and past all matter."""
    torch.manual_seed(0)
    world = DeltaWorld(HIDDEN, 2, 2, query=query, noise_std=1.0, layer_scale_init=0.5).eval()
    with torch.no_grad():
        for part in world.modules():
            if isinstance(part, torch.nn.Linear):
                part.weight *= 10.0
    return world.double()


@pytest.fixture
def clip():
    generator = torch.Generator().manual_seed(1)
    deltas = torch.randn(BATCH, FRAMES, HIDDEN, generator=generator, dtype=torch.float64)
    return deltas, torch.rand(BATCH, FRAMES, generator=generator, dtype=torch.float64).cumsum(1)


@pytest.fixture
def noise():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(
        BATCH, FRAMES - 1, CANDIDATES, HIDDEN, generator=generator, dtype=torch.float64, requires_grad=True
    )


def _predict_one(world: DeltaWorld, query, past_tokens, past_seconds, seconds):
    """One query, one clip, only the tokens it may see: no mask, no batch, no reused keys."""
    past = world.remember(past_tokens[None, :, None], past_seconds[None])
    rotation = time_rotation(seconds.view(1, 1), world.predictor.head_dim)
    return world.predictor(query.view(1, 1, -1), rotation, past)[0, 0]


def test_winners_and_predictions_equal_a_loop_over_everything(clip, noise):
    world, (deltas, seconds) = _world(), clip
    result = world.training_loss(deltas, seconds, candidates=CANDIDATES, beta=BETA, noise=noise)
    best = torch.empty(BATCH, FRAMES - 1, dtype=torch.float64)
    for b in range(BATCH):
        for p in range(FRAMES - 1):
            tried = [
                _predict_one(world, query, deltas[b, : p + 1], seconds[b, : p + 1], seconds[b, p + 1])
                for query in noise[b, p]
            ]
            losses = [smooth_l1(one, deltas[b, p + 1], BETA).mean().item() for one in tried]
            best[b, p] = min(losses)
            assert result.winners[b, p] == losses.index(min(losses))
            torch.testing.assert_close(result.prediction[b, p], tried[losses.index(min(losses))])
    torch.testing.assert_close(result.loss, best.mean())
    assert result.winners.unique().numel() > 1


def test_only_the_winners_get_gradients(clip, noise):
    world, (deltas, seconds) = _world(), clip
    with_gradients: list[bool] = []
    world.predictor.register_forward_hook(lambda *_: with_gradients.append(torch.is_grad_enabled()))
    result = world.training_loss(deltas, seconds, candidates=CANDIDATES, beta=BETA, noise=noise)
    assert with_gradients == [True]  # selection does not run the predictor itself, and leaves no graph
    assert not result.winners.requires_grad
    result.loss.backward()
    touched = noise.grad.abs().sum(-1) > 0
    won = torch.nn.functional.one_hot(result.winners, CANDIDATES).bool()
    assert torch.equal(touched, won)


@pytest.mark.parametrize("rows", [1, 4, CANDIDATES, 2 * CANDIDATES])  # of candidates, of clips, in one pass
def test_passes_of_any_size_choose_the_same(clip, noise, monkeypatch, rows):
    world, (deltas, seconds) = _world(), clip

    def losses():
        return _losses(world, FoldedPredictor, noise, deltas, seconds)

    whole = losses()
    monkeypatch.setattr(selection, "_WIDEST_ON_CPU", rows * 4 * HIDDEN)
    torch.testing.assert_close(losses(), whole, rtol=1e-12, atol=0)


def _losses(world: DeltaWorld, fold, noise, deltas, seconds):
    past = world.remember(deltas[:, :-1, None], seconds[:, :-1])
    rotation = time_rotation(seconds[:, 1:], world.predictor.head_dim)
    with torch.no_grad():
        folded = fold(world.predictor, world.predictor.head.weight.dtype)
        return folded.losses(noise, rotation, past, deltas[:, 1:], BETA)


def _plain_losses(world: DeltaWorld, noise, deltas, seconds):
    """The definition: every candidate through the predictor itself, frame by frame."""
    found = torch.empty(noise.shape[:3], dtype=noise.dtype)
    for p in range(noise.shape[1]):
        past = world.remember(deltas[:, : p + 1, None], seconds[:, : p + 1])
        rotation = time_rotation(seconds[:, p + 1, None], world.predictor.head_dim)
        with torch.no_grad():
            predicted = world.predictor(noise[:, p], rotation, past)
        found[:, p] = smooth_l1(predicted, deltas[:, p + 1, None], BETA).mean(-1)
    return found


def _wide_case(candidates: int):
    """A model of recipe proportions, small, in float32, with all biases and norms off their start."""
    torch.manual_seed(3)
    world = DeltaWorld(96, 4, 3, layer_scale_init=0.3).eval()
    with torch.no_grad():
        for parameter in world.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    deltas = torch.randn(4, 8, 96)
    return world, torch.randn(4, 7, candidates, 96) * 0.02, deltas, torch.rand(4, 8).cumsum(1)


def test_float32_selection_finds_the_losses_of_the_plain_definition():
    world, noise, deltas, seconds = _wide_case(64)
    plain = _plain_losses(world, noise, deltas, seconds)
    folded = _losses(world, FoldedPredictor, noise, deltas, seconds)
    torch.testing.assert_close(folded, plain, rtol=1e-5, atol=0)
    result = world.training_loss(deltas, seconds, candidates=64, beta=BETA, noise=noise)
    assert torch.equal(result.winners, plain.argmin(-1))
    assert result.winners.unique().numel() > 10


@pytest.mark.slow
def test_a_shortlist_makes_up_for_low_precision():
    world, noise, deltas, seconds = _wide_case(1000)
    plain = _plain_losses(world, noise, deltas, seconds)

    def winners(how: Selection):
        return world.training_loss(
            deltas, seconds, candidates=1000, beta=BETA, noise=noise, selection=how
        ).winners

    rough = winners(Selection(torch.bfloat16, shortlist=1))
    regret = plain.gather(-1, rough[..., None])[..., 0] - plain.amin(-1)
    assert 0 < (rough != plain.argmin(-1)).float().mean() < 0.5  # bfloat16 alone errs sometimes, by little
    assert regret.max() < 0.2 * plain.std(-1).min()
    assert torch.equal(winners(Selection(torch.bfloat16, shortlist=16)), plain.argmin(-1))


def test_selection_of_a_device():
    assert selection_for(torch.device("cuda"), 64) == Selection(torch.bfloat16, shortlist=1)
    assert selection_for(torch.device("cpu"), 64) == Selection()
    large = selection_for(torch.device("cpu"), 768)
    assert large in (Selection(), Selection(torch.bfloat16, shortlist=4))


@pytest.mark.parametrize("query", ["noise", "learned"])
def test_a_frame_sees_only_tokens_before_it(clip, noise, query):
    world, (deltas, seconds) = _world(query), clip
    given = {"candidates": 1, "noise": noise[:, :, :1]} if query == "noise" else {"candidates": 1}
    before = world.training_loss(deltas, seconds, beta=BETA, **given).prediction
    for changed in range(FRAMES):
        other = deltas.clone()
        other[:, changed] += 1.0
        after = world.training_loss(other, seconds, beta=BETA, **given).prediction
        moved = (after - before).abs().amax(dim=(0, 2)) > 1e-4
        assert moved.tolist() == [frame > changed for frame in range(1, FRAMES)]


def test_only_time_differences_matter(clip, noise):
    world, (deltas, seconds) = _world(), clip

    def predict(times):
        given = {"candidates": CANDIDATES, "beta": BETA, "noise": noise}
        return world.training_loss(deltas, times, **given).prediction

    torch.testing.assert_close(predict(seconds + 1024.0), predict(seconds))
    assert (predict(seconds * 1.5) - predict(seconds)).abs().max() > 0.01


def test_late_clips_keep_their_digits(clip, noise):
    world, (deltas, _) = _world().float(), clip
    seconds = (torch.arange(FRAMES) * 0.25).expand(BATCH, -1)  # exact in float32, also an hour later

    def predict(times):
        given = {"candidates": CANDIDATES, "beta": BETA, "noise": noise.detach().float()}
        return world.training_loss(deltas.float(), times, **given).prediction

    assert torch.equal(predict(seconds + 4096.0 + 1 / 64), predict(seconds))


def test_rollout_equals_growing_the_context_by_hand(clip):
    world, (deltas, seconds) = _world(), clip
    samples, horizon = 4, 3
    times = torch.cat((seconds, seconds[:, -1:] + torch.tensor([[0.2, 0.5, 0.6]])), dim=1)
    noise = torch.randn(BATCH, samples, horizon, HIDDEN, generator=torch.Generator().manual_seed(3)).double()
    futures = world.rollout(deltas, times, noise)
    assert futures.shape == (BATCH, samples, horizon, HIDDEN)
    for b in range(BATCH):
        for s in range(samples):
            tokens = deltas[b]
            for step in range(horizon):
                now = FRAMES + step
                with torch.no_grad():
                    token = _predict_one(world, noise[b, s, step], tokens, times[b, :now], times[b, now])
                torch.testing.assert_close(futures[b, s, step], token)
                tokens = torch.cat((tokens, token[None]))


def test_learned_query_gives_one_future(clip):
    world, (deltas, seconds) = _world("learned"), clip
    futures = world.rollout(deltas[:, :3], seconds)
    assert futures.shape == (BATCH, 1, FRAMES - 3, HIDDEN)
    assert torch.equal(futures, world.rollout(deltas[:, :3], seconds))
    winners = world.training_loss(deltas, seconds, candidates=1, beta=BETA).winners
    assert not winners.any()


def test_noise_comes_from_the_generator_alone():
    world = _world()
    state = torch.get_rng_state()
    first = world.draw_noise((400, HIDDEN), torch.Generator().manual_seed(5))
    assert torch.equal(first, world.draw_noise((400, HIDDEN), torch.Generator().manual_seed(5)))
    assert not torch.equal(first, world.draw_noise((400, HIDDEN), torch.Generator().manual_seed(6)))
    assert torch.equal(torch.get_rng_state(), state)
    released = DeltaWorld(HIDDEN, 2, 1)
    quiet = released.draw_noise((400, HIDDEN), torch.Generator().manual_seed(5))
    torch.testing.assert_close(quiet, first.float() * 0.02)
    assert abs(first.std().item() - 1.0) < 0.05


def test_training_draws_its_noise_from_the_generator(clip):
    world, (deltas, seconds) = _world(), clip
    shape = (BATCH, FRAMES - 1, CANDIDATES, HIDDEN)
    noise = world.draw_noise(shape, torch.Generator().manual_seed(7))
    drawn = world.training_loss(
        deltas, seconds, candidates=CANDIDATES, beta=BETA, generator=torch.Generator().manual_seed(7)
    )
    given = world.training_loss(deltas, seconds, candidates=CANDIDATES, beta=BETA, noise=noise)
    assert torch.equal(drawn.prediction, given.prediction)


def test_what_does_not_fit_is_refused(clip, noise):
    world, learned, (deltas, seconds) = _world(), _world("learned"), clip
    with pytest.raises(ValueError, match="needs noise, or a generator"):
        world.training_loss(deltas, seconds, candidates=CANDIDATES, beta=BETA)
    with pytest.raises(ValueError, match=r"noise is \(3, 4, 6, 24\), expected \(3, 4, 2, 24\)"):
        world.training_loss(deltas, seconds, candidates=2, beta=BETA, noise=noise)
    with pytest.raises(ValueError, match="one candidate, not 4"):
        learned.training_loss(deltas, seconds, candidates=4, beta=BETA)
    with pytest.raises(ValueError, match="take it from draw_noise"):
        world.rollout(deltas[:, :3], seconds)
    with pytest.raises(ValueError, match=r"expected \(3, S, 2, Z\)"):
        world.rollout(deltas[:, :3], seconds, noise[:, :1])
    with pytest.raises(ValueError, match="takes no noise"):
        learned.rollout(deltas[:, :3], seconds, noise[:, :2])
    for heads in (5, 6, 8):  # no divisor, too narrow, odd
        with pytest.raises(ValueError, match=f"24 does not split into {heads} heads"):
            DeltaWorld(HIDDEN, heads, 1)
