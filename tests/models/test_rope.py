"""What a rotation must do, whatever numbers it uses."""

import pytest
import torch

from deltacache.models.blocks import rotate, time_rotation


@pytest.mark.parametrize(("head_dim", "rotated"), [(64, 60), (16, 12), (12, 12), (6, 6)])
def test_time_rotates_the_largest_multiple_of_six(head_dim, rotated):
    states = torch.randn(1, 1, 2, head_dim, generator=torch.Generator().manual_seed(0))
    turned = rotate(states, time_rotation(torch.tensor([[0.3, 7.0]]), head_dim))
    assert torch.equal(turned[..., rotated:], states[..., rotated:])
    assert (turned[..., :rotated] != states[..., :rotated]).any()
    torch.testing.assert_close(turned.norm(dim=-1), states.norm(dim=-1))


def test_products_depend_on_the_time_between():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 64, generator=generator).unbind()

    def product(at: float, past: float) -> float:
        turned = [rotate(s, time_rotation(torch.tensor([[t]]), 64)) for s, t in ((query, at), (key, past))]
        return (turned[0] * turned[1]).sum().item()

    assert product(0.5, 0.25) == pytest.approx(product(2.5, 2.25), abs=1e-3)
    assert abs(product(0.5, 0.25) - product(0.5, 0.0)) > 0.1
    assert abs(product(0.5, 0.25) - product(0.25, 0.5)) > 0.1  # the past is not the future


def test_no_time_is_no_turn():
    states = torch.randn(1, 2, 3, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotate(states, time_rotation(torch.zeros(1, 3), 16)), states)
