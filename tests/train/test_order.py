import numpy as np
import torch

from deltacache.train.order import batch_items, epoch_order, seed_of, step_generator, step_rng


def test_batches_are_cut_from_one_sequence_of_epochs() -> None:
    count, size, steps = 7, 5, 11
    sequence = [item for epoch in range(8) for item in epoch_order(3, epoch, count)]
    batches = [batch_items(3, step, size, count).tolist() for step in range(steps)]
    assert [item for batch in batches for item in batch] == sequence[: size * steps]
    for epoch in range(8):
        assert sorted(epoch_order(3, epoch, count)) == list(range(count))


def test_a_batch_larger_than_the_data_repeats_whole_epochs() -> None:
    assert np.bincount(batch_items(0, 2, 12, 3)).tolist() == [4, 4, 4]


def test_order_depends_on_seed_epoch_and_position_alone() -> None:
    late_first = batch_items(1, 40, 16, 100).copy()
    epoch_order.cache_clear()
    for step in range(40):
        batch_items(1, step, 16, 100)
    assert (batch_items(1, 40, 16, 100) == late_first).all()
    assert (epoch_order(1, 0, 100) != epoch_order(2, 0, 100)).any()
    assert (epoch_order(1, 0, 100) != epoch_order(1, 1, 100)).any()


def test_order_is_the_same_on_every_machine() -> None:
    assert epoch_order(0, 0, 8).tolist() == GOLDEN_ORDER
    assert seed_of("noise", 0, 1) == GOLDEN_SEED


def test_draws_differ_by_purpose_seed_and_step() -> None:
    draws = {step_rng(*key).random() for key in (("a", 0, 0), ("b", 0, 0), ("a", 1, 0), ("a", 0, 1))}
    assert len(draws) == 4
    cpu = torch.device("cpu")
    again = [torch.rand(3, generator=step_generator("a", 0, 5, cpu)) for _ in range(2)]
    assert torch.equal(*again)


GOLDEN_ORDER = [3, 5, 1, 2, 4, 7, 0, 6]
GOLDEN_SEED = 5283253297535710177
