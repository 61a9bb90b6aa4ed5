"""Each probe against a slow definition, and on models whose health is known."""

import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from cases import Case
from drawn import GRID, HIDDEN, PATCHES, drawn_deltas, world_config, write_dataset

from deltacache.models.blocks import log_cosh, smooth_l1
from deltacache.models.deltatok import DeltaTok
from deltacache.models.worlds.deltaworld import DeltaWorld
from deltacache.schemas.progress import SilentReporter
from deltacache.schemas.tables import TOKENIZER_CURVES_SCHEMA, WORLD_CURVES_SCHEMA
from deltacache.train.data import ClipBatch, PairBatch
from deltacache.train.probes import PairProbe, participation_ratio, probe_tokenizer, probe_world, usage
from trainers import train_world


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def enlarged(model: torch.nn.Module, factor: float) -> None:
    """Blocks at initialisation do next to nothing: make what they do visible."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)


def test_participation_ratio_counts_directions() -> None:
    vectors = torch.zeros(400, 6)
    vectors[:, :3] = torch.linalg.qr(normal(400, 3) - normal(400, 3).mean(0)).Q
    assert participation_ratio(vectors + 7) == pytest.approx(3, abs=1e-3)
    assert participation_ratio(normal(50, 1) @ normal(1, 8)) == pytest.approx(1)
    assert participation_ratio(torch.ones(5, 8)) == 0
    values = torch.linalg.eigvalsh(torch.cov(normal(30, 8).double().T))
    assert participation_ratio(normal(30, 8)) == pytest.approx((values.sum() ** 2 / (values**2).sum()).item())


def test_usage_is_one_when_all_win_alike_and_zero_when_one_always_does() -> None:
    assert usage(torch.arange(8), 8) == (pytest.approx(1.0), 8)
    assert usage(torch.full((9,), 3), 8) == (0.0, 1)
    assert usage(torch.tensor([0, 0, 5, 5]), 8) == (pytest.approx(math.log(2) / math.log(8)), 2)
    assert usage(torch.zeros(4, dtype=torch.long), 1) == (0.0, 1)


@pytest.fixture
def tokenizer() -> DeltaTok:
    torch.manual_seed(0)
    model = DeltaTok(HIDDEN, 2, 1, 1, layer_scale_init=0.3).train()
    enlarged(model, 4.0)
    return model


@pytest.fixture
def pairs() -> PairProbe:
    drawn = [normal(20, PATCHES, HIDDEN, seed=seed) for seed in range(3)]
    return PairProbe(PairBatch(drawn[0], drawn[1]), drawn[2], torch.full((PATCHES, HIDDEN), -0.5))


@pytest.mark.parametrize("loss", ["mse", "log_cosh"])
def test_tokenizer_probes_are_what_they_say(tokenizer: DeltaTok, pairs: PairProbe, loss: str) -> None:
    found = probe_tokenizer(tokenizer, pairs, GRID, loss)
    assert tokenizer.training
    tokenizer.eval()

    def error(one: torch.Tensor, other: torch.Tensor) -> float:
        return ((one - other).square() if loss == "mse" else log_cosh(one, other)).mean().item()

    with torch.no_grad():
        before, after, first = pairs.pairs.previous, pairs.pairs.current, pairs.first_frames
        black = pairs.black.expand_as(first)
        tokens = tokenizer.encode(before, after, GRID)
        own = error(tokenizer.decode(tokens, before, GRID), after)
        swapped = error(tokenizer.decode(tokens[[-1, *range(19)]], before, GRID), after)
        zero = error(tokenizer.decode(torch.zeros_like(tokens), before, GRID), after)
        from_black = error(tokenizer.decode(tokenizer.encode(black, first, GRID), black, GRID), first)
    assert found == pytest.approx(
        {
            "copy_ratio": own / error(before, after),
            "z_swap_ratio": swapped / own,
            "zero_z_ratio": zero / own,
            "delta_rank": participation_ratio(tokens),
            "black_first_ratio": from_black / error(black, first),
        },
        rel=1e-4,
    )
    assert abs(found["z_swap_ratio"] - 1) > 1e-4


def test_a_decoder_that_ignores_its_token_is_seen(pairs: PairProbe) -> None:
    model = DeltaTok(HIDDEN, 2, 1, 1, layer_scale_init=0.0)
    found = probe_tokenizer(model, pairs, GRID, "mse")
    assert [found[name] for name in ("copy_ratio", "z_swap_ratio", "zero_z_ratio", "black_first_ratio")] == [
        1
    ] * 4


@pytest.mark.parametrize("candidates", [8, 1000])  # more than one pass
def test_world_probes_are_what_they_say(candidates: int) -> None:
    torch.manual_seed(0)
    model = DeltaWorld(HIDDEN, 2, 2, layer_scale_init=0.3).train()
    enlarged(model, 3.0)
    clips = ClipBatch(normal(9, 6, HIDDEN), torch.linspace(0, 1, 6).repeat(9, 1))
    noise = normal(candidates, HIDDEN, seed=1)
    found = probe_world(model, clips, (1, 1), noise, 0.1)
    assert model.training
    own, swapped, zero, won, best = [], [], [], [], []
    for clip in range(9):
        context, target = clips.tokens[:, :-1], clips.tokens[clip, -1]
        queries = noise[None, :, None]
        for losses, past in ((own, context[clip]), (swapped, context[clip - 1]), (zero, 0 * context[clip])):
            tokens = model.rollout(past[None], clips.timestamps_s[clip : clip + 1], queries)[0, :, 0]
            each = smooth_l1(tokens, target, 0.1).mean(1)
            losses.append(each.min().item())
            if losses is own:
                won.append(each.argmin())
                best.append(tokens[each.argmin()])
    entropy, winning = usage(torch.stack(won), candidates)
    target, last = clips.tokens[:, -1], clips.tokens[:, -2]
    assert found == pytest.approx(
        {
            "copy_ratio": sum(own) / 9 / smooth_l1(last, target, 0.1).mean().item(),
            "z_swap_ratio": sum(swapped) / sum(own),
            "zero_z_ratio": sum(zero) / sum(own),
            "delta_rank": participation_ratio(target),
            "predicted_rank": participation_ratio(torch.stack(best)),
            "query_entropy": entropy,
            "queries_winning": winning,
        },
        rel=1e-4,
    )


def test_probes_stand_in_the_table_at_their_steps_and_change_nothing(case: Case, tmp_path: Path) -> None:
    probed = case.weights(case.run(tmp_path / "probed", probe_every=3, probe_clips=5))
    plain = case.weights(case.run(tmp_path / "plain"))
    assert all(torch.equal(probed[name], plain[name]) for name in plain)
    table = pq.read_table(tmp_path / "probed/curves.parquet")
    schema = TOKENIZER_CURVES_SCHEMA if case.kind == "tokenizer" else WORLD_CURVES_SCHEMA
    assert table.schema == schema
    assert table["step"].to_pylist() == [2, 3, 4, 6, 8]
    names = schema.names[schema.get_field_index("copy_ratio") : schema.get_field_index("validation_loss")]
    assert len(names) == (5 if case.kind == "tokenizer" else 7)
    for name in names:
        assert [value is not None for value in table[name].to_pylist()] == [False, True, False, True, True]


@pytest.mark.slow
def test_both_futures_win_and_a_learned_query_has_none_to_choose(tmp_path: Path) -> None:
    deltas = write_dataset(tmp_path / "deltas", "deltas", drawn_deltas(40, 6))
    rows = {}
    for query in ("noise", "learned"):
        config = world_config(query, steps=150, batch_size=32, save_every=150, log_every=50, probe_clips=40)
        options = {"resume": False, "device": "cpu", "reporter": SilentReporter()}
        train_world(deltas, tmp_path / query, config, **options)
        rows[query] = pq.read_table(tmp_path / query / "curves.parquet").to_pylist()[-1]
    assert rows["noise"]["copy_ratio"] < 0.1 < rows["learned"]["copy_ratio"]
    assert rows["noise"]["queries_winning"] >= 2
    assert rows["noise"]["query_entropy"] > 0.2
    assert (rows["learned"]["queries_winning"], rows["learned"]["query_entropy"]) == (1, 0)
