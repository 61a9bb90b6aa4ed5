import tracemalloc

import numpy as np
import torch

from deltacache.train.order import batch_items, probe_items, seed_of, shuffled, step_generator, step_rng


def epoch_order(seed: int, epoch: int, count: int) -> list[int]:
    return shuffled("order", seed, epoch, count, np.arange(count)).tolist()


def test_batches_are_cut_from_one_sequence_of_epochs() -> None:
    count, size, steps = 7, 5, 11
    sequence = [item for epoch in range(8) for item in epoch_order(3, epoch, count)]
    batches = [batch_items(3, step, size, count).tolist() for step in range(steps)]
    assert [item for batch in batches for item in batch] == sequence[: size * steps]


def test_every_item_comes_once_an_epoch_at_every_small_size() -> None:
    for count in range(1, 500):
        for epoch in (0, 1):
            assert sorted(epoch_order(5, epoch, count)) == list(range(count))


def test_no_two_places_of_a_large_epoch_hold_the_same_item() -> None:
    for count in (10**8 + 7, 2**40):
        places = np.concatenate([np.arange(200_000), count - 1 - np.arange(200_000)])
        items = shuffled("order", 1, 4, count, places)
        assert len(np.unique(items)) == len(items)
        assert 0 <= items.min() < count / 1000
        assert count - count / 1000 < items.max() < count


def test_items_are_spread_evenly_whatever_the_place() -> None:
    """Chi-squared of how often each item stands at each place, and follows each other one, over 3,000 epochs."""
    count, epochs = 13, 3000
    orders = np.array([epoch_order(0, epoch, count) for epoch in range(epochs)])
    places = np.array([np.bincount(column, minlength=count) for column in orders.T])
    steps = np.bincount(((orders[:, 1:] - orders[:, :-1]) % count).ravel(), minlength=count)[1:]
    for counts, freedom in ((places, (count - 1) ** 2), (steps, count - 2)):
        expected = counts.mean()
        excess = ((counts - expected) ** 2 / expected).sum() - freedom
        assert abs(excess) < 4 * np.sqrt(2 * freedom)


def test_a_large_epoch_is_unlike_its_places_and_costs_no_array_of_its_length() -> None:
    batch_items(0, 0, 8, 100)
    tracemalloc.start()
    items = np.concatenate([batch_items(0, step, 1024, 10**8) for step in range(90_000, 90_010)])
    probed = probe_items(0, 64, 10**8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    assert len(set(probed.tolist())) == 64
    assert abs(np.corrcoef(items[:-1], items[1:])[0, 1]) < 0.05


def test_a_batch_larger_than_the_data_repeats_whole_epochs() -> None:
    assert np.bincount(batch_items(0, 2, 12, 3)).tolist() == [4, 4, 4]


def test_order_depends_on_seed_epoch_and_position_alone() -> None:
    late_first = batch_items(1, 40, 16, 100).copy()
    for step in range(40):
        batch_items(1, step, 16, 100)
    assert (batch_items(1, 40, 16, 100) == late_first).all()
    assert epoch_order(1, 0, 100) != epoch_order(2, 0, 100)
    assert epoch_order(1, 0, 100) != epoch_order(1, 1, 100)


def test_probed_items_are_all_there_are_or_as_many_as_wanted_none_twice() -> None:
    assert sorted(probe_items(3, 64, 9).tolist()) == list(range(9))
    assert len(set(probe_items(3, 64, 1000).tolist())) == 64
    assert probe_items(3, 64, 1000).tolist() != probe_items(4, 64, 1000).tolist()


def test_order_is_the_same_on_every_machine() -> None:
    assert epoch_order(0, 0, 8) == GOLDEN_ORDER
    assert shuffled("order", 0, 1, 10**12, np.array([0, 5, 10**12 - 1])).tolist() == GOLDEN_ITEMS
    assert seed_of("noise", 0, 1) == GOLDEN_SEED


def test_draws_differ_by_purpose_seed_and_step() -> None:
    draws = {step_rng(*key).random() for key in (("a", 0, 0), ("b", 0, 0), ("a", 1, 0), ("a", 0, 1))}
    assert len(draws) == 4
    cpu = torch.device("cpu")
    again = [torch.rand(3, generator=step_generator("a", 0, 5, cpu)) for _ in range(2)]
    assert torch.equal(*again)


GOLDEN_ORDER = [4, 2, 5, 3, 7, 0, 6, 1]
GOLDEN_ITEMS = [18992246685, 752410393594, 582405403723]
GOLDEN_SEED = 5283253297535710177
